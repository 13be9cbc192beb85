"""Damage checkpoints by bit flips, power cuts and failing disks, and resume: ours beside other tools.

    python -m benchmarks.crash flips --count 1000 --peers 200
    python -m benchmarks.crash cuts --count 30 --peers 12         # root, on a loop-mounted ext4
    python -m benchmarks.crash errors                             # ours; the part on a full disk needs root

flips: one random bit in a random byte of a random file of the newest checkpoint, then a resume by the tool's own rule.
`detected`: it raised (ours: passed over and told); `named`: the tensor (in headers and JSON: the file) was named; `the
one before`: the checkpoint before it was used; `harmless`: everything loaded was right; `silent`: it was not, without a
word.
cuts: a process saves as fast as it can and tells of each finished save through a pipe; after 0.5 to 4 s the file system
is shut down without flushing its journal, mounted again, and resumed from. `ok`: what was acknowledged, or newer, bit
for bit; `torn pick`: the tool's rule picks one that raises; `gone`: it finds none; `acked lost`: one older than
acknowledged; `silent`: what it loaded was not what was saved.
errors: ENOSPC, EDQUOT and EIO at every call of one save, and a disk with room for only a part of it (the check for room
beforehand taken away). `said so`: the save raised and the checkpoint before it is right; `saved all the same`: it did
not raise and the new one is right (a file of an older one could not be deleted); `goes on`: the next save works.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.run_states import Faults, injected

from benchmarks import crash_peers, ext4
from benchmarks.crash_writers import Writer, same, state, value, whole
from benchmarks.measure import versions
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable, run_folder, run_manifest
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.saver import Keep

Row = dict[str, Any]


# -- children ---------------------------------------------------------------------------------------------------------


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Start `work(pipe)` in a child that is silent; its pid and the other end of the pipe."""
    get, put = os.pipe()
    pid = os.fork()
    if pid:
        os.close(put)
        return pid, get
    status = 1
    try:
        os.close(get)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        work(put)
        status = 0
    except TensorkeepError:
        status = 2
    finally:
        os._exit(status)


def asked(question: Callable[[], Row], seconds: float = 60) -> Row:
    """Do some work in a child and return its answer: what it loads may hang, exhaust memory or kill the process."""

    def answer(pipe: int) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        try:
            out = question()
        except BaseException as error:  # noqa: BLE001  DCP raises a BaseException; all of them are answers here
            out = {"error": f"{type(error).__name__}: {error}"[:200]}
        os.write(pipe, json.dumps(out).encode())

    pid, pipe = forked(answer)
    ready = select.select([pipe], [], [], seconds)[0]
    text = os.read(pipe, 1 << 16) if ready else b""
    if not ready:
        os.kill(pid, signal.SIGKILL)
    os.close(pipe)
    os.waitpid(pid, 0)
    return json.loads(text) if text else {"error": "hangs" if not ready else "the process dies"}


def resumed(writer: Writer, place: Path) -> Row:
    """Resume: step, whether every tensor is right, the digest of the rest, what was passed over."""
    if writer.name == "tensorkeep":
        found = checkpoint.newest(place)
        skipped = [] if found is None else [{"message": f.message, "tensors": list(f.tensors)} for f in found[2]]
    got = writer.resume(place)
    out: Row = {"step": None} if got is None else {"step": got.step, "whole": whole(got), "rest": got.rest}
    return {**out, "skipped": skipped} if writer.name == "tensorkeep" else out


# -- flips ------------------------------------------------------------------------------------------------------------


def flips(writer: Writer, count: int, place: Path, chance: random.Random) -> Row:
    pid, pipe = forked(lambda _: writer.save(place, 3, lambda step: None))
    os.close(pipe)
    assert os.waitpid(pid, 0)[1] == 0, f"{writer.name} cannot save here"
    sound = asked(lambda: resumed(writer, place))
    assert sound.get("whole") and sound["step"] == 3, f"{writer.name}: {sound}"
    tally: Counter[str] = Counter()
    by_file: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    for _ in range(count):
        file = chance.choice([f for f in writer.files(place) if f.stat().st_size])
        at, bit = chance.randrange(file.stat().st_size), 1 << chance.randrange(8)
        owner = owner_of(file, at) if writer.name == "tensorkeep" else None
        flip(file, at, bit)
        got = asked(lambda: resumed(writer, place))
        flip(file, at, bit)
        seen = judged(got, sound, file, owner)
        tally.update(seen)
        by_file.setdefault(file.name, Counter()).update(seen[:1])
        if writer.name == "tensorkeep" and seen != ["detected", "named", "the one before"]:
            wrong.append(f"{file.name} byte {at} bit {bit}: {got}")
    assert asked(lambda: resumed(writer, place)) == sound
    keys = ("detected", "named", "the one before", "harmless", "silent")
    return {"writer": writer.name, "flips": count, **{k: tally[k] for k in keys}, "files": by_file, "notes": wrong[:5]}


def judged(got: Row, sound: Row, file: Path, owner: str | None) -> list[str]:
    if got.get("skipped"):
        (first, *more) = got["skipped"]
        named = first["tensors"] == [owner] if owner else file.name in first["message"]
        before = got.get("step") == 2 and got["whole"] and not more
        return ["detected", *(["named"] if named else []), *(["the one before"] if before else [])]
    if "error" in got:
        return ["detected"]
    return ["harmless" if got == sound else "silent"]


def owner_of(file: Path, at: int) -> str | None:
    """The tensor that a byte belongs to; None for headers, padding and other files."""
    tensors = run_manifest.read_manifest(file.parent).tensors.get(file.name, {})
    return next((n for n, t in tensors.items() if t.start <= at < t.start + t.nbytes), None)


def flip(file: Path, at: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ bit]))


# -- cuts -------------------------------------------------------------------------------------------------------------


def cuts(writer: Writer, count: int, place: Path, chance: random.Random) -> Row:
    tally: Counter[str] = Counter()
    lost, notes, saves = [], [], 0
    with ext4.disk(place) as disk:
        for _ in range(count):
            acknowledged, status = cut_once(writer, disk, chance.uniform(0.5, 4))
            got = asked(lambda: resumed(writer, disk.top / "run"))
            outcome = outcome_of(got, acknowledged)
            tally[outcome] += 1
            tally["said so"] += writer.name == "tensorkeep" and status == 2
            saves += acknowledged
            if outcome == "acked lost":
                lost.append(acknowledged - got["step"])
            if outcome != "ok" and len(notes) < 6:
                notes.append(f"{acknowledged} acknowledged: {got}")
        repaired = disk.repaired
    keys = ("ok", "torn pick", "gone", "acked lost", "silent", "said so")
    row = {"writer": writer.name, "cuts": count, **{k: tally[k] for k in keys}, "saves": saves, "fsck": repaired}
    return {**row, "steps lost": lost, "notes": notes}


def cut_once(writer: Writer, disk: ext4.Disk, seconds: float) -> tuple[int, int]:
    """Save into `disk.top/run` until the power goes, `seconds` after the first save.

    Returns the newest step acknowledged, and how the process ended (2: with our error).
    """
    disk.fresh()
    run = disk.top / "run"
    run.mkdir()
    (disk.top / "tmp").mkdir()

    def work(pipe: int) -> None:
        tempfile.tempdir = str(disk.top / "tmp")  # pytorch-lightning moves from there
        writer.save(run, 1_000_000, lambda step: os.write(pipe, step.to_bytes(4, "little")) and None)

    pid, pipe = forked(work)
    try:
        told = os.read(pipe, 4) if select.select([pipe], [], [], 120)[0] else b""
        assert told, f"{writer.name} saved nothing"
        time.sleep(seconds)
        disk.cut()
        status = ended(pid, 15)
        while data := os.read(pipe, 1 << 16):
            told += data
    finally:
        os.close(pipe)
    disk.back()
    return int.from_bytes(told[-4:], "little"), status


def ended(pid: int, seconds: float) -> int:
    """The exit status of a child; it is killed where it does not end by itself."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome_of(got: Row, acknowledged: int) -> str:
    if "error" in got:
        return "torn pick"
    if got["step"] is None:
        return "gone"
    if not got["whole"]:
        return "silent"
    return "ok" if got["step"] >= acknowledged else "acked lost"


# -- errors -----------------------------------------------------------------------------------------------------------


def errors(place: Path, small: int, number: int) -> Row:
    """The error `number` at every call of one save. `small`: from which size on files are written with direct I/O."""
    durable.SMALL, keep = small, Keep(1)
    checkpoint.save(place / "first", state(1), keep)
    with injected(Faults()) as counted:
        checkpoint.save(shutil.copytree(place / "first", place / "counted"), state(2), keep)
    tally: Counter[str] = Counter({"calls": len(counted.calls), "lost or torn": 0, "odd error": 0})
    for at in range(1, len(counted.calls) + 1):
        run = shutil.copytree(place / "first", place / "run")
        with injected(Faults(at, lambda: fail(number))):
            told = tried(run, 2, keep)
        tally.update(aftermath(run, told))
        tally["goes on"] += tried(run, 3, keep) == "saved" and left(run) == (3, True)
        tally["remains"] += bool(run_folder.remains(run))
        shutil.rmtree(run)
    return {"writer": "tensorkeep", "error": errno.errorcode[number], "where": f"direct from {small} bytes", **tally}


def full_disk(place: Path, levels: int) -> Row:
    """A file system with room for 0 to all bytes of a save, the check for room beforehand taken away."""
    tally: Counter[str] = Counter({"calls": levels + 1, "lost or torn": 0, "odd error": 0})
    keep, check = Keep(1), run_folder.room_for
    with ext4.disk(place, 64) as disk:
        for level in range(levels + 1):
            disk.fresh()
            run = disk.top / "run"
            checkpoint.save(run, state(1), keep)
            needed = sum(f.stat().st_size for f in (run / "checkpoints/step-000001").iterdir()) + (64 << 10)
            filler = disk.top / "filler"
            fill_up(filler, needed * level // levels)
            tally["refused by the check"] += tried(run, 2, keep) == "disk" and left(run) == (1, True)
            run_folder.room_for = lambda run, needed: None
            try:
                tally.update(aftermath(run, tried(run, 2, keep)))
            finally:
                run_folder.room_for = check
            filler.unlink()
            tally["goes on"] += tried(run, 3, keep) == "saved" and left(run) == (3, True)
            tally["remains"] += bool(run_folder.remains(run))
    return {"writer": "tensorkeep", "error": "ENOSPC", "where": "full ext4", **tally}


def fill_up(filler: Path, spared: int) -> None:
    """Fill the disk but for `spared` bytes, by writing: the count of free ones leaves out what ext4 keeps back."""
    with filler.open("wb") as file:
        size = 0
        for step in (1 << 20, 1 << 12):
            try:
                while True:
                    os.posix_fallocate(file.fileno(), size, step)
                    size += step
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        os.ftruncate(file.fileno(), max(size - spared, 0))
        os.fsync(file.fileno())  # freed blocks can be taken after a commit of the journal


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def tried(run: Path, step: int, keep: Keep) -> str:
    """`saved`, `disk` where it was told that the disk is full or fails, else what was raised."""
    try:
        checkpoint.save(run, state(step), keep)
    except TensorkeepError as error:
        return "disk" if "disk" in error.what or "quota" in error.what else f"{error}"
    return "saved"


def left(run: Path) -> tuple[int, bool]:
    """Find the step of the newest checkpoint, and whether it is right and nothing had to be passed over."""
    found = checkpoint.newest(run)
    assert found is not None
    step = int(found[0].document["step"])
    wanted = state(step)
    right = all(same(t, value(n, step)) for n, t in (found[0].model | found[0].optimizer).items())
    return step, right and found[0].document == wanted.document and not found[2]


def aftermath(run: Path, told: str) -> list[str]:
    step, right = left(run)
    seen = {"saved": "saved all the same", "disk": "said so"}.get(told, "odd error")
    lost = not right or step not in (1, 2) or (told == "saved" and step != 2)
    return [seen, *(["lost or torn"] if lost else [])]


# -- the command ------------------------------------------------------------------------------------------------------


def all_errors(place: Path, levels: int) -> list[Row]:
    rows = []
    for small in (durable.SMALL, 4096):
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            with tempfile.TemporaryDirectory(dir=place) as folder:
                rows.append(errors(Path(folder), small, number))
    if (why := ext4.missing()) is not None:
        print(f"full disk: not tried, {why}")
    else:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            rows.append(full_disk(Path(folder), levels))
    return rows


def table(rows: list[Row]) -> None:
    columns = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in ("notes", "files")]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(c, 0)) for c in columns) + " |")
    for row in rows:
        for note in row.get("notes", []):
            print(f"{row['writer']}: {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=["flips", "cuts", "errors"])
    parser.add_argument("--count", type=int, help="trials of ours; levels of a full disk")
    parser.add_argument("--peers", type=int, default=0, help="trials of each peer")
    parser.add_argument("--only", default="", help="writers whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where checkpoints and disk images lie")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    libraries = versions("torch", "transformers", "accelerate", "pytorch-lightning", "safetensors")
    head = f"{datetime.date.today()}, {libraries}, Linux {platform.release()}"
    if options.campaign == "cuts" and (why := ext4.missing()) is not None:
        sys.exit(f"cuts are not possible here: {why}")
    rows = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        if options.campaign == "errors":
            rows = all_errors(Path(folder), options.count or 24)
        for number, writer in enumerate(crash_peers.writers() if options.campaign != "errors" else []):
            ours = writer.name == "tensorkeep"
            count = (options.count or {"flips": 1000, "cuts": 30}[options.campaign]) if ours else options.peers
            if options.only in writer.name and count:
                crash_peers.prepare(writer)
                place = Path(folder) / f"{number}"
                place.mkdir()
                campaign = {"flips": flips, "cuts": cuts}[options.campaign]
                rows.append(campaign(writer, count, place, random.Random(options.seed)))
                print(f"{writer.name}: done", file=sys.stderr)
    print(f"{options.campaign}: {head}\n")
    table(rows)
    if options.out:
        options.out.write_text(json.dumps({"what": options.campaign, "where": head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
