"""Build the language model that a checkpoint holds, and its tokenizer: transformers on the CPU in float32."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.plan import HfTensor, Step
from tensorkeep.conversion.planning import to_hf_tensors
from tensorkeep.conversion.streams import pieces
from tensorkeep.errors import Inconclusive, TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.formats.whole_config import complete
from tensorkeep.models.refusals import refusals, said
from tensorkeep.storage.budget import check_config
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.record import DTYPES

_LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def sibling(views: Sequence[StateView]) -> dict[str, Any] | None:
    """Return the first config that any of the views has.

    Args:
        views: opened checkpoints.

    Returns:
        The config; None where none has one.
    """
    return next((v.config for v in views if v.config is not None), None)


def model_of(view: StateView, spare: dict[str, Any] | None = None) -> tuple[Any, dict[str, list[str]]]:
    """Build the model of a checkpoint, in float32 and eval mode on the CPU.

    Tensors that the checkpoint lacks are drawn from a fixed seed.

    Args:
        view: the opened checkpoint.
        spare: the config for a checkpoint without one.

    Returns:
        The transformers model, and what its loader reported by kind: missing, unexpected and mismatched names, errors.

    Raises:
        Inconclusive: no config is there, transformers has no such model or cannot load it, or is not installed.
    """
    transformers = _transformers()
    document = complete(view.config, view.companions) if view.config else spare
    if document is None:
        raise Inconclusive("no config says which model this is")
    auto = auto_class(transformers, document)
    if auto is None:
        raise Inconclusive(f"transformers has no causal language model of type {document.get('model_type')!r}")
    spelled = "dtype" if _version(transformers) >= (4, 56) else "torch_dtype"
    options: dict[str, Any] = {spelled: torch.float32, "output_loading_info": True, "trust_remote_code": False}
    try:
        believable_config(transformers, document, sum(record.nbytes for record in view.records.values()))
    except TensorkeepError as error:
        raise Inconclusive(error.line) from None
    try:
        with torch.random.fork_rng(devices=[]), silent():
            torch.default_generator.manual_seed(0)
            if view.format == "hf" and view.config is not None and isinstance(view.folder, LocalFolder):
                with _own_files(view, document) as folder:
                    model, info = auto.from_pretrained(folder, local_files_only=True, **options)
            else:
                config = transformers.AutoConfig.for_model(**with_floats(document))
                state = dict(_tensors(view, document))
                kept = auto._model_mapping[type(config)]
                del options["trust_remote_code"]
                model, info = kept.from_pretrained(None, config=config, state_dict=state, **options)
    except refusals() as error:
        raise Inconclusive(f"transformers cannot load it: {said(error, 300)}") from None
    report = {k: sorted(str(n) for n in info[k]) for k in _LOADING if info.get(k)}
    return never_rescaled(model).eval(), report


def never_rescaled(model: Any) -> Any:
    """Let a model leave its weights alone: RWKV divides some by powers of two when it evaluates, and so would be saved.

    Args:
        model: a transformers model.

    Returns:
        The model; its logits are those that it trains with.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "rescale_every", 0):
            config.rescale_every = 0
    return model


def auto_class(transformers: Any, document: dict[str, Any]) -> Any:
    """Return transformers' auto class for a model that makes text: the one that has the class that the config names.

    A model that sees too is built whole, so that its names are those of its files and nothing of it is lost.

    Args:
        transformers: the library.
        document: what config.json says.

    Returns:
        The auto class; None where the library has none for this type.
    """
    known = transformers.models.auto.modeling_auto
    kind, named = document.get("model_type"), document.get("architectures")
    own = named[0] if isinstance(named, list) and named else None
    if not isinstance(kind, str):
        return None
    causal = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    seeing = getattr(known, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {}).get(kind)
    if own is not None and own == seeing and own != causal:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM if causal is not None else None


def text_config(config: Any) -> Any:
    """Return the part of a model's config that is about its text: the config itself where there is nothing else.

    Args:
        config: of a live model.
    """
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def _own_files(view: StateView, document: dict[str, Any]) -> Iterator[Path]:
    """Give a folder of links to the files that the view reads, and of no others.

    In the view's own folder transformers picks by name: model.safetensors before an index, whatever the user named.
    """
    assert isinstance(view.folder, LocalFolder)
    stored = list(dict.fromkeys(record.file for record in view.records.values()))
    several = len(stored) > 1
    with tempfile.TemporaryDirectory(prefix="tensorkeep-") as made:
        folder = Path(made)
        for companion in view.companions:
            (folder / companion.name).write_bytes(companion.data)
        (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
        own = {file: f"part-{i:05}.safetensors" if several else "model.safetensors" for i, file in enumerate(stored)}
        for file, name in own.items():
            (folder / name).symlink_to((view.folder.path / file).resolve())
        if several:
            index = {"metadata": {}, "weight_map": {n: own[r.file] for n, r in view.records.items()}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield folder


def believable_config(transformers: Any, document: dict[str, Any], stored: int | None) -> Any:
    """Return transformers' config of a document, where it asks for a model that somebody can have.

    Args:
        transformers: the library.
        document: what config.json says; where it says nothing, the library has values of its own.
        stored: bytes of the weights beside it, where there are some.

    Raises:
        TensorkeepError: C01 for numbers out of all proportion, and where transformers refuses it.
    """
    check_config(document, "config.json", stored)
    try:
        with silent():
            config = transformers.AutoConfig.for_model(**with_floats(document))
    except refusals() as error:
        what = f"transformers cannot build it: {said(error)}"
        raise TensorkeepError(what, where="config", hint="config is what config.json says, with model_type") from None
    check_config(config.to_dict(), "config.json", stored)
    return config


def with_floats(value: Any) -> Any:
    """Return a config with the numbers that JSON has no word for: {"__float__": "Infinity"}, as transformers writes.

    Args:
        value: what config.json says, or any part of it.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {k: with_floats(v) for k, v in value.items()}
    return [with_floats(v) for v in value] if isinstance(value, list) else value


def _tensors(view: StateView, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's tensors under hf names and in hf layout, one at a time."""
    dropped: list[Step] = []
    try:
        hf_tensors = to_hf_tensors(view, 0, namings.identify(view), config, dropped)
    except TensorkeepError as error:
        raise Inconclusive(f"its tensors have no place in the model: {error.what}") from None
    for name, tensor in hf_tensors.items():
        yield name, _tensor(tensor, view)


def _tensor(tensor: HfTensor, view: StateView) -> torch.Tensor:
    """Read one tensor from its parts."""
    spelled = DTYPES[tensor.dtype].torch
    if spelled is None or not hasattr(torch, spelled):
        raise Inconclusive(f"{tensor.name} is stored as {tensor.dtype}, which torch cannot hold")
    data = bytearray()
    for part in tensor.parts:
        for piece in pieces(part, view):
            data += piece
    dtype = getattr(torch, spelled)
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape) if data else torch.empty(tensor.shape, dtype=dtype)


def tokenizer_of(views: Sequence[StateView]) -> Any:
    """Return the first tokenizer that lies beside any of the views.

    Args:
        views: opened checkpoints.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        Inconclusive: none has a tokenizer.json that can be read, or the package is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise Inconclusive("a forward needs the tokenizers package: pip install 'tensorkeep[language]'") from None
    for view in views:
        for companion in view.companions:
            if companion.name == "tokenizer.json":
                try:
                    return Tokenizer.from_buffer(companion.data)
                except ValueError as error:
                    raise Inconclusive(f"{companion.where} is no tokenizer: {error}") from None
    raise Inconclusive("no tokenizer.json lies beside the checkpoint or the reference")


def _transformers() -> Any:
    """Import transformers, or say how to install it."""
    try:
        import transformers
    except ImportError:
        raise Inconclusive("a forward needs transformers: pip install 'tensorkeep[language]'") from None
    return transformers


def _version(package: Any) -> tuple[int, ...]:
    """Return a package's version as (major, minor)."""
    return tuple(int(p) for p in str(package.__version__).split(".")[:2])


@contextmanager
def silent() -> Iterator[None]:
    """Silence transformers' and bitsandbytes' reports and bars inside the block: what they say is in the loading info.

    Yields:
        Nothing.
    """
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    codes = logging.getLogger("bitsandbytes")
    before = codes.level
    codes.setLevel(logging.CRITICAL)
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        codes.setLevel(before)
        if bars:
            theirs.enable_progress_bar()
