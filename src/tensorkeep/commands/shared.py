"""What several commands share: the flags of all, words of the tables, configs, sizes."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tensorkeep.conversion import naming as namings
from tensorkeep.errors import TensorkeepError, near_misses, word
from tensorkeep.formats import table as formats
from tensorkeep.formats.view import Note, StateView
from tensorkeep.output import Output, size
from tensorkeep.storage.overwriting import Kind, lone_file
from tensorkeep.storage.record import BLOCK_TYPES, OTHER_BLOCKS, SPELLINGS

# words in braces in a command's help -> what stands there when the help is shown
TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "formats": formats.writable,
    "model_formats": lambda: formats.writable(models=True),
    "namings": namings.writable,
    "any_naming": lambda: namings.NAMINGS,
    "loaders": namings.loaders,
    "targets": lambda: importlib.import_module("tensorkeep.conversion.targets").TARGETS,
}
Flag = Annotated[bool, Parameter(negative="", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class Say:
    """Flags of every command.

    Args:
        json: One JSON document on stdout.
        quiet: Nothing on stderr but errors.
    """

    json: Flag = False
    quiet: Flag = False

    def output(self) -> Output:
        """Return what a command writes through."""
        return Output(self.json, self.quiet)


def filled(text: str) -> str:
    """Return a docstring as help: words of the tables for `{formats}` and the like, a line for each option.

    Args:
        text: the docstring of a command.

    >>> filled("One of {model_formats}, not {this}.")
    'One of hf, dcp, pth, not {this}.'
    """
    text = re.sub(r"\n {8,}(?=\S)", " ", inspect.cleandoc(text))  # an option's second line goes on with the first
    return re.sub(r"\{(\w+)\}", lambda m: ", ".join(TABLES[m[1]]()) if m[1] in TABLES else m[0], text)


def with_config(view: StateView, config: str | None) -> StateView:
    """Return the view with the config that the user names; it also travels to the sink.

    A GGUF file's own was made of its metadata, so that the user's stands in its place; another checkpoint keeps the
    config.json that lies beside it, and where that says something else a note tells.
    """
    if config is None:
        return view
    from tensorkeep.formats.companions import COMPANIONS, Companion, read_companion
    from tensorkeep.formats.config_types import believed
    from tensorkeep.storage.budget import read_small_from
    from tensorkeep.storage.certificate import parse_json
    from tensorkeep.storage.files import LocalFolder

    path = Path(config)
    folder = LocalFolder(path if path.is_dir() else path.parent)
    name = "config.json" if path.is_dir() else path.name
    data = read_small_from(folder, name)
    document = parse_json(data, f"{folder.url}/{name}")
    if not isinstance(document, dict):
        raise TensorkeepError("is not a config.json", where=path)
    linked = any(c.name == "config.json" and c.led_out for c in view.companions)
    if view.format == "gguf":
        _stand_in(view, believed(document), path)
    elif view.config is not None and not linked:
        if believed(document) != view.config:
            view.notes.append(Note("C01", f"has a config.json of its own: {path}, which says otherwise, is not used"))
        return view
    view.config = believed(document)
    present = folder.names() if path.is_dir() else []
    given = [read_companion(folder, n) for n in COMPANIONS[1:] if n in present]
    taken = {"config.json", *(c.name for c in given)}
    others = [c for c in view.companions if c.name not in taken]
    view.companions = [Companion("config.json", data, f"{folder.url}/{name}"), *others, *given]
    return view


# of a GGUF's metadata, which nothing computes otherwise
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def _stand_in(view: StateView, config: dict[str, Any], path: Path) -> None:
    """Check that the user's config can stand for a GGUF's own, and note where the two say different things.

    Raises:
        TensorkeepError: C01 where it is another architecture's, or has other sizes or numbers than the file says.
    """
    from tensorkeep.formats.gguf_metadata import ARCHITECTURES, contradictions, other_numbers, refuse_unsaid

    made, kind = view.config or {}, str(config.get("model_type"))
    held = ARCHITECTURES.get(str(made.get("model_type")), made.get("model_type"))
    if kind in ARCHITECTURES and held is not None and ARCHITECTURES[kind] != held:
        raise TensorkeepError(f"is the config of a {kind[:40]!r}, and the file holds a {held}", where=path, code="C01")
    sizes = [k for k in _SIZES if k in made and config.get(k) not in (None, made[k])]
    if sizes:
        what = ", ".join(f"{k} {str(config[k])[:20]} for {made[k]}" for k in sizes[:3])
        hint = "heads say how rows of q and k lie in this file: give the config of its own model"
        raise TensorkeepError(f"has other sizes than the file's metadata: {what}", where=path, code="C01", hint=hint)
    if numbers := other_numbers(config, view.metadata.get("gguf", {})):
        what = f"says otherwise than the file's metadata, which llama.cpp computes with: {', '.join(numbers)}"
        hint = "give the config of its own model; gguf_set_metadata.py of the gguf package changes the file's number"
        raise TensorkeepError(what, where=path, code="C01", hint=hint)
    view.metadata["not_in_config"] = []
    try:
        refuse_unsaid(config)
    except TensorkeepError as error:
        view.notes.append(Note("C01", f"{path}: {error.what}; it is taken from there"))
    with contextlib.suppress(TensorkeepError):  # the metadata cannot say this config's RoPE, and does not contradict it
        if len(made) > 1 and (wrong := contradictions(config, made)):
            view.notes.append(Note("C01", f"{path} stands for what the metadata says: {'; '.join(wrong[:3])}"))


def found_in_store(result: Any) -> list[str]:
    """Say what killed commands had left at the place of an output in a store: gone on from, or given up.

    Args:
        result: of a conversion or a merge.
    """
    said = []
    if result.resumed:
        kept = size(result.resumed)
        said.append(f"note: a command was killed there before; {kept} that it had sent were not sent again")
    if result.cleared:
        said.append(f"note: a command was killed there before; removed: {', '.join(result.cleared)}")
    return said


def prepare(out: Output, sink: str | Path) -> None:
    """Say where a local sink leads through links, and clear what killed commands left beside it."""
    from tensorkeep.storage.files import local_path
    from tensorkeep.storage.placement import clear_leftovers

    if "://" in str(sink).removeprefix("file://"):
        return
    path = local_path(str(sink).removeprefix("file://"))
    place = path.parent.resolve()
    if place != Path(os.path.normpath(path.parent.absolute())):
        out.remark(f"note: {path} lies through a link, in {place}")
    cleared, stay = clear_leftovers(path)
    if cleared:
        out.remark(f"note: a command was killed here before; cleaned up: {', '.join(cleared)}")
    if stay:
        out.remark(f"note: {', '.join(stay)} stays: another command may be at work; if none is, delete it")


def no_video(command: str, checkpoint: str | Path, rest: str) -> TensorkeepError:
    """Return the error for a command line without videos; the model may have been forgotten, and be one itself.

    Args:
        command: that was called.
        checkpoint: what stands in the model's place.
        rest: the flags that a whole command line has.
    """
    from tensorkeep.detection.data.opening import VIDEO_SUFFIXES

    given = word(checkpoint)
    if Path(checkpoint).suffix.lower() in VIDEO_SUFFIXES:
        hint = f"tensorkeep {command} RUN {given} {rest}"
        return TensorkeepError("is a video, and the model comes before it", where=checkpoint, hint=hint)
    return TensorkeepError("no video is named", hint=f"tensorkeep {command} {given} VIDEO... {rest}")


def recipe_of_kind(word: str) -> Kind:
    """What a file must be to be replaced by a recipe: one of the same kind that reads, or one that was imported."""
    imported = lone_file(f"a recipe of the kind {word}", "# From the OpenTAD config " if word == "detection" else "$")

    def strangers(path: Path) -> list[str]:
        found = list(imported.strangers(path))
        if found and path.is_file():
            with contextlib.suppress(TensorkeepError):
                _read_recipe(word, path)
                return []
        return found

    return Kind(imported.word, strangers)


def _read_recipe(word: str, path: Path) -> None:
    """Read a recipe of one kind, strictly."""
    if word == "detection":
        from tensorkeep.detection.recipe.text import read_recipe

        read_recipe(path)
    else:
        from tensorkeep.language.recipe_text import read_language

        read_language(path)


def known_naming(naming: str | None) -> str | None:
    """Return the naming that the user gave, once the table has it."""
    if naming is not None:
        namings.module(naming)
    return naming


def known_loader(loader: str | None) -> str | None:
    """Return the program that the user gave for --for, once some naming says that it loads its names."""
    known = namings.loaders() if loader is not None else {}
    if loader is not None and loader not in known:
        hint = near_misses(loader, known) or f"known: {', '.join(known)}"
        raise TensorkeepError(f"no loader {loader!r}", where="--for", hint=hint)
    return loader


def known_dtype(dtype: str | None, command: str, paths: Sequence[str]) -> str | None:
    """Return our word for the dtype that the user gave (bf16 is BF16); `paths` are the command's, the sink last."""
    if dtype is None:
        return None
    if dtype.upper() in OTHER_BLOCKS:
        from tensorkeep.conversion.gguf_types import refuse_made_elsewhere

        refuse_made_elsewhere(dtype.upper(), paths[:-1], paths[-1], command)
    if dtype.upper() in BLOCK_TYPES:
        return dtype.upper()
    if dtype.lower() not in SPELLINGS:
        raise TensorkeepError(
            f"no dtype {dtype!r}",
            hint=near_misses(dtype.lower(), SPELLINGS)
            or f"e.g. --dtype bf16, fp16, fp32; for GGUF also {', '.join(BLOCK_TYPES).lower()}",
        )
    return SPELLINGS[dtype.lower()]


def known_root(root: str | None, to: str) -> str | None:
    """Return the root that the user gave, None for none; stop where the format has no place for one."""
    if root in (None, "none"):
        return None
    if not formats.fact(to, "NESTS"):
        raise TensorkeepError(f"{to} nests nothing: its names have no root", hint="leave --root out")
    return root


def shard_limit(text: str | None, to: str, sink: str) -> int | None:
    """Return the largest size of a file in bytes, None where none was given; stop where the sink is one file."""
    if text is None:
        return None
    if formats.names_a_file(to, Path(sink).name):
        raise TensorkeepError(f"{sink} is one file: it has no shards", hint="name a folder, or leave --shard-size out")
    return parse_size(text)


def parse_size(text: str) -> int:
    """Return bytes from `5GB`, `500MB`, `2GiB` or a plain number.

    >>> parse_size("5GB"), parse_size("2GiB")
    (5000000000, 2147483648)
    """
    units = {
        "": 1,
        "B": 1,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    digits = text.rstrip("KMGTIBkmgtib ")
    unit = text[len(digits) :].strip().upper()
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    if unit not in units or value <= 0:
        raise TensorkeepError(f"{text!r} is not a size", hint="e.g. --shard-size 5GB")
    return int(value * units[unit])
