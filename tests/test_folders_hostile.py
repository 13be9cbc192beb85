"""Folders of several ranks with odd values in their files: a view whose data can be read, or one error."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.pth import open_value
from tensorkeep.formats.view import read
from tensorkeep.storage.dtensors import part_of, place
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.pickle_values import Object
from tests.folder_layouts import megatron, verl, zero

ODD = (None, -1, 10**30, "x", [], {}, [[]], {"a": {}}, torch.zeros(2, 2), torch.tensor(1.0), (1,), b"x")
STATE = {f"model.{n}": torch.arange(12.0).reshape(3, 4) + i for i, n in enumerate(("a.weight", "norm.weight", "b"))}


def changed(value: Any) -> Iterator[Any]:
    """Every copy of a nested dict in which one entry is odd, or gone."""
    for path in paths(value):
        for odd in ODD[:: 1 if len(path) < 3 else 4]:
            made = copy.deepcopy(value)
            at = made
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = odd
            yield made


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    held = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(held)[:4]:
        yield (*at, key)
        if len(at) < 4:
            yield from paths(child, (*at, key))


def survives(folder: Path) -> None:
    try:
        view = read(folder)
        for name in view:
            assert len(view.bytes(name)) == view[name].nbytes
    except TensorkeepError as error:
        assert "\n" not in error.line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["model", "optim"])
def test_odd_values_in_zeros_files(stage: int, kind: str, model: Path, tmp_path: Path) -> None:
    import tests.folder_layouts as layouts

    top = zero(tmp_path, model, STATE, stage, 2)
    (file,) = sorted((top / "global_step7").glob(f"*_{kind}_states.pt"))[:1]
    with layouts.deepspeed_classes():
        saved = torch.load(file, weights_only=False)
    saved.get("optimizer_state_dict", {}).pop("loss_scaler", None)
    if kind == "optim":
        saved["optimizer_state_dict"]["zero_stage"] = stage
    for made in changed(saved):
        torch.save(made, file)
        survives(top)


def test_odd_values_in_megatrons_files(tmp_path: Path) -> None:
    top = megatron(tmp_path, 2, 1)
    file = top / "iter_0000009" / "mp_rank_00" / "model_optim_rng.pt"
    saved = torch.load(file, weights_only=False)
    for name in list(vars(saved["args"])):
        for odd in ODD:
            made = copy.deepcopy(saved)
            setattr(made["args"], name, odd)
            torch.save(made, file)
            survives(top)
    for made in changed({**saved, "model": OrderedDict(list(saved["model"].items())[:3])}):
        torch.save(made, file)
        survives(top)


def test_odd_dtensors(model: Path, tmp_path: Path) -> None:
    top = verl(tmp_path, model, STATE)
    file = "model_world_size_3_rank_1.pt"
    value = next(iter(open_value(LocalFolder(top / "global_step_8" / "actor"), file).value.values()))
    seen: set[int] = set()
    for holder, key in list(attributes(value, seen)):
        kept = holder[key]
        for odd in (None, -1, 10**30, "x", [], {}, (), ((),), (10**9,) * 3, ((1,),) * 40):
            holder[key] = odd
            try:
                part = part_of(value, "x")
                if part is not None:
                    place(part, 1, "x")
            except TensorkeepError as error:
                assert "\n" not in error.line
        holder[key] = kept
    assert len(seen) > 6 and part_of(value, "x") is not None


def attributes(value: Any, seen: set[int]) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Every attribute below a pickled object, with the dict that holds it."""
    if id(value) in seen:
        return
    if isinstance(value, Object):
        seen.add(id(value))
        yield from attributes(value.state, seen)
        for child in value.args:
            yield from attributes(child, seen)
    elif isinstance(value, dict):
        for key, child in value.items():
            yield value, key
            yield from attributes(child, seen)
    elif isinstance(value, tuple):
        for child in value:
            yield from attributes(child, seen)
