"""The table of formats, and what is derived from it: which can be written, what they are called, who reads a folder.

A format is one file with functions and, where they differ from the default, facts:

| name | says | without it |
|---|---|---|
| `sniff(folder, names, single)` | whether these files are its own | needed |
| `read(folder, names, path)` | the view: headers only, every range checked | needed |
| `layout(tensors, **options)` | the files of a sink | the format is only read |
| `LOOKS` | what its files look like, for a user whose path is none | not named there |
| `ENDINGS` | endings of a sink that is one file | a sink is a folder |
| `NESTS` | whether a sink's names can lie under a root | `False` |
| `CHECKSUMS` | whether its files carry checksums of their data | `False` |
| `ARCHIVED` | whether each of its files is one zip archive | `False` |
| `ADAPTERS_ONLY` | whether it holds adapters and never a model | `False` |
| `TIED` | what becomes of a tied head: `one` name is stored, or `both` are asked for | each as it is |
| `unfinished(names)` | what is wrong with files that a stopped save left behind | nothing is said |
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.storage.files import Folder

# the word on the command line -> its module. The first that recognises the files reads them, and the commonest comes
# first: a module not asked is not imported.
FORMATS = {
    "run": "tensorkeep.formats.run",
    "hf": "tensorkeep.formats.safetensors",
    "dcp": "tensorkeep.formats.dcp",
    "peft": "tensorkeep.formats.peft",
    "gguf": "tensorkeep.formats.gguf",
    "zero": "tensorkeep.formats.zero",
    "ranks": "tensorkeep.formats.ranks",
    "megatron": "tensorkeep.formats.megatron",
    "folder": "tensorkeep.formats.folders",
    "pth": "tensorkeep.formats.pth",
}


def module(word: str) -> ModuleType:
    """Return the module of a format.

    Args:
        word: The format's word on the command line, a key of FORMATS.

    Raises:
        TensorkeepError: Where no format has that word; the hint names the nearest.
    """
    if word not in FORMATS:
        raise TensorkeepError(f"no format {word!r}", hint=near_misses(word, FORMATS) or f"known: {', '.join(FORMATS)}")
    return importlib.import_module(FORMATS[word])


def fact(word: str, name: str, default: object = None) -> object:
    """Return a fact that a format's module states, or the default; a view in memory has no format and no facts.

    Args:
        word: A format's word, or `memory`.
        name: The fact's name in the module, e.g. `CHECKSUMS`.
        default: What holds where the module does not say.
    """
    return getattr(module(word), name, default) if word in FORMATS else default


def writable(*, models: bool = False) -> list[str]:
    """Return the words of the formats that can be written.

    Args:
        models: Whether to leave out those that hold adapters only.
    """
    return [w for w in FORMATS if hasattr(module(w), "layout") and not (models and fact(w, "ADAPTERS_ONLY"))]


def writer(word: str, *, models: bool = False) -> ModuleType:
    """Return the module of a format that can be written.

    Args:
        word: The format's word, as the user gave it.
        models: Whether it has to hold whole models.

    Raises:
        TensorkeepError: Where there is no such format, or it is only read.
    """
    found = importlib.import_module(FORMATS[word]) if word in FORMATS else None
    if found is None or not hasattr(found, "layout") or (models and fact(word, "ADAPTERS_ONLY")):
        words = writable(models=models)
        near = near_misses(word, words)
        raise TensorkeepError(f"cannot write the format {word!r}", hint=near or f"formats: {', '.join(words)}")
    return found


def read_only(word: str) -> bool:
    """Return whether tensorkeep reads a format and does not write it.

    Args:
        word: the format, as FORMATS names it.
    """
    return word in FORMATS and not hasattr(module(word), "layout")


def written_again(word: str) -> str:
    """Return the format that a mended copy of a checkpoint is written in: its own where that is possible, else hf.

    Args:
        word: the checkpoint's format, as FORMATS names it.

    >>> written_again("dcp"), written_again("gguf")
    ('dcp', 'hf')
    """
    own = word in FORMATS and hasattr(module(word), "layout") and not fact(word, "ADAPTERS_ONLY")
    return word if own else "hf"


def names_a_file(word: str, name: str) -> bool:
    """Return whether a sink's name means one file and not a folder.

    Args:
        word: The sink's format.
        name: The last part of the sink's path.

    Raises:
        TensorkeepError: Where the name ends as a file does and the format writes folders.
    """
    own: tuple[str, ...] = getattr(module(word), "ENDINGS", ())
    if name.endswith(own):
        return True
    if "." not in name or not any(name.endswith(getattr(module(w), "ENDINGS", ())) for w in writable()):
        return False
    if not own:
        raise TensorkeepError(f"{word} is a folder, {name} names a file", hint="leave the ending out")
    return True


def unrecognised(folder: Folder, names: list[str], path: str) -> TensorkeepError:
    """Return the error for files that no format recognises: F01 for a stopped save, F05 otherwise.

    Args:
        folder: The folder that holds the files.
        names: The files that were looked at.
        path: What the user named.
    """
    steps = sorted(Path(folder.url).glob("step-*")) or sorted(Path(folder.url).glob("*/step-*"))
    if steps:
        return TensorkeepError(
            f"holds {len(steps)} checkpoints, not one: {', '.join(s.name for s in steps[:6])}",
            where=path,
            hint=f"name one, e.g. {steps[-1]}",
        )
    for word in FORMATS:
        unfinished = getattr(module(word), "unfinished", None)
        if unfinished is not None and (what := unfinished(names)):
            return TensorkeepError(what, where=path, code="F01", hint="use the checkpoint before it")
    seen = f"holds no checkpoint known here, but {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
    if names == [Path(path).name]:
        seen = "is no checkpoint known here"
    looks = [str(look) for word in FORMATS if (look := fact(word, "LOOKS"))]
    return TensorkeepError(
        seen if names else "is an empty folder",
        where=path,
        code="F05",
        hint=f"expected {', '.join(looks[:-1])} or {looks[-1]}",
    )
