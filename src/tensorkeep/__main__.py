"""Let `python -m tensorkeep` run a command."""

import sys

from tensorkeep.cli import main

sys.exit(main())
