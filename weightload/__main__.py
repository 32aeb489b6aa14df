"""``python -m weightload``."""

import sys

from weightload.cli import main

sys.exit(main())
