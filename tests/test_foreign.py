"""Objects of own classes beside the tensors are opaque, listed, never imported; what could do harm is refused."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensorkeep.cli import main
from tensorkeep.diagnosis.verification import verify
from tensorkeep.formats.view import read
from tensorkeep.storage.foreign import harmful
from tensorkeep.storage.pickle_values import Global
from tests.helpers import refused

OWN = "own_script_of_a_user"


@pytest.fixture
def own() -> Iterator[types.SimpleNamespace]:
    """Classes of a module that is there while files are written, and not while they are read."""
    module = types.ModuleType(OWN)

    class Mode(enum.Enum):
        FAST = "fast"

    class Settings:
        class Level(enum.IntEnum):
            HIGH = 2

        def __init__(self) -> None:
            self.mode, self.level, self.itself = Mode.FAST, Settings.Level.HIGH, self

    class Attributes(dict):  # type: ignore[type-arg]
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
            self.register_buffer("table", torch.arange(3.0), persistent=False)
            self.act, self.mode = nn.functional.gelu, Mode.FAST

    Point = collections.namedtuple("Point", "weights step")
    Config = dataclasses.make_dataclass("Config", [("lr", float), ("mode", object)])
    held = {"Mode": Mode, "Settings": Settings, "Attributes": Attributes, "Net": Net, "Point": Point, "Config": Config}
    for name, made in held.items():
        made.__module__, made.__qualname__ = OWN, name
        setattr(module, name, made)
    Settings.Level.__module__, Settings.Level.__qualname__ = OWN, "Settings.Level"
    sys.modules[OWN] = module
    yield types.SimpleNamespace(**held)
    sys.modules.pop(OWN, None)


def reading(path: Path) -> Any:
    """The view, read while the module cannot be imported."""
    sys.modules.pop(OWN, None)
    view = read(path)
    assert OWN not in sys.modules
    return view


@pytest.mark.parametrize("legacy", [False, True])
def test_own_objects_beside_the_weights_stay_opaque(own: Any, legacy: bool, tmp_path: Path) -> None:
    path, weights = tmp_path / "m.pt", {"a.weight": torch.rand(3, 2)}
    saved = {"model": weights, "config": own.Config(1e-3, own.Mode.FAST), "settings": own.Settings(), "step": 9}
    torch.save({**saved, "by": {own.Mode.FAST: 1}}, path, _use_new_zipfile_serialization=not legacy)
    view = reading(path)
    assert list(view) == ["model.a.weight"] and torch.equal(view.tensor("model.a.weight"), weights["a.weight"])
    names = {f"{OWN}.{n}" for n in ("Config", "Mode", "Settings", "Settings.Level")}
    assert view.metadata["opaque"] == names and view.entries["step"] == 9
    (info,) = verify(path)[0]
    assert (info.code, info.severity) == ("F04", "info") and f"{OWN}.Config" in info.message
    assert main(["inspect", str(path)]) == 0 and main(["convert", str(path), str(tmp_path / "out"), "--to", "pth"]) == 0


def test_weights_inside_own_objects_are_found_by_attribute(own: Any, tmp_path: Path) -> None:
    weights = torch.rand(4)
    torch.save(own.Attributes(model=own.Attributes(w=weights)), tmp_path / "dict.pt")
    torch.save({"state": own.Point({"w": weights}, 3)}, tmp_path / "tuple.pt")
    settings = own.Settings()
    settings.kept = [{"w": weights}]
    torch.save({"settings": settings}, tmp_path / "cycle.pt")
    for file, name in (("dict.pt", "model.w"), ("tuple.pt", "state.0.w"), ("cycle.pt", "settings.kept.0.w")):
        view = reading(tmp_path / file)
        assert list(view) == [name] and torch.equal(view.tensor(name), weights)


def test_a_whole_model_reads_as_its_state_dict(own: Any, tmp_path: Path) -> None:
    network = own.Net()
    torch.save(network, tmp_path / "whole.pt")
    state = network.state_dict()
    view = reading(tmp_path / "whole.pt")
    assert set(view) == set(state) and all(torch.equal(view.tensor(n), t) for n, t in state.items())


def test_an_arguments_file_alone_has_no_tensors_and_converts_into_nothing(own: Any, tmp_path: Path) -> None:
    torch.save(own.Config(1e-3, None), tmp_path / "training_args.bin")
    assert len(reading(tmp_path / "training_args.bin")) == 0
    assert main(["convert", str(tmp_path / "training_args.bin"), str(tmp_path / "out"), "--to", "hf"]) == 2


class Call:
    """An object that calls something when Python loads it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def calls(path: str) -> dict[str, Any]:
    import os
    import subprocess
    import webbrowser

    return {
        "os.system": Call(os.system, f"touch {path}"),
        "eval": Call(eval, f"open({path!r}, 'w')"),
        "subprocess": Call(subprocess.check_output, ["touch", path]),
        "partial": functools.partial(os.system, f"touch {path}"),
        "webbrowser": Call(webbrowser.open, path),
        "torch's own function": Call(torch.hub.load, path, "x"),
        "getattr of a module's function": Call(getattr, Call(__import__, "os"), "system"),
    }


@pytest.mark.parametrize("kind", calls(""))
def test_what_could_do_harm_elsewhere_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"model": {"w": torch.zeros(2)}, "hook": calls(str(made))[kind]}, tmp_path / "m.pt")
    with refused("F04", "nothing was run"):
        read(tmp_path / "m.pt")
    assert not made.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("commands", "getoutput"),
        ("own_module", "os.system"),
        ("own_module", "system"),
        ("own", "subprocess.Popen"),
        ("own", "X.__reduce__"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("numpy.f2py.capi_maps", "getinit"),
        ("pip", "main"),
        ("", "x"),
        ("IPython.utils.process", "system"),
        ("runpy", "run_path"),
        ("operator", "methodcaller"),
        ("x", "getattr"),
    ],
)
def test_names_that_run_things_are_harmful(module: str, name: str) -> None:
    assert harmful(Global(module, name))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("__main__", "Config"),
        ("my.script", "Outer.Inner"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("typing", "Any"),
        ("torch.optim.lr_scheduler", "LambdaLR"),
        ("torch.nn.functional", "silu"),
        ("enum", "IntEnum"),
        ("transformers.training_args", "TrainingArguments"),
        ("builtins", "object"),
        ("my_data", "collate"),
    ],
)
def test_names_of_settings_are_not(module: str, name: str) -> None:
    assert not harmful(Global(module, name))


def test_a_pickle_of_many_own_names_costs_no_more_than_its_size(tmp_path: Path) -> None:
    names = b"".join(b"c%s\nC%d\n)\x81" % (OWN.encode(), i) for i in range(6_000))
    data = b"\x80\x02}X\x01\x00\x00\x00a](" + names + b"es."
    import zipfile

    with zipfile.ZipFile(tmp_path / "m.pt", "w") as out:
        out.writestr("m/data.pkl", data)
    assert len(read(tmp_path / "m.pt").metadata["opaque"]) == 6_000
    (info,) = verify(tmp_path / "m.pt")[0][-1:]
    assert len(info.message) < 1000 and pickle.dumps(info)
