"""What a forward and backward pass of a decoder takes of a GPU, computed from its sizes, and the fastest way that fits.

Counted: weights; gradients and moments of what trains; the work of one layer or of the head, whose wide products go in
chunks; what is in flight of each token while layers come and go; and what layers keep on the GPU. What is in flight was
measured on a Llama-3.1-8B over nf4 (benchmarks/results/qlora.md); all else is counted.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal, NamedTuple

from tensorkeep.errors import TensorkeepError

Little = Literal["start", "attention", "queries"]
GIB = 1 << 30
CHUNK_BYTES = 256 << 20  # of wide products, and of logits, at a time
LONG = 65536  # tokens from which main memory holds less of each layer
_HALF = 2  # bytes of a number
# numbers of each token in flight, beside what two layers hold: as many times the wider of hidden state and queries
_IN_FLIGHT: dict[Little, float] = {"queries": 5.0, "attention": 10.5, "start": 11.0}
_SLACK = 256 << 20  # bytes: updates and their gradients in half precision, tables of positions
_MARGIN = 0.03  # of the need: what torch's allocator cannot fill
# of a hidden state, as many as were seen to train (benchmarks/results/qlora.md): where rows are no documents,
# attention is torch's, whose kernels count in 32 bits
_NUMBERS, _NUMBERS_PACKED = 1 << 31, 1 << 32
_STRETCHES = (2, 4, 6)  # layers of which one keeps its input
_HOST_SHARE = 0.8  # of main memory that may be page-locked


class Sizes(NamedTuple):
    """Of a decoder.

    Attributes:
        layers: how many.
        hidden: width of the hidden state.
        wide: of gate and of up.
        queries: width of all heads' queries.
        keys: width of all heads' keys, or values.
        vocabulary: rows of the head.
        weights: bytes of them on the GPU.
        table: bytes of the embeddings among them that may wait in main memory.
        training: bytes of gradients and moments.
        float8: whether products of the layers are in float8.
    """

    layers: int
    hidden: int
    wide: int
    queries: int
    keys: int
    vocabulary: int
    weights: int
    table: int
    training: int
    float8: bool = False


class Way(NamedTuple):
    """How decoder layers keep what their backward needs.

    Attributes:
        wide: so many layers keep their wide products on the GPU, the last ones.
        little: what a layer keeps besides; None: all of it, on the GPU.
        host: bytes of main memory that it may wait in; what is beyond stays on the GPU (None: any number).
        rows: whether frozen embeddings wait there, too.
        every: of so many layers in a row one keeps its input, and those of the others are made again from it.
    """

    wide: int
    little: Little | None
    host: int | None = None
    rows: bool = False
    every: int = 1


class Plan(NamedTuple):
    """A way that fits.

    Attributes:
        micro: samples of a forward pass.
        way: what layers keep.
        need: bytes of the GPU, by what takes them.
        host: bytes of main memory.
    """

    micro: int
    way: Way
    need: dict[str, int]
    host: int

    @property
    def total(self) -> int:
        """Bytes of the GPU, with the margin."""
        return math.ceil(sum(self.need.values()) * (1 + _MARGIN))


def kept(sizes: Sizes, tokens: int, little: Little) -> int:
    """Return the bytes that one layer keeps of so many tokens."""
    width = {"start": 0, "attention": sizes.queries, "queries": 2 * sizes.queries + 2 * sizes.keys}[little]
    return _HALF * tokens * (sizes.hidden + width)


def needed(sizes: Sizes, tokens: int, way: Way) -> dict[str, int]:
    """Return the bytes of the GPU that training on so many tokens at a time takes, by what takes them."""
    chunk = min(tokens, CHUNK_BYTES // (2 * _HALF * max(sizes.wide, 1)))
    dense = 3 * sizes.wide * sizes.hidden  # of one MLP, dequantized
    layer = _HALF * (dense + chunk * (3 * sizes.wide + 2 * sizes.hidden))
    if sizes.float8:  # gate and up by rows and by columns, down by columns, and rounded activations: a byte each
        layer = 5 * sizes.wide * sizes.hidden + chunk * (7 * sizes.wide + 5 * sizes.hidden)
    head = min(CHUNK_BYTES, _HALF * tokens * sizes.vocabulary)
    little = way.little or "queries"
    one, across = kept(sizes, tokens, little), _HALF * tokens * max(sizes.hidden, sizes.queries)
    at_a_time = 2 * one + round(_IN_FLIGHT[little] * across)
    wide = way.wide * _HALF * tokens * 2 * sizes.wide
    if way.little is None:
        resting = sizes.layers * (one + across // 2)
    else:
        waiting = _waiting(sizes, tokens, way)
        resting = max(waiting - (way.host if way.host is not None else waiting), 0)
    return {
        "weights": sizes.weights - (sizes.table if way.rows else 0),
        "training": sizes.training,
        "one layer's work": max(layer, head) + _SLACK,
        "tokens in flight": at_a_time,
        "kept for the backward": wide + resting,
    }


def _waiting(sizes: Sizes, tokens: int, way: Way) -> int:
    """Count the bytes that layers keep besides wide products, at most at a time."""
    assert way.little is not None
    every = min(way.every, sizes.layers)
    return (-(-sizes.layers // every) + every - 1) * kept(sizes, tokens, way.little)


def planned(sizes: Sizes, samples: int, length: int, limit: int, host: int, packed: bool = False) -> Plan:
    """Choose the fastest way that fits: as many layers as can keep their products, and only then fewer samples.

    Args:
        sizes: of the decoder.
        samples: of a forward pass, at most.
        length: tokens of a sample.
        limit: bytes of the GPU.
        host: bytes of main memory that may be used.
        packed: whether rows of documents are attended without a mask.

    Returns:
        The plan.

    Raises:
        TensorkeepError: one sample at a time does not fit either, or is longer than what was seen to train.
    """
    longest = (_NUMBERS_PACKED if packed else _NUMBERS) // max(sizes.hidden, sizes.queries)
    if length > longest:
        what = f"rows of {length} tokens are too long: {longest} were seen to train"
        raise TensorkeepError(what, where="data.length", hint=f"{longest} tokens of a row at most (of a pair, for dpo)")
    least: Plan | None = None
    micro = min(samples, longest // length)
    while True:
        for way in _ways(sizes, micro * length, host, micro == 1):
            need = needed(sizes, micro * length, way)
            in_host = 0 if way.little is None else min(_waiting(sizes, micro * length, way), host)
            plan = Plan(micro, way, need, in_host)
            if plan.total <= limit:
                return plan
            least = plan if least is None or plan.total < least.total else least
        if micro <= 1:
            break
        micro = -(-micro // 2)
    assert least is not None
    what = f"{least.total / GIB:.1f} GiB are needed at the least, {limit / GIB:.1f} are allowed: {parts(least.need)}"
    hint = f"memory_limit_gib: {math.ceil(least.total / GIB)}, or a shorter data.length"
    raise TensorkeepError(what, where="training.memory_limit_gib", hint=hint)


def _ways(sizes: Sizes, tokens: int, host: int, alone: bool) -> list[Way]:
    """List the ways for so many tokens, of one sample `alone` or of several, the fastest first."""
    levels: tuple[Little, ...] = ("queries", "attention", "start") if tokens <= LONG else ("attention", "start")
    fits = [level for level in levels if sizes.layers * kept(sizes, tokens, level) <= host]
    level = fits[0] if fits else "start"
    ways = [Way(sizes.layers, None), *(Way(wide, level, host, True) for wide in range(sizes.layers, -1, -1))]
    if alone:  # attention again, then one more forward, where not even one sample fits otherwise
        ways += [Way(0, "start", host, True, every) for every in ((1,) if level != "start" else ()) + _STRETCHES]
    return ways


def parts(need: dict[str, int]) -> str:
    """Say what takes how much."""
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.items() if size >= GIB // 20)


def said(plan: Plan, length: int, layers: int, limit: int) -> str:
    """Say what a plan is, for a person."""
    way = plan.way
    words = [f"memory plan for {limit / GIB:g} GiB: {plan.micro} x {length} tokens a forward"]
    words.append(f"{way.wide} of {layers} layers keep their wide products")
    if way.little is None:
        words.append("nothing waits in main memory")
    else:
        words.append(f"what else a backward needs ({way.little}) waits in {plan.host / GIB:.1f} GiB of main memory")
    if way.every > 1:
        words.append(f"one of {way.every} layers keeps its input, those of the others are made again")
    return f"{'; '.join(words)}; {plan.total / GIB:.1f} GiB are needed: {parts(plan.need)}"


def main_memory() -> int:
    """Return the bytes of main memory that this process may page-lock: a share of what machine or container has.

    Processes that torchrun started on this machine share it.
    """
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups of version 2 and 1
        try:
            text = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            size = min(size, int(text))
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return round(size * _HOST_SHARE / max(int(here) if here.isdecimal() else 1, 1))
