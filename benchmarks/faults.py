"""Count how many faults `diagnose` names: every kind on every model and seed; and false alarms on sound checkpoints.

    python -m benchmarks.faults [--models llama_tied ...] [--kinds rope_q_only ...] [--seeds 2]
                                [--overlay fine_tuned] [--fine-tuned] [--json OUT.json] [--misses MISSES.txt]

Prints a table kinds x named right / named wrong / missed, then the false alarms on sound checkpoints. `smol` (cut from
a real model of 135 M parameters) is slower than the others and takes part only when it is named, and so do mistral,
qwen2 and granite, which no check was written beside. `--fine-tuned` and `--overlay fine_tuned` train copies with AdamW:
32 trainings a model, one to four minutes, which the two and the seeds' faults share.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fault_kinds.change import KINDS
from tests.fault_kinds.writing import write
from tests.faults import judge, make, reference
from tests.fine_tuned import WAYS, fine_tuned_copy
from tests.overlays import OVERLAYS
from tests.sound import Sound, every, golden
from tests.specimens import available

from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding

# what a bug in a check may raise
CRASHES = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError)
CRASHES = (*CRASHES, TypeError, ValueError)
GOLDEN = Path(__file__).parents[2] / "shared/fixtures/conversion/open"


@dataclass(frozen=True)
class Outcome:
    """One checkpoint and what was said of it. `outcome`: named, wrong or missed; ok or alarm for a sound one."""

    kind: str
    model: str
    seed: int
    outcome: str
    why: str
    command: str
    seconds: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[n for n in available() if n != "smol"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--overlay", choices=OVERLAYS, help="the faults befall another copy of the model than the reference"
    )
    parser.add_argument("--no-sound", action="store_true")
    parser.add_argument("--fine-tuned", action="store_true", help="sound ones: 96 copies of each that AdamW trained")
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--misses", type=Path, help="a line for each fault that was not named, with the command to see it again"
    )
    args = parser.parse_args(argv)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    sick: list[Outcome] = []
    sound: list[Outcome] = []
    with tempfile.TemporaryDirectory() as work:
        if not args.no_faults:
            sick = list(shown(faults(args.kinds, args.models, seeds, Path(work), args.overlay)))
        if not args.no_sound:
            made = trained if args.fine_tuned else sounds
            sound = list(shown(made(args.models, seeds, Path(work))))
    print("\n".join(table(sick) + alarms(sound)))
    if args.json:
        args.json.write_text(
            json.dumps({"faults": [asdict(r) for r in sick], "sound": [asdict(r) for r in sound]}, indent=1) + "\n"
        )
    if args.misses:
        args.misses.write_text(
            "".join(
                f"{r.outcome}: {r.kind} {r.model} {r.seed}: {r.why}\n    {r.command}\n"
                for r in [*sick, *sound]
                if r.outcome not in ("named", "ok")
            )
        )
    return 1 if any(r.outcome not in ("named", "ok") for r in [*sick, *sound]) else 0


def shown(rows: Iterable[Outcome]) -> Iterator[Outcome]:
    """Pass outcomes on, and say on stderr how far it is."""
    for count, row in enumerate(rows, 1):
        if count % 50 == 0:
            print(f"{count} checkpoints, now {row.kind} {row.model}", file=sys.stderr, flush=True)
        yield row


def faults(
    kinds: Iterable[str], models: list[str], seeds: Iterable[int], work: Path, overlay: str | None
) -> Iterator[Outcome]:
    for kind in kinds:
        for model in models:
            for seed in seeds:
                fault = make(kind, model, seed, work, overlay)
                if fault is None:
                    break
                started = time.perf_counter()
                document = document_of(fault.path, fault.reference, fault.target)
                outcome, why = judge(fault, document)
                more = f" --overlay {overlay}" if overlay else ""
                command = f"python -m tests.faults {kind} {model} {seed} /tmp/faults{more}   # {fault.note}"
                yield Outcome(kind, model, seed, outcome, why, command, time.perf_counter() - started)
                shutil.rmtree(work / f"{kind}-{model}-{seed}", ignore_errors=True)
                shutil.rmtree(work / f"{kind}-{model}-{seed}-titan", ignore_errors=True)


def sounds(models: list[str], seeds: Iterable[int], work: Path) -> Iterator[Outcome]:
    for model in models:
        for seed in seeds:
            yield from (judged(s, seed) for s in every(model, work, seed))
    yield from (judged(s, 0) for s in golden(GOLDEN))


def trained(models: list[str], seeds: Iterable[int], work: Path) -> Iterator[Outcome]:
    """Diagnose copies trained in every way: dtype, part of the model, rate, number of steps."""
    for model in models:
        for seed in seeds:
            for number, way in enumerate(WAYS):
                copy = fine_tuned_copy(model, way, seed)
                path = write("hf", copy.tensors, work / f"trained-{model}-{seed}-{number}", copy.config)
                yield judged(Sound(str(way), model, path, reference(model, work)), seed)
                shutil.rmtree(path)


def judged(sound: Sound, seed: int) -> Outcome:
    started = time.perf_counter()
    document = document_of(sound.path, sound.reference, sound.target)
    errors = [f"{f['code']} {f['message']}" for f in document["findings"] if f["severity"] == "error"]
    options = (f" --reference {sound.reference}" if sound.reference else "") + (
        f" --for {sound.target}" if sound.target else ""
    )
    command = (
        f"python -m tests.sound {sound.variant} {sound.model} {seed} /tmp/sound   # diagnose {sound.path}{options}"
    )
    return Outcome(
        sound.variant,
        sound.model,
        seed,
        "alarm" if errors else "ok",
        "; ".join(errors),
        command,
        time.perf_counter() - started,
    )


def document_of(path: Path, reference: Path | None, target: Any) -> dict[str, Any]:
    """Return what `diagnose --json` says; an error that ends the command becomes a finding of its code."""
    try:
        return diagnose(str(path), str(reference) if reference else None, target).to_json()
    except TensorkeepError as error:
        return stopped("stopped", error.code or "error", error.line)
    except CRASHES as error:
        return stopped("crash", "crash", f"{type(error).__name__}: {error}")


def stopped(cause: str, code: str, message: str) -> dict[str, Any]:
    """Return a document with one finding for a diagnosis that ended early."""
    said = Finding(code, "error", message).to_json()
    return {"verdict": "findings", "causes": [cause], "findings": [said]}


# -- tables ---------------------------------------------------------------------------------------------------------


def table(rows: list[Outcome]) -> list[str]:
    """Return the lines of the table: outcomes by kind of fault, their sums, and what went wrong."""
    if not rows:
        return []
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row.kind][row.outcome] += 1
    width = max(len(k) for k in counts)
    lines = [f"{'kind':<{width}}  {'codes':<12} named  wrong  missed"]
    for kind, count in counts.items():
        lines.append(
            f"{kind:<{width}}  {'/'.join(KINDS[kind].codes):<12} {count['named']:>5}  {count['wrong'] or '-':>5}  "
            f"{count['missed'] or '-':>6}"
        )
    whole = Counter(r.outcome for r in rows)
    lines.append(
        f"{len(counts)} kinds, {len(rows)} faults: {whole['named']} named right ({whole['named'] / len(rows):.1%}), "
        f"{whole['wrong']} wrong, {whole['missed']} missed"
    )
    return lines + [f"  {r.outcome}: {r.kind} {r.model} seed {r.seed}: {r.why}" for r in rows if r.outcome != "named"]


def alarms(rows: list[Outcome]) -> list[str]:
    if not rows:
        return []
    false = [r for r in rows if r.outcome == "alarm"]
    kinds = len({r.kind for r in rows})
    return [
        f"sound: {len(rows)} checkpoints of {kinds} variants, {len(false)} false alarms",
        *(f"  alarm: {r.kind} {r.model} seed {r.seed}: {r.why}" for r in false),
    ]


if __name__ == "__main__":
    sys.exit(main())
