"""Read pickles as plain data: nothing is imported, called or executed.

`.pth` files and DCP's `.metadata` are pickles, and unpickling runs whatever they name. Here the opcodes are
walked by hand: a global becomes a `Global` (two strings), a call becomes an inert `Object` (what would have been
called, with what). A global outside the caller's allow-list is refused by name (F04) even though it could do no
harm here, since the next program to open the file would run it; `foreign` tells which may stay opaque instead.

`pickle_writing.emit` goes the other way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import Budget
from tensorkeep.storage.foreign import refuse
from tensorkeep.storage.pickle_records import RECORD_MEMORY, RECORD_STEPS, Records, Unread, plain_key
from tensorkeep.storage.pickle_values import (
    ENTRY,
    LONGEST_NUMBER,
    MEMORY,
    REFERENCES,
    Global,
    Object,
    Persistent,
    long_number,
    old_string,
    text_number,
)

LARGEST_PICKLE = 1 << 30  # bytes
_PER_LOOK = 256  # opcodes between looks at the budget

# by it Python names a class inside a class, and nothing else that is read here
_GETATTR = (Global("builtins", "getattr"), Global("__builtin__", "getattr"))
_MARK = object()  # what the opcode "(" puts on the stack; later opcodes take everything above it


def _fail(what: str, where: object) -> TensorkeepError:
    """Make the error for a damaged pickle (F02)."""
    return TensorkeepError(
        f"damaged pickle: {what}",
        where=where,
        code="F02",
        hint="the file is truncated or not a checkpoint; copy it again",
    )


class _Reader:
    """The machine that pickle opcodes run on: a stack, a memo, a position; each opcode is one entry of _OPCODES."""

    def __init__(self, data: bytes, start: int, where: object, records: Mapping[str, tuple[str, ...]]) -> None:
        self.data, self.at, self.where = data, start, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.records = Records(records, data, self.memo)
        self.globals: set[Global] = set()
        self.known: dict[tuple[str, str], Global] = {}
        self.budget = Budget(len(data) - start, where)

    def take(self, count: int) -> bytes:
        """Read the next `count` bytes."""
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise _fail(f"needs {count} bytes at {self.at}, has {len(self.data) - self.at}", self.where)
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def raw_line(self) -> bytes:
        """Read up to the next line's end, as bytes."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise _fail("a line without its end", self.where)
        piece = self.data[self.at : end]
        self.at = end + 1
        return piece

    def line(self) -> str:
        """Read a name or a number that ends with its line."""
        piece = self.raw_line()
        if len(piece) > LONGEST_NUMBER:  # names and numbers; text has the V opcode
            raise _fail(f"a name or number of {len(piece)} letters", self.where)
        return piece.decode("utf-8")

    def number(self, form: str) -> int:
        """Read one number of a struct format."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def since_mark(self) -> list[Any]:
        """Take everything above the latest mark off the stack, and the mark too."""
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def found(self, module: str, name: str) -> Global:
        """Note that the pickle names a global; equal names give the same `Global`."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise _fail("a global that is not named by text", self.where)
        known = self.known.get((module, name))
        if known is None:
            known = self.known[module, name] = Global(module, name)
            if known not in _GETATTR:  # it does no more than it is called for
                self.globals.add(known)
        return known

    def call(self, function: Any, args: Any) -> None:
        """Put an `Object` on the stack in place of calling `function`."""
        if function in _GETATTR and isinstance(args, tuple) and len(args) == 2 and isinstance(args[0], Global):
            self.stack.append(self.found(args[0].module, f"{args[0].name}.{args[1]}"))  # a class inside a class
            return
        if function in _GETATTR:
            self.globals.add(function)
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise _fail("a call of something that is not a global", self.where)
        self.stack.append(Object(function, args))


def _set_items(target: Any, pairs: list[Any], budget: Budget) -> None:
    """Put keys and values, alternating in `pairs`, into a dict or an `Object`."""
    if isinstance(target, Object) and target.entries is None:
        target.entries = {}
    entries = target.entries if isinstance(target, Object) else target
    if not isinstance(entries, dict) or len(pairs) % 2:
        raise TypeError("items for something that is not a dict")
    for key, value in zip(pairs[::2], pairs[1::2]):
        budget.spend(ENTRY, steps=16)  # looks at the clock often: keys of one hash take quadratic time
        entries[plain_key(key)] = value


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, Object):
        target.items = target.items or []
        target.items.extend(values)
    elif isinstance(target, list):
        target.extend(values)
    else:
        raise TypeError("an append to something that is not a list")


def _build(r: _Reader) -> None:
    """Give the object on top of the stack its state (opcode BUILD)."""
    state = r.stack.pop()
    target = r.stack[-1]
    if not isinstance(target, Object):
        raise TypeError("state for something that is not an object")
    target.state = state
    r.records.learn(target)


def _push(read: Callable[[_Reader], Any]) -> Callable[[_Reader], None]:
    """Make an opcode that puts what `read` gives on the stack."""
    return lambda r: r.stack.append(read(r))


def _tuple(size: int) -> Callable[[_Reader], None]:
    """Make an opcode that gathers the top `size` values into a tuple."""

    def run(r: _Reader) -> None:
        if len(r.stack) < size:
            raise IndexError
        items = tuple(r.stack[-size:])
        del r.stack[-size:]
        r.stack.append(items)

    return run


def _pop_call(r: _Reader) -> None:
    args, function = r.stack.pop(), r.stack.pop()
    r.call(function, args)


def _pop_call_with_keywords(r: _Reader) -> None:
    keywords, args, function = r.stack.pop(), r.stack.pop(), r.stack.pop()
    r.call(function, args)
    r.stack[-1].state = keywords


def _memoize(r: _Reader) -> None:
    r.memo[len(r.memo) + r.records.skipped] = r.stack[-1]


def _put(read: Callable[[_Reader], int]) -> Callable[[_Reader], None]:
    """Make an opcode that stores the top of the stack in the memo under the number that `read` gives."""

    def run(r: _Reader) -> None:
        r.records.stop()
        r.memo[read(r)] = r.stack[-1]

    return run


def _get(read: Callable[[_Reader], int]) -> Callable[[_Reader], None]:
    """Make an opcode that puts on the stack what the memo holds; a record goes there whole, in place of its class."""

    def run(r: _Reader) -> None:
        number, records = read(r), r.records
        if number in records.spelled and (whole := records.read(number, r.at)):
            value, r.at = whole
            r.budget.spend(RECORD_MEMORY, RECORD_STEPS)
        else:
            value = r.memo[number] if number in r.memo else records.recall(number)
        r.stack.append(value)

    return run


def _stack_global(r: _Reader) -> None:
    name, module = r.stack.pop(), r.stack.pop()
    r.stack.append(r.found(module, name))


def _append(r: _Reader) -> None:
    value = r.stack.pop()
    _extend(r.stack[-1], [value])


def _appends(r: _Reader) -> None:
    values = r.since_mark()
    _extend(r.stack[-1], values)


def _set_item(r: _Reader) -> None:
    value, key = r.stack.pop(), r.stack.pop()
    _set_items(r.stack[-1], [key, value], r.budget)


def _set_many(r: _Reader) -> None:
    pairs = r.since_mark()
    _set_items(r.stack[-1], pairs, r.budget)


def _dict(r: _Reader) -> None:
    pairs = r.since_mark()
    made: dict[Any, Any] = {}
    _set_items(made, pairs, r.budget)
    r.stack.append(made)


def _protocol(r: _Reader) -> None:
    if r.take(1)[0] > 5:
        raise ValueError("a protocol newer than 5")


def _instance(r: _Reader) -> None:
    made = r.found(r.line(), r.line())
    r.call(made, tuple(r.since_mark()))


def _instance_of(r: _Reader) -> None:
    made, *args = r.since_mark() or [None]
    r.call(made, tuple(args))


# opcode -> what it does; in the order of Python's pickletools, which says what each is for
_OPCODES: dict[int, Callable[[_Reader], object]] = {
    0x80: _protocol,
    0x95: lambda r: r.take(8),  # a frame's length
    ord("("): lambda r: r.stack.append(_MARK),
    ord("0"): lambda r: r.stack.pop(),
    ord("1"): lambda r: r.since_mark(),
    ord("2"): lambda r: r.stack.append(r.stack[-1]),
    ord("N"): lambda r: r.stack.append(None),
    0x88: lambda r: r.stack.append(True),
    0x89: lambda r: r.stack.append(False),
    ord("K"): _push(lambda r: r.take(1)[0]),
    ord("M"): _push(lambda r: r.number("<H")),
    ord("J"): _push(lambda r: r.number("<i")),
    ord("I"): _push(lambda r: text_number(r.line())),
    ord("L"): _push(lambda r: int(r.line().rstrip("L"))),
    0x8A: _push(lambda r: long_number(r.take(r.take(1)[0]))),
    0x8B: _push(lambda r: long_number(r.take(r.number("<I")))),
    ord("G"): _push(lambda r: struct.unpack(">d", r.take(8))[0]),
    ord("F"): _push(lambda r: float(r.line())),
    ord("X"): _push(lambda r: r.take(r.number("<I")).decode("utf-8", "surrogatepass")),
    0x8C: _push(lambda r: r.take(r.take(1)[0]).decode("utf-8", "surrogatepass")),
    0x8D: _push(lambda r: r.take(r.number("<Q")).decode("utf-8", "surrogatepass")),
    ord("V"): _push(lambda r: r.raw_line().decode("raw-unicode-escape")),
    ord("U"): _push(lambda r: r.take(r.take(1)[0]).decode("latin-1")),
    ord("T"): _push(lambda r: r.take(r.number("<i")).decode("latin-1")),
    ord("S"): _push(lambda r: old_string(r.raw_line())),
    ord("B"): _push(lambda r: r.take(r.number("<I"))),
    ord("C"): _push(lambda r: r.take(r.take(1)[0])),
    0x8E: _push(lambda r: r.take(r.number("<Q"))),
    0x96: _push(lambda r: r.take(r.number("<Q"))),
    ord(")"): lambda r: r.stack.append(()),
    ord("t"): lambda r: r.stack.append(tuple(r.since_mark())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("]"): lambda r: r.stack.append([]),
    ord("l"): lambda r: r.stack.append(r.since_mark()),
    ord("a"): _append,
    ord("e"): _appends,
    ord("}"): lambda r: r.stack.append({}),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): _set_many,
    0x8F: lambda r: r.stack.append(Object(r.found("builtins", "set"))),
    0x90: _appends,
    0x91: lambda r: r.stack.append(Object(r.found("builtins", "frozenset"), (), None, r.since_mark())),
    ord("c"): _push(lambda r: r.found(r.line(), r.line())),
    0x93: _stack_global,
    ord("R"): _pop_call,
    0x81: _pop_call,
    0x92: _pop_call_with_keywords,
    ord("i"): _instance,
    ord("o"): _instance_of,
    ord("b"): _build,
    ord("q"): _put(lambda r: r.take(1)[0]),
    ord("r"): _put(lambda r: r.number("<I")),
    ord("p"): _put(lambda r: int(r.line())),
    0x94: _memoize,
    ord("h"): _get(lambda r: r.take(1)[0]),
    ord("j"): _get(lambda r: r.number("<I")),
    ord("g"): _get(lambda r: int(r.line())),
    ord("Q"): lambda r: r.stack.append(Persistent(r.stack.pop())),
    ord("P"): _push(lambda r: Persistent(r.line())),
}


def parse(
    data: bytes,
    allowed: Collection[str],
    where: object,
    start: int = 0,
    opaque: set[str] | None = None,
    records: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[Any, int]:
    r"""Read the value that a pickle describes, as plain data.

    Args:
        data: bytes that hold the pickle.
        allowed: the globals that may occur, as `module.name`; an entry ending in `.*` allows a whole module.
        where: the file, for messages.
        start: byte at which the pickle begins.
        opaque: where this is given, names of somebody's own objects are put into it and not refused.
        records: class as `module.name` -> fields, of which there are many: one may come as a `Record` of these fields.

    Returns:
        The value, and the position behind the pickle's end.

    Raises:
        TensorkeepError: F04 naming every global that is not allowed, F02 for a damaged pickle, F07 for a huge one
            or one that makes more objects than a pickle of its size may.

    Example:
        >>> parse(b"\x80\x02]q\x00(K\x01K\x02e.", (), "example")[0]
        [1, 2]
    """
    if len(data) - start > LARGEST_PICKLE:
        raise TensorkeepError(
            f"a pickle of {len(data) - start} bytes; the most read is {LARGEST_PICKLE}", where=where, code="F07"
        )
    reader = _Reader(data, start, where, records or {})
    try:
        value = _run(reader)
    except Unread:
        return parse(data, allowed, where, start, opaque)
    except TensorkeepError:
        refuse(reader.globals, allowed, where, opaque)  # what it names is the graver fault
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError) as error:
        refuse(reader.globals, allowed, where, opaque)
        raise _fail(f"{error or type(error).__name__} at {reader.at}", where) from None
    refuse(reader.globals, allowed, where, opaque)
    return value, reader.at


def _run(reader: _Reader) -> Any:
    """Carry out opcodes until STOP and return the top of the stack."""
    memory = steps = 0
    while True:
        code = reader.take(1)[0]
        if code == 0x2E:
            return reader.stack.pop()
        operation = _OPCODES.get(code)
        if operation is None:
            raise _fail(f"opcode {code:#04x} at {reader.at - 1}", reader.where)
        operation(reader)
        memory += MEMORY.get(code, REFERENCES)
        steps += 1
        if steps == _PER_LOOK:
            reader.budget.spend(memory, steps)
            memory = steps = 0
