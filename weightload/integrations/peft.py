"""PEFT: adapters are whole files."""

from weightload._install.framework import Framework

FRAMEWORK = Framework(package="peft", sites=(("peft.utils.save_and_load", "safe_load_file"),))
