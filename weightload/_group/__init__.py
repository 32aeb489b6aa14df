"""The ranks that load together, and what they must agree on."""
