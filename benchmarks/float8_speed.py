"""QLoRA of a Llama-3.1-8B shape with fp8 products beside bf16, and the parts that fp8 is made of, on one GPU.

    python -m benchmarks.float8_speed                         4 x 2048 tokens, most and balanced, and within 12 GiB
    python -m benchmarks.float8_speed --tiny                  a check of the script, on any machine

One model is built and arranged again for each way, so weights, start and tokens are the same. All ways are compiled
and run first; with `--after FILE` they are timed once that file is there. The model and the step are those of
`qlora_language`; `wide-N` keeps the wide products of N layers on the GPU, all else in main memory; `fp8-apart` adds
every update to its product by a product of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.qlora_language import LLAMA_8B, TINY, arranged_model, our_loss, same_start
from tensorkeep.language import _gated_float8
from tensorkeep.language._memory import arrange
from tensorkeep.language._memory_plan import Way
from tensorkeep.quantization import float8
from tensorkeep.quantization.frozen import FOUR_BIT_ROLES, dense_weight, float8_weight, frozen_state
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.modules import compute_in_float8

STEPS, WARM = 6, 2


def put(name: str, found: Any) -> None:
    """Print a result and write it at once."""
    print(f"{name}: {json.dumps(found)}", flush=True)
    if "OUT" in os.environ:
        with Path(os.environ["OUT"], "float8_speed.jsonl").open("a") as file:
            file.write(json.dumps({name: found}) + "\n")


def milliseconds(run: Callable[[], Any], times: int = 20) -> float:
    """Median of the runs, by events of the device."""
    for _ in range(3):
        run()
    spent = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return round(statistics.median(spent), 4)


def parts(tokens: int, rows: int, columns: int) -> dict[str, float]:
    """Time a product, what is rounded for it, and its weight, and say how far it is from float64."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16)
    layer = QuantLinear.of(linear, "nf4")
    layer.compute_in_float8()
    how, state = frozen_state(layer)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    wide, (codes, tops) = dense_weight(how, state, torch.bfloat16), float8.narrowed(x)
    narrow, scale = float8_weight(how, state, False), state[len(FOUR_BIT_ROLES)]
    exact = x[:256].double() @ layer.dequantize().double().T

    def off(made: Tensor) -> float:
        return round(float((made[:256].double() - exact).norm() / exact.norm()), 5)

    def product(fast: bool) -> Tensor:
        return torch._scaled_mm(codes, narrow.T, tops, scale[None], None, None, torch.bfloat16, fast)

    return {
        "bf16 product": milliseconds(lambda: x @ wide.T),
        "fp8 product": milliseconds(lambda: product(True)),
        "fp8 product, exact sums": milliseconds(lambda: product(False)),
        "rows rounded": milliseconds(lambda: float8.narrowed(x)),
        "weight bf16": milliseconds(lambda: dense_weight(how, state, torch.bfloat16)),
        "weight by rows": milliseconds(lambda: float8_weight(how, state, False)),
        "weight by columns": milliseconds(lambda: float8_weight(how, state, True)),
        "off, bf16": off(x @ wide.T),
        "off, fp8": off(product(True)),
        "off, fp8, exact sums": off(product(False)),
    }


def switch(model: nn.Module, on: bool) -> None:
    """Let a model's products be in fp8, or not."""
    if on:
        compute_in_float8(model)
        return
    for module in model.modules():
        for role in float8.ROLES if isinstance(module, QuantLinear) else ():
            module._buffers.pop(role, None)


def steps(model: nn.Module, optimizer: Any, vocabulary: int, batch: int, length: int, count: int) -> dict[str, Any]:
    device = next(iter(optimizer.param_groups[0]["params"])).device
    generator = torch.Generator(device).manual_seed(0)
    losses, seconds = [], []
    for step in range(count):
        if step == min(WARM, count - 1) and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(0, vocabulary, (batch, length), device=device, generator=generator)
        before = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = our_loss(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))
        seconds.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    rate = batch * length / statistics.median(seconds[WARM:] or seconds)
    return {"tokens/s": round(rate), "GiB": round(peak, 2), "losses": losses, "first": round(seconds[0], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--shape", default="4x2048")
    parser.add_argument("--ways", default="most+fp8,most,balanced+fp8,balanced,wide-10+fp8,most+fp8-apart")
    parser.add_argument("--after", type=Path, help="ways are timed once this file is there")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, length = (2, 64) if given.tiny else map(int, given.shape.split("x"))
    shape = TINY if given.tiny else LLAMA_8B
    if device.type == "cuda":
        for rows, columns in ((4096, 4096), (28672, 4096), (4096, 14336)):
            put(f"{rows}x{columns}", parts(batch * length, rows, columns))
    model: Any = arranged_model(shape, device, "most", not given.eager, batch * length)
    trained = same_start(model, device)
    starts = [parameter.detach().clone() for parameter in trained]
    model.train()

    def run(way: str, count: int) -> dict[str, Any]:
        word, _, compute = way.partition("+")
        kept: Any = Way(int(word[5:]), "queries", rows=True) if word.startswith("wide-") else word
        switch(model, compute.startswith("fp8"))
        _gated_float8.RIDING = compute != "fp8-apart"
        table = model.get_input_embeddings()
        table.weight.data = table.weight.data.to(device)  # an earlier way may have left it in main memory
        arrange(model, list(model.model.layers), kept, not given.eager, batch * length, True)
        with torch.no_grad():
            for parameter, start in zip(trained, starts):
                parameter.copy_(start)
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
        return steps(model, optimizer, shape["vocab_size"], batch, length, count)

    ways = given.ways.split(",")
    for way in ways:
        try:
            put(f"first {way}", run(way, 1))
        except (RuntimeError, TypeError) as error:  # the other ways are measured all the same
            put(f"first {way}", f"{type(error).__name__}: {error!s:.600}")
    while given.after is not None and not given.after.exists():
        time.sleep(0.2)
    for way in ways:
        try:
            put(way, run(way, WARM + STEPS))
        except (RuntimeError, TypeError) as error:
            put(way, f"{type(error).__name__}: {error!s:.300}")


if __name__ == "__main__":
    main()
