"""Decode the frames of samples on the device that trains, ahead of the updates that use them.

Processes that make samples only ask (`asking`): which sample comes when, and what is drawn for it, is decided there as
ever. Threads of the training process decode, scale and cut, each with a stream of its own; what their decoder refuses
PyAV decodes, and the sample says so.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorkeep.detection.data.asking import Asked, ask
from tensorkeep.detection.data.augment import centre_crop
from tensorkeep.detection.data.device_augment import Uncut, cut_out, scaled
from tensorkeep.detection.data.torchcodec_frames import (
    UNSUPPORTED,
    decode_pictures,
    open_decoder,
    torchcodec_version,
)
from tensorkeep.detection.data.video import decode
from tensorkeep.errors import TensorkeepError

_own = threading.local()  # a stream for each thread


def decode_asked(asked: Asked, device: torch.device) -> tuple[Uncut, str | None]:
    """Decode what was asked for.

    Args:
        asked: from `asking.ask`; its tuples may have become lists on the way.
        device: where to.

    Returns:
        The frames, cut to the draw's box; and why PyAV decoded them, None where the device did.

    Raises:
        TensorkeepError: PyAV cannot decode them either.
    """
    size, why = (asked.size[0], asked.size[1]), None
    try:
        frames = decode_pictures(asked.pictures, device, partial(scaled, size=size))
    except TensorkeepError as error:
        why = f"decoded on a CPU: {error.what}"
        frames = decode(asked.pictures.path, asked.indices, size=size, broken=asked.broken).to(device)
    if asked.drawn is None:
        return Uncut(centre_crop(frames, asked.side), None), why
    return cut_out(frames, asked.drawn), why


def decoded_ahead(
    parts: Iterator[list[Any]],
    device: torch.device,
    threads: int,
    make: Callable[[Asked, torch.device], tuple[Uncut, str | None]] = decode_asked,
) -> Generator[list[Any], None, None]:
    """Decode the frames of updates while earlier updates are made; their order stays.

    Args:
        parts: the micro-batches of each update, as `collate` makes them of samples that ask.
        device: where to.
        threads: so many clips are decoded at a time, and so many samples at least are ahead of the update that is made.
        make: decodes a clip.

    Yields:
        The same micro-batches with frames in them.
    """
    waiting: deque[list[Any]] = deque()

    def begin(asked: Asked) -> Future[tuple[Uncut, str | None]]:
        return pool.submit(_apart, make, asked, device)

    with ThreadPoolExecutor(threads, "decode") as pool:
        try:
            for update in parts:
                waiting.append([_begun(batch, begin) for batch in update])
                while _enough(list(waiting)[1:], threads):
                    yield [_done(batch) for batch in waiting.popleft()]
            while waiting:
                yield [_done(batch) for batch in waiting.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(parts, Generator):
                parts.close()


def require_decoder(paths: Sequence[str], device: torch.device) -> str:
    """See that a GPU's decoder can be used, on videos of the data.

    Args:
        paths: some of them.
        device: where they are decoded.

    Returns:
        What decodes, for the run's record.

    Raises:
        TensorkeepError: There is no GPU, no torchcodec that uses one, or no decoder on it.
    """
    if device.type != "cuda":
        what = f"frames are to be decoded on a GPU, and the run is on the {device.type.upper()}"
        raise TensorkeepError(what, where="data.decode", hint="--data.decode cpu")
    for path in paths:
        asked = ask(path, np.zeros(1, dtype=np.int64), lambda height, width: (height, width))
        if isinstance(asked, str):
            continue
        try:
            open_decoder(asked.pictures, device)
            break
        except TensorkeepError as error:
            if UNSUPPORTED not in error.what:  # what holds of one video need not hold of others
                hint = error.hint or "--data.decode cpu"
                raise TensorkeepError(error.what, where="data.decode", hint=hint) from error
    return f"torchcodec {torchcodec_version()}"


def _begun(batch: Any, begin: Callable[[Asked], Future[Any]]) -> Any:
    """Begin to decode what a micro-batch asks for."""
    if batch is None or isinstance(batch["inputs"], Tensor):
        return batch
    inputs = [begin(clip) if isinstance(clip, Asked) else clip for clip in batch["inputs"]]
    return {**batch, "inputs": inputs}


def _enough(later: Sequence[list[Any]], threads: int) -> bool:
    """Whether so many samples wait, decoded here or not, or so many updates that have none."""
    samples = sum(len(batch["inputs"]) for update in later for batch in update if batch is not None)
    return samples >= threads or len(later) > threads


def _done(batch: Any) -> Any:
    """Wait for the frames of a micro-batch; what is told of them goes to the samples' problems."""
    if batch is None or isinstance(batch["inputs"], Tensor):
        return batch
    inputs = []
    for clip, meta in zip(batch["inputs"], batch["meta"]):
        made, why = clip.result() if isinstance(clip, Future) else (clip, None)
        if why:
            meta["problems"].append(why)
        if made.frames.device.type == "cuda":  # memory of another stream, which must not be used again too early
            made.frames.record_stream(torch.cuda.current_stream(made.frames.device))
        inputs.append(made)
    return {**batch, "inputs": inputs}


def _apart(
    make: Callable[[Asked, torch.device], tuple[Uncut, str | None]], asked: Asked, device: torch.device
) -> tuple[Uncut, str | None]:
    """Decode in a thread: on a GPU in a stream of its own, to the end."""
    if device.type != "cuda":
        return make(asked, device)
    with torch.cuda.device(device):
        if not hasattr(_own, "stream"):
            _own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(_own.stream):
            made = make(asked, device)
            _own.stream.synchronize()
            return made
