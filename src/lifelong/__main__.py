"""``python -m lifelong``."""

import sys

from .cli import main

sys.exit(main())
