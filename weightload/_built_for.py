"""The check that the running torch is the one the extension was compiled against.

torch promises no binary compatibility between releases: with another torch the extension may fail to load with
an undefined symbol, or load and corrupt memory. The version is compared before the extension is touched.
"""

import torch


def check() -> None:
    """Raise ImportError, in one sentence, unless the running torch is the one of the build."""
    try:
        from weightload._build_info import TORCH_VERSION
    except ModuleNotFoundError:
        raise ImportError(
            "weightload's extension has not been built here; run `pip install .` (or, to develop, "
            "`pip install --no-build-isolation -e .`) in its source directory."
        ) from None
    if torch.__version__ != TORCH_VERSION:
        raise ImportError(
            f"weightload was built for torch {TORCH_VERSION} but torch {torch.__version__} is running; "
            "rebuild it with `pip install --force-reinstall --no-deps --no-cache-dir weightload`."
        )
