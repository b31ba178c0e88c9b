"""``python -m services.cli``: the command line without its installed script."""

import sys

from services.cli import main

sys.exit(main())
