"""Reproduce the failure of a 4-bit model's EMA with stock calls, then train, save and restart the same model with ours.

With stock calls the averaged model does not load, and a "fix" with `strict=False` loads it, says nothing, and leaves
wrong weights behind.

Measured before with bitsandbytes 0.50.2: weights wrong by 0.23 (another random seed), 0.68 (heavy-tailed pretrained
weights under the scales of a fresh nn.Linear), 2.1 (an nf4 file in an fp4 model), 0.185 (codes averaged at decay
0.9999).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tensorkeep.adapters.lora import add_lora
from tensorkeep.quantization.loading import load_quantized
from tensorkeep.quantization.modules import quantized_layers
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.ema import Ema
from tensorkeep.training.live_state import optimizer_state, put_optimizer, put_tensors, stored_tensors
from tensorkeep.training.state_files import State

WIDTH = 512  # every row is whole blocks: what is wrong below is not a kernel's fault
LAYERS = ("0", "2")
STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")


def stock(seed: int, kind: str = "nf4", init: str = "normal") -> nn.Sequential:
    """Make two frozen 4-bit linears of bitsandbytes and a head that trains.

    `init`: "normal", as the weights of a ViT are drawn; "heavy"-tailed, as they become; or "linear", nn.Linear's own.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    packed = {"compress_statistics": True, "quant_type": kind}
    linear = bitsandbytes.nn.Linear4bit
    model = nn.Sequential(
        linear(WIDTH, WIDTH, **packed), nn.GELU(), linear(WIDTH, WIDTH, **packed), nn.Linear(WIDTH, 10)
    )
    for layer in LAYERS:
        weight = model.get_submodule(layer).weight.data  # type: ignore[union-attr]
        if init == "normal":
            weight.normal_(0, 0.02)
        elif init == "heavy":
            weight.copy_(0.02 * torch.distributions.StudentT(4.0).sample(weight.shape))
    model.to("cpu")  # the move is what quantizes
    for layer in LAYERS:
        # the kernel of AVX512_BF16 machines repacks weights in place: another failure than the one told here
        model.get_submodule(layer).support_avx512bf16_for_cpu = False
    return model.eval()


def weights(model: nn.Module) -> list[Tensor]:
    from bitsandbytes.functional import dequantize_4bit

    found: list[Any] = [model.get_submodule(layer).weight for layer in LAYERS]  # type: ignore[attr-defined]
    return [dequantize_4bit(w.data, w.quant_state).float() for w in found]


def error(model: nn.Module, right: list[Tensor]) -> float:
    """Return the relative Frobenius error of the 4-bit weights, the worst layer's."""
    return max(float((w - r).norm() / r.norm()) for w, r in zip(weights(model), right))


def filtered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the quantization state, as the usual "fix" does: the load no longer complains then."""
    return {name: t for name, t in state.items() if not any(word in name for word in STATE)}


def in_new_process(call: str) -> dict[str, Any]:
    """Evaluate `call`, an expression over this module's functions, in a process of its own."""
    code = f"import json; from tests.test_flame_failure import *; print(json.dumps({call}))"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- stock ------------------------------------------------------------------------------------------------------------


def test_stock_a_4_bit_model_cannot_load_its_own_state() -> None:
    model = stock(0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight\.absmax"):
        model.load_state_dict(model.state_dict())


def test_stock_the_fix_is_silent_and_harmless_in_the_process_that_saved() -> None:
    model = stock(0)
    right = weights(model)
    result = model.load_state_dict(filtered(model.state_dict()), strict=False)
    assert not result.missing_keys and not result.unexpected_keys and error(model, right) == 0


@pytest.mark.parametrize(
    ("saved", "fresh", "low", "high"),
    [
        (("nf4", "normal"), ("nf4", "normal"), 0.18, 0.28),
        (("nf4", "heavy"), ("nf4", "linear"), 0.3, 1.0),
        (("nf4", "normal"), ("fp4", "normal"), 1.8, 2.4),
    ],
)
def test_stock_the_fix_leaves_wrong_weights_after_a_restart_without_a_word(
    saved: tuple[str, str], fresh: tuple[str, str], low: float, high: float
) -> None:
    model, again = stock(0, *saved), stock(1, *fresh)  # a restart draws other numbers: its seed is another
    result = again.load_state_dict(filtered(model.state_dict()), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert low < error(again, weights(model)) < high


class CopyEma:
    """An EMA as OpenTAD's ModelEma and timm's V2 make it: a deep copy in which every value is averaged."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        for mine, theirs in zip(self.module.state_dict().values(), model.state_dict().values()):
            mine.copy_(decay * mine + (1.0 - decay) * theirs)


@pytest.mark.parametrize("which", ["copy", "AveragedModel"])
def test_stock_an_average_of_packed_bytes_is_another_weight(which: str) -> None:
    model = stock(0)
    right, before = weights(model), model.get_submodule("0").weight.data.clone()
    if which == "copy":
        ema = CopyEma(model)
        for _ in range(100):
            ema.update(model, 0.9999)  # the model does not change: an average of it should not either
        averaged: nn.Module = ema.module
    else:
        other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        for _ in range(100):
            other.update_parameters(model)
        averaged = other.module
    changed = (averaged.get_submodule("0").weight.data != before).float().mean().item()  # type: ignore[operator,union-attr]
    assert 0.1 < changed < 0.3 and 0.1 < error(averaged, right) < 0.3


def test_stock_the_weights_cannot_be_put_back_after_evaluation() -> None:
    model = stock(0)
    average = {n: t + 1 if n == "3.weight" else t for n, t in model.state_dict().items()}
    current = copy.deepcopy(model.state_dict())
    model.load_state_dict(filtered(average), strict=False)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(current)


# -- ours -------------------------------------------------------------------------------------------------------------


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, number: int) -> None:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
    model.train()
    nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model)


def outputs(model: nn.Module, ema: Ema) -> dict[str, Tensor]:
    """Return the logits of the model and of its average, and every trained value."""
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(99))
    model.eval()
    with torch.no_grad():
        live = model(x)
        with ema.applied(model):
            averaged = model(x)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    averages = {f"ema {n}": t for n, t in ema.tensors.items()}
    return {n: t.clone() for n, t in {"live": live, "averaged": averaged, **trained, **averages}.items()}


def dense() -> nn.Sequential:
    """Make the same model in full precision."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10))


def adapted(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Ema]:
    """Put low-rank adapters on the 4-bit layers; return the model, its optimizer and its average."""
    add_lora(model, list(LAYERS), r=4)  # adopts bitsandbytes' linears
    model.get_submodule("3").requires_grad_(True)
    for layer in quantized_layers(model).values():
        layer.frozen_state = True  # type: ignore[assignment]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, Ema(model, decay=0.9, warmup=True)


def ours_restart(folder: str) -> dict[str, Any]:
    """Restart with another random seed: the base from its file, the rest from the checkpoint; three more steps."""
    torch.manual_seed(12345)
    model: nn.Module = dense()
    base = load_quantized(model, Path(folder) / "base.safetensors")
    model, optimizer, ema = adapted(model)
    found = checkpoint.newest(Path(folder) / "run")
    assert found is not None
    state = found[0]
    assert state.base == {"digest": base.base_digest}
    put_tensors(model, state.model, base=True)
    put_optimizer(model, optimizer, state.optimizer, state.document["optimizer"])
    ema.load_state_dict(state.ema, state.document["ema"]["updates"])
    torch.save(outputs(model, ema), Path(folder) / "resumed.pth")
    for number in range(3, 6):
        step(model, optimizer, ema, number)
    torch.save(outputs(model, ema), Path(folder) / "finished.pth")
    return {"bitsandbytes": "bitsandbytes" in sys.modules}


def test_ours_evaluates_restores_trains_saves_and_restarts_bitwise(tmp_path: Path) -> None:
    model = stock(0)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    digest = load_quantized(dense(), tmp_path / "base.safetensors").base_digest
    model, optimizer, ema = adapted(model)
    for number in range(3):
        step(model, optimizer, ema, number)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), ema.applied(model):
        _ = model(torch.zeros(1, WIDTH)), 1 / 0
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    tensors, _ = stored_tensors(model, base=True)
    assert not any("absmax" in name or t.dtype == torch.uint8 for name, t in tensors.items())
    moments, groups = optimizer_state(model, optimizer)
    document = {"step": 3, "optimizer": groups, "ema": {"updates": ema.updates}}
    checkpoint.save(tmp_path / "run", State(tensors, moments, ema.state_dict(), document, {"digest": digest}))
    wanted = {"resumed": outputs(model, ema)}
    for number in range(3, 6):
        step(model, optimizer, ema, number)
    wanted["finished"] = outputs(model, ema)
    assert not torch.equal(wanted["finished"]["live"], wanted["finished"]["averaged"])
    assert in_new_process(f"ours_restart({str(tmp_path)!r})") == {"bitsandbytes": False}
    for name, tensors in wanted.items():
        found = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        assert found.keys() == tensors.keys()
        assert [n for n in tensors if not torch.equal(found[n], tensors[n])] == []
