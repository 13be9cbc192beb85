"""Make randomness that a restart cannot change.

Sample order and augmentation are pure functions of (seed, epoch, index), computed here with integers, so that neither
worker count, world size nor a library's version can change them. What is left (dropout, sampling) draws from the
process's own generators, whose states are captured as plain JSON and put back last.
"""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tensorkeep.errors import TensorkeepError

_MASK = (1 << 64) - 1


def derive(seed: int, *keys: int) -> int:
    """Derive the seed of whatever belongs to a sample, epoch or rank: a 63-bit number.

    SplitMix64 (Steele, Lea and Flood 2014) over the keys in turn.

    Args:
        seed: the run's seed.
        keys: numbers that say what the seed is for.

    Returns:
        The seed, the same for the same numbers, on any machine.

    Example:
        >>> derive(0, 1, 2) == derive(0, 1, 2), derive(0, 1, 2) == derive(0, 2, 1)
        (True, False)
    """
    state = seed & _MASK
    for key in (len(keys), *keys):
        state = _mix((state + 0x9E3779B97F4A7C15) & _MASK) ^ (key & _MASK)
    return _mix((state + 0x9E3779B97F4A7C15) & _MASK) >> 1


def _mix(z: int) -> int:
    """The finalizer of SplitMix64."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def generator(seed: int, *keys: int) -> torch.Generator:
    """Make a CPU generator for (seed, keys) alone; a sample's augmentation draws from its own.

    >>> a, b = (torch.rand(2, generator=generator(0, 1, 5)) for _ in range(2))
    >>> bool((a == b).all())
    True
    """
    return torch.Generator().manual_seed(derive(seed, *keys))


def order(seed: int, epoch: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Compute the permutation of `range(length)` in which an epoch visits its samples, int64 `[length]`.

    Indices sorted by SplitMix64 of (seed, epoch, index): the same on every machine and in every version.

    Args:
        seed: of the run, or derived from it.
        epoch: whose order it is.
        length: how many samples there are.

    Returns:
        The permutation.

    >>> order(0, 0, 5).tolist() == order(0, 0, 5).tolist(), sorted(order(0, 1, 5).tolist())
    (True, [0, 1, 2, 3, 4])
    """
    with np.errstate(over="ignore"):
        z = np.arange(length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(seed, epoch))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable").astype(np.int64)


def seed_process(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch (every device) for one rank, so that ranks draw different dropout masks."""
    number = derive(seed, rank)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.manual_seed(number)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it, if `on`, the same work gives the same bits each time; work without such a kernel is an error of torch.

    cuBLAS wants CUBLAS_WORKSPACE_CONFIG in the environment, where it stays set; torch looks there at its first product,
    so a process that has multiplied on the GPU before must have set it (`:4096:8`) itself.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def capture() -> dict[str, Any]:
    """Take the states of python's, numpy's and torch's global generators, of the CPU and every CUDA device.

    Returns:
        Plain JSON values.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, _pack(np.array(words, np.uint32)), gauss],
        "numpy": [kind, _pack(np.asarray(keys, np.uint32)), int(position), int(has_gauss), float(cached)],
        "torch": _pack(torch.get_rng_state().numpy()),
        "cuda": [
            _pack(state.numpy()) for state in (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        ],
    }


def fits(state: Mapping[str, Any]) -> bool:
    """Tell whether captured states are of as many CUDA devices as this process sees.

    Args:
        state: what `capture` gave.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return len(state.get("cuda", ())) == here


def restore(state: Mapping[str, Any]) -> None:
    """Put captured states back.

    Args:
        state: what `capture` gave.

    Raises:
        TensorkeepError: a state is malformed, or they are of another number of CUDA devices (R01).
    """
    try:
        version, words, gauss = state["python"]
        kind, keys, position, has_gauss, cached = state["numpy"]
        random.setstate((version, tuple(int(w) for w in _unpack(words, np.uint32)), gauss))
        np.random.set_state((kind, _unpack(keys, np.uint32), position, has_gauss, cached))
        torch.set_rng_state(torch.from_numpy(_unpack(state["torch"], np.uint8)))
        devices = [torch.from_numpy(_unpack(s, np.uint8)) for s in state["cuda"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TensorkeepError(f"the random state is malformed: {error}", where="state.json", code="R01") from None
    if devices and not fits(state):
        what = f"random states of {len(devices)} CUDA devices, {torch.cuda.device_count()} are here"
        raise TensorkeepError(what, where="state.json", code="R01", hint="show as many devices (CUDA_VISIBLE_DEVICES)")
    if devices:
        torch.cuda.set_rng_state_all(devices)


def _pack(numbers: np.ndarray[Any, Any]) -> str:
    """Little-endian bytes of an array, as base64."""
    return base64.b64encode(np.ascontiguousarray(numbers).astype(numbers.dtype.newbyteorder("<")).tobytes()).decode()


def _unpack(text: str, dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    """The array that `_pack` made a text of."""
    return np.frombuffer(base64.b64decode(text, validate=True), np.dtype(dtype).newbyteorder("<")).astype(dtype)
