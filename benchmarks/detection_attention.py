"""Attention of the video transformers on a GPU: which kernel is the fastest at head sizes 64 and 88?

    python -m benchmarks.detection_attention            the kernels of torch, and FlexAttention compiled
    python -m benchmarks.detection_attention --no-flex

Shapes are those of a training step on 768 frames of 160 x 160: ViT-B (two videos, 12 heads of 64, 800 tokens) and
v2-g (one video, 16 heads of 88, 968 tokens a chunk). q, k and v are views of one tensor, as a block makes them,
or each by itself. Milliseconds are medians of device events; TFLOP/s count 4 L^2 d a head forward, 10 L^2 d backward.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorkeep.detection.model._attention import attend, attend_backward

SHAPES = {"vit-b": (96, 12, 800, 64), "v2-g": (48, 16, 968, 88)}  # chunks, heads, tokens, head size


def milliseconds(work: Callable[[], object], repeat: int = 12) -> float:
    found = []
    for number in range(repeat + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        if number >= 3:
            found.append(start.elapsed_time(stop))
    return statistics.median(found)


def heads(shape: tuple[int, int, int, int], joined: bool) -> list[Tensor]:
    chunks, count, length, size = shape
    made = torch.randn(chunks, length, 3, count, size, device="cuda", dtype=torch.bfloat16)
    parts = made.permute(2, 0, 3, 1, 4).unbind(0)
    return [part if joined else part.contiguous() for part in parts]


def told(name: str, shape: tuple[int, int, int, int], forward: float, backward: float, apart: float) -> None:
    chunks, count, length, size = shape
    unit = chunks * count * length**2 * size / 1e9  # of a millisecond's TFLOP/s
    print(
        f"{name:24} forward {forward:6.3f} ms {4 * unit / forward:4.0f} TFLOP/s  backward {backward:6.3f} ms "
        f"{10 * unit / backward:4.0f} TFLOP/s  from float32 {apart:.1e}",
        flush=True,
    )


def distance(out: Tensor, parts: list[Tensor]) -> float:
    """Relative distance of the first chunk from attention in float32."""
    exact = F.scaled_dot_product_attention(*(part[:1].float() for part in parts))
    return float((out[:1].float() - exact).norm() / exact.norm())


def kernels(name: str, shape: tuple[int, int, int, int]) -> None:
    for joined in (True, False):
        parts = heads(shape, joined)
        for kernel in ("cudnn", "flash"):
            try:
                done = attend(*parts, kernel)
                grad = torch.randn_like(done.out)
                forward = milliseconds(lambda: attend(*parts, kernel))  # noqa: B023
                backward = milliseconds(lambda: attend_backward(grad, *parts, done))  # noqa: B023
            except RuntimeError as error:
                print(f"{name} {kernel}: {str(error).splitlines()[0]}", flush=True)
                continue
            label = f"{name} {kernel} {'views' if joined else 'apart'}"
            told(label, shape, forward, backward, distance(done.out, parts))


def flex(name: str, shape: tuple[int, int, int, int]) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    parts = [part.requires_grad_() for part in heads(shape, False)]
    out = compiled(*parts)
    grad = torch.randn_like(out)
    forward = milliseconds(lambda: compiled(*parts))
    both = milliseconds(lambda: torch.autograd.grad(compiled(*parts), parts, grad))
    told(f"{name} flex", shape, forward, both - forward, distance(out.detach(), [p.detach() for p in parts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-flex", action="store_true")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for name, shape in SHAPES.items():
        kernels(name, shape)
    for name, shape in () if given.no_flex else SHAPES.items():
        flex(name, shape)


if __name__ == "__main__":
    main()
