"""sentence-transformers: its own modules' files; what it loads by transformers is served by installing that, too."""

from weightload._install.framework import Framework

FRAMEWORK = Framework(
    package="sentence_transformers",
    sites=(
        ("sentence_transformers.base.modules.module", "load_safetensors_file"),
        ("sentence_transformers.base.modules.module", "load_safetensors_model"),
    ),
)
