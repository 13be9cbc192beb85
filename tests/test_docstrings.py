"""Docstrings and sizes: what other rooms use says its arguments, result and errors; first lines are sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from benchmarks import structure

ROOT = Path(__file__).parent.parent
MODULES = structure.modules(ROOT)
Defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """Trees of the whole source are a million objects: the tests that come later need not carry them along."""
    yield
    for kept in (structure.parsed, tree, nodes, taken):
        kept.cache_clear()


@cache
def tree(module: str) -> ast.Module:
    return structure.parsed(MODULES[module])


@cache
def nodes(module: str) -> list[ast.AST]:
    return list(ast.walk(tree(module)))


def room(module: str) -> str:
    """The package or file at the top that a module lies in; "" for the top itself."""
    return module.partition(".")[2].partition(".")[0]


@cache
def taken(module: str) -> dict[str, tuple[str, str]]:
    """What a module takes from others of the package, anywhere in it: name here -> (module, name there; "" for all)."""
    found = {}
    for node in nodes(module):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                place = (whole, "") if whole in MODULES else (node.module, alias.name)
                found[alias.asname or alias.name] = place
    return found


def definition(module: str, name: str) -> tuple[str, Defined] | None:
    """Where a function or class is defined, through modules that hand it on; None for what is neither."""
    for node in reversed(tree(module).body):
        if isinstance(node, Defined) and node.name == name:
            return module, node
    return definition(*taken(module)[name]) if name in taken(module) else None


def shared() -> dict[str, Defined]:
    """Functions and classes that another room imports, or that stand in a room's `__all__`."""
    wanted = set()
    for module in MODULES:
        names = taken(module)
        wanted |= {place for place in names.values() if place[1] and room(place[0]) != room(module)}
        for node in nodes(module):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                place, name = names.get(node.value.id, ("", "-"))
                if not name and room(place) != room(module):
                    wanted.add((place, node.attr))
        if MODULES[module].name == "__init__.py" and module.count(".") <= 1:
            for node in tree(module).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    wanted |= {(module, name) for name in ast.literal_eval(node.value)}
    found = [place for module, name in sorted(wanted) if (place := definition(module, name))]
    return {f"{module}.{node.name}": node for module, node in found}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names that a caller gives, without the instance and those that begin with an underscore."""
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [a.arg for a in every if a and a.arg not in ("self", "cls") and not a.arg.startswith("_")]


def fields(node: ast.ClassDef) -> list[str]:
    """Public fields that a dataclass or named tuple is made with."""
    marks = " ".join(map(ast.unparse, [*node.decorator_list, *node.bases]))
    if not re.search(r"\bdataclass\b|\bNamedTuple\b", marks):
        return []
    found = [
        (n.target.id, ast.unparse(n))
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    ]
    return [name for name, text in found if not name.startswith("_") and "init=False" not in text]


def named(text: str, sections: str) -> set[str]:
    """The names that the sections of a docstring explain, one a line."""
    body = "".join(re.findall(rf"^(?:{sections}):\n((?:    .*\n?|\n)+)", text, flags=re.MULTILINE))
    return set(re.findall(r"^    \*{0,2}(\w+): \S", body, flags=re.MULTILINE))


def raises(node: Defined) -> bool:
    """Whether a function's own body raises the package's error."""
    return any(
        isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and ast.unparse(n.exc.func) == "TensorkeepError"
        for n in ast.walk(node)
    )


def missing(node: Defined) -> list[str]:
    """Return what a docstring does not say of arguments, result and errors."""
    text = ast.get_docstring(node) or ""
    if not text:
        return ["docstring"]
    if isinstance(node, ast.ClassDef):
        starts = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        text += "\n\n" + "\n\n".join(ast.get_docstring(n) or "" for n in starts)
        wanted = [p for n in starts for p in parameters(n)] or fields(node)
        wrong = sorted({*wanted} - named(text, "Args|Attributes"))
        errors = any(map(raises, starts))
    else:
        wrong = sorted({*parameters(node)} - named(text, "Args"))
        errors = raises(node)
        silent = node.returns is None or ast.unparse(node.returns) in ("None", "NoReturn", "Never")
        if not (silent or text.startswith(("Return ", "Tell whether ", "Yield "))):
            wrong += [] if re.search(r"^(Returns|Yields):$", text, flags=re.MULTILINE) else ["Returns:"]
    return wrong + (["Raises:"] if errors and not re.search(r"^Raises:$", text, flags=re.MULTILINE) else [])


def test_what_other_rooms_use_says_its_arguments_result_and_errors() -> None:
    found = shared()
    assert {"tensorkeep.conversion.planning.make_plan", "tensorkeep.errors.TensorkeepError"} <= {*found}
    assert len(found) > 300
    wrong = {name: gaps for name, node in found.items() if (gaps := missing(node))}
    assert not wrong, "\n".join(f"{name}: {', '.join(gaps)}" for name, gaps in wrong.items())


def public(module: str) -> Iterator[tuple[str, ast.Module | Defined]]:
    """A public module, its public functions and classes, and these classes' public methods."""
    if module.rpartition(".")[2].startswith("_") and not module.endswith(".__main__"):
        return
    yield module, tree(module)
    waiting = [(module, node) for node in tree(module).body]
    for place, node in waiting:
        if isinstance(node, Defined) and not node.name.startswith("_"):
            yield f"{place}.{node.name}", node
            waiting += [(f"{place}.{node.name}", n) for n in node.body if isinstance(node, ast.ClassDef)]


def test_the_first_line_of_every_public_docstring_is_a_short_sentence() -> None:
    found = {name: ast.get_docstring(node) or "" for module in MODULES for name, node in public(module)}
    assert len(found) > 1000
    wrong = []
    for name, text in found.items():
        first, *rest = text.splitlines() or [""]
        if not first.endswith(".") or len(first) > 120 or (rest and rest[0]):
            wrong.append(f"{name}: {first}")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_of_the_source_are_short() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert [found for path in MODULES.values() for found in structure.functions(path) if found[1] > 60] == []


def test_few_places_are_kept_from_the_formatter() -> None:
    found = [
        f"{path.name}: {line}"
        for part in ("src", "tests", "benchmarks", "examples")
        for path in (ROOT / part).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"# fmt: (skip|off)$", line)
    ]
    assert len(found) <= 15, "\n".join(found)
