"""Write sound checkpoints in many forms: every error that a diagnosis reports of one is a false alarm.

Each variant is written by the library that people would use. `every` yields those that a model can have; `golden`
yields sound checkpoints that flame, torchtitan and transformers wrote.

`python -m tests.sound VARIANT MODEL SEED FOLDER` writes one and prints how to diagnose it.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.faults import reference
from tests.sound_kinds import beside, stored, trained  # noqa: F401  (they register their variants)
from tests.sound_kinds.variant import ALONE, VARIANTS
from tests.specimens import specimen


@dataclass(frozen=True)
class Sound:
    """A checkpoint with nothing wrong, and what to diagnose it with."""

    variant: str
    model: str
    path: Path
    reference: Path | None
    target: str | None = None


def every(model: str, folder: Path, seed: int = 0, names: Collection[str] = ()) -> Iterator[Sound]:
    """Write all sound variants of one model (or those named) below `folder`."""
    m = specimen(model)
    for name, make in VARIANTS.items():
        if names and name not in names:
            continue
        made = make(m, folder / f"sound-{name}-{model}-{seed}", np.random.default_rng([seed, *name.encode()]))
        if made is not None:
            path, target = made if isinstance(made, tuple) else (made, None)
            yield Sound(name, model, path, None if name in ALONE else reference(model, folder), target)


def golden(folder: Path) -> Iterator[Sound]:
    """Yield the sound conversion fixtures: what flame and torchtitan wrote from each model's own hf folder."""
    for model in sorted(p for p in folder.glob("*") if (p / "hf").is_dir()):
        hf = model / "hf"
        yield Sound("golden_hf", model.name, hf, hf)
        yield Sound("golden_hf_alone", model.name, hf, None)
        for dcp in sorted(model.glob("flame_dcp_*/checkpoint/step-*")):
            yield Sound(f"golden_{dcp.parents[1].name}", model.name, dcp, hf, "flame")
        if (model / "titan030_dcp").is_dir():
            yield Sound("golden_titan030_dcp", model.name, model / "titan030_dcp", hf)
            yield Sound("golden_titan030_dcp_for_torchtitan", model.name, model / "titan030_dcp", hf, "torchtitan")
    for trainer in sorted(folder.glob("titan030_trainer_*")):
        hf = folder / trainer.name.removeprefix("titan030_trainer_") / "hf"
        for step in [*sorted(trainer.glob("checkpoint/step-*")), *sorted(trainer.glob("hf_export/step-*"))]:
            yield Sound(f"golden_trainer_{step.parent.name}", trainer.name, step, hf)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write one sound variant and print how to diagnose it.")
    parser.add_argument("variant", choices=sorted(VARIANTS))
    parser.add_argument("model")
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    for found in every(args.model, args.folder, args.seed, [args.variant]):
        options = (f" --reference {found.reference}" if found.reference else "") + (
            f" --for {found.target}" if found.target else ""
        )
        print(f"tensorkeep diagnose {found.path}{options} --json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
