"""A model of loads on many nodes, and a check of it on this machine."""
