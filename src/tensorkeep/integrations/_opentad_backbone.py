"""The quantized backbone as OpenTAD builds it: its arguments, its tensor names, frames that are normalised already.

A thin layer over `detection`'s ViT and adapters. In a `state_dict` every tensor has OpenTAD's (and mmaction's) name,
so its files go in and out; where a file has floats for a linear that is quantized here, they are put into codes as
they are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from tensorkeep.conversion.naming.opentad import backbone_segments
from tensorkeep.detection.model import quantization
from tensorkeep.detection.model.backbones import VisionTransformerAdapter
from tensorkeep.detection.model.config import AdapterConfig, VitConfig
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.packed import pack

log = logging.getLogger(__name__)
_NEW = ("adapter", "pos_embed", "fc_norm")  # segments of what a pretrained file need not have


class VisionTransformerQLoRA(VisionTransformerAdapter):
    """A frozen, quantized ViT under trained adapters, in the place of OpenTAD's `VisionTransformerAdapter`.

    `type="VisionTransformerQLoRA"` in an OpenTAD config. Arguments up to `adapter_index` are OpenTAD's own.

    Args:
        total_frames: frames of a video, whole chunks of `num_frames`.
        lora_r: rank of LoRA on the adapters' frozen, quantized projections; their temporal convolution trains as well.
        lora_alpha: LoRA is scaled by lora_alpha / lora_r.
        lora_dropout: probability with which an element of LoRA's input is zeroed while training.
        quantize_bits: 4 (nf4) or 8 (int8).
        use_plain_adapter: a bottleneck in floats in place of the quantized adapter.
        quantize_backbone: put the pretrained linears (97 % of a ViT) into `quantize_bits` too, as they are loaded.

    Raises:
        TensorkeepError: a form of the ViT that is not built here.

    Example:
        >>> vit = VisionTransformerQLoRA(img_size=32, embed_dims=64, depth=1, num_heads=2, num_frames=4, total_frames=8)
        >>> [n for n in vit.state_dict() if "mlp" in n][0]
        'blocks.0.mlp.layers.0.0.weight'
        >>> sorted({n.split(".")[-1] for n, p in vit.named_parameters() if p.requires_grad})
        ['bias', 'gamma', 'lora_A', 'lora_B', 'weight']
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dims: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] | None = None,
        num_frames: int = 16,
        tubelet_size: int = 2,
        return_feat_map: bool = True,
        with_cp: bool = False,
        adapter_mlp_ratio: float = 0.25,
        total_frames: int = 768,
        adapter_index: Sequence[int] | None = None,
        lora_r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.1,
        quantize_bits: Literal[4, 8] = 4,
        use_plain_adapter: bool = False,
        quantize_backbone: bool = False,
    ) -> None:
        norm = {"type": "LN", "eps": 1e-6, **(norm_cfg or {})}
        if not qkv_bias or not return_feat_map or norm["type"] != "LN" or total_frames % num_frames:
            what = f"qkv_bias {qkv_bias}, return_feat_map {return_feat_map}, norm {norm['type']}, {total_frames} frames"
            hint = f"biases, a feature map, LN and whole chunks of {num_frames} frames are what is built here"
            raise TensorkeepError(what, where="VisionTransformerQLoRA", hint=hint)
        config = VitConfig(
            image_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dims,
            depth=depth,
            heads=num_heads,
            mlp_dim=int(embed_dims * mlp_ratio),
            chunk_frames=num_frames,
            tubelet=tubelet_size,
            drop_path=drop_path_rate,
            eps=norm["eps"],
        )
        blocks = None if adapter_index is None else tuple(adapter_index)
        kind: Literal["plain", "qlora"] = "plain" if use_plain_adapter else "qlora"
        adapter = AdapterConfig(kind, adapter_mlp_ratio, blocks, lora_r, lora_alpha, lora_dropout, quantize_bits)
        super().__init__(config, adapter, "segments" if with_cp else "none")
        self.chunks = total_frames // num_frames
        quantization.quantize_adapters(self)
        if quantize_backbone:
            quantization.quantize_backbone(self, quantize_bits)

    def forward(self, x: Tensor, videos: int | None = None) -> Tensor:
        """Turn chunks of frames into a feature map.

        Args:
            x: chunks `[videos * chunks, 3, t, H, W]`, normalised by OpenTAD.
            videos: how many videos these are; None to tell it from the number of chunks.

        Returns:
            `[videos * chunks, C, t/2, h, w]`.

        Raises:
            TensorkeepError: the batch is not whole videos, as under OpenTAD's `temporal_checkpointing`.
        """
        if len(x) % self.chunks:
            what = f"{len(x)} chunks are not whole videos of {self.chunks}"
            hint = "total_frames must be what a video has; leave temporal_checkpointing out (with_cp=True saves more)"
            raise TensorkeepError(what, where="VisionTransformerQLoRA", hint=hint)
        t, h, w = (size // step for size, step in zip(x.shape[2:], self.patch_embed.kernel))
        x = self.encode(self.patch_embed(x), VideoShape(videos or len(x) // self.chunks, t, h, w))  # [N, L, C]
        return x.transpose(1, 2).reshape(len(x), -1, t, h, w)  # [N, C, t, h, w]

    # -- state, under OpenTAD's names -----------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return torch's state dict under OpenTAD's names."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        _rename(state, prefix, forward=False)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # torch and mmengine alike call this before they hand each child its share of `state_dict`
        _rename(state_dict, prefix, forward=True)
        quantized = {p: m for p, m in self.named_modules() if isinstance(m, QuantLinear)}
        needed = [n for n, _ in self.named_parameters()] + [f"{path}.weight" for path in quantized]
        absent = [n for n in needed if prefix + n not in state_dict and not set(_NEW) & set(n.split("."))]
        if absent:
            raise TensorkeepError(
                f"the file lacks {len(absent)} of {len(needed)} weights: {', '.join(grouped(sorted(absent))[:3])}",
                where=prefix.rstrip(".") or "VisionTransformerQLoRA",
                code="K01",
                hint="a VideoMAE file becomes OpenTAD's by `tensorkeep convert FILE pre.pth --to pth --naming opentad`",
            )
        rounded = [path for path, layer in quantized.items() if _to_codes(state_dict, f"{prefix}{path}.", layer)]
        if rounded:
            log.warning("%s linears of the file are floats: rounded to codes as they were loaded", len(rounded))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _rename(state: dict[str, Any], prefix: str, forward: bool) -> None:
    """Rename what lies under `prefix`, in place and in order: to our names (`forward`), or to OpenTAD's."""
    own = [name for name in state if name.startswith(prefix)]
    spelled = {n: prefix + ".".join(backbone_segments(tuple(n[len(prefix) :].split(".")), forward)) for n in own}
    if len(set(spelled.values())) < len(own):
        raise TensorkeepError("holds tensors under two names", where=prefix.rstrip(".") or "state dict", code="K03")
    for name in own:
        state[spelled[name]] = state.pop(name)


def _to_codes(state: dict[str, Any], prefix: str, like: QuantLinear) -> bool:
    """Put a float weight of the state into codes as `like` has them; return False where there is none."""
    weight = state.get(f"{prefix}weight")
    coded = any(name.startswith(f"{prefix}weight.") or name == f"{prefix}SCB" for name in state)
    if weight is None or not weight.is_floating_point() or coded:
        return False
    layout = like.layout
    if tuple(weight.shape) != layout.shape:
        what = f"is {list(weight.shape)}, the layer {list(layout.shape)}"
        raise TensorkeepError(what, where=f"{prefix}weight", code="S01")
    packed = pack(weight, layout.kind, bool(layout.nested), layout.block or 64, f"{prefix}weight")
    state.update({prefix + name: tensor for name, tensor in QuantLinear(packed).state_dict().items()})
    return True
