"""Read OpenTAD's (mmengine's) Python configs as data: they are parsed, never executed.

A config is a module of assignments over `_base_` files. What is plainly a value becomes one (`_literals`); whatever
else stands there (a call, an import, an `if`) becomes an `Unknown` with its file and line, and so does everything that
it may have changed. Bases are merged as mmengine merges them: dictionaries key by key, `_delete_=True` starts afresh,
anything else replaces. Standard library only.
"""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tensorkeep.detection.opentad._literals import BASE, NotPlain, Reader, Section, Unknown, weigh
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained

_DELETE = "_delete_"
_MOST_BYTES, _MOST_FILES, _DEEPEST = 1 << 20, 64, 16


class PythonConfig(NamedTuple):
    """A config merged with its bases.

    Attributes:
        values: what the names stand for.
        unknown: whatever was not evaluated.
        files: those that were read, the config itself last.
    """

    values: Section
    unknown: list[Unknown]
    files: list[Path]


class Setting(NamedTuple):
    """One setting of a config that an account lists.

    Attributes:
        path: like `dataset.train.fps`.
        where: file:line.
        value: what it is set to.
        why: why it is listed.
    """

    path: str
    where: str
    value: Any
    why: str


def read_config(path: str | Path) -> PythonConfig:
    """Read a config and merge it with its bases; nothing is executed.

    Raises:
        TensorkeepError: A file cannot be read or is no Python; a base is missing, leads in a circle or is nested too
            deep; two bases set the same name; or a value would expand beyond all use. File and line are named.

    Example:
        >>> read_config("configs/adatad/thumos/e2e_thumos_videomae_b_768x1_160_adapter.py")  # doctest: +SKIP
    """
    files: list[Path] = []
    unknown: list[Unknown] = []
    return PythonConfig(_load(Path(path), (), files, unknown), unknown, files)


def unread(section: Section, path: str = "") -> Iterator[Setting]:
    """List every setting that was not read; a section of which nothing was read is one entry, and so is an unknown."""
    for key, value in section.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Unknown):
            yield Setting(name, value.where, value.text, value.why)
        elif key not in section.seen:
            yield Setting(name, section.lines.get(key, "config"), value, "nothing here has this setting")
        elif isinstance(value, Section):
            yield from unread(value, name)
        elif isinstance(value, list | tuple):
            numbered = {f"{key}[{number}]": item for number, item in enumerate(value)}
            inner = Section({k: v for k, v in numbered.items() if isinstance(v, Section | Unknown)})
            inner.seen.update(inner)
            yield from unread(inner, path)


def _load(path: Path, above: tuple[Path, ...], files: list[Path], unknown: list[Unknown]) -> Section:
    """Read one file and its bases; `above` are the files that led here."""
    with explained(path):
        real = path.resolve()
        if real in above:
            raise TensorkeepError("its _base_ leads back to itself", where=path)
        path = real if ".." in path.parts else path
        if len(above) >= _DEEPEST or len(files) >= _MOST_FILES:
            raise TensorkeepError(f"more than {_DEEPEST} levels or {_MOST_FILES} files of _base_", where=path)
        if path.suffix != ".py" or (path.exists() and not path.is_file()):
            raise TensorkeepError("is not a Python file", where=path, hint="OpenTAD's configs end in .py")
        if path.stat().st_size > _MOST_BYTES:
            raise TensorkeepError(f"is larger than {_MOST_BYTES} bytes: no config", where=path)
        source = path.read_bytes()
    module = _parse(source, path)
    base = Section()
    for parent in _bases(module, path):
        loaded = _load(path.parent / parent, (*above, real), files, unknown)
        if twice := sorted(base.keys() & loaded.keys()):
            raise TensorkeepError(f"two of its bases set {', '.join(twice)}", where=path)
        base = _merge(loaded, base)
    files.append(path)
    return _merge(_run(module, path, base, unknown), base)


def _parse(source: bytes, path: Path) -> ast.Module:
    """Parse a file as Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in someone else's strings
            return ast.parse(source)
    except SyntaxError as error:
        raise TensorkeepError(f"is not Python: {error.msg}", where=f"{path}:{error.lineno}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise TensorkeepError(f"cannot be parsed: {error}", where=path) from error


def _bases(module: ast.Module, path: Path) -> list[str]:
    """Return the files that `_base_` names."""
    for statement in module.body:
        if isinstance(statement, ast.Assign) and _target(statement) == BASE:
            try:
                value = ast.literal_eval(statement.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                value = None
            found = [value] if isinstance(value, str) else value
            if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
                hint = "a string, or a list of strings"
                raise TensorkeepError("_base_ is no list of files", where=f"{path}:{statement.lineno}", hint=hint)
            return list(found)
    return []


def _target(statement: ast.Assign) -> str | None:
    """Return the name that a simple assignment binds."""
    first = statement.targets[0]
    return first.id if len(statement.targets) == 1 and isinstance(first, ast.Name) else None


def _merge(child: Section, base: Section) -> Section:
    """Put `child` over `base` by mmengine's rule, dictionaries key by key."""
    merged = copy.deepcopy(base)
    for key, value in child.items():
        old = dict.get(merged, key)
        fresh = isinstance(value, Section) and bool(dict.get(value, _DELETE))
        if isinstance(value, Section) and isinstance(old, Section) and not fresh:
            merged[key] = _merge(value, old)
        elif isinstance(value, Section) and key in merged and not fresh and not isinstance(old, Unknown):
            what = f"{key} is a dict here and {type(old).__name__} in its base"
            hint = "mmengine refuses this too: add _delete_=True to replace it"
            raise TensorkeepError(what, where=child.lines.get(key), hint=hint)
        else:
            merged[key] = _without_delete(copy.deepcopy(value))
        merged.lines[key] = child.lines.get(key, "config")
    return merged


def _without_delete(value: Any) -> Any:
    """Return a value without mmengine's `_delete_` marks."""
    if isinstance(value, Section):
        return Section({k: _without_delete(v) for k, v in value.items() if k != _DELETE}, value.lines)
    return value


def _run(module: ast.Module, path: Path, base: Section, unknown: list[Unknown]) -> Section:
    """Return what the names that a module assigns stand for."""
    names = Section({BASE: base})
    for statement in module.body:
        where = f"{path}:{statement.lineno}"
        try:
            bound = _assigned(statement, names, path, unknown)
        except NotPlain as problem:
            found = Unknown(where, ast.unparse(statement).partition("\n")[0][:120], problem.why)
            unknown.append(found)
            bound = dict.fromkeys(_touched(statement, names), found)
        except RecursionError as error:
            raise TensorkeepError("is nested too deep", where=where) from error
        for name, value in bound.items():
            if not isinstance(value, Unknown):
                weigh(value, where)
            names[name], names.lines[name] = value, where
    return Section({n: v for n, v in names.items() if n != BASE and not n.startswith("__")}, names.lines)


def _assigned(statement: ast.stmt, names: Section, path: Path, unknown: list[Unknown]) -> dict[str, Any]:
    """Return what one statement binds; raises NotPlain where it does anything but bind names to values."""
    docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if docstring or isinstance(statement, ast.Pass):
        return {}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
        return {statement.target.id: Reader(names, path, unknown).value(statement.value)}
    if not isinstance(statement, ast.Assign):
        raise NotPlain(statement, f"{type(statement).__name__.lower()} is not executed")
    if _target(statement) == BASE:
        return {}
    value = Reader(names, path, unknown).value(statement.value)
    bound: dict[str, Any] = {}
    for target in statement.targets:
        if isinstance(target, ast.Name):
            bound[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, list | tuple) and len(value) == len(target.elts):
            for name, item in zip(target.elts, value):
                if not isinstance(name, ast.Name):
                    raise NotPlain(statement, "assigns into a value")
                bound[name.id] = item
        else:
            raise NotPlain(statement, "assigns into a value")
    return bound


def _touched(statement: ast.stmt, names: Section) -> list[str]:
    """List the names that a statement binds, and those of dictionaries and lists that it may change."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    found = [
        a.asname or a.name for n in ast.walk(statement) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    ]
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id != BASE:
            bound = dict.get(names, node.id)
            if not isinstance(node.ctx, ast.Load) or isinstance(bound, dict | list | tuple):
                found.append(node.id)
    return found
