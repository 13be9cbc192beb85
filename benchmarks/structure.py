"""How the source is built: units, imports between them, chains, cycles, sizes; before and after a change.

    python -m benchmarks.structure                    # this checkout
    python -m benchmarks.structure --tree OTHER       # another checkout beside it, in the same table
    python -m benchmarks.structure --json

A unit is a top-level module or package under `src/tensorkeep`; an arrow is an import of one unit by another, inside
functions too (imports for type checking alone do not count). A chain counts units, or inside a room modules: strongly
connected parts count as one step.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "tensorkeep"
Graph = dict[str, set[str]]
ROOMS = (
    "storage formats quantization conversion adapters models training diagnosis language detection integrations "
    "commands"
).split()


def modules(tree: Path) -> dict[str, Path]:
    """Module name -> file, of every module of the package."""
    source = tree / "src"
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file; `parsed.cache_clear()` gives the memory of all of them back."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports, at its top or inside functions, not for types alone."""
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    waiting: list[ast.AST] = [parsed(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in known)
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            place = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{place}.{alias.name}"
                if whole in known or place in known:
                    yield whole if whole in known else place


def graph(tree: Path) -> Graph:
    """Module -> the modules it imports."""
    known = modules(tree)
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


def grouped(between: Graph, unit: Any) -> Graph:
    """The same graph between units: `unit(module)` names the unit of a module, None leaves it out."""
    out: Graph = {}
    for name, targets in between.items():
        if (mine := unit(name)) is not None:
            out.setdefault(mine, set()).update(u for t in targets if (u := unit(t)) not in (None, mine))
    return out


def room(module: str) -> str | None:
    """The room of a module: a package under the top one; None for what lies beside the rooms."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def components(between: Graph) -> list[list[str]]:
    """Strongly connected parts, each after everything it leads to (Tarjan's order)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(between.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            found.append(part)

    sys.setrecursionlimit(10_000)
    for node in sorted(between):
        if node not in index:
            visit(node)
    return found


def longest(between: Graph) -> list[str]:
    """The longest chain of imports, each cycle counted as one step."""
    parts = components(between)
    home = {node: number for number, part in enumerate(parts) for node in part}
    chains: dict[int, list[str]] = {}
    for number, part in enumerate(parts):
        below = {home[t] for node in part for t in between.get(node, ()) if t in home} - {number}
        best = max((chains[b] for b in below), key=len, default=[])
        chains[number] = [part[0], *best]
    return max(chains.values(), key=len, default=[])


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every function of a file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.name}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def public_names(path: Path) -> Iterator[str]:
    """Functions and classes that a module defines at its top without a leading underscore."""
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


LOADED = """
import sys
sys.argv = ["tensorkeep"]
from tensorkeep.cli import main
code = main(["train", "language", "recipe.yaml", "--out", "run", "--quiet"])
assert code == 0, code
ours = sorted(m for m in sys.modules if m.split(".")[0] == "tensorkeep")
print("\\n".join(ours))
"""


def loaded_by_a_language_run(tree: Path) -> list[str]:
    """The package's modules that are loaded once a small language run has trained."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.language_files import config, save_tokenizer, texts

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        document = {
            "config": config(),
            "tokenizer": str(save_tokenizer(place / "tok")),
            "data": {"files": [str(texts(place / "a.jsonl"))], "length": 32},
            "training": {"updates": 1, "batch": 2},
        }
        (place / "recipe.yaml").write_text(json.dumps(document))
        done = subprocess.run(
            [sys.executable, "-c", LOADED],
            cwd=place,
            env={"PYTHONPATH": str(tree / "src"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"the language run failed: {done.stderr[-500:]}")
        return [line for line in done.stdout.splitlines() if line.startswith(PACKAGE)]


def measure(tree: Path) -> dict[str, Any]:
    """Every figure of a checkout."""
    files = modules(tree)
    between = graph(tree)
    tops = {n.split(".")[1] for n in files if "." in n}
    units = grouped(between, lambda m: m.split(".")[1] if "." in m else None)
    rooms = {t for t in tops if (tree / "src" / PACKAGE / t).is_dir()}
    inside = {
        r: longest(grouped(between, lambda m, r=r: m if m.startswith(f"{PACKAGE}.{r}.") else None)) for r in rooms
    }
    python = [p for part in ("src", "tests", "benchmarks", "examples") for p in (tree / part).rglob("*.py")]
    source = list(files.values())
    lines = {p: p.read_text(encoding="utf-8").splitlines() for p in python}
    names: dict[str, int] = {}
    for path in source:
        for name in set(public_names(path)):
            names[name] = names.get(name, 0) + 1
    deepest = max(inside.items(), key=lambda item: len(item[1]), default=("", []))
    modules_loaded = loaded_by_a_language_run(tree)
    return {
        "modules": len(files),
        "top-level units": len(tops),
        "arrows between units": sum(len(t) for t in units.values()),
        "longest chain between units": len(longest(units)),
        "longest chain between rooms": len(longest(grouped(between, room))),
        "cycles between units": sum(len(p) > 1 for p in components(units)),
        "longest chain inside a room": f"{len(deepest[1])} ({deepest[0]})",
        "cycles between modules": sum(len(p) > 1 for p in components(between)),
        "modules loaded by a language run": len(modules_loaded),
        "of these, of detection": sum(m.startswith(f"{PACKAGE}.detection") for m in modules_loaded),
        "`# fmt: skip`": sum("fmt: skip" in line for text in lines.values() for line in text),
        "lines over 120": sum(len(line) > 120 for text in lines.values() for line in text),
        "longest file of src (lines)": max(len(lines[p]) for p in source),
        "files of src over 400 lines": sum(len(lines[p]) > 400 for p in source),
        "longest function of src (lines)": max(n for p in source for _, n in functions(p)),
        "functions of src over 60 lines": sum(n > 60 for p in source for _, n in functions(p)),
        "public functions and classes": len(names),
        "of these, in two or more modules": sum(n > 1 for n in names.values()),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    trees = [*chosen.tree, Path(__file__).parent.parent]
    found = [measure(tree.resolve()) for tree in trees]
    if chosen.json:
        print(json.dumps(dict(zip(map(str, trees), found)), indent=1))
        return
    for key in found[0]:
        print(f"{key:40}" + "".join(f"{one[key]!s:>22}" for one in found))


if __name__ == "__main__":
    main()
