"""Run every command on a counted corpus of hostile inputs, and count executions, hangs, tracebacks and excess.

    python -m benchmarks.hostile [--kinds pickle ...] [--each N] [--seed S] [--json OUT.json] [--hangs S] [--verbose]

Each command runs in a process of its own, forked from one that has imported what all of them import, in the case's
folder, offline and without standard input. Seconds are processor time of the command; MB are its private memory
(RssAnon), the imported libraries included. `tests/test_hostile.py` runs a sample.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.hostile import CANARY, Case, cases

SECONDS, MEGABYTES = 10.0, 500.0  # the most that a file of up to 1 MB may take
HANGS = 60.0  # seconds of the clock after which a command is ended
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Outcome:
    """What one command did.

    Attributes:
        exit: its code; None where it was ended.
        seconds: processor time.
        mb: most private memory.
        faults: what it should not have done: "executed", "hang", "traceback", "killed", "exit", "control", "password".
        said: the end of its output.
    """

    case: str
    command: str
    exit: int | None
    seconds: float
    mb: float
    faults: list[str] = field(default_factory=list)
    said: str = ""


def warm(base: Path) -> None:
    """Import what the commands import, so that a forked one starts at once; two look at the sound model."""
    import jinja2  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from tensorkeep.cli import main

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for command in ("diagnose", "inspect"):
            main([command, str(base)])
    gc.collect()
    gc.freeze()  # nothing that is here is looked at, and so copied, in a forked process


def run_case(case: Case, folder: Path, base: Path, hangs: float = HANGS) -> Iterator[Outcome]:
    """Write a case into an empty folder and run its commands there."""
    commands = case.make(folder, base)
    for command in commands:
        words = [w for part in command for w in (part.split() if part.startswith("generate --") else [part])]
        yield _run(f"{case.kind}: {case.name}", words, folder, hangs)


def _run(case: str, words: list[str], folder: Path, hangs: float) -> Outcome:
    """Run one command in a forked process and look at what it left."""
    before = set(_canaries(folder))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(words, folder, write)
    os.close(write)
    output: list[bytes] = []
    reader = threading.Thread(target=lambda: output.extend(iter(lambda: os.read(read, 1 << 16), b"")))
    reader.start()
    peak, started, status = 0.0, time.monotonic(), None
    while status is None:
        peak = max(peak, _private(child))
        done, code, usage = os.wait4(child, os.WNOHANG)
        if done:
            status = code
        elif time.monotonic() - started > hangs or peak > 8 * MEGABYTES:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
        else:
            time.sleep(0.01)
    reader.join()
    os.close(read)
    text = b"".join(output).decode("utf-8", "surrogateescape")
    ended = os.WIFSIGNALED(status)
    outcome = Outcome(
        case, " ".join(words), None if ended else os.WEXITSTATUS(status), usage.ru_utime + usage.ru_stime, peak
    )
    outcome.said = text[-300:]
    checks = {
        "executed": set(_canaries(folder)) != before,
        "hang": ended and peak <= 8 * MEGABYTES,
        "killed": ended and peak > 8 * MEGABYTES,
        "traceback": "Traceback (most recent call last)" in text,
        "exit": not ended and outcome.exit not in (0, 1, 2, 3),
        "seconds": outcome.seconds > SECONDS,
        "memory": peak > MEGABYTES,
        "control": bool(_CONTROL.search(text)),
        "password": "hunter2" in text,
    }
    outcome.faults = [name for name, found in checks.items() if found]
    return outcome


def _canaries(folder: Path) -> Iterator[Path]:
    return folder.rglob(CANARY)


def _private(process: int) -> float:
    """Private memory of a process in MB."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/status") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
    return 0.0


def _child(words: list[str], folder: Path, write: int) -> None:
    """Run a command as the console script would, and never return."""
    from tensorkeep.cli import main

    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(write, 1)
    os.dup2(write, 2)
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(
            io.FileIO(1 if name == "stdout" else 2, "w"), "utf-8", "backslashreplace", write_through=True
        )
        setattr(sys, name, stream)
    code = 70
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what escapes is what is looked for
        traceback.print_exc()
    finally:
        os._exit(code)


def run(chosen: Iterable[Case], base: Path, verbose: bool = False, hangs: float = HANGS) -> list[Outcome]:
    """Run cases one after another."""
    found = []
    for case in chosen:
        folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        try:
            for outcome in run_case(case, folder, base, hangs):
                found.append(outcome)
                if verbose or outcome.faults:
                    told = f"exit {outcome.exit} | {outcome.seconds:.1f} s {outcome.mb:.0f} MB"
                    said = f"{' '.join(outcome.faults)} | {outcome.said[-160:]!r}"
                    print(f"{outcome.case} | {outcome.command} | {told} | {said}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return found


def sample(every: list[Case], each: int | None) -> list[Case]:
    """Take so many cases of each kind, as far apart as they stand; all of them without a number."""
    kinds: dict[str, list[Case]] = defaultdict(list)
    for case in every:
        kinds[case.kind].append(case)
    return [c for of in kinds.values() for c in of[:: -(-len(of) // each) if each else 1]]


def table(found: list[Outcome]) -> str:
    """Count by kind, in Markdown."""
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in found:
        kinds[outcome.case.partition(":")[0]].append(outcome)
    rows = ["| kind | cases | commands | executed | hangs | tracebacks | over the limits | most seconds | most MB |"]
    rows.append("|---|" + "---:|" * 8)
    for kind, of in [*kinds.items(), ("all", found)]:
        count = Counter(f for o in of for f in o.faults)
        over = count["seconds"] + count["memory"] + count["killed"]
        numbers = [len({o.case for o in of}), len(of), count["executed"], count["hang"], count["traceback"], over]
        figures = [f"{max(o.seconds for o in of):.1f}", f"{max(o.mb for o in of):.0f}"]
        rows.append(f"| {kind} | " + " | ".join([*map(str, numbers), *figures]) + " |")
    return "\n".join(rows)


def make_base(folder: Path) -> Path:
    """A small sound model with tokenizer."""
    from tests.language_files import save_model

    return save_model(folder / "base", "llama")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--each", type=int, help="take so many cases of each kind, not all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hangs", type=float, default=HANGS, help="seconds of the clock that end a command")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch))
        warm(base)
        chosen = sample([c for c in cases(given.seed) if not given.kinds or c.kind in given.kinds], given.each)
        found = run(chosen, base, given.verbose, given.hangs)
    print(table(found))
    other = Counter(f for o in found for f in o.faults if f in ("control", "password", "exit"))
    print(
        f"control codes printed: {other['control']}, passwords: {other['password']}, undefined exits: {other['exit']}"
    )
    if given.json:
        given.json.write_text(json.dumps([asdict(o) for o in found], indent=1))
    return 1 if any(o.faults for o in found) else 0


if __name__ == "__main__":
    sys.exit(main())
