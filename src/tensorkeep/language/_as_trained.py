"""What an adapter was trained on, as a model in memory, and rows of text to run it on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView, read
from tensorkeep.language._data import make_data
from tensorkeep.language._flow import StreamedData
from tensorkeep.language.data.preferences import Pairs
from tensorkeep.language.data.texts import objective_of
from tensorkeep.language.recipe import DataConfig, LanguageRecipe
from tensorkeep.language.start import Remark, load_tokenizer, loaded
from tensorkeep.models.language_model import text_config
from tensorkeep.quantization.linear_layers import dense
from tensorkeep.quantization.modules import quantized_layers
from tensorkeep.quantization.packed import kind_of, pack
from tensorkeep.quantization.replacing import left_wide, selected, tied_parameters
from tensorkeep.quantization.unpacking import unpack
from tensorkeep.training.distributed import World
from tensorkeep.training.sections import TrainingConfig

LENGTH = 512  # tokens of a row


def rows_of(merged: str, texts: Sequence[str], most: int, least: int, remark: Remark) -> Tensor:
    """Return rows of joined texts, or conversations in the chat template, shuffled so that the last are like the rest.

    Args:
        merged: an hf folder with config and tokenizer.
        texts: files as training reads them.
        most: rows to return at most.
        least: rows that there must be.
        remark: is told what was left out.

    Returns:
        Token ids [rows, length]; 512 tokens, or as many as the model takes.

    Raises:
        TensorkeepError: they are too few.
    """
    from transformers import AutoConfig

    try:
        tokenizer = load_tokenizer(merged)
    except TensorkeepError as error:
        hint = "put tokenizer.json beside the base's weights"
        raise TensorkeepError("no tokenizer lies beside the base", hint=hint) from error
    objective = objective_of(texts[0])
    if objective == "dpo":
        hint = 'lines of {"text": ...} or {"messages": [...]}, plain text, or parquet of them'
        raise TensorkeepError("preferences are no texts", where=texts[0], hint=hint)
    config = text_config(AutoConfig.for_model(**dict(read(merged).config or {})))
    length = min(LENGTH, int(getattr(config, "max_position_embeddings", LENGTH)))
    read_as = DataConfig(tuple(texts), length=length, packing="concatenate")
    recipe = LanguageRecipe(read_as, TrainingConfig(updates=1), model=merged, objective=objective)
    with tempfile.TemporaryDirectory() as scratch:
        reading = replace(recipe, data=replace(recipe.data, cache=scratch))
        data = make_data(reading, reading.data, tokenizer, int(config.vocab_size), Path(scratch), World(), remark)
        if isinstance(data, (Pairs, StreamedData)):
            raise TensorkeepError("preferences are no texts", where=texts[0])
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        samples = (data.sample(i, torch.Generator().manual_seed(i))["input_ids"] for i in order)
        whole = [ids for ids, _ in zip((s for s in samples if len(s) == length), range(most))]
    if len(whole) < least:
        what = f"{len(whole)} rows of {length} tokens are too few: {least} at least"
        raise TensorkeepError(what, where=texts[0], hint="give more text, like what the model is for")
    return torch.stack(whole)


def round_plainly(model: nn.Module, name: str, kind: str) -> None:
    """Round a linear's weight number by number.

    Args:
        model: changed in place.
        name: of the linear.
        kind: "nf4", "fp4" or "int8"; with " (double)" the scales are rounded too.
    """
    linear: Any = model.get_submodule(name)
    word, _, double = kind.partition(" ")
    packed = pack(linear.weight.data.contiguous(), kind_of(word), double=bool(double))
    linear.weight.data.copy_(unpack(packed.layout, packed.tensors, torch.float32))


def base_model(base: StateView, quantized: str | None, device: torch.device) -> nn.Module:
    """Load the base as the adapter saw it: dequantized, or with its linears rounded as they were in training.

    Args:
        base: the checkpoint.
        quantized: what a float base was quantized to, as "nf4 (double)"; None: nothing.
        device: where to.

    Returns:
        The model in float32, without a module of codes, in evaluation mode.
    """
    model = loaded(base)
    for name, layer in quantized_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data = layer.dequantize()
        if layer.bias is not None:
            linear.bias.data = layer.bias.data.float()
        model.set_submodule(name, linear)
        quantized = None
    model = model.float().to(device).eval().requires_grad_(False)
    wide, tied = left_wide(model), tied_parameters(model)
    for name, module in model.named_modules() if quantized else ():
        if dense(module) and id(module.weight) not in tied and selected(name, ("*",), wide):
            round_plainly(model, name, str(quantized))
    return model
