"""Loads into tensors and modules that exist: what goes where, what modules have a say in, ranks of a mesh."""
