"""From what the user names to open files, and which of their tensors are wanted."""
