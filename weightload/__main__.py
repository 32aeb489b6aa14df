"""``python -m weightload``."""

import sys

from weightload.cli.main import main

sys.exit(main())
