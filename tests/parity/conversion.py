"""Parity with flame and torchtitan: `python -m tests.parity.conversion DIR`, one line a case.

DIR holds a folder a model: `hf/`, `expected.safetensors`, and what the original programs wrote from it (`flame_dcp_*`,
`titan030_dcp`); and trainer checkpoints (`titan030_trainer_MODEL`). What they wrote is read by torch's own reader as
well as by ours; what we write is loaded by torch and by transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import Note, StateView, read
from tensorkeep.storage.record import FROM_TORCH
from tests.parity.outcome import (
    Outcome,
    be_quiet,
    bitwise,
    guarded,
    largest,
    load_model,
    natural_key,
    report,
    same,
    tensors,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOGITS = 1e-4  # what the fixtures state


class Model:
    """A model folder: the hf view as read by us, its tensors as read by the safetensors library, the expectation."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.view = read(folder / "hf")
        self.config: dict[str, Any] = json.loads((folder / "hf" / "config.json").read_text())
        index = folder / "hf" / "model.safetensors.index.json"
        files = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        self.tensors = {n: t for file in files for n, t in load_file(folder / "hf" / file).items()}
        self.tied = bool(self.config.get("tie_word_embeddings"))
        self.conflict = self.tied and HEAD in self.tensors and not same(self.tensors[HEAD], self.tensors[EMBEDDING])
        expected = folder / "expected.safetensors"
        self.expected = load_file(expected) if expected.exists() else {}

    @property
    def dtype(self) -> str | None:
        """The dtype of the hf file, None where it mixes several (norms in fp32)."""
        kinds = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        return FROM_TORCH[str(kinds.pop()).removeprefix("torch.")] if len(kinds) == 1 else None

    def after(self, written: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cast the model's tensors as a writer does to its own dtypes, and back to those of the file."""
        casts = {n: t.to(written[n].dtype) if n in written else t for n, t in self.wanted.items()}
        return {n: t.to(self.tensors[n].dtype) if self.dtype else t for n, t in casts.items()}

    @property
    def wanted(self) -> dict[str, torch.Tensor]:
        """What an hf sink of this model holds: a tied head once, a head of its own always."""
        return {n: t for n, t in self.tensors.items() if n != HEAD or self.conflict or not self.tied}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(argv).folder
    be_quiet()
    with tempfile.TemporaryDirectory() as work:
        return report(cases(folder, Path(work)))


def cases(folder: Path, work: Path) -> Iterator[Outcome]:
    """Every case of a folder of fixtures."""
    places = [p for p in sorted(folder.iterdir(), key=natural_key) if p.is_dir() and not p.name.startswith("sick_")]
    models = {p.name: Model(p) for p in places if (p / "hf").is_dir()}
    for model in models.values():
        yield from guarded(model.name, lambda m=model: model_cases(m, work / m.name))
    for place in places:
        if (place / "checkpoint").is_dir() and place.name not in models:
            yield from guarded(place.name, lambda p=place: trainer_cases(p, list(models.values()), work / p.name))


def model_cases(model: Model, work: Path) -> Iterator[Outcome]:
    for dcp in sorted(model.folder.glob("flame_dcp_*")):
        step = max((dcp / "checkpoint").glob("step-*"), key=natural_key)
        yield from guarded(
            f"{model.name}/{dcp.name}",
            lambda s=step, d=dcp: flame_cases(model, s, f"{model.name}/{d.name}", work / d.name),
        )
    titan = model.folder / "titan030_dcp"
    if titan.is_dir():
        yield from guarded(f"{model.name}/titan030_dcp", lambda: titan_cases(model, titan, work / "titan"))
    yield from guarded(f"{model.name}/hf", lambda: round_trips(model, work / "trips"))


# -- flame ----------------------------------------------------------------------------------------------------------


def flame_cases(model: Model, step: Path, name: str, work: Path) -> Iterator[Outcome]:
    """What flame wrote becomes hf; our DCP gives flame's state dict what flame's own gives it, nested and flat."""
    original = torch_load(step)
    held = {n.removeprefix("model."): t for n, t in original.items()}
    out = work / "hf"
    view = with_config(read(step), model)
    plan = make_plan([view], "hf", dtype=model.dtype)
    convert(plan, str(out), "hf")
    overwrote = model.conflict and same(held[HEAD], held[EMBEDDING])  # as transformers 4 does under a tied config
    wanted = {n: t for n, t in model.after(held).items() if not (overwrote and n == HEAD)}
    yield bitwise(f"{name} to hf", tensors(read(out)), wanted, "flame overwrote the head" * overwrote)
    if not overwrote:
        yield from logits(f"{name} to hf", out, model.expected)

    plan = make_plan([view], "hf")
    convert(plan, str(work / "hf_as_stored"), "hf")
    again = with_config(read(work / "hf_as_stored"), model)
    for root, style in (("model", "nested"), (None, "flat")):
        sink = work / style
        convert(make_plan([again], "dcp", root=root), str(sink), "dcp")
        state = {n: torch.empty_like(t) for n, t in held.items()}
        load_into({"model": state} if root else state, sink)
        yield bitwise(f"{name} back, flame's dcp.load, {style}", state, held)


# -- torchtitan -----------------------------------------------------------------------------------------------------


def titan_cases(model: Model, titan: Path, work: Path) -> Iterator[Outcome]:
    """Convert torchtitan's DCP to hf and back: its state dict gets the same bits, what its adapter loses stays."""
    name = f"{model.name}/titan030_dcp"
    original = torch_load(titan)
    lost = (
        {n for n in model.tensors if n.endswith(".bias")} if not any(n.endswith(".bias") for n in original) else set()
    )
    overwrote = model.conflict and same(original["lm_head.weight"], original["tok_embeddings.weight"])
    said = "; ".join(
        [f"torchtitan dropped {len(lost)} biases"] * bool(lost) + ["torchtitan overwrote the head"] * overwrote
    )
    convert(make_plan([with_config(read(titan), model)], "hf", dtype=model.dtype), str(work / "hf"), "hf")
    floats = {n: t.float() for n, t in model.wanted.items()}
    wanted = {n: t for n, t in model.after(floats).items() if n not in lost and not (overwrote and n == HEAD)}
    yield bitwise(f"{name} to hf", tensors(read(work / "hf")), wanted, said)
    if not lost and not overwrote:
        yield from logits(f"{name} to hf", work / "hf", model.expected)

    plan = make_plan([model.view], "dcp", naming="torchtitan", dtype="F32")
    convert(plan, str(work / "dcp"), "dcp")
    state = {n: torch.empty_like(t) for n, t in original.items()}
    load_into(state, work / "dcp")
    if overwrote:
        original["lm_head.weight"] = model.tensors[HEAD].float()
    yield bitwise(f"{name} from hf, torchtitan's dcp.load", state, original, said)
    if model.conflict:
        yield said_so(f"{name} from hf says T01", plan.notes, "T01")
    if lost:
        kept = torch_load(work / "dcp")
        yield bitwise(
            f"{name} from hf keeps biases", {n: t for n, t in kept.items() if n.endswith(".bias")}, titan_biases(model)
        )
        yield said_so(f"{name} from hf says K07", plan.notes, "K07")

    convert(make_plan([model.view], "dcp", naming="torchtitan"), str(work / "own"), "dcp")
    convert(make_plan([with_config(read(work / "own"), model)], "hf"), str(work / "own_hf"), "hf")
    yield bitwise(f"{model.name}/hf to torchtitan and back", tensors(read(work / "own_hf")), model.wanted)
    yield from logits(f"{model.name}/hf to torchtitan and back", work / "own_hf", model.expected)


def titan_biases(model: Model) -> dict[str, torch.Tensor]:
    """Biases under torchtitan's names in fp32, q and k rows interleaved for a llama: written anew, from the paper."""
    heads = model.config["num_attention_heads"]
    dim = model.config.get("head_dim") or model.config["hidden_size"] // heads
    own = {"q_proj": "qkv_linear.wq", "k_proj": "qkv_linear.wk", "v_proj": "qkv_linear.wv", "o_proj": "wo"}
    mlp = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    out = {}
    for name, tensor in model.tensors.items():
        if name.endswith(".bias"):
            layer, part, proj = name.split(".")[2:5]
            if proj in ("q_proj", "k_proj") and model.config["model_type"] == "llama":
                tensor = tensor.view(-1, 2, dim // 2).transpose(1, 2).reshape(-1)
            spelled = f"attention.{own[proj]}" if part == "self_attn" else f"feed_forward.{mlp[proj]}"
            out[f"layers.{layer}.{spelled}.bias"] = tensor.float()
    return out


def said_so(name: str, notes: list[Note], code: str) -> Outcome:
    found = [n for n in notes if n.code == code]
    return Outcome(name, 0 if found else 1, 0, found[0].message[:100] if found else f"no note {code}")


def trainer_cases(place: Path, models: list[Model], work: Path) -> Iterator[Outcome]:
    """A trainer's checkpoint, optimizer and all, becomes hf with the config of the model it was trained from."""
    for step in sorted((place / "checkpoint").glob("step-*"), key=natural_key):
        name = f"{place.name}/{step.name}"
        model = sibling(place.name, read(step), models)
        view = with_config(read(step), model)
        convert(make_plan([view], "hf"), str(work / step.name), "hf")
        found = sorted(place.glob(f"expected_after_{step.name.removeprefix('step-')}_steps.safetensors"))
        yield from logits(f"{name} to hf", work / step.name, load_file(found[0]) if found else {})
        original = torch_load(step, keys=set(titan_keys(model, work)))
        convert(make_plan([read(work / step.name)], "dcp", naming="torchtitan"), str(work / "dcp"), "dcp")
        state = {n: torch.empty_like(t) for n, t in original.items()}
        load_into(state, work / "dcp")
        yield bitwise(
            f"{name} to hf and back, torchtitan's dcp.load",
            state,
            original,
            f"of {len(view) + len(view.entries)} entries in the checkpoint",
        )
    for export in sorted((place / "hf_export").glob("step-*"), key=natural_key):
        model = sibling(place.name, read(export), models)
        view = with_config(read(export), model)
        convert(make_plan([view], "dcp", naming="torchtitan"), str(work / "export_dcp"), "dcp")
        convert(make_plan([with_config(read(work / "export_dcp"), model)], "hf"), str(work / "export"), "hf")
        made = tensors(read(work / "export"))
        yield bitwise(f"{place.name}/hf_export/{export.name} to torchtitan and back", made, tensors(read(export)))
        load_model(work / "export")


def titan_keys(model: Model, work: Path) -> list[str]:
    """The keys of torchtitan's model, from its own DCP of the sibling where there is one."""
    titan = model.folder / "titan030_dcp"
    if not titan.is_dir():
        titan = work / "sibling_dcp"
        convert(make_plan([model.view], "dcp", naming="torchtitan"), str(titan), "dcp")
    return list(metadata(titan))


def sibling(name: str, view: StateView, models: list[Model]) -> Model:
    """The model a trainer checkpoint belongs to: named in its name, or else of the very same shapes."""
    named = [m for m in models if m.name in name]
    if named:
        return max(named, key=lambda m: len(m.name))
    shapes = {r.shape for r in view.values()}
    fitting = [m for m in models if {tuple(t.shape) for t in m.tensors.values()} <= shapes]
    if not fitting:
        raise ValueError(f"no model beside {name} has its shapes")
    return max(fitting, key=lambda m: len(m.tensors))


# -- both -----------------------------------------------------------------------------------------------------------


def round_trips(model: Model, work: Path) -> Iterator[Outcome]:
    """hf to each format and back, bit by bit; then what transformers computes from the end of the chain."""
    for to, options in (("dcp", {}), ("dcp", {"root": "model"}), ("pth", {})):
        word = f"{to}{' nested' if options else ''}"
        convert(make_plan([model.view], to, **options), str(work / word / "there"), to)
        convert(make_plan([with_config(read(work / word / "there"), model)], "hf"), str(work / word / "back"), "hf")
        yield bitwise(f"{model.name}/hf to {word} and back", tensors(read(work / word / "back")), model.wanted)
    yield from logits(f"{model.name}/hf to pth and back", work / "pth" / "back", model.expected)


def logits(name: str, folder: Path, expected: dict[str, torch.Tensor]) -> Iterator[Outcome]:
    """Logits and loss of the converted folder against the original model's."""
    model = load_model(folder)
    if "input_ids" not in expected:
        yield Outcome(f"{name}, loads", 0, 0, "no expected logits")
        return
    with torch.no_grad():
        made = model(input_ids=expected["input_ids"], labels=expected["input_ids"])
    wanted = next(t for n, t in expected.items() if n.startswith("logits"))
    yield Outcome(f"{name}, logits", largest(made.logits, wanted), LOGITS)
    losses = [t for n, t in expected.items() if n.startswith("loss")]
    if losses:
        yield Outcome(f"{name}, loss", largest(made.loss.reshape(1), losses[0].reshape(1)), LOGITS)


def with_config(view: StateView, model: Model) -> StateView:
    """The view with the config that stands in the model's hf folder, as `--config` gives it."""
    view.config, view.companions = model.view.config, list(model.view.companions)
    return view


def metadata(folder: Path) -> dict[str, Any]:
    """The tensors of a DCP folder by torch's own reader: name to shape and dtype."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {n: m for n, m in found.items() if isinstance(m, TensorStorageMetadata)}


def torch_load(folder: Path, keys: set[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a DCP folder, loaded by torch."""
    state = {
        n: torch.empty(m.size, dtype=m.properties.dtype)
        for n, m in metadata(folder).items()
        if keys is None or n in keys
    }
    load_into(state, folder)
    return state


def load_into(state: dict[str, Any], folder: Path) -> None:
    """torch.distributed.checkpoint.load, strict about every key of `state`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    except CheckpointException as error:  # a BaseException, which would end the run
        raise ValueError(f"dcp.load: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
