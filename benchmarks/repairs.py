"""Count what `repair` does to trained values: every kind of fault on copies that AdamW trained.

    python -m benchmarks.repairs [--models llama_tied ...] [--kinds rope_q_only ...] [--seeds 2] [--first-seed 0]
                                 [--untrained] [--json OUT.json]

Each broken copy is repaired twice: as it is, and with everything allowed (`--take-from-reference '*' --yes`). A result
is right where each tensor is the trained one before the fault, bit for bit or within the rounding of an inverse; with
everything allowed, but for the tensors that repair named as taken or lost. A refusal writes nothing. The last line says
how often a trained value was lost without a word.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fault_kinds.change import KINDS
from tests.fault_kinds.names import EMBEDDING, HEAD
from tests.fault_kinds.writing import write
from tests.faults import Fault, make
from tests.specimens import available

from tensorkeep.diagnosis.comparison import Difference, compare
from tensorkeep.diagnosis.repairs import Repaired, repair
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import exactly, matches
from tensorkeep.formats.view import read

# twice the distance of a dtype's numbers: an inverse rounds once, and undoes one rounding
ROUNDING = {"F32": 2.0**-22, "F16": 2.0**-9, "BF16": 2.0**-6}
OUTCOMES = ("kept", "rounded", "announced", "refused", "LOST")


@dataclass(frozen=True)
class Repair:
    """One repair. `outcome`: kept, rounded, announced (but for what was named), refused, or LOST; `why` in words."""

    kind: str
    model: str
    seed: int
    allowed: bool
    outcome: str
    why: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[n for n in available() if n not in ("smol", "stories")])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--untrained", action="store_true", help="break copies of the reference instead of trained ones"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    overlay = None if args.untrained else "fine_tuned_any"
    with tempfile.TemporaryDirectory() as work:
        rows = list(repairs(args.kinds, args.models, seeds, Path(work), overlay))
    print("\n".join(table(rows)))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 1 if any(r.outcome == "LOST" for r in rows) else 0


def repairs(
    kinds: Iterable[str], models: list[str], seeds: Iterable[int], work: Path, overlay: str | None
) -> Iterator[Repair]:
    """Make each fault and repair it, as it is and with everything allowed."""
    count = 0
    for kind in kinds:
        for model in models:
            for seed in seeds:
                fault = make(kind, model, seed, work, overlay)
                if fault is None or fault.reference is None:
                    break
                for allowed in (False, True):
                    outcome, why = repaired(fault, work / "mended", allowed)
                    yield Repair(kind, model, seed, allowed, outcome, why)
                shutil.rmtree(work / f"{kind}-{model}-{seed}", ignore_errors=True)
                count += 1
                if count % 50 == 0:
                    print(f"{count} faults, now {kind} {model}", file=sys.stderr, flush=True)


def repaired(fault: Fault, out: Path, allowed: bool) -> tuple[str, str]:
    """Repair one fault and judge the result by the tensors before it; nothing stays at `out`."""
    out = out.with_suffix(".pth") if fault.path.is_file() else out
    try:
        done = attempt(fault, out, allowed)
        if done is None:
            return "refused", "nothing is lost that could be taken"
    except TensorkeepError as error:
        return ("LOST", f"refused, and wrote {out}") if out.exists() else ("refused", error.line)
    truth = write("hf", dict(fault.before), out.parent / "truth", None)
    try:
        return judge(compare(read(str(out)), read(str(truth))), done, HEAD not in fault.before)
    finally:
        shutil.rmtree(truth)
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def attempt(fault: Fault, out: Path, allowed: bool) -> Repaired | None:
    """Repair a fault; where everything is allowed and nothing can be taken, without taking."""
    paths = str(fault.path), str(out), str(fault.reference)
    if not allowed:
        return repair(*paths, fault.target)  # type: ignore[arg-type]
    try:
        return repair(*paths, fault.target, take=["*"], yes=True)  # type: ignore[arg-type]
    except TensorkeepError as error:
        if "nothing that is lost here" not in error.line:
            raise
    return repair(*paths, fault.target, yes=True)  # type: ignore[arg-type]


def judge(differences: list[Difference], done: Repaired, tied: bool) -> tuple[str, str]:
    """Say what became of the values that the copy had before the fault; a tied head is its embedding."""
    named = [n for n in (*done.taken, *done.lost)]
    outcome = "kept"
    for d in differences:
        if d.status == "equal" or d.status == "only_a":
            continue
        name = EMBEDDING if tied and d.name == HEAD else d.name
        if any(matches(name, [exactly(n)]) for n in named):
            outcome = "announced"
        elif d.status == "values" and d.relative is not None and d.b and d.relative <= ROUNDING.get(d.b.dtype, 0):
            outcome = "rounded" if outcome == "kept" else outcome
        else:
            return "LOST", f"{d.name}: {d.status}, relative {d.relative}; done {done.done}"
    return outcome, ", ".join(f"{code} {what}" for code, what in done.done.items())


def table(rows: list[Repair]) -> list[str]:
    """Return the lines of the table: outcomes by kind of fault, first as it is, then with everything allowed."""
    counts: dict[str, Counter[tuple[bool, str]]] = defaultdict(Counter)
    for row in rows:
        counts[row.kind][row.allowed, row.outcome] += 1
    width = max(len(k) for k in counts)
    head = "  ".join(f"{o:>9}" for o in OUTCOMES)
    lines = [f"{'kind':<{width}}  {head}  | everything allowed: {head}"]
    for kind, count in counts.items():
        cells = ["  ".join(f"{count[allowed, o] or '-':>9}" for o in OUTCOMES) for allowed in (False, True)]
        lines.append(f"{kind:<{width}}  {cells[0]}  |                     {cells[1]}")
    for allowed in (False, True):
        whole = Counter(r.outcome for r in rows if r.allowed is allowed)
        said = ", ".join(f"{whole[o]} {o}" for o in OUTCOMES)
        lines.append(f"{'everything allowed' if allowed else 'as it is'}: {sum(whole.values())} repairs: {said}")
    return lines + [f"  LOST: {r.kind} {r.model} seed {r.seed}: {r.why}" for r in rows if r.outcome == "LOST"]


if __name__ == "__main__":
    sys.exit(main())
