"""Check a model that some framework has loaded, in one line of its script, before training.

    for finding in check_loaded(model, "checkpoint/step-0"):
        print(finding.severity, finding.code, finding.message)

Every parameter and persistent buffer is compared bit by bit with the file, under whichever name it has there; every
non-persistent buffer with what its config gives; what the file has and the model did not take is listed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorkeep.diagnosis.identity.demand import demand
from tensorkeep.diagnosis.live._buffers import buffer_findings
from tensorkeep.diagnosis.live._config import config_findings
from tensorkeep.diagnosis.live._findings import ORDER, tensor_findings
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.formats.view import StateView, read
from tensorkeep.models.buffers import transformers_roots
from tensorkeep.models.counterpart import StoredModel
from tensorkeep.models.tensors import held
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json


def check_loaded(
    model: nn.Module, checkpoint: str | Path | StateView, config: Any = None, identity: str | None = None
) -> list[Finding]:
    """Compare a model in memory with the checkpoint that it was loaded from.

    Works on plain, compiled, DDP and FSDP2 models. Of a sharded model each process compares its own shards, so call
    it on every process: the findings are exchanged and are the same everywhere. The model is not changed.

    Args:
        model: The loaded model.
        checkpoint: The checkpoint's path, of any format and naming, or its view.
        config: The checkpoint's config (a dict, a file, a folder or a transformers config), where none lies beside it.
        identity: What `tensorkeep identify` must say of the checkpoint; None where it may be any.

    Returns:
        What is wrong, errors first; [] where every tensor and buffer is right.

    Raises:
        TensorkeepError: Where the checkpoint or the config cannot be read at all; F03 where it has another identity.

    Example:
        >>> [f.code for f in check_loaded(model, "out")]              # doctest: +SKIP
        ['B01']
    """
    view = checkpoint if isinstance(checkpoint, StateView) else read(checkpoint)
    if identity is not None:
        demand(view, identity)
    given = _config(config) or view.config
    tensors = held(model)
    source = StoredModel.of(view, given or _own(model))
    findings = _shared(model, list(tensor_findings(model, tensors, source)))
    findings += config_findings(model, given)
    findings += buffer_findings(model, given)
    return sorted(findings, key=lambda f: ("error", "warning", "info").index(f.severity))


def _own(model: nn.Module) -> dict[str, Any] | None:
    """Return a transformers model's own config: it gives the size of a head where no config lies beside the file."""
    own = next((getattr(root, "config", None) for _, root in transformers_roots(model)), None)
    return own.to_dict() if own is not None else None


def _config(config: Any) -> dict[str, Any] | None:
    """Read a config given as a dict, a path or a transformers config."""
    if config is None or isinstance(config, dict):
        return config
    if isinstance(config, (str, Path)):
        path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        document = parse_json(read_small(path), path)
        return document if isinstance(document, dict) else None
    if hasattr(config, "to_dict"):
        made: dict[str, Any] = config.to_dict()
        return made
    raise TensorkeepError(
        f"a config of type {type(config).__name__}", hint="give a dict, a path, or a transformers config"
    )


# -- processes ---------------------------------------------------------------------------------------------------------


def _shared(model: nn.Module, findings: list[Finding]) -> list[Finding]:
    """Exchange the findings about a sharded model between all processes and merge them by code and severity."""
    sharded = any(hasattr(p, "to_local") for p in model.parameters())
    if not sharded or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return findings
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, findings)
    merged: dict[tuple[str, str], Finding] = {}
    for rank, theirs in enumerate(gathered):
        for finding in theirs:
            key = (finding.code, finding.severity)
            kept = merged.setdefault(key, finding)
            more = [t for t in finding.tensors if t not in kept.tensors]
            if kept is not finding and more:
                kept.tensors = [*kept.tensors, *more]
                kept.message += f"; process {rank}: {finding.message}"
            _ranks(kept).append(rank)
    return _one_code_each(list(merged.values()))


def _ranks(finding: Finding) -> list[int]:
    """Return the list of processes that have this finding, as it stands in its evidence."""
    ranks: list[int] = finding.evidence.setdefault("processes", [])
    return ranks


def _one_code_each(findings: list[Finding]) -> list[Finding]:
    """Leave each tensor the code that comes first in ORDER, where its shards gave several."""
    seen: set[str] = set()
    out = []
    for finding in sorted(findings, key=lambda f: ORDER.index(f.code) if f.code in ORDER else -1):
        left = [t for t in finding.tensors if t not in seen or finding.code not in ORDER]
        if left or not finding.tensors:
            finding.tensors = left
            out.append(finding)
        seen.update(left if finding.code in ORDER else ())
    return out
