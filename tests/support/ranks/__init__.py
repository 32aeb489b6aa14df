"""Several real processes at once, which load together."""
