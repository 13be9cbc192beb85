"""A model's whole config: with the lists that `believed` leaves out, where some models give a field for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.config_types import lists_of
from tensorkeep.storage.certificate import parse_json


def complete(config: Mapping[str, Any], companions: Iterable[Companion]) -> dict[str, Any]:
    """Return a config with the lists that `believed` leaves out: fields that some models give for each layer.

    Args:
        config: from `believed`.
        companions: the small files beside the weights, config.json among them.
    """
    for companion in companions:
        if companion.name == "config.json":
            try:
                whole = parse_json(companion.data, companion.where)
            except TensorkeepError:
                continue
            return _with_lists(config, whole) if isinstance(whole, dict) else dict(config)
    return dict(config)


def _with_lists(config: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, and the configs inside it, with the lists of whole numbers that the file has in its place."""
    lists = lists_of(whole)
    made = {**{k: v for k, v in lists.items() if k not in config}, **config}
    inner = {k: v for k, v in config.items() if isinstance(v, Mapping) and isinstance(whole.get(k), Mapping)}
    return {**made, **{k: _with_lists(v, whole[k]) for k, v in inner.items() if k.endswith("_config")}}
