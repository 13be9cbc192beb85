"""Write what a quantize-aware run trained: the very codes that its forward computes with, as 4-bit files hold them.

nf4 becomes an hf folder as bitsandbytes' and transformers' 4-bit models are, q4_0 a GGUF file. The codes are made by
the function that the forward calls. Once the files are written, the codes are read back and compared with codes that
are made a second time, and every other tensor keeps the values that the run computed with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tensorkeep.adapters.aware import AwareUpdate, aware_layers
from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.streams import write_tensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import tensor_of
from tensorkeep.formats.view import StateView, read
from tensorkeep.language.checkpoints import checkpoint_of, put_state, run_of
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import Remark, start_of
from tensorkeep.quantization.aware import Aware
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.modules import quantized_layers
from tensorkeep.quantization.packed import WEIGHT_DIGEST
from tensorkeep.quantization.stored import find_quantized, members
from tensorkeep.storage.files import CERTIFICATE
from tensorkeep.training.distributed import World

_COMPUTES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class AwareMerge:
    """A merge that is ready to be written.

    Attributes:
        plan: of the output.
        to: its format, "hf" or "gguf".
        kind: of the codes.
        layers: the trained layers by name.
        averaged: whether they hold the run's average.
    """

    plan: Plan
    to: str
    kind: Aware
    layers: Mapping[str, AwareUpdate]
    averaged: bool


def aware_kind(run: str | Path) -> Aware | None:
    """Return the format that a language run was trained for; None where it was trained for none.

    Args:
        run: the run's folder, or a step folder in it.
    """
    place = run_of(Path(run))
    if place is None:
        return None
    adapter = read_language(place / "recipe.yaml").adapter
    return adapter.quantize_aware if adapter is not None else None


def aware_merge(run: str | Path, folder: Path, ema: bool = False, remark: Remark = lambda _: None) -> AwareMerge:
    """Make the files of a run's merged model in the format that it was trained for.

    Args:
        run: the run's folder, or a step folder in it.
        folder: is made, and holds tensors until the plan has been carried out.
        ema: take the averaged weights where there are some.
        remark: is told of damaged checkpoints that were passed over.

    Returns:
        The plan and the layers that it was made of.

    Raises:
        TensorkeepError: the run holds no valid checkpoint, was trained for no such format, or its files name tensors
            otherwise than transformers' model does.

    Example:
        >>> made = aware_merge("runs/one", Path("tmp"))  # doctest: +SKIP
        >>> made.kind, len(made.layers)  # doctest: +SKIP
        ('nf4', 210)
    """
    path = Path(run)
    place = run_of(path)
    kind = aware_kind(run)
    if place is None or kind is None:
        raise TensorkeepError("is no run that was trained with quantize_aware", where=path)
    recipe, state = read_language(place / "recipe.yaml"), checkpoint_of(place, path, False, remark)
    start = start_of(recipe, place, World(), remark)
    with put_state(start, recipe, state, ema), torch.no_grad():
        layers = aware_layers(start.model)
        assert start.view is not None
        _write(folder, start.view, start.model, layers, recipe, kind)
        for layer in layers.values():  # they outlive the average
            layer.lora_A, layer.lora_B = (nn.Parameter(p.detach().clone()) for p in (layer.lora_A, layer.lora_B))
    to = "hf" if kind == "nf4" else "gguf"
    plan = make_plan([read(str(folder))], to)
    if kind == "q4_0":
        plan.steps = [_blocked(step, layers) for step in plan.steps]
    return AwareMerge(plan, to, kind, layers, ema and bool(state.ema))


@torch.no_grad()
def check_written(made: AwareMerge, out: str) -> int:
    """Compare the written codes with codes that are made anew.

    Args:
        made: what was written.
        out: where.

    Returns:
        How many weights are equal bit for bit: all of them.

    Raises:
        TensorkeepError: F03 where one is not.
    """
    view = read(out)
    plan = make_plan([view], "hf", dtype="F32") if made.to == "gguf" else None
    steps = {s.sink.name: s for s in plan.steps if s.sink is not None} if plan is not None else {}
    for name, layer in made.layers.items():
        codes = layer.codes()
        if plan is not None:
            raw = bytearray()
            write_tensor(steps[f"{name}.weight"], plan.sources, raw.extend, crc_wanted=False)
            found = torch.frombuffer(raw, dtype=torch.int32).view(codes.shape)
            same = torch.equal(found, codes.values().view(torch.int32))
        else:
            same = torch.equal(tensor_of(view, f"{name}.weight"), codes.codes)
            same = same and torch.equal(tensor_of(view, f"{name}.weight.absmax"), codes.scales)
        if not same:
            raise TensorkeepError("is not what the trained forward computes with", where=f"{out}: {name}", code="F03")
    return len(made.layers)


def _write(
    folder: Path,
    view: StateView,
    model: nn.Module,
    layers: Mapping[str, AwareUpdate],
    recipe: LanguageRecipe,
    kind: Aware,
) -> None:
    """Write the model as an hf folder: codes where nf4 has them; for a GGUF file base and update as one float32."""
    weights = find_quantized(view)
    missing = [n for n in layers if f"{n}.weight" not in view]
    if missing:
        what = f"transformers calls {missing[0]} otherwise than the files do"
        raise TensorkeepError(what, where=view.path, code="K01")
    beside, coded = members(weights), quantized_layers(model)
    tensors: dict[str, Tensor] = {}
    for name in view:
        module = name.removesuffix(".weight")
        if name in beside:
            continue
        if module in layers and name.endswith(".weight"):
            layer = layers[module]
            tensors |= _codes(module, QuantLinear(layer.codes().packed())) if kind == "nf4" else {name: layer.sum()}
        elif module in coded and name.endswith(".weight") and kind == "nf4" and coded[module].kind == "nf4":
            tensors |= _codes(module, coded[module])
        elif module in coded and name.endswith(".weight"):
            tensors[name] = coded[module].dequantize()
        elif name in weights:
            live: Any = model.get_parameter(name)
            tensors[name] = live.detach().float().contiguous()
        else:
            tensors[name] = tensor_of(view, name).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    document = {k: v for k, v in (view.config or {}).items() if k != "quantization_config"}
    if kind == "nf4":
        document["quantization_config"] = _as_bitsandbytes(tensors, model, recipe)
    for path in Path(view.folder.url).iterdir() if view.folder is not None else ():
        heavy = "safetensors" in path.name or path.name in (CERTIFICATE, "config.json")
        if path.suffix in (".json", ".jinja", ".model", ".txt") and not heavy:
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(document, indent=2))


def _codes(module: str, layer: QuantLinear) -> dict[str, Tensor]:
    """Return codes and scales under the names of bitsandbytes' files."""
    held = {k: t.detach().cpu().contiguous() for k, t in layer.state_dict().items() if k not in (WEIGHT_DIGEST, "bias")}
    return {f"{module}.{key}": tensor for key, tensor in held.items()}


def _as_bitsandbytes(tensors: Mapping[str, Tensor], model: nn.Module, recipe: LanguageRecipe) -> dict[str, Any]:
    """Return the config's entry about the codes; values are rounded once, to the dtype that the run computed in."""
    linears = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, QuantLinear))]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": _COMPUTES[recipe.training.precision],
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [n for n in linears if f"{n}.weight.absmax" not in tensors] or ["lm_head"],
    }


def _blocked(step: Step, layers: Mapping[str, AwareUpdate]) -> Step:
    """Return a step of a GGUF plan with blocks where its tensor is a trained layer's."""
    ours = {p.name.removesuffix(".weight") in layers for p in step.parts}
    if step.sink is None or True not in ours:
        return step
    if False in ours:
        what = f"{step.sink.name} joins weights that were trained for q4_0 with others"
        raise TensorkeepError(what, where="adapter.targets", hint="train all of them: adapter.targets '[all-linear]'")
    actions = tuple(dict.fromkeys([*(a for a in step.actions if a not in ("keep", "cast")), "quantize"]))
    return replace(step, actions=actions, sink=step.sink._replace(dtype="F32", encoding="Q4_0", tied_to=None))
