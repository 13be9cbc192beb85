import sys

from tensorkeep.cli import main

sys.exit(main())
