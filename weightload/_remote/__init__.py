"""Weights that servers have: object stores and HTTP, read by ranges through the ``obstore`` library."""
