"""The command line: ``weightload inspect``, ``verify``, ``load``, ``settings``."""
