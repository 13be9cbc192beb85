"""A trained model as an hf folder, under the names of the checkpoint that it started from."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tensorkeep.conversion.fit import Misfit, Offer
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import Companion, find_companions, travelling
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView
from tensorkeep.language.start import Remark, StartingModel
from tensorkeep.models.loader import by_transformers
from tensorkeep.models.refusals import refusals
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import LocalFolder, explained
from tensorkeep.storage.placement import write_bytes
from tensorkeep.storage.record import FROM_TORCH


@dataclass
class WholeModel:
    """Every tensor of a model's checkpoint under the names of files, and what lies beside them.

    Attributes:
        tensors: by name.
        inherited: names of those that were not trained and are the base's.
        companions: config, tokenizer and others.
        misfit: what transformers would report; None for nothing.
    """

    tensors: dict[str, Tensor]
    inherited: list[str]
    companions: list[Companion]
    misfit: Misfit | None

    def write(self, folder: Path, run: Path, remark: Remark) -> None:
        """Write it into a folder that is not there yet; who calls gives it its name.

        Args:
            folder: made here.
            run: the run's folder, for messages.
            remark: is told which tensors are the base's.

        Raises:
            TensorkeepError: K01 where transformers would not find the model in these tensors.
        """
        if self.misfit is not None:
            lacks, more = self.misfit.missing, self.misfit.unexpected
            odd = [*lacks, *more, *self.misfit.mismatched]
            what = f"transformers would miss {len(lacks)} of its tensors and have no place for {len(more)}"
            raise TensorkeepError(f"{what}, first {odd[0]}", where=run, code="K01", tensors=odd)
        if self.inherited:
            shown = ", ".join(grouped(self.inherited)[:3])
            remark(f"note: {len(self.inherited)} tensors were not trained and are the base's: {shown}")
        with explained(folder):
            folder.mkdir()
            whole = {n: t.contiguous() for n, t in self.tensors.items()}
            save_file(whole, folder / "model.safetensors", {"format": "pt"})
        for companion in self.companions:
            write_bytes(folder / companion.name, companion.data)


def whole_model(start: StartingModel, ties: Mapping[str, str], run: Path) -> WholeModel:
    """Give a model's tensors the names that files have, and add what else its base holds.

    Args:
        start: the trained model, and the checkpoint that it started from.
        ties: names of tensors that are others over again, as the run's state has them.
        run: the run's folder, with config and tokenizer.
    """
    live: Any = start.model
    held = {n: t for n, t in live.state_dict().items() if isinstance(t, Tensor) and n not in ties}
    tensors = _as_saved(start.model, held)
    companions = travelling(find_companions(LocalFolder(run), [], described=True))
    config = next((parse_json(c.data, c.where) for c in companions if c.name == "config.json"), None)
    misfit = _misfit(tensors, config)
    inherited = _inherited(start.view, tensors, misfit.missing if misfit is not None else ())
    if start.view is not None and inherited:
        tensors = tensors | {n: start.view.tensor(n) for n in inherited}
        misfit = _misfit(tensors, config)
    return WholeModel(tensors, inherited, companions, misfit)


def _as_saved(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let transformers 5 turn live tensors into those of the file that it loaded the model from; 4 keeps their names.

    Asked of the model and not of its config: only the model knows under which older names it was loaded.
    """
    revert = getattr(sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None)
    try:
        made: dict[str, Tensor] = revert(model, dict(state)) if revert is not None else state
    except refusals():
        return state
    return made


def _inherited(view: StateView | None, tensors: Mapping[str, Tensor], missing: Collection[str]) -> list[str]:
    """Return the names of the base's tensors that the model does not have, as a visual tower under another class.

    A second copy of one that it has (a head tied to the embedding) is none of them, unless it is missed.
    """
    if view is None or not set(view) & set(tensors):
        return []
    rest = [n for n in view if n not in tensors]
    digests = {view.digest(n) for n in view if n in tensors} if rest else set()
    return [n for n in rest if n in missing or view.digest(n) not in digests]


def _misfit(tensors: Mapping[str, Tensor], config: Any) -> Misfit | None:
    """Ask transformers what it would report about these names and shapes; None for nothing."""
    if not isinstance(config, dict):
        return None
    dtypes = {n: FROM_TORCH[str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()}
    found = by_transformers(config, {n: Offer(dtypes[n], tuple(t.shape)) for n, t in tensors.items()})
    return found if found is not None and found.count else None
