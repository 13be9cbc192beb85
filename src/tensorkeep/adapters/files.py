"""Save and load the adapter of a live model: `adapter_model.safetensors` and `adapter_config.json`.

File names, tensor names and config fields are PEFT's, so its readers and ours understand both. The header of the
weights holds the digest of the base's checkpoint and how it was quantized; a load onto any other base is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.adapters.lora import LoraQuantLinear, layers
from tensorkeep.adapters.stacked import adapted_stacks, in_peft
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats import peft
from tensorkeep.formats.earlier import CHECKPOINT
from tensorkeep.formats.memory import raw_bytes, tensor_of
from tensorkeep.formats.names import exactly, matches, unwrap
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization.encoding import EXCLUDED
from tensorkeep.quantization.linear_layers import turned
from tensorkeep.quantization.modules import quantized_layers
from tensorkeep.quantization.stacks import Stack, stacks
from tensorkeep.storage import certificate as manifest
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.layout import Fixed, SinkTensor, Slot
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.storage.record import FROM_TORCH

_PREFIX = "base_model.model."
HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight\Z")


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return everything that trains, under PEFT's names.

    A pair is `base_model.model.<module>.lora_A.weight` [r, in] and `lora_B.weight` [out, r].
    Other trainable parameters (a head, norms) come along as PEFT keeps its `modules_to_save`. Shards are gathered: call
    it on every process.
    """
    found, piles = layers(model), adapted_stacks(model)
    if not found and not piles:
        raise TensorkeepError("the model has no LoRA layers", where="lora", hint="add_lora(model, targets) adds them")
    out = {}
    theirs = in_peft(list(piles))
    for name, parameter in _trainable(model).items():
        module, _, last = name.rpartition(".")
        own = last in ("lora_A", "lora_B") and (module in found or module in piles)
        if module in found and not own:
            what = f"{last} of an adapted linear trains, which PEFT's files cannot say"
            raise TensorkeepError(what, where=module, hint="freeze it")
        whole: Any = parameter.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        out[f"{_PREFIX}{theirs.get(module, module)}.{last}.weight" if own else _PREFIX + name] = whole
    return out


def adapter_config(
    model: nn.Module, base: str | None = None, task: str | None = "CAUSAL_LM", parameters: Collection[str] = ()
) -> dict[str, Any]:
    """Return PEFT's config of the model's adapter; see `write_adapter` for `parameters`."""
    linears, piles = layers(model), adapted_stacks(model)
    found: dict[str, Any] = {**linears, **piles}
    parameters = [*parameters, *piles]
    ranks, alphas = {n: m.r for n, m in found.items()}, {n: m.alpha for n, m in found.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    if len({m.rslora for m in found.values()}) > 1:
        raise TensorkeepError("some layers are rsLoRA and some are not: one file cannot say so", where="lora")
    pairs = {f"{n}.lora_{half}" for n in found for half in "AB"}
    saved = sorted({n.rpartition(".")[0] for n in _trainable(model) if n not in pairs})
    named = {n: f"{n}.weight" if n in parameters and n in linears else n for n in found}  # as PEFT's patterns meet them
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0 if parameters else next(iter(linears.values())).dropout,
        "use_rslora": next(iter(found.values())).rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(turned(m) for m in linears.values()),
        "init_lora_weights": True,
        "target_modules": sorted(n for n in found if n not in parameters),
        **({"target_parameters": sorted(named[n] for n in parameters)} if parameters else {}),
        "rank_pattern": {named[n]: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {named[n]: _plain(a) for n, a in alphas.items() if a != alpha},
        "modules_to_save": saved or None,
    }


def quantization(model: nn.Module) -> dict[str, Any] | None:
    """Return how the linears of an adapted model are quantized; None where all under the adapter are dense.

    Where layers differ, the commonest form is at the top and the others under `layers`, by name; None there is dense.
    `modules` has patterns of those that the form at the top is for, where they are not all but heads and embeddings.
    """
    each = {n: _form(m) if isinstance(m, LoraQuantLinear) else None for n, m in layers(model).items()}
    each |= {n: None if s.layout is None else _form(s) for n, s in adapted_stacks(model).items()}
    usual = _commonest(each.values())
    odd = {n: None if form is None else dict(form) for n, form in each.items() if form != usual}
    if usual is None:
        return {"kind": None, "layers": odd} if odd else None
    chosen = _patterns(model)
    return {**dict(usual), **({"layers": odd} if odd else {}), **({"modules": chosen} if chosen else {})}


def _patterns(model: nn.Module) -> list[str]:
    """Return patterns of the quantized modules; none where they are every matrix but heads and embeddings."""
    piles = [unwrap(n)[0] for n, s in stacks(model) if s.layout is not None]
    packed = [*quantized_layers(model), *piles]
    wide = [unwrap(n)[0] for n, p in model.named_parameters() if p.ndim == 2 and n.endswith(".weight")]
    others = [n for n in (w.removesuffix(".weight") for w in wide) if n not in packed]
    if not piles and not [n for n in packed if matches(n, EXCLUDED)] and all(matches(n, EXCLUDED) for n in others):
        return []
    kinds: dict[str, list[str]] = {}
    for name in packed:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    out = []
    for kind, names in kinds.items():
        pattern = f"^{kind}$"
        out += [pattern] if not any(matches(n, [pattern]) for n in others) else [exactly(n) for n in names]
    return sorted(out)


def _form(layer: LoraQuantLinear | Stack) -> tuple[tuple[str, Any], ...]:
    """Return how one quantized layer is quantized, as pairs that can be compared."""
    layout = layer.layout
    assert layout is not None
    if layout.kind == "int8":
        return (("kind", "int8"),)
    return (("kind", layout.kind), ("block", layout.block), ("double", bool(layout.nested)))


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_digest: str | None = None,
    base: str | None = None,
    task: str | None = "CAUSAL_LM",
    overwrite: bool = False,
) -> Path:
    """Write a model's adapter into a new folder, whole or not at all.

    Args:
        model: a model with LoRA layers; on a sharded one, call it on every process.
        folder: where `adapter_model.safetensors` and `adapter_config.json` go.
        base_digest: of the base's checkpoint (`Loaded.base_digest`), by which a later load knows it; None for unknown.
        base: the base's name, for people and PEFT.
        task: PEFT's task type.
        overwrite: replace what is in `folder`, if it is a checkpoint and nothing else.

    Returns:
        The folder.

    Raises:
        TensorkeepError: the model has no LoRA layers, something trains that PEFT's files cannot say, the folder exists,
            or the disk is full or fails.

    Example:
        >>> save_adapter(model, "adapter", base_digest=loaded.base_digest)  # doctest: +SKIP
        PosixPath('adapter')
    """
    final = Path(folder)
    with replacing(final, overwrite, CHECKPOINT) as temporary:
        write_adapter(model, temporary, base_digest, base, task)
    return final


def write_adapter(
    model: nn.Module,
    folder: Path,
    base_digest: str | None = None,
    base: str | None = None,
    task: str | None = "CAUSAL_LM",
    parameters: Collection[str] = (),
) -> None:
    """Write the files of a model's adapter into a folder that is not there yet.

    Args:
        model: a model with LoRA layers.
        folder: made here; who calls gives it its name once it is proven.
        base_digest: of the base's checkpoint; None for unknown.
        base: the base's name, for people and PEFT.
        task: PEFT's task type.
        parameters: adapted linears that the config names by their weight (`target_parameters`), for models in which
            PEFT takes a linear of that name for one of its stacked experts. PEFT knows no dropout there: the config
            then has none.

    Raises:
        TensorkeepError: the model has no LoRA layers, or something trains that PEFT's files cannot say.
    """
    state, config = adapter_state(model), adapter_config(model, base, task, parameters)
    own = {"kind": "rslora" if config["use_rslora"] else "lora", "base_digest": base_digest}
    aware = {kind for m in layers(model).values() if isinstance(kind := getattr(m, "aware", None), str)}
    own |= {"quantize_aware": aware.pop()} if aware else {}
    header = peft.header_of({**own, "quantization": quantization(model)})
    sinks = [SinkTensor(n, FROM_TORCH[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in state.items()]
    folder.mkdir()
    with (folder / peft.WEIGHTS).open("xb") as file:
        for segment in peft.layout(sinks, header)[0].segments:
            assert isinstance(segment, (Fixed, Slot))
            file.write(segment.data if isinstance(segment, Fixed) else raw_bytes(state[segment.tensor]))
    write_bytes(folder / peft.CONFIG, manifest.dump(config))


def load_adapter(
    model: nn.Module, source: StateView | str | Path, base_digest: str | None = None, allow_other_base: bool = False
) -> dict[str, Any]:
    """Copy a saved adapter, ours or PEFT's, into a model that `add_lora` gave the same layers.

    Every tensor of both sides must meet in name and shape, rank and scale must agree, and the base must be the one that
    it was trained on: the digest in its config against `base_digest`, its quantization against the model's.

    Args:
        model: a model with LoRA layers.
        source: the adapter's folder or file, or an opened view.
        base_digest: of the checkpoint that the model was loaded from; None for unknown.
        allow_other_base: load it onto any base.

    Returns:
        The adapter's config.

    Raises:
        TensorkeepError: names or shapes differ (A01), rank or scale differ (A02), the base is another one (A04). The
            model is then unchanged.
    """
    view, config = _open(source)
    found, targets = layers(model), _trainable(model)
    piles = adapted_stacks(model)
    if not found and not piles:
        raise TensorkeepError(
            "the model has no LoRA layers", where=view.path, hint="add_lora(model, targets) adds them"
        )
    ours = {f"{p}.lora_{half}": f"{n}.lora_{half}" for n, p in in_peft(list(piles)).items() for half in "AB"}
    stored = {ours.get(_own_name(name), _own_name(name)): name for name in view}
    problems = [f"missing {n}" for n in targets if n not in stored]
    problems += [f"unexpected {view_name}" for n, view_name in stored.items() if n not in targets]
    problems += [
        f"{n} is {list(view[s].shape)}, the model's {list(targets[n].shape)}"
        for n, s in stored.items()
        if n in targets and view[s].shape != tuple(targets[n].shape)
    ]
    if problems:
        more = f" ({len(problems)} in all)" if len(problems) > 3 else ""
        hint = "add_lora with the targets and ranks of its adapter_config.json; DoRA and other kinds load through PEFT"
        raise TensorkeepError("; ".join(problems[:3]) + more, where=view.path, code="A01", hint=hint, tensors=problems)
    _check_scales(config, {n: (m.r, m.scale) for n, m in {**found, **piles}.items()}, view.path)
    if not allow_other_base:
        _check_base(config, base_digest, quantization(model), view.path)
    with torch.no_grad():
        for name, own in targets.items():
            own.copy_(tensor_of(view, stored[name]))
    return config


def _open(source: StateView | str | Path) -> tuple[StateView, dict[str, Any]]:
    """Open an adapter and return its view and its config."""
    if isinstance(source, StateView):
        view, config = source, source.metadata.get("adapter")
    else:
        path = Path(source)
        view = read(path)
        config = view.metadata.get("adapter")
        beside = (path if path.is_dir() else path.parent) / peft.CONFIG
        if config is None and beside.is_file():
            config = manifest.parse_json(read_small(beside), beside)
    if not isinstance(config, dict):
        hint = f"{peft.CONFIG} says rank and alpha, without which the update's size is unknown"
        raise TensorkeepError(f"has no {peft.CONFIG}", where=view.path, code="A02", hint=hint)
    return view, config


def _own_name(stored: str) -> str:
    """Return the model's parameter for a stored tensor: `X.lora_A` for `X.lora_A.weight`, else the same name."""
    name = unwrap(stored)[0]
    half = HALF.match(name)
    return f"{half['module']}.lora_{half['half']}" if half else name


def _check_scales(config: Mapping[str, Any], mine: Mapping[str, tuple[int, float]], where: str) -> None:
    """Stop (A02) where the file's rank or scale of a layer is not the model's."""
    for name, (rank, scale) in mine.items():
        alpha = _of(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        said = _of(config.get("rank_pattern"), name, config.get("r"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or said != rank:
            what = f"its config says r={shown(said)}, alpha={shown(alpha)} for {name}, the tensors have rank {rank}"
            raise TensorkeepError(what, where=where, code="A02")
        theirs = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not math.isclose(theirs, scale, rel_tol=1e-9):
            hint = f"add_lora(..., alpha={alpha:g}, rslora={bool(config.get('use_rslora'))})"
            raise TensorkeepError(
                f"scales {name} by {theirs:g}, the model by {scale:g}", where=where, code="A02", hint=hint
            )


def _of(patterns: Any, module: str, default: Any) -> Any:
    """Return the entry of a rank or alpha pattern for a module: its key is the name or its end."""
    for key, value in patterns.items() if isinstance(patterns, Mapping) else ():
        named = key.removesuffix(".weight")  # so in files where PEFT adapts the parameter
        if module == named or module.endswith(f".{named}"):
            return value
    return default


def _check_base(
    config: Mapping[str, Any], base_digest: str | None, quantized: dict[str, Any] | None, where: str
) -> None:
    """Stop (A04) where the adapter was trained on another base, or on another quantization of it."""
    recorded = config.get("base_digest")
    if isinstance(recorded, str) and recorded != base_digest:
        here = f"this one is {base_digest}" if base_digest else "nothing says which base this is"
        hint = "give the base that it was trained on; --allow-other-base (allow_other_base=True) loads it all the same"
        raise TensorkeepError(f"was trained on the base {recorded[:80]}, {here}", where=where, code="A04", hint=hint)
    then = config.get("quantization")
    if isinstance(then, dict) and "modules" not in then and quantized is not None:  # as earlier versions wrote it
        quantized = {k: v for k, v in quantized.items() if k != "modules"}
    if "quantization" in config and then != quantized:
        was, now = config["quantization"] or "float weights", quantized or "float weights"
        hint = "quantize the base as it was; --allow-other-base (allow_other_base=True) loads it all the same"
        raise TensorkeepError(f"was trained on {was}, this base is {now}", where=where, code="A04", hint=hint)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name without wrappers."""
    return {unwrap(n)[0]: p for n, p in model.named_parameters() if p.requires_grad}


def _commonest(values: Any) -> Any:
    """Return the value that occurs most often, the first of several."""
    seen = list(values)
    return max(dict.fromkeys(seen), key=seen.count)


def _plain(number: float) -> int | float:
    """Return a whole number as int, so that JSON says 32 and not 32.0."""
    return int(number) if number == int(number) else number
