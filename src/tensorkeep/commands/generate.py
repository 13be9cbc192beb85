"""`tensorkeep generate`: let a model continue a prompt, before or after training."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tensorkeep.commands.shared import Flag, Say
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.language.data.conversations import refuse_broken
from tensorkeep.output import Output

if TYPE_CHECKING:
    from tensorkeep.formats.view import StateView
    from tensorkeep.training.distributed import World


def generate(
    checkpoint: str,
    /,
    *,
    prompt: str,
    adapter: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    quantize_backbone: Literal["nf4", "fp4", "int8"] | None = None,
    ema: bool = True,
    best: Flag = False,
    raw: Flag = False,
    tokenizer: str | None = None,
    allow_other_base: Flag = False,
    device: str | None = None,
    say: Say = Say(),
) -> int:
    """Continue a prompt with a language model. A run answers as it is evaluated: with its adapter and its average.

    Args:
        checkpoint: A run, a step folder of one, or any checkpoint with config and tokenizer: hf, DCP, .pth, GGUF, a Hub
            id.
        prompt: The text to continue; a question, where the tokenizer has a chat template.
        adapter: A LoRA adapter to put on the checkpoint: a folder of ours or of PEFT.
        max_tokens: Stop after this many tokens.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn.
        seed: The seed with which tokens are drawn.
        quantize_backbone: Hold the checkpoint's linears in 4 or 8 bits. A run says this itself.
        ema: Use a run's averaged weights where there are some.
        best: Take a run's best checkpoint instead of its newest.
        raw: Take the prompt as it is, without the chat template.
        tokenizer: Another tokenizer than the checkpoint's: a folder or a tokenizer.json.
        allow_other_base: Put the adapter on though it names another base by digest, or another quantization.
        device: The device to run on, cpu or cuda. Default: a GPU where there is one.
    """
    refuse_broken(prompt, "--prompt")
    from tensorkeep.language import generation
    from tensorkeep.training import distributed

    out = say.output()
    world = distributed.start(device)
    try:
        opened = None if adapter is not None else _run(checkpoint, ema, best, quantize_backbone, world, out)
        if opened is None:
            opened = _bare(checkpoint, tokenizer, adapter, quantize_backbone, allow_other_base)
        if world.device.type == "cpu":
            _decode_once(opened.model)
        opened.model.to(world.device).eval()
        with opened.averaged:
            _round_once(opened.model)
            how = (max_tokens, temperature, seed, raw)
            made = generation.generate(opened.model, opened.tokenizer, prompt, *how, out.piece)
        out.line()
    finally:
        distributed.stop()
    _tell(out, {"checkpoint": checkpoint, "adapter": adapter, **opened.said, "prompt": prompt}, made)
    return 0


def _tell(out: Output, asked: dict[str, Any], made: Any) -> None:
    """The document of what was asked and made, and a line about its speed."""
    if out.json:
        numbers = {
            "tokens": len(made.ids),
            "ids": made.ids,
            "seconds": made.seconds,
            "tokens_per_second": made.tokens_per_second,
        }
        out.document({**asked, "text": made.text, **numbers, "stopped_by": made.stopped_by})
    ended = {"end": "ended by the model", "length": "stopped at --max-tokens", "context": "its context is full"}
    out.remark(f"{len(made.ids)} tokens, {made.tokens_per_second:.1f} a second, {ended[made.stopped_by]}")


@dataclass
class _Opened:
    """A model that can speak; `averaged` puts its average on; `said`: step, ema, quantization for the document."""

    model: Any
    tokenizer: Any
    averaged: contextlib.AbstractContextManager[Any]
    said: dict[str, Any]


def _decode_once(model: Any) -> None:
    """Put float32 weights in the place of codes: the same numbers, which are then not decoded at every token."""
    from torch import nn

    from tensorkeep.adapters.aware import AwareUpdate
    from tensorkeep.adapters.lora import LoraQuantLinear, adapted
    from tensorkeep.quantization.modules import quantized_layers
    from tensorkeep.quantization.replacing import replace_modules

    for layer in quantized_layers(model).values():
        if isinstance(layer, AwareUpdate):
            continue
        made: Any
        dense: Any
        made = dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight, dense.bias = nn.Parameter(layer.dequantize(), requires_grad=False), layer.bias
        if isinstance(layer, LoraQuantLinear):
            made = adapted(dense, layer.r, layer.alpha, layer.dropout, layer.rslora)
            made.lora_A, made.lora_B = layer.lora_A, layer.lora_B
        replace_modules(model, {layer: made})


def _round_once(model: Any) -> None:
    """Put the rounded weights of quantize-aware layers in their place, which are then not made at every token."""
    from tensorkeep.adapters.aware import aware_layers
    from tensorkeep.adapters.lora import merge_

    if aware_layers(model):
        merge_(model)


# -- opening ----------------------------------------------------------------------------------------------------------


def _run(path: str, ema: bool, best: bool, quantized: str | None, world: World, out: Output) -> _Opened | None:
    """A run of ours as its recipe builds it, with the state of the checkpoint meant; None where it is no run."""
    from tensorkeep.language.checkpoints import checkpoint_of, needs_start_weights, put_state, run_of
    from tensorkeep.language.recipe_text import read_language
    from tensorkeep.language.start import start_of

    run = run_of(Path(path))
    if run is None:
        return None
    if quantized is not None:
        raise TensorkeepError("a run says itself how it is quantized", where=path, hint="leave --quantize-backbone out")
    state, recipe = checkpoint_of(run, Path(path), best, out.remark), read_language(run / "recipe.yaml")
    start = start_of(recipe, run, world, out.remark, weights=needs_start_weights(recipe))
    averaged = put_state(start, recipe, state, ema)
    kind = recipe.training.quantize_backbone if recipe.adapter is not None else None
    said = {"step": state.document["step"], "ema": ema and bool(state.ema), "quantize_backbone": kind}
    return _Opened(start.model, start.tokenizer, averaged, said)


def _bare(path: str, tokenizer: str | None, adapter: str | None, quantized: Any, allow: bool) -> _Opened:
    """Any other checkpoint: weights in float32, quantized as said, under an adapter."""
    from tensorkeep.formats.view import read
    from tensorkeep.language.start import loaded
    from tensorkeep.quantization.modules import quantize_

    view = read(path)
    if view.format == "peft":
        hint = f"tensorkeep generate BASE --adapter {word(path)} --prompt TEXT"
        raise TensorkeepError("is an adapter and needs its base", where=path, code="K08", hint=hint)
    words = _tokenizer(view, tokenizer)
    model = loaded(view).requires_grad_(False)
    if quantized is not None:
        quantize_(model, quantized)
    if adapter is not None:
        _put_adapter(model, view, adapter, allow)
    said = {"step": None, "ema": False, "quantize_backbone": quantized}
    return _Opened(model, words, contextlib.nullcontext(), said)


def _tokenizer(view: StateView, named: str | None) -> Any:
    """The tokenizer named, or the one that travels with the weights (a GGUF file holds one, too)."""
    from tensorkeep.language.start import load_tokenizer

    if named is not None:
        return load_tokenizer(named)
    if not any("tokenizer" in companion.name for companion in view.companions):
        hint = "--tokenizer FOLDER or tokenizer.json"
        raise TensorkeepError("no tokenizer lies beside the weights", where=view.path, code="C03", hint=hint)
    with tempfile.TemporaryDirectory() as folder:
        for companion in view.companions:
            (Path(folder) / companion.name).write_bytes(companion.data)
        return load_tokenizer(folder, view.path)


def _put_adapter(model: Any, base: StateView, path: str, allow: bool) -> None:
    """LoRA layers where the adapter has them, and its weights in them; its base is compared by digest."""
    from tensorkeep.adapters.files import HALF, load_adapter
    from tensorkeep.adapters.lora import add_lora
    from tensorkeep.adapters.merging import base_digests
    from tensorkeep.formats.names import exactly, unwrap
    from tensorkeep.formats.view import read

    view = read(path)
    if view.format != "peft":
        hint = f"MiniMind's LoRA files: tensorkeep convert {word(path)} OUT --to peft"
        raise TensorkeepError("is no adapter folder", where=path, code="K08", hint=hint)
    config = view.metadata.get("adapter")
    config = config if isinstance(config, Mapping) else {}
    names = {name: unwrap(name)[0] for name in view}
    halves = {name: found for name, clean in names.items() if (found := HALF.match(clean))}
    ranks = {
        found["module"]: view[name].shape[0]
        for name, found in halves.items()
        if found["half"] == "A" and view[name].shape
    }
    if not ranks or config.get("use_dora"):
        what = "is a DoRA adapter" if ranks else "holds no LoRA pairs under PEFT's names"
        hint = f"tensorkeep merge {word(base.path)} {word(path)} OUT, then: tensorkeep generate OUT --prompt TEXT"
        raise TensorkeepError(what, where=path, code="A01", hint=hint)
    alphas = {module: _of(config.get("alpha_pattern"), module, config.get("lora_alpha", 0)) for module in ranks}
    rslora = bool(config.get("use_rslora"))
    each = {name: exactly(name) for name in ranks}
    add_lora(
        model,
        list(each.values()),
        rslora=rslora,
        rank_pattern={each[n]: r for n, r in ranks.items()},
        alpha_pattern={each[n]: a for n, a in alphas.items()},
    )
    saved = {clean for name, clean in names.items() if name not in halves}
    for name, parameter in model.named_parameters():
        if name in saved:  # PEFT's modules_to_save: whole tensors that were trained
            parameter.requires_grad_(True)
    recorded, digest = config.get("base_digest"), None
    if recorded is not None and not allow:
        here = base_digests(base)
        digest = recorded if recorded in here else here[0]
    load_adapter(model, view, digest, allow)
    model.requires_grad_(False)


def _of(patterns: Any, module: str, default: Any) -> Any:
    """The entry of a pattern of PEFT's config for a module: its key is the name or its end."""
    items = patterns.items() if isinstance(patterns, Mapping) else ()
    return next((value for key, value in items if module == key or module.endswith(f".{key}")), default)
