"""Attention of packed rows, under a mask of the row and document by document: `python -m benchmarks.packed_attention`.

Forward and backward of `tensorkeep.language._documents.attend` beside torch's SDPA under the mask that packed rows
would need, in milliseconds, best of `--repeats`. On a GPU 32 heads over 8 of width 128 in bf16; on a CPU 9 over 3 of
width 64 in float32. Rows are said as ROWSxTOKENS:DOCUMENT.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tensorkeep.language._documents import attend, documents_of

GPU = ["4x2048:512", "1x32768:2048", "1x32768:8192"]
CPU = ["4x256:64", "4x512:128", "1x2048:256", "2x512:512"]


def best(step: Callable[[], Tensor], leaves: list[Tensor], repeats: int) -> float:
    """Milliseconds of a forward and backward, the best of several."""
    found = []
    for _ in range(repeats + 1):
        for leaf in leaves:
            leaf.grad = None
        if leaves[0].is_cuda:
            torch.cuda.synchronize()
        since = time.perf_counter()
        torch.autograd.backward(step().sum())
        if leaves[0].is_cuda:
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - since))
    return min(found[1:])


def measure(rows: int, length: int, document: int, repeats: int, masked: bool) -> tuple[float | None, float]:
    """The two times of one shape; None for the mask where it is left out."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    heads, groups, width = (32, 8, 128) if cuda else (9, 3, 64)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(rows, n, length, width, device=device, dtype=dtype, requires_grad=True)
        for n in (heads, groups, groups)
    )
    positions = (torch.arange(length, device=device) % document).expand(rows, length)
    where = documents_of(positions)
    number = (positions == 0).cumsum(1)
    ours = best(lambda: attend(query, key, value, where), [query, key, value], repeats)
    if not masked:
        return None, ours
    mask = (number[:, :, None] == number[:, None, :]).tril()[:, None]
    theirs = best(
        lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True),
        [query, key, value],
        repeats,
    )
    return theirs, ours


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=GPU if torch.cuda.is_available() else CPU)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-mask", action="store_true", help="leave the mask out, which may not fit")
    given = parser.parse_args()
    print("| rows | documents of | mask, ms | without, ms |\n|---|---|---|---|")
    for shape in given.shapes:
        rows, length, document = map(int, shape.replace(":", "x").split("x"))
        theirs, ours = measure(rows, length, document, given.repeats, not given.no_mask)
        print(f"| {rows} x {length} | {document} | {'-' if theirs is None else f'{theirs:.2f}'} | {ours:.2f} |")


if __name__ == "__main__":
    main()
