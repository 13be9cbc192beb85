"""Read YAML that may hold anything: plain values within bounds, or one error; aliases count as written out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import read_small, too_large

LARGEST = 256 << 10  # bytes; PyYAML reads some 100 kB a second
_DEEPEST, _MOST_VALUES = 64, 50_000
_LONGEST_NUMBER = 400  # letters


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds on depth and on the length of numbers (sexagesimal ones take quadratic time)."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node, not deeper than _DEEPEST."""
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {_DEEPEST} levels")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: Any) -> int:
        """Read a whole number of a sensible length."""
        if len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value)} letters")
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str | bytes, where: object) -> Any:
    r"""Return the YAML of an untrusted file: plain values only, aliases and merges within bounds.

    Args:
        text: the file's content.
        where: the file, for messages.

    Raises:
        TensorkeepError: it is not valid YAML, larger than a recipe, nested too deeply, refers to itself, or stands for
            more values than a recipe has when every alias is written out.

    Example:
        >>> parse_yaml("a: &x [1, 2]\nb: *x", "recipe.yaml")
        {'a': [1, 2], 'b': [1, 2]}
    """
    if len(text) > LARGEST:
        raise too_large(len(text), LARGEST, where)
    try:
        node = _composed(text)
        return None if node is None else _Loader("").construct_document(node)
    # PyYAML's constructors answer odd values (!!bool x, 2000-99-99) with whatever goes wrong in them
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise TensorkeepError(
            f"cannot be read as YAML: {' '.join(str(error).split())[:300] or type(error).__name__}", where=where
        ) from None


@lru_cache(4)
def _composed(text: str | bytes) -> yaml.Node | None:
    """Compose a document; a command reads its recipe several times, and composing takes nearly all of that time.

    Raises:
        yaml.YAMLError: it is not valid YAML or beyond the bounds.
    """
    node: yaml.Node | None = _Loader(text).get_single_node()
    if node is not None:
        _check_written_out(node)
    return node


def _check_written_out(root: yaml.Node) -> None:
    """Refuse a document that is too large or too deep with every alias written out, or that contains itself."""
    known: dict[int, tuple[int, int]] = {}  # node -> values and levels that it stands for; (0, 0): inside it now

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) not in known:
            known[id(node)] = 0, 0
            inner = [measure(child) for child in _children(node)]
            known[id(node)] = 1 + sum(n for n, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        if known[id(node)] == (0, 0):
            raise yaml.YAMLError("a value that contains itself")
        return known[id(node)]

    values, depth = measure(root)
    if values > _MOST_VALUES or depth > _DEEPEST:
        raise yaml.YAMLError(f"more than {_MOST_VALUES} values or {_DEEPEST} levels, with aliases written out")


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def read_yaml(path: str | Path) -> Any:
    """Return the plain values of a YAML file.

    Args:
        path: the file.

    Raises:
        TensorkeepError: as `parse_yaml`, and where the file cannot be read.
    """
    return parse_yaml(read_small(Path(path), LARGEST), path)
