"""Save a few checkpoints (`power_child.py RUN LOG`); LOG lists those acknowledged and those named the best."""

import os
import sys
from pathlib import Path

from tensorkeep.storage import durable
from tensorkeep.training.saver import Keep, Saver, mark_best
from tests.run_states import state

STEPS = (1, 2, 2, 3)  # one step is saved again, as after a resume that passed over a damaged one
SIZE = 48  # a tensor of 9 KB: its file goes by direct I/O here, the small ones through the page cache

if __name__ == "__main__":
    durable.SMALL = 16 << 10
    told = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
    saver = Saver(Path(sys.argv[1]), Keep(2), background=True)
    for step in STEPS:
        saver.background = step == 2
        saver.save(state(step, size=SIZE))
        if saver.background:
            saver.wait()
        os.write(told, f"step {step}\n".encode())
        if step == 2:
            mark_best(Path(sys.argv[1]), step)
            os.write(told, f"best {step}\n".encode())
    saver.close()
