"""OpenTAD's tools under our integration: its names are replaced, evaluation puts every bit back, resume is strict.

OpenTAD itself runs in `tests.parity.opentad_guest`; here its engine is a stand-in with the same names and arguments.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.conversion.naming import opentad as naming
from tensorkeep.detection.model.backbones import VisionTransformerQLoRA as OwnQLoRA
from tensorkeep.detection.model.config import VitConfig
from tensorkeep.detection.model.layers import normalise_frames
from tensorkeep.detection.model.quantization import quantize_adapters
from tensorkeep.diagnosis.verification import verify
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.integrations._opentad_backbone import VisionTransformerQLoRA
from tensorkeep.integrations._opentad_files import read_resumed, restore_run
from tensorkeep.quantization.linear import QuantLinear
from tests.opentad_fake import Net, engine, installed

LOG = logging.getLogger("Train")
MODULE = "tensorkeep.integrations.opentad"
TINY: Any = {"img_size": 32, "embed_dims": 64, "depth": 2, "num_heads": 2, "num_frames": 4, "total_frames": 8}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """`start(*argv)`: a process in which the tool's names are bound and its config not yet read; the tool."""

    def begin(*arguments: object, objects: dict[str, dict[str, Any]] | None = None) -> ModuleType:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        return installed(lambda name, module: monkeypatch.setitem(sys.modules, name, module), objects or engine())

    return begin


def read_config() -> None:
    importlib.import_module(MODULE)


def wrapped(seed: int = 0) -> nn.Module:
    return DistributedDataParallel(Net(seed))


def trained(tool: ModuleType, folder: Path, epochs: int = 4, **options: Any) -> tuple[Any, nn.Module]:
    seed = options.pop("seed", 0)
    random.seed(seed)
    model = wrapped(seed)
    return tool.main(read_config, model, str(folder), epochs, LOG, **options), model


def epoch(folder: Path, number: int) -> Path:
    return folder / "checkpoint" / f"epoch_{number}.pth"


def content(path: Path) -> dict[str, object]:
    """Every tensor by digest and every plain value, random states included."""
    view = read(path)
    return {**{n: (view[n].dtype, view.digest(n)) for n in view}, **view.entries}


# -- the names ------------------------------------------------------------------------------------------------------


def test_names_bound_before_the_config_is_read_are_taken_over(start: Callable[..., ModuleType]) -> None:
    tool = start()
    theirs = tool.ModelEma
    alien = ModuleType("alien")
    alien.save_checkpoint = lambda: None  # type: ignore[attr-defined]
    sys.modules["alien"], kept = alien, alien.save_checkpoint
    try:
        read_config()
    finally:
        del sys.modules["alien"]
    for place in (tool, sys.modules["opentad.utils"], sys.modules["opentad.utils.ema"]):
        assert place.ModelEma is not theirs
        assert type(place.ModelEma(wrapped())).__name__ == "Average"
    assert alien.save_checkpoint is kept, "another object of that name was touched"
    assert sys.modules["mmengine.registry"].MODELS.built == {"VisionTransformerQLoRA": VisionTransformerQLoRA}


def test_another_opentad_is_refused_and_nothing_is_replaced(start: Callable[..., ModuleType]) -> None:
    objects = engine()
    objects["cores.test_engine"]["eval_one_epoch"] = lambda test_loader, model: None
    tool = start(objects=objects)
    before = dict(vars(tool))
    with pytest.raises(TensorkeepError, match=r"eval_one_epoch takes \(test_loader, model\); known is .*3dd7b032"):
        read_config()
    assert vars(tool) == before
    tool = start()
    sys.modules["mmengine.registry"].MODELS.built["VisionTransformerQLoRA"] = object
    before = dict(vars(tool))
    with pytest.raises(TensorkeepError, match="another VisionTransformerQLoRA is registered"):
        read_config()
    assert vars(tool) == before
    start(objects=(objects := engine()))
    del objects["utils.ema"]["ModelEma"]
    del sys.modules["opentad.utils.ema"].ModelEma
    with pytest.raises(TensorkeepError, match="ModelEma is not there"):
        read_config()


# -- the average ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eval_one_epoch", "val_one_epoch"])
def test_an_evaluation_sees_the_average_and_every_bit_and_draw_is_put_back(
    start: Callable[..., ModuleType], tmp_path: Path, name: str
) -> None:
    tool = start()
    average, model = trained(tool, tmp_path, 2)
    before, drawn = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    seen = getattr(tool, name)(None, model, None, LOG, 0, model_ema=average)
    assert seen["model_ema"] is None
    averaged = average.module.state_dict()
    assert all(torch.equal(t, averaged[n]) for n, t in seen["weights"].items())
    assert any(not torch.equal(t, before[n]) for n, t in seen["weights"].items()), "the average is the weights"
    with pytest.raises(ValueError, match="stop"):
        tool.eval_one_epoch(None, model, ValueError("stop"), LOG, 0, model_ema=average)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())


def test_quantized_state_never_travels(start: Callable[..., ModuleType], tmp_path: Path) -> None:
    average, model = trained(start(), tmp_path, 1)
    trains = {n.removeprefix("module.") for n, p in model.named_parameters() if p.requires_grad}
    assert set(average.ema.tensors) == trains
    own, state = model.state_dict(), average.module.state_dict()
    assert list(own) == list(state), "OpenTAD loads it strictly"
    codes = [n for n in own if ".base." in n and not n.endswith("nf4")]
    assert len(codes) == 12
    assert all(state[n].data_ptr() == own[n].data_ptr() for n in codes)


# -- checkpoints and resume -----------------------------------------------------------------------------------------


def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(
    start: Callable[..., ModuleType], tmp_path: Path
) -> None:
    trained(start(), tmp_path / "whole", 4)
    trained(start(), tmp_path / "cut", 2)
    at = epoch(tmp_path / "cut", 1)
    _, model = trained(start("--resume", at), tmp_path / "cut", 4, resume=at, seed=9)
    assert content(epoch(tmp_path / "cut", 3)) == content(epoch(tmp_path / "whole", 3))
    assert model.module.loss_normalizer.dtype == torch.float32  # type: ignore[union-attr]


def test_without_evaluations_training_is_bitwise_the_same(start: Callable[..., ModuleType], tmp_path: Path) -> None:
    trained(start(), tmp_path / "with", 3)
    trained(start(), tmp_path / "without", 3, evaluate=False)
    assert content(epoch(tmp_path / "with", 2)) == content(epoch(tmp_path / "without", 2))


def test_a_file_is_certified_and_a_damaged_one_is_refused_before_it_is_read(
    start: Callable[..., ModuleType], tmp_path: Path
) -> None:
    trained(start(), tmp_path, 1)
    path = epoch(tmp_path, 0)
    findings, _, certified = verify(path)
    assert (findings, certified) == ([], True)
    block = read(path)["state_dict.module.head.weight"].blocks[0]
    whole = path.read_bytes()
    data = bytearray(whole)
    data[block.start + 1] ^= 4
    schedule = bytearray(whole)  # a plain number, which no digest of a tensor covers
    number = re.search(rb"last_epoch(?:q.|r....)K(.)", whole, re.DOTALL)
    assert number is not None
    schedule[number.start(1)] ^= 1
    cut = whole[: len(whole) // 2]
    for option, damaged, code in (
        ("--resume", data, "F03"),
        ("--resume", schedule, "F03"),
        ("--resume", cut, "F02"),
        ("--checkpoint", data, "F03"),
    ):
        path.write_bytes(damaged)
        start(option, path)
        with pytest.raises(TensorkeepError, match=code):
            read_config()


def test_a_failing_disk_and_spoiled_weights_leave_the_file_before_whole(
    start: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = start()
    average, model = trained(tool, tmp_path, 1)
    optimizer = tool.build_optimizer({"lr": 1e-2}, model, LOG)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    before = content(epoch(tmp_path, 0))
    (tmp_path / "checkpoint" / ".epoch_0.pth.0123abcd.tensorkeep-tmp").write_bytes(b"of a killed save")

    def full(states: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, pytest.raises(TensorkeepError, match="the disk is full"):
        broken.setattr(torch, "save", full)
        tool.save_checkpoint(model, average, optimizer, scheduler, 0, work_dir=str(tmp_path))
    with torch.no_grad():
        model.module.head.bias[0] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(TensorkeepError, match=r"V01.*state_dict.module.head.bias"):
        tool.save_checkpoint(model, average, optimizer, scheduler, 0, work_dir=str(tmp_path))
    assert content(epoch(tmp_path, 0)) == before
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == [
        "epoch_0.pth",
        "epoch_0.pth.tensorkeep.json",
    ]


def edited(path: Path, change: Callable[[dict[str, Any]], None], target: Path) -> Path:
    states = torch.load(path)
    change(states)
    torch.save(states, target)
    return target


def drop_weight(states: dict[str, Any]) -> None:
    del states["state_dict_ema"]["module.head.bias"]


def another_base(states: dict[str, Any]) -> None:
    name = next(n for n in states["state_dict_ema"] if n.endswith("down_proj.base.weight"))
    states["state_dict_ema"][name] = states["state_dict_ema"][name] ^ 1


def nudged_base(states: dict[str, Any]) -> None:
    name = "module.backbone.patch_embed.projection.bias"
    states["state_dict_ema"][name] = states["state_dict_ema"][name] * (1 + 1e-6)


def other_dtype(states: dict[str, Any]) -> None:
    states["state_dict"]["module.head.weight"] = states["state_dict"]["module.head.weight"].half()


def wrong_moment(states: dict[str, Any]) -> None:
    del states["tensorkeep"]  # as OpenTAD writes it: nothing but numbers and shapes to go by
    moments = states["optimizer"]["state"]
    a, b = sorted(moments)[:2]
    moments[a], moments[b] = moments[b], moments[a]


def unknown_weight(states: dict[str, Any]) -> None:
    states["state_dict"]["module.head.scale"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_weight, r"K01.*missing from the checkpoint: module.head.bias"),
        (another_base, r"A04.*1 frozen tensors of the average are not the model's"),
        (nudged_base, r"A04.*1 frozen tensors of the average"),
        (other_dtype, r"S04.*module.head.weight is torch.float16"),
        (wrong_moment, r"R05.*moments that do not fit"),
        (unknown_weight, r"Unexpected key.*head.scale"),
    ],
)
def test_a_resume_is_strict(
    start: Callable[..., ModuleType], tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    trained(start(), tmp_path, 1)
    path = edited(epoch(tmp_path, 0), change, tmp_path / "edited.pth")
    with pytest.raises((TensorkeepError, RuntimeError), match=f"(?s){said}"):
        trained(start("--resume", path), tmp_path, 2, resume=path)


def test_moments_go_to_the_parameters_they_were_of(start: Callable[..., ModuleType], tmp_path: Path) -> None:
    trained(start(), tmp_path, 1)
    objects = engine()

    def build_optimizer(cfg: Any, model: Any, logger: Any) -> Any:
        groups = [[p for n, p in model.named_parameters() if ("adapter" in n) == adapter] for adapter in (True, False)]
        return torch.optim.AdamW([{"params": group[::-1]} for group in groups], lr=cfg["lr"])

    objects["cores.optimizer"]["build_optimizer"] = build_optimizer
    path = epoch(tmp_path, 0)
    with pytest.raises(TensorkeepError, match=r"R05 .*other groups or another order"):
        trained(start("--resume", path, objects=objects), tmp_path, 2, resume=path)


def test_an_opentad_file_goes_on_and_its_losses_are_said(
    start: Callable[..., ModuleType], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(start(), tmp_path, 1)

    def foreign(states: dict[str, Any]) -> None:
        del states["tensorkeep"]
        ema = states["state_dict_ema"]
        for name, tensor in ema.items():  # OpenTAD averages what is frozen too
            if tensor.is_floating_point() and "norm" in name:
                ema[name] = 0.999 * tensor + (1 - 0.999) * tensor

    path = edited(epoch(tmp_path, 0), foreign, tmp_path / "theirs.pth")
    with caplog.at_level(logging.WARNING):
        trained(start("--resume", path), tmp_path, 2, resume=path)
    assert "R01 the file is OpenTAD's own" in caplog.text
    assert read_resumed(path) == {}


def test_floats_under_a_resumed_model_become_its_codes(start: Callable[..., ModuleType]) -> None:
    tool = start()
    read_config()
    model = wrapped()
    tool.build_optimizer({"lr": 1e-2}, model, LOG)  # from here on loads into it are watched
    state = model.state_dict()
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    floats = {n: t for n, t in state.items() if not any(n.startswith(name) for name in layers)}
    model.load_state_dict(floats | {n: layer.dequantize() for n, layer in layers.items()})
    assert all(torch.equal(model.state_dict()[n], state[n]) for n in layers)


def test_the_loss_scale_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    given: list[object] = []
    scaler = SimpleNamespace(load_state_dict=given.append)
    saved = {"scaler": {"scale": 512.0}, "world_size": 2, "randomness": {}}
    with caplog.at_level(logging.WARNING):
        restore_run(saved, scaler, LOG)
        restore_run(saved, None, LOG)
    assert given == [{"scale": 512.0}]
    assert "R04 solver.amp is another" in caplog.text
    assert caplog.text.count("R01 random states begin anew") == 2  # of two processes


# -- the backbone ---------------------------------------------------------------------------------------------------


def test_the_backbone_computes_what_ours_does_on_frames_normalised_already() -> None:
    torch.manual_seed(1)
    own = OwnQLoRA(VitConfig(32, 16, 64, 2, 2, 256, 4, drop_path=0.0), lora_r=4)
    quantize_adapters(own)
    skin = VisionTransformerQLoRA(**TINY, lora_r=4)
    with torch.no_grad():
        for adapter in (block.adapter for block in own.blocks):
            adapter.up_proj.lora_B.normal_(std=0.1)  # type: ignore[union-attr, operator]
    skin.load_state_dict({named(n): t for n, t in own.state_dict().items()})
    frames = torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8)
    config = own.config
    out = skin.eval()(normalise_frames(frames, config.mean, config.std))
    assert torch.equal(out, own.eval()(frames, 2))
    with pytest.raises(TensorkeepError, match="3 chunks are not whole videos of 2"):
        skin(torch.zeros(3, 3, 4, 32, 32))


def named(name: str) -> str:
    return ".".join(naming.backbone_segments(tuple(name.split(".")), forward=False))


def test_its_names_are_opentads_and_its_parameters_come_in_opentads_order() -> None:
    plain = VisionTransformerQLoRA(**TINY, use_plain_adapter=True)
    inside = [n.removeprefix("blocks.0.") for n in plain.state_dict() if n.startswith("blocks.0.")]
    assert inside == [
        "norm1.weight",
        "norm1.bias",
        "attn.q_bias",
        "attn.v_bias",
        "attn.qkv.weight",
        "attn.proj.weight",
        "attn.proj.bias",
        "norm2.weight",
        "norm2.bias",
        "mlp.layers.0.0.weight",
        "mlp.layers.0.0.bias",
        "mlp.layers.1.weight",
        "mlp.layers.1.bias",
        "adapter.gamma",
        "adapter.down_proj.weight",
        "adapter.down_proj.bias",
        "adapter.up_proj.weight",
        "adapter.up_proj.bias",
    ]
    assert set(plain.state_dict()) - {n for n in plain.state_dict() if n.startswith("blocks.")} == {
        "pos_embed",
        "patch_embed.projection.weight",
        "patch_embed.projection.bias",
        "fc_norm.weight",
        "fc_norm.bias",
    }


@pytest.mark.parametrize("form", [{"quantize_bits": 4}, {"quantize_bits": 8}, {"use_plain_adapter": True}])
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_loads_its_own_state_strictly_in_another_process(form: dict[str, Any], packed: bool) -> None:
    torch.manual_seed(1)
    one = nn.ModuleDict({"backbone": VisionTransformerQLoRA(**TINY, **form, quantize_backbone=packed)})
    torch.manual_seed(2)
    other = nn.ModuleDict({"backbone": VisionTransformerQLoRA(**TINY, **form, quantize_backbone=packed)})
    state = one.state_dict()
    other.load_state_dict(state)
    assert all(torch.equal(t, state[n]) for n, t in other.state_dict().items())
    quantized = [n for n, m in one.named_modules() if isinstance(m, QuantLinear)]
    assert len(quantized) == (8 if packed else 0) + (0 if "use_plain_adapter" in form else 4)


def pretrained() -> dict[str, Tensor]:
    torch.manual_seed(3)
    state = VisionTransformerQLoRA(**TINY, use_plain_adapter=True).state_dict()
    return {n: t for n, t in state.items() if "adapter" not in n}


def test_pretrained_floats_become_codes_as_they_are_loaded(caplog: pytest.LogCaptureFixture) -> None:
    floats = pretrained()
    model = VisionTransformerQLoRA(**TINY, quantize_backbone=True)
    model.load_state_dict(floats, strict=False)  # as mmengine loads them: adapters are new
    layer = model.blocks[1].mlp.fc2  # type: ignore[union-attr]
    assert isinstance(layer, QuantLinear)
    weight = floats["blocks.1.mlp.layers.1.weight"]
    dense = nn.Linear(256, 64, bias=False)
    dense.weight = nn.Parameter(weight)
    assert torch.equal(layer.weight, QuantLinear.of(dense, "nf4").weight)
    assert 0 < float((layer.dequantize() - weight).abs().max()) < 0.02
    assert "8 linears of the file are floats" in caplog.text


def test_a_pretrained_file_of_another_naming_or_with_holes_is_refused() -> None:
    model = VisionTransformerQLoRA(**TINY)
    with pytest.raises(TensorkeepError, match=r"K01.*the file lacks 28 of 52"):
        model.load_state_dict({f"encoder.{n}": t for n, t in pretrained().items()}, strict=False)
    holes = {n: t for n, t in pretrained().items() if n != "blocks.1.attn.q_bias"}
    with pytest.raises(TensorkeepError, match=r"the file lacks 1 of .*blocks.1.attn.q_bias"):
        model.load_state_dict(holes, strict=False)
    twice = pretrained() | {"blocks.0.mlp.fc1.weight": torch.zeros(256, 64)}
    with pytest.raises(TensorkeepError, match="two names"):
        model.load_state_dict(twice, strict=False)
    with pytest.raises(TensorkeepError, match="qkv_bias False"):
        VisionTransformerQLoRA(**TINY, qkv_bias=False)


# -- OpenTAD itself -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("OPENTAD" not in os.environ, reason="OPENTAD (its checkout) and OPENTAD_PYTHON are not set")
def test_opentads_unmodified_tools_run_under_us(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.parity.opentad_guest", os.environ["OPENTAD"], os.environ["OPENTAD_PYTHON"]]
    ended = subprocess.run([*command, str(tmp_path / "guest")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
