"""The loaders that are compared, how each is called, and the process that one runs in."""
