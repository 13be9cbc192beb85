"""Shapes and settings of a detector's parts, as frozen dataclasses: what a recipe's `model` section holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tensorkeep.detection.model import kinds
from tensorkeep.detection.model.projection_checks import check_per_file, check_windows
from tensorkeep.errors import TensorkeepError, near_misses

Checkpointing = Literal["none", "blocks", "attention", "segments", "two_level", "offload", "reversible"]
REVERSIBLE = "reversible_swin"
Tuning = Literal["adapter", "all", "none"]
LORA_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def is_added(name: str) -> bool:
    """Return whether a tensor of a backbone is of its adapters or low-rank updates, not of the pretrained network.

    Args:
        name: below the backbone or the detector.
    """
    parts = name.split(".")
    return "adapter" in parts or "ladders" in parts or parts[-1] in ("lora_A", "lora_B")


@dataclass(frozen=True)
class VitConfig:
    """Shape of a ViT over chunks of frames.

    Attributes:
        image_size: pixels; only sizes the stored position table, frames may have any size.
        patch_size: pixels.
        embed_dim: channels of a token.
        depth: number of blocks.
        heads: of the attention.
        mlp_dim: channels inside the MLP.
        chunk_frames: frames that attention sees together.
        tubelet: frames of a token.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        eps: of the layer norms.
        mean: per channel, RGB, on the 0..255 scale.
        std: per channel, RGB, on the 0..255 scale.
    """

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_dim: int = 1536
    chunk_frames: int = 16
    tubelet: int = 2
    drop_path: float = 0.1
    eps: float = 1e-6
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        if self.embed_dim % self.heads:
            raise TensorkeepError(f"embed_dim {self.embed_dim} is not a multiple of heads {self.heads}", where="vit")
        if self.chunk_frames % self.tubelet:
            what = f"chunk_frames {self.chunk_frames} is not a multiple of tubelet {self.tubelet}"
            raise TensorkeepError(what, where="vit")


@dataclass(frozen=True)
class SwinConfig:
    """Shape of Re2TAL's reversible video Swin transformer.

    Attributes:
        patch: frames, rows and columns of a token.
        channels: of a token in the first stage; each stage after it has twice as many.
        depths: blocks of each stage.
        heads: of the attention, in each stage.
        window: tokens that attention sees together: time steps, rows, columns.
        mlp_ratio: channels inside the MLP over those of the stage.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        eps: of the layer norms.
        mean: per channel, RGB, on the 0..255 scale.
        std: per channel, RGB, on the 0..255 scale.
    """

    patch: tuple[int, int, int] = (2, 4, 4)
    channels: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: tuple[int, int, int] = (8, 7, 7)
    mlp_ratio: float = 4.0
    drop_path: float = 0.2
    eps: float = 1e-5
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.heads):
            raise TensorkeepError(f"{len(self.depths)} depths but {len(self.heads)} heads", where="swin")
        odd = [h for stage, h in enumerate(self.heads) if (self.channels << stage) % h]
        if odd:
            what = f"the channels of a stage, from {self.channels}, are no multiple of {odd[0]} heads"
            raise TensorkeepError(what, where="swin")

    @property
    def embed_dim(self) -> int:
        """Channels of the feature map."""
        return self.channels << (len(self.depths) - 1)

    @property
    def chunk_frames(self) -> int:
        """Return 0: a whole window goes through it."""
        return 0


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter is put into which blocks.

    Attributes:
        kind: "tia" is AdaTAD's temporal-informative adapter, "plain" has no temporal convolution, "qlora" has frozen
            projections under LoRA; "ladder" is AdaTAD's side-tuning: adapters beside a ViT that no gradient enters.
        ratio: inner width of the adapter over the width of the ViT.
        blocks: indices of the blocks, with "ladder" of those that are read; None: all.
        lora_r: rank, "qlora" only.
        lora_alpha: scale of the updates times the rank, "qlora" only.
        lora_dropout: rate before the updates, "qlora" only.
        quantize_bits: of the frozen projections, "qlora" only.
    """

    kind: Literal["tia", "plain", "qlora", "ladder"] = "tia"
    ratio: float = 0.25
    blocks: tuple[int, ...] | None = None
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    quantize_bits: Literal[4, 8] = 4


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates on the pretrained linears of every block.

    Attributes:
        lora_r: rank.
        lora_alpha: scale of the updates times the rank.
        lora_dropout: rate before the updates.
        targets: names of the linears inside a block.
    """

    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    targets: tuple[str, ...] = LORA_TARGETS


@dataclass(frozen=True)
class ProjectionConfig:
    """Shape of ActionFormer's projection.

    Attributes:
        in_channels: channels of the features.
        channels: channels of every level.
        embed_layers: convolutions before the blocks.
        stem_layers: blocks at full length.
        branch_layers: blocks that each halve the length.
        kernel_size: of the convolutions before the blocks.
        heads: of the attention.
        windows: attention window of each level in its own steps, stem first (odd; 1 or less: global); one serves all.
        drop_path: rate of stochastic depth.
        layer_scale: whether each residual branch has a per-channel scale that starts at 1e-4.
        input_dropout: rate on whole channels of the features.
        proj_dropout: rate inside the blocks.
        positions: whether a fixed position table is added.
        max_length: grid steps that inputs are padded to, and of the position table.
        per_file: for each feature file its channels, and those a convolution of its own makes of them; empty: none.
    """

    in_channels: int = 384
    channels: int = 512
    embed_layers: int = 2
    stem_layers: int = 2
    branch_layers: int = 5
    kernel_size: int = 3
    heads: int = 4
    windows: tuple[int, ...] = (-1,)
    drop_path: float = 0.1
    layer_scale: bool = True
    input_dropout: float = 0.0
    proj_dropout: float = 0.0
    positions: bool = False
    max_length: int = 768
    per_file: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_per_file(self.per_file, self.in_channels, self.channels)
        if self.channels % self.heads:
            what = f"channels {self.channels} is not a multiple of heads {self.heads}"
            raise TensorkeepError(what, where="projection")
        check_windows(self.windows, self.branch_layers)

    @property
    def level_windows(self) -> tuple[int, ...]:
        """Attention window of each level, stem first."""
        return self.windows if len(self.windows) > 1 else self.windows * (1 + self.branch_layers)


@dataclass(frozen=True)
class HeadConfig:
    """Shape of the detection head, and how its loss is computed.

    Attributes:
        classes: number of classes.
        channels: of the towers.
        convs: layers of each tower.
        prior: class probability that the head starts from.
        strides: grid steps between two points, for each level.
        ranges: shortest and longest distance in grid steps that each level regresses.
        point_offset: whether points lie half a stride later.
        centre_radius: a point learns a segment only this near its centre, in strides; None: anywhere inside it.
        near_ties: whether a point learns only the classes of segments about as long as the shortest that fits it.
        loss_normalizer: what the moving average of positive points, which divides the losses, starts from.
        loss_normalizer_momentum: of that average.
        label_smoothing: part of each class target that is spread.
        focal_alpha, focal_gamma: of the focal loss.
        regression: loss of the boundaries.
        loss_weight: of the regression loss; 0 or less weighs it by the ratio of the two losses.
    """

    classes: int = 20
    channels: int = 512
    convs: int = 2
    prior: float = 0.01
    strides: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    ranges: tuple[tuple[float, float], ...] = ((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000))
    point_offset: bool = False
    centre_radius: float | None = 1.5
    near_ties: bool = True
    loss_normalizer: float = 100.0
    loss_normalizer_momentum: float = 0.9
    label_smoothing: float = 0.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    regression: Literal["diou", "giou"] = "diou"
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.ranges):
            what = f"{len(self.strides)} strides but {len(self.ranges)} ranges"
            raise TensorkeepError(what, where="head", hint="give one range for each level")


@dataclass(frozen=True)
class BackboneConfig:
    """A video network as a detector's backbone, and what of it trains.

    Attributes:
        vit: its shape, where it is a ViT; None: VideoMAE-S, or no ViT where there is `swin`.
        adapter: adapters in its blocks; None: none.
        lora: low-rank updates on its linears; None: none.
        tuning: what trains: "adapter" (adapters and LoRA), "all" or "none".
        checkpointing: which activations are kept for the backward (see `VisionTransformer`); of a reversible network
            none of its blocks' ("reversible"), or all ("none").
        output_length: grid steps of a window.
        frozen_dtype: dtype in which frozen weights are held and computed.
        kind: which network, one of the table in `detection/backbones`.
        swin: its shape, where it is "reversible_swin".
        freeze_norms: whether its layer norms stay as they are, whatever `tuning` says.
    """

    vit: VitConfig | None = None
    adapter: AdapterConfig | None = None
    lora: LoraConfig | None = None
    tuning: Tuning = "adapter"
    checkpointing: Checkpointing = "segments"
    output_length: int = 768
    frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    kind: str = "videomae"
    swin: SwinConfig | None = None
    freeze_norms: bool = False

    @property
    def network(self) -> VitConfig | SwinConfig:
        """The shape of the network that is built."""
        found = self.vit if self.swin is None else self.swin
        assert found is not None
        return found

    def __post_init__(self) -> None:
        if self.vit is None and self.swin is None:
            object.__setattr__(self, "vit", VitConfig())
        self._check_reversible()
        if self.adapter is None or self.adapter.kind != "ladder":
            return
        if self.lora is not None or self.tuning == "all":
            part = "low-rank updates" if self.lora is not None else "weights of the ViT (tuning: all)"
            hint = "adapter.kind: tia, or leave them out"
            raise TensorkeepError(f"a ladder lets no gradient reach {part}", where="model.backbone", hint=hint)

    def _check_reversible(self) -> None:
        """Check that the shape is that of the kind, and that a reversible network has nothing of a ViT."""
        where, reversible = "model.backbone", self.kind == REVERSIBLE
        if reversible is not (self.swin is not None) or reversible is not (self.vit is None):
            what = f"kind {self.kind} {'needs swin and no vit' if reversible else 'needs vit and no swin'}"
            raise TensorkeepError(what, where=where, hint=f"kind: {REVERSIBLE} goes with swin, a ViT with vit")
        if not reversible and self.checkpointing == "reversible":
            raise TensorkeepError("a ViT is not reversible", where=f"{where}.checkpointing", hint="segments")
        if reversible and self.checkpointing not in ("none", "reversible"):
            what = f"checkpointing {self.checkpointing} is a ViT's"
            raise TensorkeepError(what, where=f"{where}.checkpointing", hint="reversible, or none")
        if reversible and (self.adapter is not None or self.lora is not None):
            what = "adapters and low-rank updates are for ViTs; the reversible Swin trains whole"
            raise TensorkeepError(what, where=where, hint="tuning: all")


@dataclass(frozen=True)
class NeckConfig:
    """A group norm for each level of the pyramid, in place of the layer norm that is otherwise there.

    Attributes:
        groups: number of groups; each level is normalised over a group's channels and all its time steps.
        affine: whether it has a weight and a bias for each channel.
    """

    groups: int
    affine: bool = True


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that decides the shape of a detector: the `model` section of a recipe.

    Each kind of detector in `tensorkeep.detection.model.kinds` has a dataclass like this one, whose projection and head
    hold its own fields; this one is ActionFormer's.

    Attributes:
        projection: from features to a pyramid of levels.
        head: from levels to predictions.
        backbone: from frames to features; None: the detector reads features `[B, C, T]`.
        neck: between projection and head; None: a layer norm for each level.
        kind: name of the detector.

    Raises:
        TensorkeepError: The parts do not fit each other.
    """

    projection: ProjectionConfig
    head: HeadConfig
    backbone: BackboneConfig | None = None
    neck: NeckConfig | None = None
    kind: str = "actionformer"

    def __post_init__(self) -> None:
        levels = 1 + self.projection.branch_layers
        if len(self.head.strides) != levels:
            what = f"the head has {len(self.head.strides)} levels, the projection {levels}"
            raise TensorkeepError(what, where="detector", hint="strides need one entry for each level")
        if self.backbone is not None and self.backbone.network.embed_dim != self.projection.in_channels:
            own, whose = self.backbone.network.embed_dim, "ViT" if self.backbone.swin is None else "Swin"
            what = f"projection.in_channels {self.projection.in_channels} is not the {whose}'s {own}"
            raise TensorkeepError(what, where="detector")
        if self.neck is not None and (self.neck.groups < 1 or self.projection.channels % self.neck.groups):
            what = f"neck.groups {self.neck.groups} does not divide the {self.projection.channels} channels"
            raise TensorkeepError(what, where="detector")

    @classmethod
    def variant(cls, values: Mapping[str, Any], where: str) -> type[DetectorConfig]:
        """Return the dataclass of the kind that a recipe's `model` section names."""
        name = values.get("kind", "actionformer")
        if cls is not DetectorConfig:
            return cls
        if name == "actionformer":
            kinds.refuse_others(cls, values, where)
            return cls
        if name not in kinds.NAMES:
            hint = near_misses(str(name), kinds.NAMES) or f"one of {', '.join(kinds.NAMES)}"
            raise TensorkeepError(f"unknown kind of detector {name!r}", where=f"{where}.kind", hint=hint)
        found: type[DetectorConfig] = kinds.module(name).Config
        kinds.refuse_others(found, values, where)
        return found

    @classmethod
    def variants(cls) -> list[type[DetectorConfig]]:
        """Return the dataclasses of every kind."""
        return [kinds.module(name).Config for name in kinds.NAMES]


def without_updates(config: DetectorConfig) -> DetectorConfig:
    """Return the shape of a detector whose low-rank updates were added into their linears.

    Args:
        config: of the detector that has them; one that has none stays as it is.
    """
    backbone = config.backbone
    if backbone is None:
        return config
    adapter = backbone.adapter
    if adapter is not None and adapter.kind == "qlora":
        adapter = replace(adapter, kind="tia")
    return replace(config, backbone=replace(backbone, adapter=adapter, lora=None))
