"""`python -m tests.parity.qlora DIR`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.parity import qlora
from tests.parity.outcome import be_quiet, report

parser = argparse.ArgumentParser(description=qlora.__doc__)
parser.add_argument("folder", type=Path)
be_quiet()
with tempfile.TemporaryDirectory() as work:
    sys.exit(report(qlora.cases(parser.parse_args().folder, Path(work))))
