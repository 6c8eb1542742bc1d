"""``python -m feedforward``: the command line."""

import sys

from feedforward.cli import main

sys.exit(main())
