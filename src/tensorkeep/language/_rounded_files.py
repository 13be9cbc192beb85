"""Write a merged model with codes in the place of rounded weights, as the programs that load such files read them.

nf4, fp4, int8: a folder as transformers and bitsandbytes save one; experts are a matrix each, as transformers 4 does
mxfp4: a folder in compressed-tensors' mxfp4-pack-quantized, which transformers and vLLM load
q4_k: a GGUF file
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.streams import permuted, write_tensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import gguf
from tensorkeep.formats.memory import tensor_of, torch_dtype
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization.block_bytes import GGML_NAMES, ggml_blocks, mxfp4_tensors
from tensorkeep.quantization.grids import Bits
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.packed import WEIGHT_DIGEST
from tensorkeep.quantization.rounding import Rounded
from tensorkeep.storage.files import CERTIFICATE
from tensorkeep.storage.layout import Fixed, Slot

_SMALL_FILES = (".json", ".jinja", ".model", ".txt")


def planned(
    folder: Path, view: StateView, base: StateView, bits: Bits, found: Mapping[str, Rounded], wide: Sequence[str]
) -> Plan:
    """Write a merged model's files with codes in the place of the rounded weights, and plan their way to the sink.

    Args:
        folder: is made.
        view: the merged model in floats.
        base: what the adapter was merged into; says the dtypes of what is not rounded.
        bits: the kind of codes.
        found: the rounded weights, by name without ".weight".
        wide: the linears that stay floats.

    Returns:
        The plan of an hf folder, or of a GGUF file.

    Raises:
        TensorkeepError: llama.cpp has no such architecture (q4_k).
    """
    folder.mkdir(parents=True)
    _floats(folder, view, base, bits, found)
    if bits == "q4_k":
        return make_plan([read(str(_gguf_file(folder, read(str(folder)), found)))], "gguf")
    document = {**(view.config or {}), "quantization_config": _described(bits, wide)}
    (folder / "config.json").write_text(json.dumps(document, indent=2))
    return make_plan([read(str(folder))], "hf")


def _floats(folder: Path, view: StateView, base: StateView, bits: Bits, found: Mapping[str, Rounded]) -> None:
    """Write the tensors, codes for those that have some (for q4_k: what they stand for), and the files beside them."""
    tensors: dict[str, Tensor] = {}
    for name in view:
        module = name.removesuffix(".weight")
        one = found.get(module) if name.endswith(".weight") else None
        if one is None:
            tensors[name] = tensor_of(view, name).to(_dtype_of(base, name)).contiguous()
        elif bits == "q4_k":
            tensors[name] = torch.zeros(one.codes.shape, dtype=torch.float16)  # their blocks are put in later
        else:
            tensors |= {f"{module}.{key}": t for key, t in _codes(one, _dtype_of(base, name)).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in Path(view.folder.url).iterdir() if view.folder is not None else ():
        weights = "safetensors" in path.name or path.name == CERTIFICATE
        if path.suffix in _SMALL_FILES and not weights:
            shutil.copy(path, folder / path.name)


def _codes(one: Rounded, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of one weight, under the names that they have beside its module's."""
    if one.form == "mxfp4":
        return {key: tensor.cpu().contiguous() for key, tensor in mxfp4_tensors(one).items()}
    held = QuantLinear(one.packed(dtype), None).state_dict()
    return {key: t.detach().cpu().contiguous() for key, t in held.items() if key != WEIGHT_DIGEST}


def _described(bits: Bits, wide: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` by which transformers loads such a folder."""
    if bits == "mxfp4":
        weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
        weights |= {"dynamic": False, "scale_dtype": "torch.uint8"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        form = "mxfp4-pack-quantized"
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**group, "format": form}},
            "ignore": list(wide) or ["lm_head"],
        }
    said: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": list(wide) or ["lm_head"]}
    if bits == "int8":
        return said | {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    return said | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": bits,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def _dtype_of(base: StateView, name: str) -> torch.dtype:
    """Return what the base holds a tensor in; bfloat16 where it calls it otherwise, or holds codes."""
    found = torch_dtype(base, name) if name in base else torch.bfloat16
    return found if found.is_floating_point and found.itemsize >= 2 else torch.bfloat16


# -- GGUF ---------------------------------------------------------------------------------------------------------


def _gguf_file(folder: Path, view: StateView, found: Mapping[str, Rounded]) -> Path:
    """Write a GGUF file whose rounded tensors are their blocks, and whose others are as a conversion makes them."""
    plan = make_plan([view], "gguf")
    steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
    blocks = {name: _stacked_blocks(step, found) for name, step in steps.items()}
    sinks = []
    for name, step in steps.items():
        assert step.sink is not None
        kind, _ = blocks[name] or (None, b"")
        sinks.append(step.sink if kind is None else step.sink._replace(dtype="F32", encoding=kind, tied_to=None))
    (layout,) = gguf.layout(sinks, config=plan.config, companions=plan.companions)
    path = folder / "model.gguf"
    with path.open("wb") as file:

        def write(piece: memoryview) -> None:
            file.write(piece)

        for segment in layout.segments:
            if isinstance(segment, Fixed):
                file.write(segment.data)
            elif isinstance(segment, Slot):
                made = blocks[segment.tensor]
                if made is None:
                    write_tensor(steps[segment.tensor], [view], write, False)
                else:
                    file.write(made[1])
    return path


def _stacked_blocks(step: Step, found: Mapping[str, Rounded]) -> tuple[str, bytes] | None:
    """Return the type and the bytes of a tensor of rounded weights, its rows where llama.cpp has them."""
    mine = [found.get(part.name.removesuffix(".weight")) for part in step.parts]
    if not any(mine):
        return None
    made, kinds = [], set()
    for part, one in zip(step.parts, mine):
        if one is None or part.turned or part.inner is not None or part.plus or part.rows is not None:
            raise TensorkeepError(f"llama.cpp keeps {part.name} in another form than rows", where="--to-bits")
        raw = ggml_blocks(one).cpu().contiguous()
        data = memoryview(raw.numpy().tobytes())
        for permute in part.permutes:
            data = permuted(data, permute, raw.shape[1])
        made.append(bytes(data))
        kinds.add(GGML_NAMES[one.form])
    return kinds.pop(), b"".join(made)
