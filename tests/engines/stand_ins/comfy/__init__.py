"""In ComfyUI's place, which is no package."""
