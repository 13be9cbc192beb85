"""The command `watch`: follow a run from another terminal, or on another machine's folder; nothing is written there."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from tensorkeep.commands.shared import Flag, Say
from tensorkeep.commands.watch._looking import ENDED, Look, Looking
from tensorkeep.commands.watch._telling import document, lines, parts
from tensorkeep.output import Output

EVERY = 0.5  # seconds between two looks


def watch(run: Path, /, *, once: Flag = False, say: Say = Say()) -> int:
    """Follow a run from another terminal until it ends: loss, time left, memory, checkpoints, whether it lives.

    Reads the run's files alone, so the folder may be another machine's. Exit code 0 when the run is done or was
    interrupted by its user, 1 when it failed or is dead, 2 where no run is, 3 where its state cannot be told from here.

    Args:
        run: A run's folder, as `tensorkeep train --out RUN` made it.
        once: Say how it stands now, and leave; 0 also while it goes on.
    """
    printer = say.output()
    looking = Looking(run)
    found = looking.look() if once else _followed(looking, printer)
    if printer.json:
        printer.document(document(found))
    for line in lines(found):
        printer.line(line)
    return ENDED.get(found.state, 0)


def _followed(looking: Looking, printer: Output) -> Look:
    """Show how a run stands until it ends; the last look."""
    with printer.page() as draw:
        status = None if draw else printer.status()
        while True:
            found = looking.look()
            if draw:
                draw(partial(lines, found))
            elif status and found.losses and found.fresh and found.state not in ENDED:
                status.show("  ".join(parts(found)), found.step or 0, found.updates or found.step or 0)
            if found.state in ENDED and found.state != "silent":
                return found
            time.sleep(EVERY)
