"""Weights and optimizer state of a resume file, put together for the tensors of a model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import Part
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped
from tensorkeep.language.minimind._resume_file import Resume
from tensorkeep.models.counterpart import CounterpartFinder, StoredModel
from tensorkeep.models.tensors import Held, clean, expected
from tensorkeep.training.live_state import refuse_difference, stored_tensors


def model_state(resume: Resume, model: nn.Module, base: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make the weights and the optimizer state of a model from a resume file.

    Args:
        resume: the file.
        model: decides names, shapes and dtypes; it stays as it is.
        base: whether only what trains is the run's, over a base whose weights must be those in the file.

    Returns:
        Weights by the model's names in the dtype the model trains them in, and moments as `parameter/slot`.

    Raises:
        TensorkeepError: the file is of another model (K01, K02, S01, A02, A04), lacks optimizer state (R05), or holds
            NaN or Inf (V01).
    """
    parts = _counterparts(resume, model, base)
    weights = _weights(resume, model, parts, base)
    return weights, _moments(resume, parts, {n: tuple(t.shape) for n, t in weights.items()})


def _in_file(name: str) -> str:
    """Translate the name of an adapter's weight into the file's: `q_proj.lora_A` is `q_proj.lora.A.weight` there."""
    name = clean(name)
    module, _, leaf = name.rpartition(".")
    return f"{module}.lora.{leaf[-1]}.weight" if leaf in ("lora_A", "lora_B") else name


def _counterparts(resume: Resume, model: nn.Module, base: bool) -> dict[str, tuple[Part, ...]]:
    """Find the stored weights that make up each tensor of the model; nothing may be left over on either side."""
    stored = set(resume.weights.values())
    view = replace(resume.view, records={n: r for n, r in resume.view.records.items() if n in stored})
    source = StoredModel.of(view, view.config)
    mine, _ = stored_tensors(model, base)
    held = {n: Held(_in_file(n), model, t) for n, t in mine.items()}
    finder = CounterpartFinder(model, list(held.values()), source)
    found = {n: finder.parts(h, h.name) for n, h in held.items()}
    made = {n: p for n, p in found.items() if p}
    used = {p.name for parts in made.values() for p in parts}
    wanted = [n for n in resume.weights if not (base and ".lora." not in n) and not (resume.tied and n == hf.HEAD)]
    unused = [n for n in wanted if resume.weights[n] not in used]
    if any(".shared_experts." in n for n in unused):
        raise TensorkeepError(
            "holds shared experts, which this model lacks: no class of transformers computes MiniMind's of 2025",
            where=resume.view.path,
            code="K02",
            hint="train it in a module with MiniMind's own names, or go on in MiniMind",
        )
    both, lacking = dict.fromkeys(made, ""), {n: "tensor" for n in mine if n not in made}
    refuse_difference("model", both | lacking, both | dict.fromkeys(unused, ""))
    known = {resume.weights[n] for n in resume.moments} or stored
    if rest := [n for n, parts in made.items() if any(p.name not in known for p in parts)]:
        raise TensorkeepError(
            f"the file has no optimizer state of {', '.join(grouped(rest)[:3])} ({len(rest)})",
            where=resume.view.path,
            code="R05",
            hint="make the model as that run had it: tied head, LoRA on the same layers",
        )
    if base:
        _compare_base(resume, model)
    return made


def _built(resume: Resume, name: str, parts: tuple[Part, ...], shape: tuple[int, ...]) -> Tensor:
    """Put a tensor of the model together from the file, in the dtype it is stored in."""
    sizes = [resume.view[p.name].shape for p in parts]
    fits = sizes[0] == shape if len(sizes) == 1 else all(s[-1:] == shape[-1:] for s in sizes)
    made = expected(parts, resume.view, shape, (0, shape[0]) if shape else (0, 1)) if fits else None
    if made is None:
        raise TensorkeepError(
            f"{name} is {list(shape)}, {parts[0].name} is {list(sizes[0])}",
            where=resume.view.path,
            code="S01",
            hint="build the model from the config of these weights",
            tensors=[parts[0].name],
        )
    if not bool(torch.isfinite(made).all()):
        raise TensorkeepError(
            f"{parts[0].name} holds NaN or Inf",
            where=resume.view.path,
            code="V01",
            hint="continue from an earlier file; fp16 ends at 65504",
            tensors=[p.name for p in parts],
        )
    return made


def _weights(resume: Resume, model: nn.Module, parts: dict[str, tuple[Part, ...]], base: bool) -> dict[str, Tensor]:
    """Make the model's weights, in the dtype it trains them in."""
    mine, _ = stored_tensors(model, base)
    return {n: _built(resume, n, parts[n], tuple(t.shape)).to(t.dtype) for n, t in mine.items()}


def _moments(
    resume: Resume, parts: dict[str, tuple[Part, ...]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Make optimizer state under the model's names, `parameter/slot`; stacked experts get stacked moments."""
    own = {stored: name for name, stored in resume.weights.items()}
    out: dict[str, Tensor] = {}
    for name, made in parts.items():
        slots = [resume.moments.get(own[p.name], {}) for p in made]
        if not any(slots):
            continue
        counts = {float(resume.view.array(s["step"]).reshape(())) for s in slots if s}
        if len(counts) > 1 or not all(slots):
            raise TensorkeepError(
                f"the experts that make up {name} took {sorted(counts)} optimizer steps: they cannot share one counter",
                where=resume.view.path,
                code="R05",
            )
        for slot in sorted(slots[0].keys() - {"step"}):
            moved = tuple(p._replace(name=s[slot]) for p, s in zip(made, slots))
            out[f"{name}/{slot}"] = _built(resume, f"{name}/{slot}", moved, shapes[name])
        out[f"{name}/step"] = torch.tensor(counts.pop(), dtype=torch.float32)
    return out


def _compare_base(resume: Resume, model: nn.Module) -> None:
    """Refuse an adapter whose base is not the one in the file, or whose scale is not MiniMind's, which is 1."""
    scales = {n: m.scale for n, m in model.named_modules() if isinstance(getattr(m, "scale", None), float)}
    if odd := [n for n, scale in scales.items() if scale != 1.0 and hasattr(model.get_submodule(n), "lora_A")]:
        raise TensorkeepError(
            f"{odd[0]} scales its update by {scales[odd[0]]:g}, MiniMind by 1",
            where="lora",
            code="A02",
            hint="alpha = r",
        )
    live = {clean(n): p for n, p in model.named_parameters()}
    for name, stored in resume.weights.items():
        mine = live.get(name)
        if mine is None or not mine.is_floating_point() or tuple(mine.shape) != resume.view[stored].shape:
            continue  # quantized, or stacked: its codes are compared by the base's digest
        theirs = resume.view.tensor(stored)
        if ".lora." not in name and not torch.equal(mine.detach().cpu().to(theirs.dtype), theirs):
            raise TensorkeepError(
                f"{name} of the model is not the base's that this adapter was trained on",
                where=resume.view.path,
                code="A04",
                hint="tensorkeep convert the resume file itself to hf, and take that as the base",
            )
