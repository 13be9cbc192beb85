"""Evaluate Python expressions without executing anything: a walk over the syntax tree takes what is plainly a value.

Plain are literals, names bound to values, `dict()`, `list()`, `tuple()`, `range()`, `+ - * / // %`, f-strings of those,
subscripts and `_base_.name`. Everything else raises `NotPlain`, or becomes an `Unknown` inside a container. Sizes are
bounded: a file of a hundred bytes can ask for a list of a billion. Standard library only.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from tensorkeep.errors import TensorkeepError

BASE = "_base_"
_MOST_VALUES = 100_000  # values and characters that one name may stand for
_MOST_BITS = 1024
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"}
# widths are bounded: "%999999999d" would fill the memory
_PERCENT = re.compile(r"%(%|(\.\d{1,2})?[sdifgr])")
_FORMAT = re.compile(r"(0?\d{1,2})?(,)?(\.\d{1,2})?[sdfgex%]?")


class Unknown(NamedTuple):
    """An expression that was not evaluated.

    Attributes:
        where: file:line.
        text: its source.
        why: the reason in words.
    """

    where: str
    text: str
    why: str


class Section(dict[str, Any]):
    """A dictionary of a config that notes what is read of it.

    Attributes:
        lines: key -> file:line where it was written.
        seen: keys that were read.
        missed: keys that were asked for and not there, with the default taken.
    """

    def __init__(self, values: dict[str, Any] | None = None, lines: dict[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.lines = lines or {}
        self.seen: set[str] = set()
        self.missed: dict[str, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Section:
        return Section({key: copy.deepcopy(value, memo) for key, value in self.items()}, dict(self.lines))

    def __getitem__(self, key: str) -> Any:
        """Return a value that has no default; raises TensorkeepError where it is missing or unknown."""
        self.seen.add(key)
        if key not in self:
            raise TensorkeepError(f"lacks {key!r}", where=next(iter(self.lines.values()), "config"))
        value = super().__getitem__(key)
        if isinstance(value, Unknown):
            hint = "write the value out in the config, as a literal"
            raise TensorkeepError(f"{key} = {value.text} is not evaluated: {value.why}", where=value.where, hint=hint)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or `default` where it is missing or unknown; an unknown one stays unread, to be reported."""
        value = super().get(key, default)
        if key not in self:
            self.missed[key] = default
        elif isinstance(value, Unknown):
            return default
        else:
            self.seen.add(key)
        return value


class NotPlain(Exception):
    """Raised for an expression that is no plain value."""

    def __init__(self, node: ast.AST, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


def weigh(value: Any, where: str) -> None:
    """Raise TensorkeepError where a value holds too much, shared parts counted each time."""
    waiting, weight = [value], 0
    while waiting:
        item = waiting.pop()
        weight += 1 + (len(item) if isinstance(item, str | bytes) else 0)
        if weight > _MOST_VALUES:
            raise TensorkeepError(f"expands to more than {_MOST_VALUES:,} values", where=where)
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple) and not isinstance(item, Unknown):
            waiting.extend(item)


class Reader:
    """Evaluates expressions; inside a container an unknown part leaves the rest readable."""

    def __init__(self, names: Section, path: Path, unknown: list[Unknown]) -> None:
        self.names, self.path, self.unknown = names, path, unknown

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression; raises NotPlain where it is none."""
        readers: dict[type[ast.expr], Callable[[Any], Any]] = {
            ast.Constant: lambda n: n.value,
            ast.Name: self._name,
            ast.List: self._items,
            ast.Dict: self._dict,
            ast.Tuple: lambda n: tuple(self._items(n)),
            ast.UnaryOp: self._unary,
            ast.BinOp: self._binary,
            ast.JoinedStr: self._joined,
            ast.Call: self._call,
            ast.Subscript: self._subscript,
            ast.Attribute: self._attribute,
            ast.Set: self._template,
        }
        reader = readers.get(type(node))
        if reader is None:
            raise NotPlain(node, f"{type(node).__name__.lower()} is not evaluated")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "{{" in node.value:
            raise NotPlain(node, "mmengine's templates in strings are not filled in")
        return reader(node)

    def inside(self, node: ast.expr) -> Any:
        """Return the value of a part of a container, or an Unknown in its place."""
        try:
            return self.value(node)
        except NotPlain as problem:
            found = Unknown(f"{self.path}:{node.lineno}", ast.unparse(node)[:120], problem.why)
            self.unknown.append(found)
            return found

    def _name(self, node: ast.Name) -> Any:
        """Return what a name is bound to."""
        if node.id not in self.names or node.id == BASE:
            raise NotPlain(node, f"{node.id} is not bound to a value")
        value = dict.__getitem__(self.names, node.id)
        if isinstance(value, Unknown):
            raise NotPlain(node, f"{node.id} is not known ({value.where})")
        return value

    def _items(self, node: ast.List | ast.Tuple) -> list[Any]:
        """Return the items of a list or tuple."""
        items: list[Any] = []
        for item in node.elts:
            if isinstance(item, ast.Starred):
                items.extend(_expect(self.value(item.value), (list, tuple), item))
            else:
                items.append(self.inside(item))
        return items

    def _dict(self, node: ast.Dict) -> Section:
        """Return a dictionary display as a section."""
        section = Section()
        for key, value in zip(node.keys, node.values):
            if key is None:
                self._update(section, value)
            else:
                self._put(section, _expect(self.value(key), (str, int), key), value)
        return section

    def _call(self, node: ast.Call) -> Any:
        """Return the value of `dict()`, `list()`, `tuple()` or `range()`."""
        name = node.func.id if isinstance(node.func, ast.Name) and node.func.id not in self.names else None
        if name == "dict" and len(node.args) <= 1:
            section = Section()
            for argument in node.args:
                self._update(section, argument)
            for word in node.keywords:
                if word.arg is None:
                    self._update(section, word.value)
                else:
                    self._put(section, word.arg, word.value)
            return section
        if name in ("list", "tuple") and len(node.args) <= 1 and not node.keywords:
            items = [_expect(self.value(argument), (list, tuple), argument) for argument in node.args]
            return {"list": list, "tuple": tuple}[name](*items)
        if name == "range" and 1 <= len(node.args) <= 3 and not node.keywords:
            bounds = [_expect(self.value(argument), (int,), argument) for argument in node.args]
            if (len(bounds) == 3 and bounds[2] == 0) or len(range(*bounds)) > _MOST_VALUES:
                raise NotPlain(node, "the range has no step or is too long")
            return list(range(*bounds))
        raise NotPlain(node, f"the call of {ast.unparse(node.func)} is not executed")

    def _update(self, section: Section, node: ast.expr) -> None:
        """Put the keys of another section into a section."""
        other = _expect(self.value(node), (Section,), node)
        section.update(other)
        section.lines.update(other.lines)

    def _put(self, section: Section, key: str, node: ast.expr) -> None:
        """Put one value into a section and note its line."""
        section[key], section.lines[key] = self.inside(node), f"{self.path}:{node.lineno}"

    def _unary(self, node: ast.UnaryOp) -> Any:
        """Return the value of `not x`, `-x` or `+x`."""
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            return not value
        if isinstance(node.op, ast.USub | ast.UAdd):
            number = _expect(value, (int, float), node)
            return -number if isinstance(node.op, ast.USub) else number
        raise NotPlain(node, "the operator is not evaluated")

    def _binary(self, node: ast.BinOp) -> Any:
        """Return the value of an arithmetic expression."""
        sign = _OPERATORS.get(type(node.op))
        if sign is None:
            raise NotPlain(node, f"{type(node.op).__name__.lower()} is not evaluated")
        return _operate(sign, self.value(node.left), self.value(node.right), node)

    def _joined(self, node: ast.JoinedStr) -> str:
        """Return the text of an f-string."""
        parts: list[str] = []
        for part in node.values:
            if isinstance(part, ast.Constant):
                parts.append(str(part.value))
                continue
            field = cast(ast.FormattedValue, part)
            value = _expect(self.value(field.value), (str, int, float), field)
            form = self._joined(field.format_spec) if isinstance(field.format_spec, ast.JoinedStr) else ""
            if field.conversion not in (-1, ord("s")) or not _FORMAT.fullmatch(form):
                raise NotPlain(node, "the format of the f-string is not evaluated")
            try:
                parts.append(format(value, form))
            except (ValueError, TypeError, OverflowError) as error:
                raise NotPlain(node, str(error)) from error
        return "".join(parts)

    def _subscript(self, node: ast.Subscript) -> Any:
        """Return an item of a dictionary, list or tuple."""
        holder = _expect(self.value(node.value), (dict, list, tuple), node)
        key = _expect(self.value(node.slice), (str, int), node)
        try:
            found = dict.__getitem__(holder, key) if isinstance(holder, dict) else holder[key]
        except (KeyError, IndexError, TypeError) as error:
            raise NotPlain(node, "there is no such item") from error
        if isinstance(found, Unknown):
            raise NotPlain(node, f"is not known ({found.where})")
        return found

    def _attribute(self, node: ast.Attribute) -> Any:
        """Return what `_base_.model.head` stands for: mmengine's way to a base's value."""
        names: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name) or inner.id != BASE:
            raise NotPlain(node, "an attribute is not evaluated")
        found: Any = dict.__getitem__(self.names, BASE)
        for name in names:
            if not isinstance(found, dict) or name not in found:
                raise NotPlain(node, f"no base sets {'.'.join(names)}")
            found = dict.__getitem__(found, name)
        if isinstance(found, Unknown):
            raise NotPlain(node, f"is not known ({found.where})")
        return copy.deepcopy(found)

    def _template(self, node: ast.Set) -> Any:
        """Return what `{{_base_.name}}` stands for, which to Python is a set of a set."""
        inner = node.elts[0]
        name = inner.elts[0] if isinstance(inner, ast.Set) and len(inner.elts) == 1 else None
        if len(node.elts) == 1 and isinstance(name, ast.Attribute):
            return self._attribute(name)
        raise NotPlain(node, "a set is not evaluated")


def _expect(value: Any, types: tuple[type, ...], node: ast.AST) -> Any:
    """Return a value of one of `types`; raises NotPlain for others."""
    if not isinstance(value, types) or isinstance(value, Unknown):
        raise NotPlain(node, f"a {type(value).__name__} stands where {types[0].__name__} is expected")
    return value


def _operate(sign: str, left: Any, right: Any, node: ast.BinOp) -> Any:
    """Do arithmetic on numbers, and `+ * %` on strings and lists, within bounds."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if numbers and all(isinstance(x, float) or x.bit_length() < _MOST_BITS for x in (left, right)):
        work: dict[str, Callable[[Any, Any], Any]] = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "/": lambda a, b: a / b,
            "//": lambda a, b: a // b,
            "%": lambda a, b: a % b,
        }
        try:
            return work[sign](left, right)
        except (ZeroDivisionError, OverflowError) as error:
            raise NotPlain(node, str(error)) from error
    series = (str, list, tuple)
    if sign == "+" and isinstance(left, series) and type(left) is type(right):
        joined: Any = left
        return joined + right
    if sign == "*" and isinstance(right, series):
        left, right = right, left
    if sign == "*" and isinstance(left, series) and isinstance(right, int) and len(left) * right <= _MOST_VALUES:
        return left * right
    if sign == "%" and isinstance(left, str) and "%" not in _PERCENT.sub("", left):
        values = right if isinstance(right, tuple) else (right,)
        if all(isinstance(v, str | int | float) for v in values):
            try:
                return left % values
            except (TypeError, ValueError, OverflowError) as error:
                raise NotPlain(node, str(error)) from error
    raise NotPlain(node, f"{sign} of {type(left).__name__} and {type(right).__name__} is not evaluated")
