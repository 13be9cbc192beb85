"""Averages of other tools: the right weights out of their files, or exactly why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tensorkeep.adapters.lora import add_lora
from tensorkeep.detection.opentad.averages import read_ema
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.modules import quantize_
from tensorkeep.training.ema import Ema
from tests.helpers import refused


def _model(seed: int = 0, quantized: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Linear(64, 4))
    model.requires_grad_(False)
    if quantized:
        quantize_(model, "nf4", exclude=["3"])
        add_lora(model, ["2"], r=4)
    model[3].requires_grad_(True)
    return model


class _OpenTAD:
    """OpenTAD's ModelEma from its published behaviour: a copy of the state dict, every value averaged in place."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {n: t.clone() for n, t in model.state_dict().items()}

    def update(self, model: nn.Module, decay: float) -> None:
        for mine, theirs in zip(self.state.values(), model.state_dict().values()):
            mine.copy_(decay * mine + (1.0 - decay) * theirs)


def _trained(model: nn.Module, update: Callable[[nn.Module], Any], steps: int = 5) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        update(model)
    return model


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _opentad(path: Path, decay: float, quantized: bool = True) -> tuple[nn.Module, dict[str, Tensor]]:
    """A checkpoint as OpenTAD writes it under DDP; the model, and what averages it should give."""
    model = _model(quantized=quantized)
    ema, right = _OpenTAD(model), Ema(model, decay)
    _trained(model, lambda m: (ema.update(m, decay), right.update(m)))
    document = {
        "epoch": 5,
        "state_dict": _under("module.", model.state_dict()),
        "state_dict_ema": _under("module.", ema.state),
    }
    torch.save(document, path)
    return model, right.tensors


def _said(notes: list[Any]) -> list[tuple[str, str, int]]:
    return [(note.code, note.severity, len(note.tensors)) for note in notes]


def test_opentad_gives_the_trainable_averages_and_names_averaged_codes(tmp_path: Path) -> None:
    model, right = _opentad(tmp_path / "epoch_5.pth", 0.9)
    found = read_ema(tmp_path / "epoch_5.pth", model)
    assert found.root == "state_dict_ema" and found.tensors.keys() == right.keys()
    assert all(torch.allclose(found.tensors[n], right[n], rtol=0, atol=1e-6) for n in right)
    codes = next(note for note in found.notes if note.code == "Q03")
    assert set(codes.tensors) == {"0.weight", "2.weight"} and min(codes.evidence["changed"].values()) > 0.05
    Ema(model).load_state_dict(found.tensors, 5)


def test_codes_that_averaging_left_alone_are_said_to_be_the_base_s(tmp_path: Path) -> None:
    model, _ = _opentad(tmp_path / "e.pth", 0.999)  # truncation changes no byte at this decay
    assert ("E02", "info", 2) in _said(read_ema(tmp_path / "e.pth", model).notes)
    assert not any(note.code == "Q03" for note in read_ema(tmp_path / "e.pth", model).notes)


def test_codes_are_judged_without_a_live_copy(tmp_path: Path) -> None:
    model, right = _opentad(tmp_path / "e.pth", 0.9)
    averaged = torch.load(tmp_path / "e.pth")["state_dict_ema"]
    torch.save({"model_ema": averaged}, tmp_path / "alone.pth")
    by_model = next(n for n in read_ema(tmp_path / "alone.pth", model).notes if n.code == "Q03")
    by_blocks = next(n for n in read_ema(tmp_path / "alone.pth", list(right)).notes if n.code == "Q03")
    assert set(by_model.tensors) == set(by_blocks.tensors) == {"0.weight", "2.weight"}


def test_torch_averaged_model(tmp_path: Path) -> None:
    model, right = _model(), Ema(_model(), 0.8)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    average.update_parameters(model)  # the first update copies
    _trained(model, lambda m: (average.update_parameters(m), right.update(m)), steps=3)
    torch.save(average.state_dict(), tmp_path / "alone.pth")
    torch.save(
        {"model": model.state_dict(), "model_ema": average.state_dict(), "ema_decay": 0.8}, tmp_path / "both.pth"
    )
    for path in ("alone.pth", "both.pth"):
        found = read_ema(tmp_path / path, model)
        assert found.updates == 4 and found.decay == (0.8 if path == "both.pth" else None)
        assert all(torch.allclose(found.tensors[n], right.tensors[n], atol=1e-6) for n in right.tensors)


def test_an_average_that_was_never_updated_is_flagged(tmp_path: Path) -> None:
    model = _model()
    torch.save({"model": model.state_dict(), "model_ema": AveragedModel(model).state_dict()}, tmp_path / "c.pth")
    said = _said(read_ema(tmp_path / "c.pth", model).notes)
    assert said.count(("E01", "warning", 2)) == 2  # equals the live weights; zero updates


def test_timm_files_with_and_without_prefix(tmp_path: Path) -> None:
    model, right = _model(), Ema(_model(), 0.9)
    ema = _OpenTAD(model)  # timm's ModelEmaV2 is the same arithmetic
    _trained(model, lambda m: (ema.update(m, 0.9), right.update(m)))
    torch.save(
        {"arch": "vit", "state_dict": model.state_dict(), "state_dict_ema": ema.state}, tmp_path / "ckpt.pth.tar"
    )
    torch.save(_under("module.", ema.state), tmp_path / "alone.pth")
    found = read_ema(tmp_path / "ckpt.pth.tar", model)
    assert all(torch.allclose(found.tensors[n], right.tensors[n], atol=1e-6) for n in right.tensors)
    with refused("K08", "nothing in it says that it is an average", "root=''"):
        read_ema(tmp_path / "alone.pth", model)
    again = read_ema(tmp_path / "alone.pth", model, root="")
    assert all(torch.equal(again.tensors[n], found.tensors[n]) for n in found.tensors)


def test_what_was_averaged_and_does_not_train_here_is_said(tmp_path: Path) -> None:
    model, _ = _opentad(tmp_path / "e.pth", 0.9, quantized=False)
    document = torch.load(tmp_path / "e.pth")
    document["state_dict_ema"]["module.1.running_mean"] += 1
    torch.save(document, tmp_path / "e.pth")
    model[3].bias.requires_grad_(False)
    moved = next(n for n in read_ema(tmp_path / "e.pth", model).notes if n.severity == "warning")
    assert list(moved.tensors) == ["1.running_mean", "3.bias"]


def test_a_narrow_average_is_said(tmp_path: Path) -> None:
    model = _model()
    torch.save(
        {"state_dict_ema": {n: t.bfloat16() if t.is_floating_point() else t for n, t in model.state_dict().items()}},
        tmp_path / "n.pth",
    )
    assert ("E03", "warning", 2) in _said(read_ema(tmp_path / "n.pth", model).notes)


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (lambda s: s.pop("module.3.bias"), "K01", "3.bias trains in the model and is not in the average"),
        (
            lambda s: s.update({"module.9.weight": torch.ones(2)}),
            "K02",
            "9.weight is in the average and not in the model",
        ),
        (lambda s: s.update({"module.3.bias": torch.ones(5)}), "S01", "[5] in the average, [4] in the model"),
        (lambda s: s["module.3.bias"].fill_(float("nan")), "V01", "not finite"),
        (lambda s: s.update({"module.3.bias": torch.ones(4, dtype=torch.uint8)}), "Q03", "no averaging survives"),
        (lambda s: s.update({"3.bias": torch.ones(4)}), "K03", "without wrappers"),
    ],
)
def test_names_and_values_are_strict(tmp_path: Path, change: Any, code: str, word: str) -> None:
    model, _ = _opentad(tmp_path / "e.pth", 0.9)
    document = torch.load(tmp_path / "e.pth")
    change(document["state_dict_ema"])
    torch.save(document, tmp_path / "e.pth")
    with refused(code, word):
        read_ema(tmp_path / "e.pth", model)


def test_a_packed_weight_that_trains_in_the_model_is_refused(tmp_path: Path) -> None:
    _opentad(tmp_path / "e.pth", 0.9)
    with refused("Q03", "2.weight trains in the model and is nf4 codes"):
        read_ema(tmp_path / "e.pth", ["2.weight", "3.weight", "3.bias"])


def test_averages_that_do_not_say_which_weight_is_which_are_refused(tmp_path: Path) -> None:
    model = _model()
    torch.save({"shadow_params": list(model.parameters()), "decay": 0.9}, tmp_path / "d.pth")
    with refused("K08", "by position"):
        read_ema(tmp_path / "d.pth", model)
    torch.save({"ema": model.state_dict(), "model_ema": model.state_dict()}, tmp_path / "two.pth")
    with refused("K08", "2 averages: ema, model_ema"):
        read_ema(tmp_path / "two.pth", model)
    assert read_ema(tmp_path / "two.pth", model, root="ema").root == "ema"


def test_opentad_names_reach_our_detector_s(tmp_path: Path) -> None:
    theirs = "module.backbone.model.backbone.blocks.0.mlp.layers.0.0.weight"
    torch.save(
        {"state_dict_ema": {theirs: torch.ones(2), "module.rpn_head.cls_head.bias": torch.zeros(3)}}, tmp_path / "o.pth"
    )
    found = read_ema(tmp_path / "o.pth", ["backbone.blocks.0.mlp.fc1.weight", "head.cls_head.bias"])
    assert torch.equal(found.tensors["backbone.blocks.0.mlp.fc1.weight"], torch.ones(2))


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]),
    st.sampled_from(["state_dict_ema", "ema", "model_ema"]),
    st.booleans(),
)
def test_every_wrapping_of_an_average_reads_bitwise(
    tmp_path_factory: Any, prefix: str, root: str, outside: bool
) -> None:
    path = tmp_path_factory.mktemp("w") / "c.pth"
    model = _model(3)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    stored = (
        {f"{prefix}{root}.{n}": t for n, t in tensors.items()}
        if outside and prefix
        else {root: _under(prefix, tensors)}
    )
    torch.save(stored, path)
    found = read_ema(path, model)
    assert all(torch.equal(found.tensors[n], tensors[n]) for n in ("3.weight", "3.bias")) and len(found.tensors) == 2


def test_our_own_averages_are_read_from_a_checkpoint_s_folder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = _model()
    save_file({n: t + 1 for n, t in Ema(model).tensors.items()}, tmp_path / "ema.safetensors")
    found = read_ema(tmp_path, model)
    assert all(torch.equal(found.tensors[n], t + 1) for n, t in Ema(model).tensors.items())


def test_reading_changes_neither_model_nor_file(tmp_path: Path) -> None:
    model, _ = _opentad(tmp_path / "e.pth", 0.9)
    before, data = copy.deepcopy(model.state_dict()), (tmp_path / "e.pth").read_bytes()
    read_ema(tmp_path / "e.pth", model)
    with pytest.raises(TensorkeepError):
        read_ema(tmp_path / "e.pth", model, root="nowhere")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert (tmp_path / "e.pth").read_bytes() == data


def test_state_without_its_codes_is_no_crash(tmp_path: Path) -> None:
    model, right = _opentad(tmp_path / "e.pth", 0.9)
    document = torch.load(tmp_path / "e.pth")
    for copy_ in ("state_dict", "state_dict_ema"):
        del document[copy_]["module.0.weight"]
    torch.save(document, tmp_path / "e.pth")
    assert read_ema(tmp_path / "e.pth", model).tensors.keys() == right.keys()
