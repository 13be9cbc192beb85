"""The environment variables that matter here, with what is or looks like a secret masked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorkeep.errors import printable

_MASK = "***"
_PREFIXES = tuple(
    "AWS_ BNB_ CUBLAS_ CUDA_ CUDNN_ FSSPEC_ GLOO_ HF_ HIP_ HUGGINGFACE_ KMP_ MKL_ NCCL_ NVIDIA_ OMP_ OPENBLAS_ "
    "PYTORCH_ ROCR_ S3FS_ TENSORKEEP_ TOKENIZERS_ TORCH TRACKIO_ TRANSFORMERS_ TRITON_ WANDB_".split()
)
_NAMES = frozenset(
    "ALL_PROXY CC CXX HTTP_PROXY HTTPS_PROXY LD_LIBRARY_PATH LD_PRELOAD LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR "
    "MASTER_PORT NO_PROXY PYTHONHASHSEED PYTHONHOME PYTHONPATH RANK REQUESTS_CA_BUNDLE SLURM_JOB_ID SLURM_NNODES "
    "SLURM_NTASKS SSL_CERT_FILE TMPDIR WORLD_SIZE XDG_CACHE_HOME".split()
)
# a part of a name, between underscores, that says that the value is a secret; TOKENIZERS_... is none
_SECRET_PART = re.compile(
    r"(?:API|ACCESS|AUTH)?(?:TOKENS?|KEYS?|SECRETS?|PASS|PASSWD|PASSWORDS?|PASSPHRASE|PWD|CREDENTIALS?|CREDS|AUTH|"
    r"AUTHORIZATION|COOKIES?|SIGNATURE|HEADERS?)"
)
_SECRET_VALUE = re.compile(
    r"(?i)(?:token|key|secret|passw\w*|pwd|bearer|basic|authorization|signature|sig)[\"']?\s*[=:\s]\s*\S"
    r"|\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA|eyJ)[\w-]{8,}"
)
_LONG = re.compile(r"[A-Za-z0-9+=_-]{24,}")  # as keys are written; a path's parts and device names are told apart below
_UUID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
_DEVICE = re.compile(r"(?:GPU|MIG)-[0-9a-f-]+(?:/\d+/\d+)?")


def variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that matter to tensorkeep and its packages, in order, secrets masked.

    Args:
        environment: the variables; None: those of this process.
    """
    given = os.environ if environment is None else environment
    wanted = (n for n in given if n.upper() in _NAMES or n.upper().startswith(_PREFIXES))
    return {printable(name, 100): shown(name, given[name]) for name in sorted(wanted)}


def shown(name: str, value: str) -> str:
    """Return a variable's value as it may stand in a public report.

    >>> shown("HF_TOKEN", "abc"), shown("HTTPS_PROXY", "http://me:pw@proxy:3128"), shown("TOKENIZERS_PARALLELISM", "0")
    ('***', '***@proxy:3128', '0')
    """
    if not value:
        return ""
    if any(_SECRET_PART.fullmatch(part) for part in name.upper().split("_")) or _SECRET_VALUE.search(value):
        return _MASK
    if "@" in value:  # user and password, with or without a scheme; all before the last, whatever it is
        value = f"{_MASK}@{value.rpartition('@')[2]}"
    return printable(_LONG.sub(_masked_word, _without_query(value)), 300)


def _without_query(value: str) -> str:
    """Cut what follows a URL's question mark: it is often a signature."""
    return re.sub(r"\?\S*", f"?{_MASK}", value)


def _masked_word(match: re.Match[str]) -> str:
    """Mask a long word of letters and digits; the id of a device is none, nor are words joined by - or _."""
    word = match[0]
    if _DEVICE.fullmatch(word) or not re.search(r"\d", word) or not re.search(r"[A-Za-z]", word):
        return word
    return _MASK if max(map(len, re.split(r"[-_]", word))) >= 16 or _UUID.search(word) else word


def without_home(value: Any) -> Any:
    """Return a document in which the home folder is `~`: its name is a person's.

    Args:
        value: text, or lists and dicts of it.
    """
    home = str(Path.home())
    if isinstance(value, dict):
        return {name: without_home(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_home(inner) for inner in value]
    if isinstance(value, str) and len(home) > 1:
        return re.sub(rf"(?<![\w/.]){re.escape(home)}(?![\w-])", "~", value)
    return value
