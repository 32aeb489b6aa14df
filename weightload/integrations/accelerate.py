"""accelerate: ``load_checkpoint_in_model``, weights that were offloaded to disk, and ``load_state``."""

from weightload._install.framework import Framework

FRAMEWORK = Framework(
    package="accelerate",
    sites=(
        ("accelerate.utils.modeling", "safe_open"),
        ("accelerate.utils.modeling", "safe_load_file"),
        ("accelerate.utils.offload", "safe_open"),
    ),
)
