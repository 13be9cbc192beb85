"""Build a config's model on the meta device, and ask transformers what it calls its tensors there and in files.

Nothing here holds a weight. `names` keeps what is found out; this module is loaded only when that is not known yet.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tensorkeep.conversion.row_maps import Run, numbered, origins, row_count, runs
from tensorkeep.errors import TensorkeepError
from tensorkeep.models.language_model import believable_config, silent
from tensorkeep.models.refusals import refusals, said
from tensorkeep.quantization.linear_layers import linear_layers

Shapes = dict[str, tuple[int, ...]]
_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel")


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
    file, saved, problem = _as_saved(model, kept)
    made = _inverted(saved, kept)
    in_file = {n: next(iter(_as_saved(model, {n: live[n]})[0]), n) for n in {*tied, *tied.values()}}
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
        "prefix": str(getattr(model, "base_model_prefix", "") or ""),
        "inward": _inward(model),
        "linear": {n: k for n, k, _ in linear_layers(model)},
        "positions": positions(model),
        "rope": rope_layout(model),
        "embedding": _path(model, model.get_input_embeddings),
        "head": _path(model, model.get_output_embeddings),
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


# -- live -> file ------------------------------------------------------------------------------------------------------


def _as_saved(model: Any, live: Shapes) -> tuple[Shapes, dict[str, tuple[Run, ...]], str]:
    """Return the shapes that a file has for live tensors, of which rows each is made, and why that cannot be told."""
    revert = getattr(sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None)
    same: dict[str, tuple[Run, ...]] = {n: (Run(n),) for n in live}
    if revert is None:  # transformers 4: names in memory are those in files
        return dict(live), same, ""
    names = list(live)
    try:
        hollow = {n: torch.empty(s, device="meta") for n, s in live.items()}
        reverted = {n: _one(t) for n, t in revert(model, dict(hollow)).items()}
        shapes = {n: tuple(t.shape) for n, t in reverted.items()}
        owners = {id(t): n for n, t in hollow.items()}  # what is only renamed is the same object
        whole = {n: (Run(owners[id(t)]),) for n, t in reverted.items() if id(t) in owners}
        left = set(live) - {runs[0].name for runs in whole.values()}
        probes = {n: torch.from_numpy(numbered(i, live[n])) for i, n in enumerate(names) if n in left}
        made = {n: _one(t) for n, t in revert(model, probes).items()} if probes else {}
    except refusals() as error:
        return dict(live), same, f"transformers cannot say how it saves {type(model).__name__}: {said(error)}"
    out, odd = _described(made, shapes, names, [live[n] for n in names])
    out = {n: whole.get(n) or out[n] for n in shapes if n in whole or n in out}
    return shapes, out, f"transformers saves {odd[0]} in another arrangement than rows of the model's" if odd else ""


def _one(value: Any) -> torch.Tensor:
    """Return the tensor of a conversion's result, which may be a list of one."""
    found: torch.Tensor = value[0] if isinstance(value, list) else value
    return found


def _described(
    made: Mapping[str, torch.Tensor], shapes: Shapes, names: list[str], origin: list[tuple[int, ...]]
) -> tuple[dict[str, tuple[Run, ...]], list[str]]:
    """Turn converted probes into runs; also the names of those for which that cannot be done."""
    places = {n: i for i, n in enumerate(names)}
    out: dict[str, tuple[Run, ...]] = {}
    odd: list[str] = []
    for name, probe in made.items():
        shape, found = shapes.get(name, ()), None
        thin = shape if len(shape) < 2 else (*shape[:-1], 1)
        if tuple(probe.shape) == thin and probe.numel():
            found = runs(probe.numpy(), names, origin)
            if len(shape) > 1 and any(origin[places[r.name]][-1:] != shape[-1:] for r in found or ()):
                found = None
        elif len(shape) > 1 and tuple(probe.shape) == (*shape[:-2], 1, shape[-1]) and probe.numel():
            (run, *more) = runs(probe.numpy(), names, origin) or (Run(name, (0, 0)),)
            swapped = (*shape[:-2], shape[-1], shape[-2])
            whole = run == Run(run.name) and not more and tuple(origin[places[run.name]]) == swapped
            found = (Run(run.name, turned=True),) if whole else None
        if found is None:
            odd.append(name)
        else:
            out[name] = found
    return out, odd


def _inverted(saved: Mapping[str, tuple[Run, ...]], live: Shapes) -> dict[str, tuple[Run, ...]]:
    """Return, from the rows that file tensors are made of, those that live tensors are made of."""
    names = list(saved)
    codes: dict[str, Any] = {n: None for n in live}
    whole: dict[str, tuple[Run, ...]] = {}
    sizes: list[tuple[int, ...]] = []
    for number, (name, parts) in enumerate(saved.items()):
        rows = 0
        for run in parts:
            first, last = run.rows or (0, row_count(live[run.name]))
            if run.rows is None and len(parts) == 1 and run.permute is None:
                whole[run.name] = (Run(name, turned=run.turned),)
            else:
                if codes[run.name] is None:
                    codes[run.name] = numbered(0, (row_count(live[run.name]),)) - (1 << 50)
                order = torch.arange(last - first).numpy()
                if run.permute is not None:
                    block = torch.tensor(run.permute.order()).numpy()
                    order = (order.reshape(-1, len(block))[:, :1] + block).ravel()
                codes[run.name][first + order] = numbered(number, (rows + last - first,))[rows:]
            rows += last - first
        sizes.append((rows,))
    out = dict(whole)
    for name, found in codes.items():
        if found is not None and (made := runs(found, names, sizes)) is not None and (origins(found)[0] >= 0).all():
            out[name] = made
    return out


# -- file -> live, for names that files had before ---------------------------------------------------------------------


def loaded(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[Run, ...]], list[str]]:
    """Return which rows of a file's tensors transformers' loader makes the live tensors of.

    Args:
        model: from `build`.
        shapes: of the file's tensors, by name.

    Returns:
        The rows by live name, and the file's names that the loader has no place for.

    Raises:
        TensorkeepError: K06 where the loader rearranges them in a way that is not rows.
    """
    library = sys.modules.get("transformers.core_model_loading")
    mapping = sys.modules.get("transformers.conversion_mapping")
    live = model.state_dict()
    if library is None or mapping is None or not hasattr(library, "rename_source_key"):
        return {n: (Run(n),) for n in shapes if n in live}, [n for n in shapes if n not in live]
    try:
        return _load(library, mapping, model, live, shapes)
    except refusals() as error:
        what = f"transformers cannot say how it loads {type(model).__name__}: {said(error)}"
        raise TensorkeepError(what, code="K06") from None


def _load(
    library: Any, mapping: Any, model: Any, live: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[Run, ...]], list[str]]:
    """Run transformers' own conversion over numbered rows, as its loader runs it over weights."""
    transforms = mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, library.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, library.WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    names = sorted(shapes, key=library.dot_natural_key)
    jobs: dict[str, Any] = {}
    out: dict[str, tuple[Run, ...]] = {}
    strangers: list[str] = []
    prefix = model.base_model_prefix
    for number, name in enumerate(names):
        new, pattern = library.rename_source_key(name, renamings, converters, prefix, live)
        if new not in live and name in live:
            new, pattern = library.rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=live)
        if new not in live:
            strangers.append(name)
        elif pattern is None:
            out[new] = (Run(name),)
        else:
            job = jobs.get(new)
            if job is None:
                job = jobs[new] = copy.deepcopy(by_pattern[pattern])
            if not _fits_as_it_is(job, shapes[name], live[new].shape):
                job.add_tensor(new, name, pattern, torch.from_numpy(numbered(number, shapes[name])))
            else:
                out[new] = (Run(name),)
                del jobs[new]
    sizes = [tuple(shapes[n]) for n in names]
    wanted = {n: tuple(t.shape) for n, t in live.items()}
    for new, job in jobs.items():
        made = {n: _one(t) for n, t in job.convert(new, model=model, config=model.config).items()}
        found, odd = _described(made, wanted, names, sizes)
        if odd:
            raise TensorkeepError(f"transformers' loader rearranges {odd[0]}, not by rows alone", code="K06")
        out.update(found)
    return out, strangers


def _fits_as_it_is(job: Any, stored: Sequence[int], live: Sequence[int]) -> bool:
    """Whether a conversion turns a tensor only where its shape asks for it, and this one's does not.

    The conversion looks at shapes, which numbered rows do not have: where it is to turn, it is told to.
    """
    checking = [o for o in job.operations if getattr(o, "check_dims", False)]
    if checking and tuple(stored) == tuple(live):
        return True
    for operation in checking:
        operation.check_dims = False
    return False


# -- what else a model says --------------------------------------------------------------------------------------------


def positions(model: nn.Module) -> int | None:
    """Return how many positions a model's tables have; None where it has no table, so that nothing but memory limits.

    Args:
        model: a transformers model.
    """
    found = []
    for name, module in model.named_modules():
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
