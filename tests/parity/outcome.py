"""What the parity runners share: lines of outcome, exact comparison, logits of a converted folder by transformers."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView

LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


class Outcome(NamedTuple):
    """One case: `figure` must not exceed `tolerance`; `more` says what the figure counts. The line has four fields."""

    name: str
    figure: float
    tolerance: float
    more: str = ""

    @property
    def line(self) -> str:
        passed = "PASS" if self.figure <= self.tolerance else "FAIL"  # NaN fails
        more = f"  ({self.more})" if self.more else ""
        return f"{passed} {self.name.replace(' ', '_')} {self.figure:.3g} {self.tolerance:.3g}{more}"


def report(outcomes: Iterable[Outcome]) -> int:
    """Print a line a case as it comes; 1 where one failed or none ran."""
    failed = ran = 0
    for outcome in outcomes:
        print(outcome.line, flush=True)
        ran += 1
        failed += not outcome.figure <= outcome.tolerance
    print(f"{ran - failed} of {ran} cases pass", file=sys.stderr)
    return 1 if failed or not ran else 0


def guarded(name: str, run: Callable[[], Iterator[Outcome]]) -> Iterator[Outcome]:
    """The outcomes of one group; an error of ours or of a loader is a failed case, not the end of the run."""
    try:
        yield from run()
    except (TensorkeepError, RuntimeError, ValueError, KeyError, OSError, AssertionError) as error:
        yield Outcome(name, float("inf"), 0, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def different(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in one of two state dicts only, or with other bits."""
    return [n for n in sorted({*ours, *theirs}) if not same(ours.get(n), theirs.get(n))]


def bitwise(name: str, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], more: str = "") -> Outcome:
    """An outcome that counts the tensors which differ."""
    odd = different(ours, theirs)
    said = f"of {len(theirs)} tensors differ{': ' + ', '.join(odd[:3]) if odd else ''}"
    return Outcome(name, len(odd), 0, f"{said}; {more}" if more else said)


def tensors(view: StateView) -> dict[str, torch.Tensor]:
    return {name: view.tensor(name) for name in view}


def load_model(folder: Path) -> Any:
    """The model of a converted folder in fp32, once transformers says that every tensor found its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {k: sorted(map(str, info[k]))[:4] for k in LOADING if info.get(k)}
    if wrong:
        raise ValueError(f"from_pretrained: {wrong}")
    return model.eval()


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; infinite for shapes that differ."""
    return float("inf") if a.shape != b.shape else float((a.double() - b.double()).abs().max())


def be_quiet() -> None:
    """No progress bars and no advice: what matters is compared."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def natural_key(path: Path) -> tuple[object, ...]:
    """Sort key that puts step-10 behind step-3."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", path.as_posix()) if p)
