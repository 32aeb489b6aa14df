"""Shared by benchmarks: the machine and its state, ranks, rounds in turns, and a line for the person who waits."""
