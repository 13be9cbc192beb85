"""Render chat templates within bounds: they come with the tokenizer, from strangers, and are programs.

Jinja's sandbox keeps a template from the machine, not from its time and memory. transformers still renders; only the
environment that it compiles a template in is exchanged for one that counts: loops, calls, operators, what they make and
what is printed. What was counted is compared with the limits before the next step, so no step is large.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tensorkeep.errors import TensorkeepError

_MOST_STEPS, _MOST_MADE, _MOST_SECONDS = 2_000_000, 1 << 26, 5.0  # steps; letters and items; processor time
_LARGEST_STEP = 1 << 24  # letters or items that one call may make
_LONGEST_TEMPLATE, _LONGEST_NUMBER = 1 << 20, 4096  # letters; bits
_ITEM = 16  # an item of a list counts as so many letters
_COUNTED, _WEIGHED, _PRINTED = "tensorkeep_counted", "tensorkeep_weighed", "tensorkeep_printed"
# their time is not in proportion to what they are given, or they print markup; no chat template has them
_LEFT_OUT = ("urlize", "striptags", "wordwrap", "pprint", "xmlattr")
_LOCK = threading.RLock()


class TooMuch(SecurityError):
    """Raised inside a template that does more than a template may."""


class Meter:
    """Counts what one rendering does; `left` is how many steps and letters remain."""

    def __init__(self, steps: int = _MOST_STEPS, clock: Callable[[], float] = time.thread_time) -> None:
        self.steps, self.made, self._clock = steps, _MOST_MADE, clock
        self._until = clock() + _MOST_SECONDS
        self._kept: dict[int, tuple[Any, int]] = {}  # containers that the template made, with their weights

    def step(self) -> None:
        """Count one step of a loop, one call or one operator."""
        self.steps -= 1
        if self.steps < 0:
            raise TooMuch(f"takes more than {_MOST_STEPS} steps")
        if self.steps % 64 == 0 and self._clock() > self._until:
            raise TooMuch(f"takes more than {_MOST_SECONDS:.0f} seconds")

    def weigh(self, value: Any) -> Any:
        """Count what a step made, and give it back."""
        self.step()
        self.spend(self.weight(value))
        return value

    def spend(self, letters: int) -> None:
        """Count letters or items that were made."""
        self.made -= letters
        if self.made < 0:
            raise TooMuch(f"makes more than {_MOST_MADE} letters")

    def allow(self, letters: int) -> None:
        """Refuse a step before it makes so many letters or items."""
        if letters > min(_LARGEST_STEP, self.made):
            raise TooMuch(f"would make {letters} letters or items at once")

    def weight(self, value: Any) -> int:
        """Count letters and items; a container of containers counts as written out, though they be one and the same."""
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, int):
            return value.bit_length() // 8
        if not isinstance(value, dict | list | tuple):
            return 1
        if id(value) in self._kept:
            return self._kept[id(value)][1]
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        weight = _ITEM * (1 + len(inner)) + sum(self.weight(v) for v in inner if isinstance(v, dict | list | tuple))
        self._kept[id(value)] = (value, weight)
        return weight


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that counts; `meter` is the one of the rendering under way."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])
    meter: Meter

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Carry out an operator whose result is small enough."""
        meter = self.meter
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, Sized) and isinstance(times, int):
                    meter.allow(len(text) * max(times, 0) * (1 if isinstance(text, str | bytes) else _ITEM))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _LONGEST_NUMBER:
                raise TooMuch(f"would make a number of {bits} bits")
        if operator == "%" and isinstance(left, str):
            meter.allow(_filled(left, right if isinstance(right, tuple) else (right,)))
        return meter.weigh(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, within bounds; named as Jinja names it, so that templates may use any keyword."""
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps str.format
        if isinstance(owner, str | bytes | int) and not isinstance(owner, bool):
            __self.meter.allow(_most_made(owner, args, kwargs))
        elif isinstance(__obj, type) or getattr(__obj, "__module__", None) != "jinja2.runtime":
            __self.meter.allow(
                sum(abs(a) for a in (*args, *kwargs.values()) if type(a) is int and abs(a) < 1 << 40) // 64
            )
        return __self.meter.weigh(super().call(__context, __obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse a template and put the counting into it."""
        parsed: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return parsed


def _most_made(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bound what a method of a text or number can make of its arguments."""
    size = len(owner) if isinstance(owner, str | bytes) else owner.bit_length() // 8 + 1
    most = 1
    for value in (*args, *kwargs.values()):
        if isinstance(value, str | bytes):
            most = max(most, len(value))
        elif isinstance(value, int):
            most = max(most, abs(value))
        elif isinstance(value, dict):  # str.translate
            most = max([most, *(len(v) for v in value.values() if isinstance(v, str))])
        elif isinstance(value, list | tuple):  # str.join
            return size * len(value) + sum(len(v) for v in value if isinstance(v, str))
    if isinstance(owner, str) and re.search(r"[{%]", owner):  # str.format
        most = max(most, _filled(owner, (*args, *kwargs.values())))
    return (size + 1) * (most + 1)


def _filled(text: str, values: tuple[Any, ...]) -> int:
    """Bound the length of a format with its values put in, by the widths that it names or is given."""
    widths = [int(n[:18]) for n in re.findall(r"\d+", text)]
    if "*" in text or "{" in text:
        widths += [abs(v) for v in values if isinstance(v, int)]
    inside = sum(len(v) for v in values if isinstance(v, str))
    return len(text) * (1 + inside) + sum(widths) * (1 + text.count("%") + text.count("{"))


class _Counting(NodeTransformer):
    """Puts counting around what a template iterates over, makes and prints."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _COUNTED)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        letters = sum(len(n.data) for n in node.nodes if isinstance(n, nodes.TemplateData))
        if letters:
            node.nodes.append(_filter(nodes.Const(letters, lineno=node.lineno), _PRINTED))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGHED) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGHED)

    visit_List = visit_Dict = visit_Concat

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGHED) if node.ctx == "load" else node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _bounded(theirs: jinja2.Environment) -> BoundedEnvironment:
    """Make an environment like transformers' own, which counts."""
    made: Any = theirs.overlay()
    made.__class__ = BoundedEnvironment
    made.extensions = theirs.extensions  # the very tracker of answers that transformers asks
    made.meter = Meter()
    made.finalize = lambda value: made.meter.weigh(value)
    made.filters = {name: _metered(made, name, f) for name, f in theirs.filters.items() if name not in _LEFT_OUT}
    made.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    made.filters |= {_COUNTED: jinja2.pass_context(lambda _, values: _counted(made, values))}
    made.filters |= {_WEIGHED: jinja2.pass_context(lambda _, value: made.meter.weigh(value))}
    made.filters |= {_PRINTED: jinja2.pass_context(lambda _, letters: made.meter.spend(letters) or "")}
    return made  # type: ignore[no-any-return]


def _counted(made: BoundedEnvironment, values: Any) -> Any:
    """Count each turn of a loop."""

    def turns() -> Iterator[Any]:
        for value in values:
            made.meter.step()
            yield value

    return turns()


def _metered(made: BoundedEnvironment, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter: small numbers only, and what it makes is counted."""

    @functools.wraps(function)  # keeps what Jinja notes on it: whether it wants the context
    def run(*args: Any, **kwargs: Any) -> Any:
        args = tuple(list(_counted(made, a)) if isinstance(a, Iterator) else a for a in args)
        numbers = [abs(v) for v in (*args[1:], *kwargs.values()) if isinstance(v, int)]
        first = next((a for a in args if isinstance(a, str | dict | list | tuple | range)), "")
        texts = [len(v) for v in (*args, *kwargs.values()) if isinstance(v, str) and v is not first]
        weight = len(first) if isinstance(first, range) else made.meter.weight(first)
        if name == "format" and isinstance(first, str):
            made.meter.allow(_filled(first, args[1:]))
        if name == "sum" and any(isinstance(v, list | tuple) for v in (*args[1:], *kwargs.values())):
            raise TooMuch("adds up lists")  # takes the square of their number
        made.meter.allow((weight + 1) * (1 + max(numbers, default=0)))
        made.meter.allow((weight + 1) * (1 + max(texts, default=0)))
        return made.meter.weigh(function(*args, **kwargs))

    return run


@contextmanager
def bounded_templates() -> Iterator[None]:
    """Let transformers compile and render chat templates within bounds inside the block.

    Raises:
        TensorkeepError: a template does too much, or this transformers renders in a way that cannot be bounded.
    """
    from transformers.utils import chat_template_utils as theirs

    compiled, used = theirs._compile_jinja_template, []

    def compile_bounded(text: str) -> Any:
        if len(text) > _LONGEST_TEMPLATE:
            raise TooMuch(f"is {len(text)} letters long")
        template = _compiled(compiled, text)
        template.environment.meter = Meter()
        used.append(template)
        return template

    with _LOCK:
        theirs._compile_jinja_template = compile_bounded
        try:
            yield
        finally:
            theirs._compile_jinja_template = compiled
    if not used:
        raise TensorkeepError(
            "this transformers renders chat templates in a way that is unknown here", where="tokenizer"
        )


@functools.lru_cache(maxsize=8)
def _compiled(theirs: Callable[[str], Any], text: str) -> Any:
    """Compile a template once; transformers' environment is taken from an empty one, since compiling runs constants."""
    return _bounded(theirs("").environment).from_string(text)
