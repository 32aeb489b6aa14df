"""In every process of an engine, those included that it starts by itself."""

import torchvision_operators  # noqa: F401
