"""Loads: the iterators to the CPU and to accelerators, what they count and say, single tensors, new names."""
