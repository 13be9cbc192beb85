"""What one untrusted file may cost to read: bytes of memory and processor seconds, in proportion to its size.

Every reader of such files asks here: pickles, JSON, YAML (`yaml_documents`), GGUF vocabularies, configs. Reading a file
of up to 1 MB takes at most 10 s and 500 MB, with the start of the program; more is allowed as the file is larger.
`docs/reference/limits.md` lists the limits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.storage.files import Folder, LocalFolder

_MB = 1_000_000
_SECONDS = 5.0  # of processor time for a file of up to 1 MB, and for each MB more
_MEMORY, _MEMORY_PER_BYTE = 128 * _MB, 24  # bytes of objects: this much, and so many for each byte of the file
LARGEST_JSON = 256 << 20  # bytes; the largest indices and tokenizers known have 40 MB
_MOST_LAYERS = 1024
_MOST_PARTS = 1 << 17  # experts of all layers together; the largest models known have 50,000
_MOST_OF_HEAD, _MOST_POSITIONS = 1 << 16, 1 << 25  # tables are computed of these, whatever is stored
_MOST_SIZE = 1 << 31  # any other number that may size a tensor
_NO_SIZE = re.compile(r".*(theta|max_length|seed|params|parameters|flops|flos)|rotary_emb_base|sliding_window")
_MOST_OF_OTHERS = 1 << 100  # no tensor is sized by these; tokenizers write 1e30 for a length without limit
_ROWS = ("doge",)  # models whose experts are rows of tables: 16,384 in each layer by default
_MORE_THAN_STORED, _SMALL = 16, 1 << 26  # elements for each stored byte (2 bits hold 4), and so many more
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_CHECK_EVERY = 1024  # steps between looks at the clock


class Budget:
    """Count what reading a file costs, and stop with an error (F07) where it costs more than files of its size may.

    Args:
        size: bytes of the file.
        where: the file, for messages.
        clock: processor seconds so far; the thread's own.

    Example:
        >>> Budget(100, "x.pth").spend(memory=1 << 40)
        Traceback (most recent call last):
        tensorkeep.errors.TensorkeepError: F07 x.pth: takes more memory than a file of 100 bytes may
        hint: the file is damaged or hostile: do not open it with other programs
    """

    def __init__(self, size: int, where: object, clock: Callable[[], float] = time.thread_time) -> None:
        self.size, self.where, self._clock = size, where, clock
        self.memory = _MEMORY + _MEMORY_PER_BYTE * size
        self.seconds = _SECONDS * max(1.0, size / _MB)
        self._until = clock() + self.seconds
        self._steps = 0

    def spend(self, memory: int = 0, steps: int = 1) -> None:
        """Count bytes of new objects and steps of work; the clock is looked at every thousand steps."""
        self.memory -= memory
        self._steps += steps
        if self.memory < 0:
            raise self._over("memory")
        if self._steps >= _CHECK_EVERY:
            self._steps = 0
            if self._clock() > self._until:
                raise self._over("time")

    def _over(self, what: str) -> TensorkeepError:
        return TensorkeepError(
            f"takes more {what} than a file of {self.size} bytes may",
            where=self.where,
            code="F07",
            hint="the file is damaged or hostile: do not open it with other programs",
        )


# -- JSON ---------------------------------------------------------------------------------------------------------


def check_json(data: bytes, where: object) -> None:
    """Refuse JSON that holds more values than a file of its size may, before it is parsed.

    Args:
        data: the file's bytes.
        where: the file, for messages.

    Raises:
        TensorkeepError: F07.
    """
    # each value is introduced by one of these; what a text holds of them makes the count only larger
    Budget(len(data), where).spend(72 * data.count(b"[") + 240 * data.count(b"{") + 64 * data.count(b","))


def read_small(path: Path, most: int = LARGEST_JSON) -> bytes:
    """Return a file that belongs in memory: JSON, a recipe, a tokenizer.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        TensorkeepError: it is larger (sparse files are, at no cost), is no regular file or cannot be read.
    """
    folder = LocalFolder(path.parent)
    return read_small_from(folder, path.name, most)


def read_small_from(folder: Folder, name: str, most: int = LARGEST_JSON) -> bytes:
    """Return a file of a folder that belongs in memory.

    Args:
        folder: where it lies.
        name: its name.
        most: bytes that it may have.

    Raises:
        TensorkeepError: it is larger, is no regular file or cannot be read.
    """
    size = folder.size(name)
    if size > most:
        raise too_large(size, most, f"{folder.url}/{name}")
    return folder.read(name)


def too_large(size: int, most: int, where: object) -> TensorkeepError:
    """Make the error for a file that is refused before it is read.

    Args:
        size: bytes that it has.
        most: bytes that are read.
        where: the file.
    """
    return TensorkeepError(
        f"{size} bytes; the most read of such a file is {most}", where=where, hint="move it elsewhere"
    )


# -- configs ------------------------------------------------------------------------------------------------------


def check_config(config: Mapping[str, Any], where: object, stored: int | None = None) -> None:
    """Refuse a config whose numbers ask for a model that nobody has: building it would take hours or all memory.

    Args:
        config: a model's config, with the configs inside it.
        where: the config's file, for messages.
        stored: bytes of the weights beside it; what it asks for may not be larger by far.

    Raises:
        TensorkeepError: C01 naming the first such number.

    Example:
        >>> check_config({"num_hidden_layers": 10**9}, "config.json")
        Traceback (most recent call last):
        tensorkeep.errors.TensorkeepError: C01 config.json: num_hidden_layers is 1000000000; the most believed is 1024
        hint: correct the config, or take the one of these weights
    """
    layers = max((config[key] for key in _LAYERS if _whole(config.get(key))), default=1)
    for key, value in config.items():
        most = _most(str(key), 1 if config.get("model_type") in _ROWS else layers)
        if isinstance(value, Mapping):
            check_config(value, where, stored)
        elif _whole(value) and value > most:
            raise _unbelievable(f"{key} is {shown(value)}; the most believed is {most}", where)
    asked = _elements(config, layers)
    if stored is not None and asked > _MORE_THAN_STORED * stored + _SMALL:
        raise _unbelievable(f"asks for some {shown(asked)} numbers; {stored} bytes are stored", where)


def _elements(config: Mapping[str, Any], layers: int) -> int:
    """Return how many elements embedding and layers of a config have, roughly; 0 where it does not say."""

    def size(key: str) -> int:
        value = config.get(key)
        return value if isinstance(value, int) else 0

    inner = size("hidden_size") + size("intermediate_size")
    inner += max(size("num_experts"), size("num_local_experts")) * size("moe_intermediate_size")
    return size("hidden_size") * (size("vocab_size") + layers * inner)


def _most(key: str, layers: int) -> int:
    """Return the largest number that a config's key may have."""
    if "experts" in key:
        return _MOST_PARTS // max(layers, 1)
    if "head_dim" in key:
        return _MOST_OF_HEAD
    if _NO_SIZE.fullmatch(key):
        return _MOST_OF_OTHERS
    if key in _LAYERS:
        return _MOST_LAYERS
    return _MOST_POSITIONS if key in _POSITIONS else _MOST_SIZE


def _unbelievable(what: str, where: object) -> TensorkeepError:
    return TensorkeepError(what, where=where, code="C01", hint="correct the config, or take the one of these weights")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def believable(config: Mapping[str, Any], stored: int | None = None) -> bool:
    """Tell whether a config's numbers are those of a model that somebody can have.

    Args:
        config: a model's config.
        stored: bytes of the weights beside it, where there are some.
    """
    try:
        check_config(config, "config", stored)
    except TensorkeepError:
        return False
    return True
