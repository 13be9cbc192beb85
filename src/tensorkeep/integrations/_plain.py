"""Turn a nested checkpoint of plain Python values into one JSON document and named tensors, and back. No pickle.

JSON's own values stay themselves; what it lacks is an object with one key that begins with `$`. Anything else is
refused by the path of its keys, so nothing comes back as something it was not.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError, shown

_FACTORIES: dict[str, Any] = {t.__name__: t for t in (list, dict, set, int, float, str)} | {"None": None}
_SEQUENCES: dict[type, str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
Tensors = dict[str, dict[str, Tensor]]  # file -> name -> tensor


class Encoder:
    """Makes the JSON document of a nested value; its tensors are then in `tensors`, by file and name.

    Tensors under the top-level key `whole` keep their own names, in a file of theirs; all others are named by path.
    Tensors that share their memory whole are stored once and come back shared.
    """

    def __init__(self, whole: str) -> None:
        self.whole = whole
        self.tensors: Tensors = {"model": {}, "rest": {}}
        self._seen: dict[tuple[Any, ...], tuple[str, str]] = {}

    def document(self, value: Any) -> Any:
        """Return a value as plain JSON values that refer to its tensors by file and name.

        Raises:
            TensorkeepError: names the keys where something cannot be expressed.
        """
        try:
            return self._value(value, ())
        except RecursionError:
            raise TensorkeepError("refers to itself, or is nested too deep", where="checkpoint") from None

    def _value(self, value: Any, at: tuple[Any, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is list:
            return [self._value(v, (*at, i)) for i, v in enumerate(value)]
        if kind in _SEQUENCES:
            members = sorted(value, key=repr) if kind is not tuple else value
            return {_SEQUENCES[kind]: [self._value(v, (*at, i)) for i, v in enumerate(members)]}
        if kind in (Tensor, nn.Parameter):
            return {"$tensor": list(self._tensor(value.detach(), at))}
        if kind in (dict, OrderedDict, defaultdict, Counter):
            return self._mapping(value, kind, at)
        return self._tagged(value, at)

    def _mapping(self, value: Any, kind: type, at: tuple[Any, ...]) -> Any:
        if kind is dict and all(type(k) is str and not k.startswith("$") for k in value):
            return {k: self._value(v, (*at, k)) for k, v in value.items()}
        pairs = [[self._value(k, (*at, k)), self._value(v, (*at, k))] for k, v in value.items()]
        if kind is defaultdict:
            name = getattr(value.default_factory, "__name__", "None")
            if _FACTORIES.get(name, self) is not value.default_factory:
                raise _cannot(value.default_factory, (*at, "default_factory"))
            return {"$defaultdict": [name, pairs]}
        if kind is OrderedDict:  # a module's state_dict carries `_metadata`, the versions of its layers
            if vars(value).keys() - {"_metadata"}:
                raise _cannot(value, at)
            return {"$ordered": [pairs, self._value(vars(value).get("_metadata"), (*at, "_metadata"))]}
        return {"$counter" if kind is Counter else "$dict": pairs}

    def _tagged(self, value: Any, at: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.Size):
            return {"$size": list(value)}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        if type(value) in (PurePath, Path, type(Path())):
            return {"$path": str(value)}
        if type(value) is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        raise _cannot(value, at)

    def _tensor(self, tensor: Tensor, at: tuple[Any, ...]) -> tuple[str, str]:
        key: tuple[Any, ...] = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key in self._seen and tensor.numel():
            return self._seen[key]
        own = at[0] == self.whole and len(at) == 2
        file, name = ("model", str(at[1])) if own else ("rest", "/".join(str(key) for key in at))
        while name in self.tensors[file]:  # the keys 0 and "0" read alike
            name += "~"
        self.tensors[file][name] = tensor
        self._seen[key] = (file, name)
        return file, name


def _cannot(value: Any, at: tuple[Any, ...]) -> TensorkeepError:
    """Return the error for a value that cannot be kept without pickle."""
    kind, keys = type(value), ".".join(str(key) for key in at)
    return TensorkeepError(
        f"{keys} is a {kind.__module__}.{kind.__qualname__}, which cannot be kept without pickle",
        where="checkpoint",
        hint="keep it as plain values (int, float, str, list, dict, tensor) in that state",
    )


def decode_document(document: Any, tensors: Mapping[str, Mapping[str, Tensor]], where: object) -> Any:
    """Return the value that an `Encoder` made this document of.

    Raises:
        TensorkeepError: F07 where the document says what no `Encoder` ever wrote.
    """
    try:
        return _decoded(document, tensors)
    except (KeyError, TypeError, ValueError, RecursionError, RuntimeError, AttributeError) as error:
        what = f"is not the document of a checkpoint: {shown(str(error))}"
        raise TensorkeepError(what, where=where, code="F07", hint="use the checkpoint before it") from None


def _decoded(value: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    def inner(part: Any) -> Any:
        return _decoded(part, tensors)

    if isinstance(value, list):
        return [inner(v) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {k: inner(v) for k, v in value.items()}
    content = value[tag]
    if tag == "$tensor":
        return tensors[content[0]][content[1]]
    return _TAGS[tag](content, inner)


def _pairs(content: Any, inner: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    return [(inner(k), inner(v)) for k, v in content]


def _ordered(content: Any, inner: Callable[[Any], Any]) -> Any:
    out: Any = OrderedDict(_pairs(content[0], inner))
    if content[1] is not None:
        out._metadata = inner(content[1])
    return out


def _dtype(content: Any, inner: Callable[[Any], Any]) -> torch.dtype:
    found = getattr(torch, content)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype: {content}")
    return found


_TAGS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "$float": lambda c, _: float(c),
    "$tuple": lambda c, inner: tuple(inner(v) for v in c),
    "$set": lambda c, inner: {inner(v) for v in c},
    "$frozenset": lambda c, inner: frozenset(inner(v) for v in c),
    "$dict": lambda c, inner: dict(_pairs(c, inner)),
    "$counter": lambda c, inner: Counter(dict(_pairs(c, inner))),
    "$defaultdict": lambda c, inner: defaultdict(_FACTORIES[c[0]], _pairs(c[1], inner)),
    "$ordered": _ordered,
    "$dtype": _dtype,
    "$size": lambda c, _: torch.Size(c),
    "$device": lambda c, _: torch.device(c),
    "$path": lambda c, _: Path(c),
    "$bytes": lambda c, _: base64.b64decode(c, validate=True),
}
