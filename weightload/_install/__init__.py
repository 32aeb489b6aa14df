"""Puts weightload in the place of safetensors in a framework's modules, and takes it back."""
