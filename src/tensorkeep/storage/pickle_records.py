"""Read the many small objects of a few classes in a pickle by one match each, not opcode by opcode.

Python's pickler spells equal kinds of objects alike: the class by its number in the memo, then a dict whose keys are
numbers of the memo too, then the values. After one such object was read opcode by opcode, a regular expression made of
its spelling reads the others. What it does not fit is read opcode by opcode as before, so the result is the same.
The memo gets no entries for what is read this way: one that is asked for later is read again where it stands.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from tensorkeep.storage.pickle_values import Global, Object

# of one record: the record itself, its place in a list or a dict, two numbers; and the opcodes that it stands for
RECORD_MEMORY, RECORD_STEPS = 320, 32
_NUMBER = rb"(?:K.|M..|J.{4}|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_REFERENCE = rb"h.|j.{4}"
_TEXT = rb"\x8c.[ -~]{0,255}?\x94"
# what follows the class `torch.Size`: a tuple of numbers, that in a tuple of arguments, and the call
_SIZES = rb"(?:\)|(?:%b\x85|%b{2}\x86|%b{3}\x87|\(%b{4,32}t)\x94)\x85\x94R\x94" % ((_NUMBER,) * 4)
_NUMBERS = re.compile(_NUMBER, re.DOTALL)
_LENGTHS = {b"h": 2, b"j": 5}  # bytes of an opcode that takes a number of the memo
_LONGEST_KEY = 64  # parts of a tuple that is a dict's key: it is hashed again each time
_KEPT = 8  # bytes of a spelling: numbers with more are all different, and not worth remembering


class Unread(Exception):
    """The memo is asked for an inner part of a record, or for one under a number of the pickle's own."""


class Record(tuple[Any, ...]):
    """An object read by one match: its class (`Global`), then the values of the fields that the caller names.

    A field that the object lacks is None; a `torch.Size` is a `Sizes`. Two records are never equal, as two
    `Object`s are not.
    """

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class Sizes(tuple[int, ...]):
    """A `torch.Size` read by a match: whole numbers, which nobody has checked."""

    __slots__ = ()


class Records:
    """The classes whose objects are read by one match, and what was read so.

    Args:
        fields: class as `module.name` -> the fields that are kept, in the order of a `Record`.
        data: the pickle.
        memo: what the reader memoizes, by number.
    """

    def __init__(self, fields: Mapping[str, tuple[str, ...]], data: bytes, memo: dict[int, Any]) -> None:
        self.fields, self.data, self.memo = fields, data, memo
        # by the class's number: the spelling, the class, and where each kept field stands in it
        self.spelled: dict[int, tuple[re.Pattern[bytes], Global, list[int | None]]] = {}
        self.skipped = 0  # memo numbers of what was read by matches
        self._known: set[Global] = set()
        self._values: dict[bytes, tuple[Any, int]] = {}  # spelling -> value, memo numbers that it takes
        self._firsts, self._places, self._classes = array("Q"), array("Q"), array("Q")

    def stop(self) -> None:
        """Read everything opcode by opcode from here on: the pickle gives numbers to the memo itself."""
        if self.skipped:
            raise Unread
        self.fields, self.spelled = {}, {}

    def learn(self, made: Object) -> None:
        """Take the spelling of an object's class from one that was read opcode by opcode."""
        names = self.fields.get(str(made.call)) if made.call not in self._known else None
        if names is None or not isinstance(made.state, dict) or made.args or made.items or made.entries:
            return
        self._known.add(made.call)
        numbers = {id(value): n for n, value in reversed(self.memo.items()) if isinstance(value, (str, Global))}
        size = next((n for n, v in self.memo.items() if isinstance(v, Global) and str(v) == "torch.Size"), None)
        keys = [numbers.get(id(key)) for key in made.state]
        number = numbers.get(id(made.call))
        if number is None or None in keys:
            return
        forms = [_TEXT, _REFERENCE, _NUMBER, b"N"]
        if size is not None:
            forms.append(re.escape(_spelled(size)) + _SIZES)
        value = b"(" + b"|".join(forms) + b")"
        middle = b"".join(re.escape(_spelled(key)) + value for key in keys if key is not None)
        pattern = re.compile(rb"\)\x81\x94\}\x94\(" + middle + b"ub", re.DOTALL)
        order = list(made.state)
        self.spelled[number] = pattern, made.call, [order.index(n) if n in order else None for n in names]

    def read(self, number: int, at: int) -> tuple[Record, int] | None:
        """Read the object whose class's number ends at byte `at`; None where it is spelled in another way.

        Args:
            number: of the class in the memo.
            at: the byte behind that number.

        Returns:
            The record, and the position behind it.
        """
        pattern, call, order = self.spelled[number]
        match = pattern.match(self.data, at)
        if match is None:
            return None
        known, found, taken = self._values, [], 2  # the object and its dict
        for spelling in match.groups():
            value = known.get(spelling) or self._value(spelling)
            if value is None:
                return None
            found.append(value[0])
            taken += value[1]
        self._firsts.append(len(self.memo) + self.skipped)
        self._places.append(at)
        self._classes.append(number)
        self.skipped += taken
        return Record([call, *[found[i] if i is not None else None for i in order]]), match.end()

    def _value(self, spelling: bytes) -> tuple[Any, int] | None:
        """Return what one field's bytes mean, and how many numbers of the memo they take; None where they misfit."""
        kind = spelling[:1]
        made: tuple[Any, int]
        if kind == b"N":
            made = None, 0
        elif kind == b"\x8c":
            if spelling[1] != len(spelling) - 3:  # the text goes on behind a byte that looks like its end
                return None
            made = spelling[2:-1].decode("ascii"), 1
        elif kind not in b"hj":
            made = _whole(spelling), 0
        elif len(spelling) == _LENGTHS[kind]:
            number = int.from_bytes(spelling[1:], "little")
            made = self.memo[number] if number in self.memo else self.recall(number), 0
        else:
            inner = spelling[_LENGTHS[kind] :]
            made = Sizes(map(_whole, _NUMBERS.findall(inner))), 2 if inner[:1] == b")" else 3
        if kind not in b"J\x8a" or len(spelling) > _KEPT:
            self._values[spelling] = made
        return made

    def recall(self, number: int) -> Any:
        """Return what the memo would hold under a number, had a record been read opcode by opcode.

        Args:
            number: which is not in the memo.

        Raises:
            KeyError: no record takes it.
            Unread: it is the record itself or an inner part of it.
        """
        at = bisect_right(self._firsts, number) - 1
        if at < 0:
            raise KeyError(number)
        match = self.spelled[self._classes[at]][0].match(self.data, self._places[at])
        left = number - self._firsts[at] - 2
        if match is not None and left >= 0:
            for spelling in match.groups():
                value = self._value(spelling)
                taken = value[1] if value else 0
                if value and left < taken:
                    if left == taken - 1:  # the text, or the sizes behind the two tuples that they are made of
                        return value[0]
                    break
                left -= taken
            else:
                raise KeyError(number)
        raise Unread


def plain_key(value: Any) -> Any:
    """Return a dict key of a harmless type.

    Args:
        value: what a pickle gives as a key.

    Raises:
        TypeError: hashing it could take without end.
    """
    # hashing a deeply nested tuple overflows the C stack; state dicts are keyed by text, numbers and small indices
    if value is None or isinstance(value, (str, int, float, bool, bytes, Object, Global, Record)):
        return value
    if (
        isinstance(value, tuple)
        and len(value) <= _LONGEST_KEY
        and all(p is None or isinstance(p, (str, int, float, Object, Global)) for p in value)
    ):
        return value
    raise TypeError(f"a dict key of type {type(value).__name__}")


def _spelled(number: int) -> bytes:
    """Return the opcode that takes a number of the memo."""
    return b"h" + bytes([number]) if number < 256 else b"j" + number.to_bytes(4, "little")


def _whole(spelling: bytes) -> int:
    """Return the whole number that an opcode and its bytes mean."""
    kind = spelling[:1]
    if kind == b"\x8a":
        return int.from_bytes(spelling[2:], "little", signed=True)
    return int.from_bytes(spelling[1:], "little", signed=kind == b"J")
