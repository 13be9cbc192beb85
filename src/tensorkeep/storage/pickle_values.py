"""What a pickle says, as plain data: names, calls that are never made, and references to storages."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Any

LONGEST_NUMBER = 4096  # bytes of one whole number
# bytes of memory that an opcode takes in CPython; those not listed make at most a small number
REFERENCES = 16 + 32  # on the stack, and later in a container; a small number
ENTRY = 100  # of a dict, on average
MEMORY = {
    # nothing new: a place on the stack, and later in a container; or what lies on the stack goes elsewhere
    **dict.fromkeys((*b"hjg(N012bues", 0x88, 0x89, 0x95), 16),
    **dict.fromkeys((0x8F, 0x91, ord("R"), 0x81, 0x92, ord("i"), ord("o")), REFERENCES + 72),  # an Object
    **dict.fromkeys((ord("]"), ord("l"), ord("t"), 0x85, 0x86, 0x87), REFERENCES + 56),
    **dict.fromkeys((ord("}"), ord("d")), REFERENCES + 64),
    **dict.fromkeys(
        (ord("X"), 0x8C, 0x8D, ord("V"), ord("U"), ord("T"), ord("S"), ord("B"), ord("C")), REFERENCES + 64
    ),
    **dict.fromkeys((ord("q"), ord("r"), ord("p"), 0x94), ENTRY),
    ord("Q"): REFERENCES + 48,
}


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names; it is never looked up.

    Args:
        module: the module that is named.
        name: the class or function in it.

    >>> str(Global("torch", "Size"))
    'torch.Size'
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True, repr=False)  # a repr of what a hostile file nests and shares may never end
class Object:
    """What a pickle wanted to build; nothing of it is carried out.

    Attributes:
        call: the class or function that would have been called.
        args: its arguments.
        state: what the new object's attributes would have been set to.
        items: what would have been appended to it; None where nothing was (a list for each would be much memory).
        entries: keys and values that would have been put into it; None where none were.
    """

    call: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] | None = None
    entries: dict[Any, Any] | None = None

    @property
    def is_mapping(self) -> bool:
        """Whether this would have been a dict."""
        return self.call.name in ("OrderedDict", "defaultdict", "dict")


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Persistent:
    """A persistent id: how torch refers to a storage outside the pickle."""

    value: Any


def long_number(data: bytes) -> int:
    """Read a whole number from its little-endian bytes.

    Args:
        data: the bytes.

    Raises:
        ValueError: there are more than any checkpoint needs.
    """
    if len(data) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def old_string(text: bytes) -> str:
    """Read the S opcode's text: a Python 2 string literal.

    Args:
        text: the literal.

    Raises:
        ValueError: it is none.
    """
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string without its quotes")
    return codecs.escape_decode(text[1:-1])[0].decode("latin-1")


def text_number(text: str) -> int | bool:
    """Read the I opcode's number, which spells True and False too.

    Args:
        text: its digits.

    Raises:
        ValueError: they are no number.
    """
    return {"00": False, "01": True}[text] if text in ("00", "01") else int(text)
