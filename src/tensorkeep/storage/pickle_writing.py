"""Write pickles from plain data: the few opcodes that torch's own files need, always the same bytes."""

from __future__ import annotations

import struct
from typing import Any

from tensorkeep.storage.pickle_values import Global, Object, Persistent


def emit(value: Any) -> bytes:
    r"""Return the pickle of plain data in protocol 2, the same bytes every time.

    Protocol 2 is what every torch that reads DCP understands. Objects with `state` become NEWOBJ + BUILD, others a
    call. No memo: the files are small and the opcodes stay readable with `python -m pickletools`.

    Args:
        value: None, bool, int, float, str, tuple, list, dict, `Global`, `Object`, `Persistent`, nested as you like.

    Raises:
        TypeError: for any other type.

    Example:
        >>> emit([1, "a"])
        b'\x80\x02](K\x01X\x01\x00\x00\x00ae.'
    """
    out = bytearray(b"\x80\x02")
    _emit(value, out)
    return bytes(out + b".")


def _emit(value: Any, out: bytearray) -> None:
    if value is None:
        out += b"N"
    elif isinstance(value, bool):
        out += b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        out += _int_opcode(value)
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(value, Global):
        out += f"c{value.module}\n{value.name}\n".encode()
    elif isinstance(value, Persistent):
        _emit(value.value, out)
        out += b"Q"
    elif isinstance(value, tuple):
        out += b"("
        for item in value:
            _emit(item, out)
        out += b"t"
    elif isinstance(value, list):
        out += b"]("
        for item in value:
            _emit(item, out)
        out += b"e"
    elif isinstance(value, dict):
        out += b"}"
        _emit_items(value, out)
    elif isinstance(value, Object):
        _emit_object(value, out)
    else:
        raise TypeError(f"cannot write a {type(value).__name__} into a pickle")


def _emit_object(value: Object, out: bytearray) -> None:
    _emit(value.call, out)
    _emit(value.args, out)
    out += b"R" if value.state is None else b"\x81"
    if value.entries:
        _emit_items(value.entries, out)
    if value.state is not None:
        _emit(value.state, out)
        out += b"b"


def _emit_items(entries: dict[Any, Any], out: bytearray) -> None:
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
