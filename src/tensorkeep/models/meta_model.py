"""Build a config's model on the meta device, and ask transformers what it calls its tensors there and in files.

Nothing here holds a weight. `names` keeps what is found out; this module is loaded only when that is not known yet.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensorkeep.conversion.row_maps import Run
from tensorkeep.errors import TensorkeepError
from tensorkeep.models.language_model import believable_config, silent
from tensorkeep.models.meta_rows import as_saved, inverted
from tensorkeep.models.refusals import refusals, said
from tensorkeep.models.unsaved import computed_values, digests
from tensorkeep.quantization.linear_layers import linear_layers

_TIE = "tie_word_embeddings"
_AUTO = tuple(
    f"AutoModel{task}" for task in ("ForCausalLM", "ForImageTextToText", "ForMultimodalLM", "ForSeq2SeqLM", "")
)


def build(document: Mapping[str, Any], stored: int | None = None) -> Any:
    """Build the model of a config on the meta device.

    Args:
        document: as config.json has it.
        stored: bytes of the weights beside it, where there are some.

    Returns:
        A transformers model without values.

    Raises:
        TensorkeepError: transformers is not installed, has no such model, or refuses the config.
    """
    try:
        import transformers
    except ImportError:
        raise TensorkeepError(
            "transformers is not installed", hint="pip install 'tensorkeep[language]', which knows every architecture"
        ) from None
    plain = {k: v for k, v in document.items() if k != "quantization_config"}
    if not isinstance(plain.get("model_type"), str):
        raise TensorkeepError("the config has no model_type", where="config", code="C01")
    config = believable_config(transformers, plain, stored)
    kind = _class(transformers, document, config)
    try:
        with silent(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = kind(copy.deepcopy(config))
            model.tie_weights()
    except refusals() as error:
        raise TensorkeepError(f"transformers cannot build {kind.__name__}: {said(error)}", where="config") from None
    return model.eval()


def _class(transformers: Any, document: Mapping[str, Any], config: Any) -> Any:
    """Return the class that the config names, or the one that generates text, or any of its type."""
    named = document.get("architectures")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    kind = getattr(transformers, first, None) if re.fullmatch(r"[A-Z]\w*", first) else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    for auto in (getattr(transformers, word, None) for word in _AUTO):
        if auto is not None and type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise TensorkeepError(f"transformers has no model of type {document.get('model_type')!r}", where="config")


def facts(model: Any) -> dict[str, Any]:
    """Return everything that `names.ModelNames` keeps of a model, as plain data.

    Args:
        model: from `build`.
    """
    live = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    tied = _tied(model)
    kept = {n: s for n, s in live.items() if n not in tied}
    unsaved = {n: digests(values) for n, values in computed_values(model).items() if n in kept}
    kept = {n: s for n, s in kept.items() if n not in unsaved}
    file, saved, problem = as_saved(model, kept)
    made = inverted(saved, kept)
    in_file = {n: next(iter(as_saved(model, {n: live[n]})[0]), n) for n in {*tied, *tied.values()}}
    return {
        "kind": type(model).__name__,
        "live": live,
        "file": file,
        "saved": {n: r for n, r in saved.items() if r != (Run(n),)},
        "made": {n: r for n, r in made.items() if r != (Run(n),)},
        "odd": sorted(set(kept) - set(made)),
        "problem": problem,
        "live_tied": tied,
        "tied": {in_file[other]: in_file[source] for other, source in tied.items()},
        "tied_as": {other: in_file[other] for other in tied},
        "ignored": sorted(str(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        "computed": sorted({n for n, _ in model.named_buffers()} - set(live)),
        "unsaved": unsaved,
        "prefix": str(getattr(model, "base_model_prefix", "") or ""),
        "inward": _inward(model),
        "linear": {n: k for n, k, _ in linear_layers(model)},
        "positions": positions(model),
        "rope": rope_layout(model),
        "embedding": _path(model, model.get_input_embeddings),
        "head": _path(model, model.get_output_embeddings),
        "tie_says_more": tie_says_more(model),
    }


def _inward(model: nn.Module) -> list[str]:
    """Return the stacks of experts whose matrices are [in, out], as their module says of itself."""
    return [
        f"{name}.{n}"
        for name, module in model.named_modules()
        if getattr(module, "is_transposed", False) is True
        for n, p in module.named_parameters(recurse=False)
        if p.dim() == 3
    ]


def _path(model: nn.Module, getter: Any) -> str | None:
    """Return the path of the module that a getter gives; None where there is none."""
    try:
        wanted = getter()
    except refusals():
        return None
    return next((n for n, m in model.named_modules() if m is wanted), None) if wanted is not None else None


def _tied(model: Any) -> dict[str, str]:
    """Return, for each name that shares a parameter with another, that other name."""
    given = getattr(model, "all_tied_weights_keys", None)
    out: dict[str, str] = {}
    first: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), []).append(name)
    for names in first.values():
        targets = [n for n in names if isinstance(given, Mapping) and n in given]
        source = next((n for n in names if n not in targets), names[0])
        out.update({n: source for n in names if n != source})
    return out


def tie_says_more(model: Any) -> bool:
    """Say whether `tie_word_embeddings` decides more than which tensors are one.

    So it is where a forward reads it, or another field of the config hangs on it: T5 scales the head's input by it.

    Args:
        model: a transformers model.
    """
    forwards = {inspect.unwrap(type(m).forward) for m in model.modules()}
    if any(_TIE in getattr(getattr(f, "__code__", None), "co_names", ()) for f in forwards):
        return True
    try:
        with silent():
            tied, parted = (_without_tie(type(model.config)(**{_TIE: tie}).to_dict()) for tie in (True, False))
    except refusals():  # such a config has no values of its own
        return False
    return bool(tied != parted)


def _without_tie(value: Any) -> Any:
    """Return a config without what it says of ties, at any depth."""
    return {k: _without_tie(v) for k, v in value.items() if k != _TIE} if isinstance(value, dict) else value


# -- what else a model says --------------------------------------------------------------------------------------------


def positions(model: nn.Module) -> int | None:
    """Return how many positions a model's tables have; None where it has no table, so that nothing but memory limits.

    Args:
        model: a transformers model.
    """
    found = []
    text = _path(model, getattr(model, "get_input_embeddings", lambda: None)) or ""
    seeing = tuple(
        f"{n}."
        for n, m in model.named_modules()
        if getattr(m, "main_input_name", "input_ids") != "input_ids" and not f"{text}.".startswith(f"{n}." if n else "")
    )
    for name, module in model.named_modules():
        if name.startswith(seeing):
            continue
        table = isinstance(module, nn.Embedding) and re.search(r"(^|\.)(wpe|\w*position\w*)$", name)
        if table and not re.search(r"vis(ion|ual)|image|relative", name):
            found.append(module.num_embeddings - int(getattr(module, "offset", 0) or 0))
    return min(found, default=None)


def rope_layout(model: nn.Module) -> str | None:
    """Return how the model's RoPE pairs rows: "half", "pairs" (2i and 2i + 1), or None where none is found.

    The function of its own module that turns a vector is asked with one.

    Args:
        model: a transformers model.
    """
    if getattr(model.config, "rope_interleave", None) is True:
        return "pairs"
    spaces = {
        type(m).__module__ for m in _text(model).modules() if type(m).__module__.startswith("transformers.models")
    }
    for space in sorted(spaces):
        module = sys.modules[space]
        turn = getattr(module, "rotate_half", None) or getattr(module, "rotate_every_two", None)
        plain = getattr(module, "_apply_rotary_emb", None)
        if turn is not None or plain is not None:
            row = torch.arange(8.0).view(1, 1, 1, 8)
            try:
                quarter = (torch.zeros(4), torch.ones(4))
                made = turn(row) if turn is not None else plain(row, *quarter)  # type: ignore[misc]
                return {1: "pairs", 4: "half"}.get(abs(int(made.flatten()[0])))
            except refusals():
                continue
        apply = getattr(module, "apply_rotary_emb", None)
        if apply is not None and "freqs_cis" in inspect.signature(apply).parameters:
            return "pairs"  # complex numbers are made of neighbours
    return None


def _text(model: Any) -> nn.Module:
    """Return the language model inside a model that also sees."""
    try:
        found = model.get_decoder()
    except refusals():
        found = None
    return found if isinstance(found, nn.Module) else model
