"""Read the `model` section of a recipe off a detector's shapes: OpenTAD's checkpoints carry no config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

FILE = "recipe.yaml"
Shapes = Mapping[str, tuple[int, ...]]
# attention heads by width: S, B, L, H, v2-g, InternVideo2-6B
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 3200: 25}
# a tensor that one kind of backbone has -> its kind, frames of a chunk, drop path, pixels where no table shows them
_KINDS = {"backbone.cls_token": ("internvideo2", 8, 0.1, 224), "backbone.norm.weight": ("vjepa2", 16, 0.0, 256)}
_VIDEOMAE = ("videomae", 16, 0.1, 224)
_VJEPA2_HEADS = {1408: 22}  # of the giant one
# what no shape shows; one class is a proposal head, which OpenTAD trains on ActivityNet
_ASSUMED = "attention heads, windows and the window's length, drop paths, level ranges, centre radius, loss weights"
_LADDER_MARK = "backbone.ladders.adapters.0.gamma"
_LADDER = "input dropout, the blocks that the ladder reads"
_THUMOS: dict[str, Any] = {"length": 768, "projection": {}, "head": {}}
_ACTIVITYNET: dict[str, Any] = {
    "length": 192,
    "projection": {"positions": True},
    "head": {"label_smoothing": 0.1, "loss_normalizer": 200, "loss_weight": 2.0},
}


# dimensions of what must be there to read anything off
_NEEDED = {"projection.embed.0.conv.weight": 3, "head.cls_head.weight": 3, "head.cls_head.bias": 1}
_FILE_CONV = re.compile(r"projection\.proj\.(\d{1,4})\.conv\.weight")
_NEEDED_OF_BACKBONE = {"backbone.patch_embed.proj.weight": 5, "backbone.blocks.0.mlp.fc1.weight": 2}


def readable(shapes: Shapes) -> bool:
    """Tell whether these shapes are enough of a detector to read its recipe off.

    Args:
        shapes: by our names.

    Returns:
        Whether `read_off` finds what it needs.
    """
    has_backbone = any(name.startswith("backbone.") for name in shapes)
    needed = {
        **_NEEDED,
        **{name: 3 for name in shapes if _FILE_CONV.fullmatch(name)},
        **(_NEEDED_OF_BACKBONE if has_backbone else {}),
        **_needed_of(kind_of(shapes), shapes),
    }
    return all(len(shapes.get(name, ())) == sides for name, sides in needed.items())


def _needed_of(kind: str, shapes: Shapes) -> dict[str, int]:
    """Return which tensors a detector's recipe is read off, besides those that all have, and their dimensions."""
    if kind == "tridet":
        count = max(_blocks(shapes)["branch_layers"], 1)
        windows = [f"projection.branch.{i}.{part}" for i in range(count) for part in ("psi", "convkw")]
        names = [*windows, "projection.branch.0.mlp.0", "head.cls_start_head", "head.reg_head"]
        return {f"{name}.weight": 3 for name in names}
    return {f"{_causal_block(shapes)}.conv1d.weight": 3} if kind == "causaltad" else {}


def _causal_block(shapes: Shapes) -> str:
    """Return the name of one of CausalTAD's mixers."""
    return min(name for name in shapes if name.endswith(".block.A_log")).removesuffix(".A_log")


def read_off(shapes: Shapes) -> tuple[str, list[str]]:
    """Return the recipe's YAML for a detector with these shapes, and a list of what it assumes.

    Args:
        shapes: by our names.
    """
    import yaml

    levels = max(_count(shapes, rf"{part}\.(\d+)\.") for part in (r"head\.scale", r"neck\.norms"))
    classes = shapes["head.cls_head.bias"][0]
    preset = _ACTIVITYNET if classes == 1 else _THUMOS
    kind = kind_of(shapes)
    projection, head = _PARTS[kind](shapes, preset["length"])
    if "positions" in preset["projection"] and kind == "causaltad":
        projection["positions"] = preset["length"]
    elif kind != "temporalmaxer":
        projection |= preset["projection"]
    model: dict[str, Any] = {
        "projection": {
            **_embedding(shapes),
            **projection,
            **({"input_dropout": 0.1} if _LADDER_MARK in shapes else {}),
        },
        "head": {
            "classes": classes,
            "channels": shapes["head.cls_head.weight"][1],
            "convs": _count(shapes, r"head\.cls_convs\.(\d+)\."),
            "strides": [2**level for level in range(levels)],
            "ranges": [[2 ** (level + 1) if level else 0, 2 ** (level + 2)] for level in range(levels - 1)]
            + [[2**levels if levels > 1 else 0, 10000]],
            "centre_radius": 1.5,
            "loss_normalizer": 100,
            **head,
            **preset["head"],
        },
    }
    model |= {} if kind == "actionformer" else {"kind": kind}
    if not any(name.startswith("neck.norms.") for name in shapes):
        model["neck"] = {"groups": 4, "affine": False}
    if "backbone.patch_embed.proj.weight" in shapes:
        model = {"backbone": {**_backbone(shapes), "output_length": preset["length"]}, **model}
    assumed = _ASSUMED if _LADDER_MARK not in shapes else f"{_ASSUMED}, {_LADDER}"
    text = yaml.safe_dump({"model": model}, sort_keys=False, default_flow_style=None, width=100)
    return (
        f"# Read off the shapes of a checkpoint. Assumed, since no shape shows it: {assumed}.\n{text}",
        assumed.split(", "),
    )


def kind_of(shapes: Shapes) -> str:
    """Tell which detector has these shapes.

    Args:
        shapes: by our names.

    Returns:
        Its name in a recipe.
    """
    if "head.cls_start_head.weight" in shapes:
        return "tridet"
    if any(name.endswith(".block.A_log") for name in shapes):
        return "causaltad"
    blocks = any(re.match(r"projection\.(stem|branch)\.", name) for name in shapes)
    return "actionformer" if blocks else "temporalmaxer"


def _embedding(shapes: Shapes) -> dict[str, Any]:
    """Return what every projection has of these shapes."""
    channels, in_channels, kernel = shapes["projection.embed.0.conv.weight"]
    files = [[shape[1], shape[0]] for name, shape in sorted(shapes.items(), key=_number) if _FILE_CONV.fullmatch(name)]
    return {
        "in_channels": sum(width for width, _ in files) or in_channels,
        **({"per_file": files} if files else {}),
        "channels": channels,
        "embed_layers": _count(shapes, r"projection\.embed\.(\d+)\."),
        "kernel_size": kernel,
    }


def _number(item: tuple[str, tuple[int, ...]]) -> int:
    """Return the number in the name of one of the convolutions of feature files; else 0."""
    match = _FILE_CONV.fullmatch(item[0])
    return int(match[1]) if match else 0


def _blocks(shapes: Shapes) -> dict[str, Any]:
    """Return how many blocks a projection of these shapes has."""
    stem, branch = (_count(shapes, rf"projection\.{part}\.(\d+)\.") for part in ("stem", "branch"))
    return {"stem_layers": stem, "branch_layers": branch}


def _actionformer(shapes: Shapes, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of ActionFormer's projection and head."""
    scaled = "projection.stem.0.drop_path_attn.scale" in shapes
    found = {"heads": 4, "windows": [-1], "drop_path": 0.1 if scaled else 0.0, "layer_scale": scaled}
    return {**_blocks(shapes), **found, "max_length": length}, {}


def _tridet(shapes: Shapes, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of TriDet's projection and head."""
    blocks = _blocks(shapes)
    branch = [f"projection.branch.{i}" for i in range(blocks["branch_layers"])]
    windows = [shapes[f"{name}.psi.weight"][2] for name in branch]
    wide = _wide(windows, [shapes[f"{name}.convkw.weight"][2] for name in branch])
    found = {
        "mlp_dim": shapes["projection.branch.0.mlp.0.weight"][0],
        "windows": [windows[0], *windows],
        "wide": wide,
        "pooling": "mean" if "projection.branch.0.downsample.1.weight" in shapes else "max",
        "drop_path": 0.1 if "projection.branch.0.drop_path_out.scale" in shapes else 0.0,
        "max_length": length,
    }
    head = {
        "kernel_size": shapes["head.cls_head.weight"][2],
        "boundary_kernel_size": shapes["head.cls_start_head.weight"][2],
        "bins": shapes["head.reg_head.weight"][0] // 2 - 1,
    }
    return {**blocks, **found}, head


def _wide(windows: list[int], sizes: list[int]) -> float:
    """Return the number with the fewest digits that makes these second windows of the first, rounded and made odd."""
    least = max((size - 1.5) / (window + 1) for window, size in zip(windows, sizes))
    for digits in range(4):
        found = math.floor(least * 10**digits + 1) / 10**digits
        made = [round((window + 1) * found) for window in windows]
        if [size + 1 - size % 2 for size in made] == sizes:
            return float(found)
    return float(sizes[0] / (windows[0] + 1))


def _temporalmaxer(shapes: Shapes, _length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of TemporalMaxer's projection and head."""
    return {"branch_layers": _count(shapes, r"head\.scale\.(\d+)\.") - 1}, {}


def _causaltad(shapes: Shapes, _length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of CausalTAD's projection and head."""
    block = _causal_block(shapes)
    inner, _, width = shapes[f"{block}.conv1d.weight"]
    scaled = f"{block.removesuffix('.block')}.drop_path.scale" in shapes
    channels = max(shapes["projection.embed.0.conv.weight"][0], 1)
    found = {"conv_width": width, "expand": inner // channels, "heads": 4, "drop_path": 0.3 if scaled else 0.0}
    return {**_blocks(shapes), **found}, {}


_PARTS = {
    "actionformer": _actionformer,
    "tridet": _tridet,
    "temporalmaxer": _temporalmaxer,
    "causaltad": _causaltad,
}


def _backbone(shapes: Shapes) -> dict[str, Any]:
    """Return the `backbone` section of a ViT with these shapes."""
    dim, _, tubelet, patch, _ = shapes["backbone.patch_embed.proj.weight"]
    kind, frames, drop_path, pixels = next((k for mark, k in _KINDS.items() if mark in shapes), _VIDEOMAE)
    _, positions, _ = shapes.get("backbone.pos_embed", (1, frames // tubelet * (pixels // patch) ** 2, dim))
    positions -= kind == "internvideo2"  # the class token's
    steps = frames // tubelet  # of a chunk; others where so many squares of patches do not fill the table
    tried = (steps, positions // (pixels // patch) ** 2 or steps, 4, 2, 16, 1)
    steps = next((n for n in tried if math.isqrt(positions // n) ** 2 * n == positions), steps)
    found = [re.fullmatch(r"backbone\.blocks\.(\d+)\.adapter\.gamma", name) for name in shapes]
    adapted = sorted(int(match[1]) for match in found if match)
    depth = _count(shapes, r"backbone\.blocks\.(\d+)\.")
    rungs = _count(shapes, r"backbone\.ladders\.adapters\.(\d+)\.")
    section: dict[str, Any] = {
        "vit": {
            "image_size": round((positions / steps) ** 0.5) * patch,
            "patch_size": patch,
            "embed_dim": dim,
            "depth": depth,
            "heads": {**_HEADS, **(_VJEPA2_HEADS if kind == "vjepa2" else {})}.get(dim, max(dim // 64, 1)),
            "mlp_dim": shapes["backbone.blocks.0.mlp.fc1.weight"][0],
            "chunk_frames": steps * tubelet,
            "tubelet": tubelet,
            "drop_path": 0.0 if rungs else drop_path,
        }
    }
    section |= {} if kind == "videomae" else {"kind": kind}
    if adapted:
        section["adapter"] = _adapter(shapes, f"backbone.blocks.{adapted[0]}.adapter", dim)
        section["adapter"] |= {} if len(adapted) == depth else {"blocks": adapted}
    if rungs:  # which blocks they read no shape shows: in OpenTAD's configs the last ones
        section["adapter"] = _adapter(shapes, "backbone.ladders.adapters.0", dim)
        section["adapter"] |= {"kind": "ladder", "blocks": list(range(depth - rungs, depth))}
    return {**section, "tuning": "adapter" if adapted or rungs else "all", "checkpointing": "segments"}


def _adapter(shapes: Shapes, prefix: str, dim: int) -> dict[str, Any]:
    """Return the `adapter` section for the adapter under `prefix`."""
    rank = shapes.get(f"{prefix}.down_proj.lora_A")
    if rank is not None:
        width = shapes[f"{prefix}.down_proj.lora_B"][0]
        return {"kind": "qlora", "ratio": _ratio(width, dim), "lora_r": rank[0]}
    temporal = f"{prefix}.dwconv.weight" in shapes
    width = shapes[f"{prefix}.{'dwconv' if temporal else 'down_proj'}.weight"][0]
    return {"kind": "tia" if temporal else "plain", "ratio": _ratio(width, dim)}


def _ratio(width: int, dim: int) -> float:
    """Return a ratio that `int(dim * ratio)` turns into `width` again."""
    return width / dim if int(dim * (width / dim)) == width else (width + 0.5) / dim


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number that the pattern finds in a name."""
    found = [re.match(pattern, name) for name in shapes]
    return 1 + max((int(match[1]) for match in found if match), default=-1)
