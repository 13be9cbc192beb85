"""Write pickles from plain data: the few opcodes that torch's own files need, always the same bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from tensorkeep.storage.pickle_values import Global, Object, Persistent


class Pickled(bytes):
    """The opcodes of a value, which `emit` puts in as they are."""


HOLE = Pickled(b"\xff\xff<hole>\xff\xff")  # no value's opcodes: \xff is neither an opcode nor UTF-8


class _Out(bytearray):
    """The opcodes so far; `numbers` are those of the memo that texts and globals are taken from, None for no memo."""

    numbers: dict[Any, int] | None = None


def emit(value: Any, known: Sequence[str | Global] | None = None) -> bytes:
    r"""Return the pickle of plain data, the same bytes every time.

    Objects with `state` become NEWOBJ + BUILD, others a call. Without `known` it is of protocol 2 and without memo: its
    opcodes stay readable with `python -m pickletools`. With it, it is of protocol 4 and spelled as Python's own pickler
    spells objects: a third of the bytes where many objects are of the same classes.

    Args:
        value: None, bool, int, float, str, tuple, list, dict, `Global`, `Object`, `Persistent`, `Pickled`,
            nested as you like.
        known: at most 256 texts and globals that come again and again; they are memoized in front.

    Raises:
        TypeError: for any other type.

    Example:
        >>> emit([1, "a"])
        b'\x80\x02](K\x01X\x01\x00\x00\x00ae.'
    """
    if known is None:
        return b"\x80\x02" + pickled(value) + b"."
    front = b"".join(pickled(item) + b"\x940" for item in known)
    return b"\x80\x04" + front + pickled(value, known) + b"."


def template(value: Any, known: Sequence[str | Global] | None = None) -> Callable[..., Pickled]:
    """Return a function that pickles a value with gaps in it: much quicker than `emit` where many values are alike.

    Args:
        value: as `emit` takes it, with `HOLE` at every place that differs.
        known: as `emit` takes it.

    Returns:
        A function of what goes into the holes, in their order.

    Example:
        >>> pair = template((HOLE, "a"))
        >>> emit([pair(1), pair(2)]) == emit([(1, "a"), (2, "a")])
        True
    """
    first, *others = pickled(value, known).split(HOLE)
    numbers = _numbered(known)

    def fill(*values: Any) -> Pickled:
        out = _Out(first)
        out.numbers = numbers
        for item, after in zip(values, others, strict=True):
            _emit(item, out)
            out += after
        return Pickled(out)

    return fill


def pickled(value: Any, known: Sequence[str | Global] | None = None) -> Pickled:
    """Return the opcodes of a value, to be put into others.

    Args:
        value: as `emit` takes it.
        known: as `emit` takes it.
    """
    out = _Out()
    out.numbers = _numbered(known)
    _emit(value, out)
    return Pickled(out)


def _numbered(known: Sequence[str | Global] | None) -> dict[Any, int] | None:
    return None if known is None else {item: n for n, item in enumerate(known)}


def _emit(value: Any, out: _Out) -> None:
    write = _WRITERS.get(type(value))
    if write is None:
        write = next((w for kind, w in _WRITERS.items() if isinstance(value, kind)), None)
        if write is None:
            raise TypeError(f"cannot write a {type(value).__name__} into a pickle")
    write(value, out)


def _memoized(out: _Out) -> None:
    """Give what was just written a number, as Python's pickler does with everything that could come again."""
    if out.numbers is not None:
        out += b"\x94"


def _emit_text(value: str, out: _Out) -> None:
    number = out.numbers.get(value) if out.numbers else None
    if number is not None:
        out += bytes((0x68, number))
        return
    text = value.encode("utf-8", "surrogatepass")
    if out.numbers is not None and len(text) < 256:
        out += b"\x8c" + bytes((len(text),)) + text
    else:
        out += b"X" + struct.pack("<I", len(text)) + text
    _memoized(out)


def _emit_global(value: Global, out: _Out) -> None:
    number = out.numbers.get(value) if out.numbers else None
    if number is not None:
        out += bytes((0x68, number))
        return
    out += f"c{value.module}\n{value.name}\n".encode()
    _memoized(out)


def _emit_persistent(value: Persistent, out: _Out) -> None:
    _emit(value.value, out)
    out += b"Q"


def _emit_tuple(value: tuple[Any, ...], out: _Out) -> None:
    if out.numbers is None or len(value) > 3:
        out += b"("
        for item in value:
            _emit(item, out)
        out += b"t"
    else:
        for item in value:
            _emit(item, out)
        out += (b")", b"\x85", b"\x86", b"\x87")[len(value)]
    if value:
        _memoized(out)


def _emit_list(value: list[Any], out: _Out) -> None:
    out += b"]"
    _memoized(out)
    out += b"("
    for item in value:
        _emit(item, out)
    out += b"e"


def _emit_dict(value: dict[Any, Any], out: _Out) -> None:
    out += b"}"
    _memoized(out)
    _emit_items(value, out)


def _emit_object(value: Object, out: _Out) -> None:
    _emit(value.call, out)
    _emit(value.args, out)
    out += b"R" if value.state is None else b"\x81"
    _memoized(out)
    if value.entries:
        _emit_items(value.entries, out)
    if value.state is not None:
        _emit(value.state, out)
        out += b"b"


def _emit_items(entries: dict[Any, Any], out: _Out) -> None:
    out += b"("
    for key, item in entries.items():
        _emit(key, out)
        _emit(item, out)
    out += b"u"


def _int_opcode(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def _append(value: bytes, out: _Out) -> None:
    out += value


_WRITERS: dict[type, Callable[[Any, _Out], None]] = {
    str: _emit_text,
    int: lambda value, out: _append(_int_opcode(value), out),
    tuple: _emit_tuple,
    Pickled: _append,
    Object: _emit_object,
    Global: _emit_global,
    bool: lambda value, out: _append(b"\x88" if value else b"\x89", out),
    type(None): lambda value, out: _append(b"N", out),
    dict: _emit_dict,
    list: _emit_list,
    Persistent: _emit_persistent,
    float: lambda value, out: _append(b"G" + struct.pack(">d", value), out),
}
