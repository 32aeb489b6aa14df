"""Measurements on a machine with one GPU; check.sh runs all of them."""
