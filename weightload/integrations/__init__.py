"""weightload in frameworks: one module each; README.md has versions, and how to switch it on and off."""

from weightload._install.installing import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
