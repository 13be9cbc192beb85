"""What an average costs a step, and a swap in and out, on a frozen 4-bit base and on a model that trains whole.

    python -m benchmarks.ema [--rounds 5]

Ours against torch's AveragedModel, ema-pytorch, timm's ModelEmaV3 and OpenTAD's ModelEma (written anew from what it
does). ViT-L size: 24 blocks of width 1024. CPU time of one thread: what is measured is bytes and Python, not cores. The
floor is what an update cannot avoid: weights read, average read and written, at the speed this machine copies memory.

Peers that cannot be imported are skipped and named. Beside an installed torch, without touching it:
    pip download --no-deps ema-pytorch==0.8.3 timm==1.0.31 -d peers
    for w in peers/*.whl; do unzip -qo $w -d peers; done
    PYTHONPATH=peers python -m benchmarks.ema
timm is loaded by the one file that has the class, since the package asks for torchvision.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.measure import versions
from tensorkeep.adapters.lora import add_lora
from tensorkeep.quantization.modules import model_sizes, quantize_
from tensorkeep.training.ema import Ema

DECAY = 0.9999


class Block(nn.Module):
    """The linears and norms of a transformer block; no forward is timed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Low(nn.Module):
    """bitsandbytes' 4-bit linear under a low-rank pair: what the peers are used on."""

    def __init__(self, dense: nn.Linear, r: int) -> None:
        from bitsandbytes.nn import Linear4bit

        super().__init__()
        self.base = Linear4bit(dense.in_features, dense.out_features, quant_type="nf4")
        self.base.weight.data, self.base.bias = dense.weight.data, dense.bias
        self.base.to("cpu").requires_grad_(False)  # the move quantizes
        self.lora_A = nn.Parameter(torch.randn(r, dense.in_features))
        self.lora_B = nn.Parameter(torch.randn(dense.out_features, r))


def model_of(depth: int, width: int, quantized: bool) -> tuple[nn.Module, str]:
    """The model, and what its base is held by: bitsandbytes' layers, or ours where it is not installed."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(Block(width) for _ in range(depth)))
    if not quantized:
        return model, "plain linears"
    model.requires_grad_(False)
    if importlib.util.find_spec("bitsandbytes") is None:
        quantize_(model, "nf4")
        add_lora(model, "all-linear", r=16)
        return model, "tensorkeep's 4-bit linears"
    for block in model:  # type: ignore[attr-defined]
        for name in ("qkv", "proj", "fc1", "fc2"):
            setattr(block, name, Low(getattr(block, name), 16))
    return model, "bitsandbytes' 4-bit linears"


class Subject(NamedTuple):
    """One way to average. `swap`: the average into the model and out again, with nothing in between."""

    name: str
    update: Callable[[], Any]
    swap: Callable[[], Any]


def ours(model: nn.Module) -> Subject:
    ema = Ema(model, DECAY)

    def swap() -> None:
        with ema.applied(model):
            pass

    return Subject("tensorkeep", lambda: ema.update(model), swap)


def ours_copying(model: nn.Module) -> Subject:
    ema = Ema(model, DECAY)

    def swap() -> None:
        with ema.applied(model, copy=True):
            pass

    return Subject("tensorkeep, copy=True", lambda: ema.update(model), swap)


def averaged_model(model: nn.Module) -> Subject:
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ema.update_parameters(model)  # the first one copies
    return Subject("torch AveragedModel", lambda: ema.update_parameters(model), _by_state(model, ema.module))


def opentad(model: nn.Module) -> Subject:
    """OpenTAD's: a deep copy; every value of the state dict, codes and counters too, averaged one by one."""
    module = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update() -> None:
        for mine, theirs in zip(module.state_dict().values(), model.state_dict().values()):
            mine.copy_(DECAY * mine + (1.0 - DECAY) * theirs)

    return Subject("OpenTAD ModelEma", update, _by_state(model, module))


def _by_state(model: nn.Module, average: nn.Module) -> Callable[[], None]:
    """The swap of OpenTAD's evaluation: a deep copy of the state dict, the average's loaded, the copy loaded.

    Not strict, since bitsandbytes' layers refuse their own state: the packed weights that come back may be others.
    """

    def swap() -> None:
        current = copy.deepcopy(model.state_dict())
        model.load_state_dict(average.state_dict(), strict=False)
        model.load_state_dict(current, strict=False)

    return swap


def ema_pytorch(model: nn.Module) -> Subject:
    from ema_pytorch import EMA

    ema = EMA(model, beta=DECAY, update_after_step=0, update_every=1)
    ema.update()
    return Subject("ema-pytorch", ema.update, _by_state(model, ema.ema_model))


def timm(model: nn.Module) -> Subject:
    found = [Path(p) / "timm/utils/model_ema.py" for p in sys.path if (Path(p) / "timm/utils/model_ema.py").is_file()]
    if not found:
        raise ImportError("No module named 'timm'")
    spec = importlib.util.spec_from_file_location("timm_model_ema", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ema = module.ModelEmaV3(model, decay=DECAY, foreach=True)
    return Subject("timm ModelEmaV3", lambda: ema.update(model), _by_state(model, ema.module))


SUBJECTS = (ours, ours_copying, averaged_model, timm, ema_pytorch, opentad)


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Measure the median CPU time of a call, after one that is not counted; other work on the machine adds little."""
    call()
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        taken.append(1e3 * (time.process_time() - started))
        if sum(taken) > 60e3:
            break
    return statistics.median(taken)


def floor(count: int, rounds: int) -> float:
    """Milliseconds of the bytes of an update: 12 a parameter, at the rate of adding one array into another."""
    one, other = torch.zeros(count), torch.ones(count)
    return milliseconds(lambda: one.add_(other), rounds)


def compare(title: str, quantized: bool, arguments: argparse.Namespace) -> None:
    model, how = model_of(arguments.depth, arguments.width, quantized)
    held = model_sizes(model)
    print(f"\n## {title}, {how}: {held}")
    print(f"floor of an update: {floor(held.trainable, arguments.rounds):.2f} ms")
    print("| | update, ms | times ours | swap in and out, ms | times ours |\n|---|---|---|---|---|")
    first: tuple[float, float] | None = None
    for make in SUBJECTS:
        try:
            subject = make(model)
        except ImportError as error:
            print(f"| {make.__name__} | skipped: {error} | | | |")
            continue
        update = milliseconds(subject.update, arguments.rounds)
        swap = milliseconds(subject.swap, arguments.rounds)
        first = first or (update, swap)
        ratios = update / first[0], swap / first[1]
        print(f"| {subject.name} | {update:.2f} | {ratios[0]:.1f} | {swap:.2f} | {ratios[1]:.1f} |", flush=True)
        del subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = " ".join(f"{v:.1f}" for v in os.getloadavg())
    conditions = f"CPU time of one thread; load average {load}; median of {arguments.rounds}"
    print(f"{versions('torch', 'ema-pytorch', 'timm')}; {conditions}")
    compare("frozen nf4 base, LoRA r 16 on all linears", True, arguments)
    compare("trained whole, float32", False, arguments)


if __name__ == "__main__":
    main()
