"""Files as safetensors has them: handles, dicts, prefetching."""
