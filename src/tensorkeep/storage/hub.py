"""Find a model by its Hugging Face id: in the local cache first, by a download only where that is allowed; never code.

The cache is read as files (`models--org--name/refs/main` names a commit, `snapshots/<commit>/` holds the files), so
that an id works without huggingface_hub. Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError, untold
from tensorkeep.storage.files import absent

# org/name@revision, with the characters that the Hub allows; a revision may be a branch with slashes
_MODEL_ID = re.compile(
    r"(?P<org>[A-Za-z0-9][\w.-]{0,95})/(?P<name>[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?", re.ASCII
)
_FILE_ENDINGS = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt", ".json", ".distcp", ".metadata")
_SECONDS = 10  # to wait for the Hub's first answer
_BESIDE = (".json", ".jinja", "tokenizer.model", "vocab.txt", "merges.txt")
# best first; of a repository that has the first kind the others are not downloaded
_WEIGHT_ENDINGS = ((".safetensors", ".safetensors.index.json"), (".bin", ".bin.index.json"), (".gguf",))


def cached_snapshot(path: str) -> Path:
    """Return the folder of a model given by its id `org/name[@revision]`: from the cache, or downloaded.

    A download takes safetensors, JSON and tokenizer files of the top folder (.bin only where there are no
    safetensors) and never code; it needs huggingface_hub, and HF_HUB_OFFLINE unset.

    Args:
        path: the id; a revision is a branch, a tag or a commit, `main` where there is none.

    Raises:
        TensorkeepError: F05 where this is clearly a local path, or the model is nowhere to be had.

    Example:
        >>> cached_snapshot("HuggingFaceTB/SmolLM2-135M")        # doctest: +SKIP
        PosixPath('/home/me/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f...')
    """
    match = _MODEL_ID.fullmatch(path)
    # an id whose first part is a folder here was meant as a path
    if match is None or path.startswith((".", "~")) or path.endswith(_FILE_ENDINGS) or Path(match["org"]).is_dir():
        raise absent(path)
    repository, revision = f"{match['org']}/{match['name']}", match["revision"]
    found = _snapshot(cache_folder() / f"models--{match['org']}--{match['name']}", revision)
    if found is not None and _has_weights(found):
        return found
    if _offline():
        raise _missing(path, found, "HF_HUB_OFFLINE is set: unset it, or give the path of a folder")
    try:
        import huggingface_hub
    except ImportError:
        raise _missing(
            path, found, f"download it first: pip install huggingface_hub, then: hf download {repository}"
        ) from None
    return _download(huggingface_hub, repository, revision, path)


def cache_folder() -> Path:
    """Return the folder of the Hugging Face cache: HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub."""
    for variable, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if os.environ.get(variable):
            return (Path(os.environ[variable]) / below).expanduser()
    return Path("~/.cache/huggingface/hub").expanduser()


def _offline() -> bool:
    """Tell whether the environment forbids downloads."""
    return any(
        os.environ.get(v, "").upper() in ("1", "ON", "YES", "TRUE") for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _missing(path: str, found: Path | None, hint: str) -> TensorkeepError:
    """Make the error for a model that is not in the cache, or there without its weights."""
    what = (
        "is in the Hub cache without weights" if found else "no such file or folder, and no such model in the Hub cache"
    )
    return TensorkeepError(what, where=path, hint=hint, code="F05")


def _snapshot(repository: Path, revision: str | None) -> Path | None:
    """Find the snapshot of a branch, tag or commit; without a revision that of `main`, or the only one there."""
    snapshots = repository / "snapshots"
    if not snapshots.is_dir() or ".." in Path(revision or "").parts:
        return None
    reference = repository / "refs" / (revision or "main")
    if reference.is_file():
        commit = reference.read_text(errors="replace").strip()
    elif revision is not None:
        commit = revision
    else:
        present = sorted(p.name for p in snapshots.iterdir() if p.is_dir())
        commit = present[0] if len(present) == 1 else ""
    # a commit is one name: a reference that holds anything else must not lead out of the cache
    folder = snapshots / commit
    return folder if re.fullmatch(r"[\w-]+", commit) and folder.is_dir() else None


def _has_weights(folder: Path) -> bool:
    endings = tuple(e for kinds in _WEIGHT_ENDINGS for e in kinds)
    return any(p.name.endswith(endings) and p.exists() for p in folder.iterdir())  # a link may dangle


def wanted_files(names: Iterable[str]) -> list[str]:
    """Choose what to download of a repository: its best weights and what belongs beside them, top folder only.

    >>> wanted_files(["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "onnx/model.bin"])
    ['config.json', 'model.safetensors']
    """
    top = sorted(n for n in names if "/" not in n)
    weights = next((found for kinds in _WEIGHT_ENDINGS if (found := [n for n in top if n.endswith(kinds)])), [])
    # optimizer states and arguments of the Trainer end in .bin as well
    weights = [n for n in weights if not n.startswith(("training_args", "optimizer", "scheduler"))]
    beside = [n for n in top if n.endswith(_BESIDE) and not n.endswith(".index.json")]
    return sorted({*weights, *beside})


def _download(huggingface_hub: Any, repository: str, revision: str | None, path: str) -> Path:
    """Download the wanted files of a repository into the cache and return their folder."""
    try:
        # model_info asks once; listing calls retry for half a minute, too long for a mistyped path
        found = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=_SECONDS)
        files = wanted_files(file.rfilename for file in found.siblings or ())
        if not any(n.endswith(e) for kinds in _WEIGHT_ENDINGS for e in kinds for n in files):
            raise TensorkeepError("the repository holds no weights that can be read", where=path, code="F05")
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=files))
    # with httpx below, a failed connection is no OSError; a name that the Hub refuses is a ValueError
    except (OSError, ValueError, getattr(getattr(huggingface_hub, "errors", None), "HTTPError", OSError)) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TensorkeepError(
            f"no such file or folder, not in the Hub cache, and the Hub gave: {untold(first[:200], path)}",
            where=path,
            code="F05",
            hint="check the name; for a private or gated model: hf auth login",
        ) from None
