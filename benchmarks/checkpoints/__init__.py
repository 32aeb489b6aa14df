"""Synthetic checkpoints of real models' shapes, and what a load must give."""
