"""The two backbones that users look for by name: a VideoMAE ViT with adapters, and the same with QLoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tensorkeep.detection.model.adapters import add_adapters, add_lora, set_trainable
from tensorkeep.detection.model.config import AdapterConfig, Checkpointing, LoraConfig, Tuning, VitConfig
from tensorkeep.detection.model.vit import VisionTransformer


class VisionTransformerAdapter(VisionTransformer):
    """VideoMAE ViT with temporal-informative adapters, everything else frozen: AdaTAD's backbone.

    Args:
        config: shape of the ViT.
        adapter: which adapters; None: AdaTAD's in every block.
        checkpointing: which activations are kept for the backward (see `VisionTransformer`).
        lora: low-rank updates on the pretrained linears; None: none.
        tuning: what trains: "adapter" (adapters and LoRA), "all" or "none".

    Raises:
        TensorkeepError: A block or a linear is named that does not exist.

    Example:
        >>> config = VitConfig(image_size=32, embed_dim=48, depth=1, heads=3, mlp_dim=96, chunk_frames=4)
        >>> type(VisionTransformerAdapter(config).blocks[0].adapter).__name__
        'Adapter'
    """

    def __init__(
        self,
        config: VitConfig,
        adapter: AdapterConfig | None = None,
        checkpointing: Checkpointing = "none",
        lora: LoraConfig | None = None,
        tuning: Tuning = "adapter",
    ) -> None:
        super().__init__(config, checkpointing)
        add_adapters(self, adapter or AdapterConfig())
        if lora is not None:
            add_lora(self, lora)
        set_trainable(self, tuning)


class VisionTransformerQLoRA(VisionTransformerAdapter):
    """VideoMAE ViT with QLoRA adapters, everything else frozen: the QLoRA form of AdaTAD.

    Args:
        config: shape of the ViT.
        lora_r: rank of the updates inside the adapters.
        lora_alpha: their scale times the rank.
        lora_dropout: rate before them.
        quantize_bits: of the adapters' frozen projections, 4 or 8.
        use_plain_adapter: whether `PlainAdapter` is taken instead: no temporal convolution, nothing quantized.
        blocks: indices of the blocks that get an adapter; None: all.
        checkpointing: which activations are kept for the backward (see `VisionTransformer`).

    Raises:
        TensorkeepError: A block is named that does not exist, or `quantize_bits` is neither 4 nor 8.

    Example:
        >>> config = VitConfig(image_size=32, embed_dim=48, depth=1, heads=3, mlp_dim=96, chunk_frames=4)
        >>> type(VisionTransformerQLoRA(config, lora_r=4).blocks[0].adapter).__name__
        'QLoRAAdapter'
    """

    def __init__(
        self,
        config: VitConfig,
        lora_r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.1,
        quantize_bits: Literal[4, 8] = 4,
        use_plain_adapter: bool = False,
        blocks: Sequence[int] | None = None,
        checkpointing: Checkpointing = "none",
    ) -> None:
        chosen = None if blocks is None else tuple(blocks)
        kind: Literal["plain", "qlora"] = "plain" if use_plain_adapter else "qlora"
        adapter = AdapterConfig(kind, 0.25, chosen, lora_r, lora_alpha, lora_dropout, quantize_bits)
        super().__init__(config, adapter, checkpointing)
