"""Write a checkpoint of a run as a resume file that MiniMind continues from with `--from_resume 1`.

The file has the same keys as MiniMind's own: weights in fp16, head and embedding under both names, AdamW's state by
position, epoch and step of one rank. It is a copy for use elsewhere: what fp16 and (epoch, step) cannot hold stays in
the run. It is written like every conversion: streamed, read back, compared, then renamed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensorkeep.conversion.naming import hf, minimind
from tensorkeep.conversion.plan import Part, Plan, Step
from tensorkeep.conversion.proof import check_sources, prove
from tensorkeep.conversion.sink import quiet
from tensorkeep.conversion.writing import write_files
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.earlier import CHECKPOINT
from tensorkeep.formats.run import read_part
from tensorkeep.formats.view import Note, StateView
from tensorkeep.language.minimind._position import Batching, step_of
from tensorkeep.language.minimind._resume_file import registered
from tensorkeep.storage import run_folder
from tensorkeep.storage.archive_writing import build_archive, tensor_object
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.layout import FileLayout, SinkTensor
from tensorkeep.storage.placement import replacing
from tensorkeep.storage.record import DTYPES, TensorRecord, nbytes

_STACKED = re.compile(r"(?P<at>.+\.mlp\.experts)\.(?P<what>gate_up_proj|down_proj)\Z")
SLOTS = ("step", "exp_avg", "exp_avg_sq")
OURS = ("names", "params", "base_lr")  # keys of a parameter group that are not AdamW's


@dataclass(frozen=True)
class Exported:
    """A resume file that was written.

    Args:
        path: the file.
        epoch: from 0, as MiniMind counts.
        step: micro-batches of one rank in this epoch.
        world_size: ranks.
        notes: what the file does not hold.
    """

    path: str
    epoch: int
    step: int
    world_size: int
    notes: list[Note]


def export_resume(
    run: str | Path, out: str | Path, batch: int | None = None, world_size: int | None = None, overwrite: bool = False
) -> Exported:
    """Write a checkpoint of a run as a MiniMind resume file; after an error nothing is left behind.

    Args:
        run: a run, whose newest whole checkpoint is taken, or a step folder.
        out: the file to write.
        batch: MiniMind's --batch_size: samples a forward on one rank (None: the run's own).
        world_size: ranks that are to go on (None: the run's own).
        overwrite: replace `out` where it is there.

    Returns:
        What was written, with notes on what the file does not hold.

    Raises:
        TensorkeepError: the model is none of MiniMind's (K02, T01), the optimizer not AdamW (R05), the run an
            adapter's, or a weight beyond fp16 (V02).

    Example:
        >>> export_resume("runs/one", "checkpoints/pretrain_768_resume.pth").step         # doctest: +SKIP
        2000
    """
    opened = run_folder.open_checkpoint(Path(run))
    model = read_part(opened.path, "model") if opened is not None else None
    if opened is None or model is None:
        what = (
            "is not a run of tensorkeep"
            if opened is None
            else "holds an adapter alone, MiniMind's file the base as well"
        )
        raise TensorkeepError(
            what, where=run, hint="weights go with: tensorkeep convert RUN OUT --to pth --naming minimind"
        )
    document = parse_json(read_small(opened.path / run_folder.STATE), opened.path / run_folder.STATE)
    weights, moments = _unstacked(model), read_part(opened.path, "optimizer")
    optimizer = _unstacked(moments) if moments is not None else None
    names = _names(weights, document, opened.path)
    made = minimind.generation(weights)
    notes: list[Note] = []
    group = _group(document, notes, opened.path)
    batching = _batching(document, batch, world_size)
    epoch, step = _position(document, batching, notes)
    steps = [_weight(weights, name) for name in names]
    steps += [] if hf.HEAD in names else [_tied(steps, names)]
    steps += [s for i, n in enumerate(names) for s in _state(optimizer, n, i)]
    value = _document(steps, len(names), group)
    scaler = document.get("scaler")
    value |= {"epoch": epoch, "step": step, "world_size": batching.world_size, "wandb_id": None}
    value["scaler"] = dict(scaler) if isinstance(scaler, Mapping) else {}
    plan = Plan([weights, *([optimizer] if optimizer else [])], steps, "minimind", None, notes=notes)
    _write(plan, value, Path(out), overwrite)
    width = weights[hf.EMBEDDING].shape[1]
    suffix = f"_{width}{'_moe' if any('.experts.' in n for n in names) else ''}_resume.pth"
    if not Path(out).name.endswith(suffix):
        notes.append(Note("K08", f"MiniMind ({made}) looks for a name that ends in {suffix}"))
    rounded = "weights are rounded to fp16, as MiniMind keeps them"
    notes.append(Note("V02", f"{rounded}: the run itself goes on exactly from its own checkpoints"))
    return Exported(str(out), epoch, step, batching.world_size, notes)


# -- tensors ------------------------------------------------------------------------------------------------------


def _unstacked(view: StateView) -> StateView:
    """Take stacked experts apart, as MiniMind's files keep them.

    `experts.gate_up_proj [e, 2i, h]` becomes gate and up of each expert, as byte ranges of the same file. Optimizer
    state (`name/slot`) goes along; Adam's one counter becomes each expert's.
    """
    records: dict[str, TensorRecord] = {}
    for name, record in view.records.items():
        base, _, slot = name.partition("/")
        match = _STACKED.match(base)
        if match is None:
            records[name] = record
            continue
        for part, own in _pieces(match, base, record, view):
            records[f"{part}/{slot}" if slot else part] = own
    return replace(view, records=records)


def _pieces(
    match: re.Match[str], base: str, record: TensorRecord, view: StateView
) -> Iterator[tuple[str, TensorRecord]]:
    """Name and record of each expert's part of a stacked tensor."""
    leaves = ("gate_proj", "up_proj") if match["what"] == "gate_up_proj" else ("down_proj",)
    if not record.shape:
        stacked = next((r for n, r in view.records.items() if n == f"{base}/exp_avg"), record)
        for e in range(stacked.shape[0] if stacked.shape else 0):
            for leaf in leaves:
                yield f"{match['at']}.{e}.{leaf}.weight", record
        return
    experts, rows, width = record.shape
    shape = (rows // len(leaves), width)
    size = nbytes(record.dtype, shape)
    for e in range(experts):
        block = next(
            (b for b in record.blocks if 0 <= e - b.offsets[0] < b.shape[0] and b.shape[1:] == (rows, width)), None
        )
        if block is None:
            what = f"{record.name} is cut through its experts"
            raise TensorkeepError(what, where=view.path, hint="resume it on one rank and save once")
        for i, leaf in enumerate(leaves):
            start = block.start + ((e - block.offsets[0]) * len(leaves) + i) * size
            own = block._replace(start=start, nbytes=size, offsets=(0, 0), shape=shape, crc=None)
            name = f"{match['at']}.{e}.{leaf}.weight"
            yield name, replace(record, name=name, shape=shape, blocks=(own,))


def _names(weights: StateView, document: Mapping[str, Any], where: Path) -> list[str]:
    """List parameter names in the order of MiniMind's optimizer; until MiniMind-3 head and embedding are one."""
    if hf.HEAD in weights and (made := minimind.generation(weights)) != "mm3":
        raise TensorkeepError(
            f"has a head of its own; that of {made} is the embedding",
            where=where,
            code="T01",
            hint="weights alone go with: tensorkeep convert RUN OUT --to pth --naming minimind",
        )
    if hf.EMBEDDING not in weights or weights[hf.EMBEDDING].shape[1:] == ():
        raise TensorkeepError(f"has no {hf.EMBEDDING}: no language model of MiniMind's", where=where, code="K01")
    return registered(weights, minimind.generation(weights))


def _weight(weights: StateView, name: str) -> Step:
    """The step that writes one weight, rounded to fp16 where it is wider."""
    record = weights[name]
    cast = DTYPES[record.dtype].floating and record.dtype != "F16"
    sink = SinkTensor(f"model.{name}", "F16" if cast else record.dtype, record.shape)
    return Step(("rename", "cast") if cast else ("rename",), (Part(0, name),), sink)


def _tied(steps: list[Step], names: list[str]) -> Step:
    """The step that puts the embedding's bytes under the head's name as well."""
    embedding = steps[names.index(hf.EMBEDDING)]
    assert embedding.sink is not None
    sink = embedding.sink._replace(name=f"model.{hf.HEAD}", tied_to=embedding.sink.name)
    return Step((*embedding.actions, "tie"), embedding.parts, sink)


def _state(optimizer: StateView | None, name: str, index: int) -> Iterator[Step]:
    """The steps that write the optimizer state of one parameter, by its position."""
    for slot in SLOTS:
        if optimizer is not None and (record := optimizer.get(f"{name}/{slot}")) is not None:
            sink = SinkTensor(f"optimizer.state.{index}.{slot}", record.dtype, record.shape)
            yield Step(("rename",), (Part(1, f"{name}/{slot}"),), sink)


def _document(steps: list[Step], count: int, group: Mapping[str, Any]) -> dict[str, Any]:
    """Build the nested value that torch.save would have pickled, with tensors by storage key."""
    keys = _keys(steps)
    model: dict[str, Any] = {}
    states: dict[int, dict[str, Any]] = {}
    for step in steps:
        assert step.sink is not None
        made = tensor_object(step.sink, keys[step.sink.tied_to or step.sink.name])
        if step.sink.name.startswith("model."):
            model[step.sink.name.removeprefix("model.")] = made
        else:
            _, _, index, slot = step.sink.name.split(".")
            states.setdefault(int(index), {})[slot] = made
    return {
        "model": model,
        "optimizer": {"state": states, "param_groups": [{**group, "params": list(range(count))}]},
    }


def _keys(steps: list[Step]) -> dict[str, str]:
    """Storage key of each tensor that has bytes of its own."""
    stored = [s.sink.name for s in steps if s.sink is not None and s.sink.tied_to is None]
    return {name: str(i) for i, name in enumerate(stored)}


# -- the rest of the document ----------------------------------------------------------------------------------------


def _group(document: Mapping[str, Any], notes: list[Note], where: Path) -> dict[str, Any]:
    """Make AdamW's one parameter group; where ours are several, with the largest one's settings and a note."""
    kept = document.get("optimizer") or {}
    groups = [g for g in kept.get("groups") or () if isinstance(g, dict)]
    if kept.get("kind") != "AdamW" or not groups:
        raise TensorkeepError(f"trains with {kept.get('kind')}, MiniMind with AdamW", where=where, code="R05")
    plain = [{k: tuple(v) if k == "betas" else v for k, v in g.items() if k not in OURS} for g in groups]
    largest = max(range(len(groups)), key=lambda i: len(groups[i].get("names") or ()))
    differ = sorted({k for g in plain for k in g if g[k] != plain[largest].get(k)})
    if differ:
        notes.append(Note("R05", f"{len(groups)} parameter groups become one, {', '.join(differ)} as in the largest"))
    return plain[largest]


def _batching(document: Mapping[str, Any], batch: int | None, world_size: int | None) -> Batching:
    """How MiniMind would cut the run's data."""
    world = world_size or document.get("world_size") or 1
    whole, length = document.get("batch"), (document.get("data") or {}).get("length")
    micro = batch or (document.get("facts") or {}).get("micro") or math.ceil((whole or 1) / world)
    if type(whole) is not int or type(length) is not int or min(length, micro, world) < 1:
        raise TensorkeepError(
            "the checkpoint does not say batch and length of its data", where=run_folder.STATE, code="R02"
        )
    return Batching(length, micro, max(round(whole / (micro * world)), 1), world)


def _position(document: Mapping[str, Any], batching: Batching, notes: list[Note]) -> tuple[int, int]:
    """Translate the run's position into MiniMind's epoch and step, noting what these cannot say."""
    epoch, step, rest = step_of(document["samples"], batching)
    if rest:
        again = f"{rest} samples beyond step {step} come again"
        notes.append(Note("R02", f"{again}: MiniMind counts micro-batches, the run samples"))
    if step % batching.accumulation:
        inside = f"step {step} is inside MiniMind's accumulation of {batching.accumulation}"
        notes.append(Note("R02", f"{inside}: its next step takes fewer samples"))
    theirs = (document.get("recipe") or {}).get("continued_from") or {}
    same = theirs.get("order") == ("sampler" if batching.world_size > 1 else "process")
    if step and not (same and type(theirs.get("samples")) is int and theirs["samples"] // batching.length == epoch):
        done = step * batching.batch * batching.world_size
        some = f"of the {done} samples that were trained on some come again, and others never"
        avoid = "export at an epoch's start to avoid that"
        notes.append(Note("R02", f"MiniMind shuffles this epoch its own way: {some}; {avoid}"))
    return epoch, step


def _write(plan: Plan, value: dict[str, Any], out: Path, overwrite: bool) -> None:
    """Stream the file beside its place, prove it, rename it."""
    keys = _keys(plan.steps)
    stored = [(keys[t.name], t) for t in plan.tensors if t.name in keys]
    with replacing(out, overwrite, CHECKPOINT) as temporary:
        layout = FileLayout(temporary.name, build_archive(0, value, stored).segments)
        sums = write_files([layout], temporary.parent, plan, quiet)
        check_sources(plan, sums)
        lost = {n: s.cast.overflowed for n, s in sums.items() if s.cast.overflowed}
        if lost:
            name, count = next(iter(lost.items()))
            raise TensorkeepError(
                f"{count} weights of {name.removeprefix('model.')} are beyond fp16, which ends at 65504",
                where=out,
                code="V02",
                hint="MiniMind keeps fp16 only; tensorkeep convert RUN OUT --to pth keeps the run's own dtype",
            )
        prove(temporary, plan, sums, quiet)
