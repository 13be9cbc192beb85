"""What users built before: OpenTAD's adapters over bitsandbytes' 4-bit linears, with LoRA; runs inside OpenTAD."""

import bitsandbytes as bnb
import torch
from mmengine.registry import MODELS
from opentad.models.backbones.vit_adapter import VisionTransformerAdapter
from torch import nn


class Projection(nn.Module):
    def __init__(self, dense, r=8):
        super().__init__()
        self.base = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, quant_type="nf4")
        self.base.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
        self.lora_A = nn.Parameter(torch.randn(r, dense.in_features) * 0.02)
        self.lora_B = nn.Parameter(torch.zeros(dense.out_features, r))

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


@MODELS.register_module()
class VisionTransformerBnb(VisionTransformerAdapter):
    def __init__(self, **options):
        super().__init__(**options)
        for block in self.blocks:
            block.adapter.down_proj = Projection(block.adapter.down_proj)
            block.adapter.up_proj = Projection(block.adapter.up_proj)
