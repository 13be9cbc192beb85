"""Key lists of full-size models: the same names, shapes, dtypes and parameter counts from our own build, on meta."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from tensorkeep.conversion.naming import opentad
from tensorkeep.detection.model.config import (
    AdapterConfig,
    BackboneConfig,
    DetectorConfig,
    HeadConfig,
    ProjectionConfig,
    VitConfig,
)
from tensorkeep.detection.model.detector import Detector, count_parameters
from tensorkeep.detection.model.groups import detector_groups
from tests.parity.opentad_fixtures import Case, Fixture
from tests.parity.opentad_training import group_cases, optimizer_of

VIT = "backbone.model.backbone."


def cases(fixture: Fixture) -> Iterator[Case]:
    rows = {opentad.strip_wrapper(row["name"]): row for row in fixture.meta["state_dict"]}
    with torch.device("meta"):
        detector = Detector(config_of({name: tuple(row["shape"]) for name, row in rows.items()}))
    parameters = {opentad.from_hf(name) for name, _ in detector.named_parameters()}
    ours = {opentad.from_hf(name): tensor for name, tensor in detector.state_dict().items()}
    yield "names", float(len(ours.keys() ^ rows.keys())), 0
    shared = [(name, row) for name, row in rows.items() if name in ours]
    yield "shapes", float(sum(tuple(ours[name].shape) != tuple(row["shape"]) for name, row in shared)), 0
    kinds = sum((name in parameters) != (row["kind"] == "param") for name, row in shared)
    yield "parameter or buffer", float(kinds), 0
    dtypes = [name for name, row in shared if str(ours[name].dtype) != f"torch.{row['dtype']}"]
    yield "dtypes", float(sum(opentad.to_hf(name) not in opentad.CHANGED_DTYPES for name in dtypes)), 0
    counts = fixture.meta.get("meta", {}).get("counts", {})
    found = count_parameters(detector)
    parts = {"vit_without_adapter": "vit", "adapter": "adapter", "projection": "projection", "neck": "neck"}
    for theirs, mine in {**parts, "rpn_head": "head", "total": "total"}.items():
        if theirs in counts:
            yield (
                f"parameters, {theirs}",
                float(abs(found[mine].total - counts[theirs] if mine in found else counts[theirs])),
                0,
            )
    if "optimizer_groups" in fixture.meta:
        groups = detector_groups(detector, optimizer_of({"groups": fixture.meta["optimizer_groups"]}))
        yield from group_cases(groups, fixture.meta["optimizer_groups"])


def config_of(shapes: dict[str, tuple[int, ...]]) -> DetectorConfig:
    """A config with these shapes. What no shape shows (heads, ranges, rates) is left at a value that fits."""
    channels, in_channels, kernel = shapes["projection.embed.0.conv.weight"]
    levels = _count(shapes, r"neck\.fpn_norms\.(\d+)\.")
    projection = ProjectionConfig(
        in_channels=in_channels,
        channels=channels,
        embed_layers=_count(shapes, r"projection\.embed\.(\d+)\."),
        stem_layers=_count(shapes, r"projection\.stem\.(\d+)\."),
        branch_layers=_count(shapes, r"projection\.branch\.(\d+)\."),
        kernel_size=kernel,
        heads=1,
        layer_scale="projection.branch.0.drop_path_attn.scale" in shapes,
    )
    head = HeadConfig(
        classes=shapes["rpn_head.cls_head.bias"][0],
        channels=shapes["rpn_head.cls_head.weight"][1],
        convs=_count(shapes, r"rpn_head\.cls_convs\.(\d+)\."),
        strides=tuple(2**level for level in range(levels)),
        ranges=((0, 4),) * levels,
    )
    return DetectorConfig(projection, head, _backbone(shapes) if f"{VIT}pos_embed" in shapes else None)


def _backbone(shapes: dict[str, tuple[int, ...]]) -> BackboneConfig:
    dim, _, tubelet, patch, _ = shapes[f"{VIT}patch_embed.projection.weight"]
    positions = shapes[f"{VIT}pos_embed"][1]
    side = int((positions / (16 // tubelet)) ** 0.5)
    assert side * side * (16 // tubelet) == positions, "chunks of other than 16 frames"
    vit = VitConfig(
        image_size=side * patch,
        patch_size=patch,
        embed_dim=dim,
        depth=_count(shapes, rf"{re.escape(VIT)}blocks\.(\d+)\."),
        heads=1,
        mlp_dim=shapes[f"{VIT}blocks.0.mlp.layers.0.0.weight"][0],
        tubelet=tubelet,
    )
    found = (re.fullmatch(rf"{re.escape(VIT)}blocks\.(\d+)\.adapter\.gamma", name) for name in shapes)
    blocks = tuple(int(match[1]) for match in found if match)
    adapter: Any = AdapterConfig(blocks=blocks) if blocks else None
    return BackboneConfig(vit, adapter, tuning="adapter" if blocks else "all")


def _count(shapes: dict[str, tuple[int, ...]], pattern: str) -> int:
    found = (re.match(pattern, name) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
