"""MiniMind's two later models written from their description: the same parameter names, registered in the same order.

For what transformers has no class of (mm2 with shared experts, the auxiliary loss as MiniMind trains it), and to replay
MiniMind's own resume, which goes by the order of `named_parameters()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)).type_as(x)


class Attention(nn.Module):
    """Grouped queries, half-split RoPE, causal; q and k normed per head in mm3."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, heads, self.groups, self.dim = c["hidden_size"], c["heads"], c["kv_heads"], c["head_dim"]
        self.q_proj = nn.Linear(hidden, heads * self.dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.groups * self.dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.groups * self.dim, bias=False)
        self.o_proj = nn.Linear(heads * self.dim, hidden, bias=False)
        if c["qk_norm"]:
            self.q_norm, self.k_norm = Norm(self.dim, c["eps"]), Norm(self.dim, c["eps"])
        self.theta = c["theta"]

    def forward(self, x: Tensor) -> Tensor:
        """`[b, t, hidden]` to the same."""
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        angles = torch.outer(torch.arange(t), self.theta ** (-torch.arange(0, self.dim, 2)[: self.dim // 2] / self.dim))
        cos, sin = (f(angles).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))  # [t, 1, dim]
        q, k = (y * cos + torch.cat([-y[..., self.dim // 2 :], y[..., : self.dim // 2]], -1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(q.shape[2] // self.groups, dim=2) for y in (k, v))
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """mm2 keeps the router's weight in a module of its own."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Experts(nn.Module):
    """Routed experts; shared ones beside them in mm2. `aux` is the balancing loss of the last forward."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.top, self.new, self.coef = c["top"], c["qk_norm"], c["aux"]
        experts = nn.ModuleList(Mlp(c["hidden_size"], c["moe_width"]) for _ in range(c["experts"]))
        if self.new:
            self.gate: nn.Module = nn.Linear(c["hidden_size"], c["experts"], bias=False)
            self.experts = experts
        else:
            self.experts, self.gate = experts, Gate(c["hidden_size"], c["experts"])
            self.shared_experts = nn.ModuleList(Mlp(c["hidden_size"], c["moe_width"]) for _ in range(c["shared"]))
        self.norm, self.aux = c["norm_topk"], torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """`[b, t, hidden]` to the same."""
        scores = self.gate(x).softmax(-1)  # [b, t, experts]
        weight, index = scores.topk(self.top, dim=-1, sorted=False)
        if self.norm and (self.top > 1 or self.new):
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        chosen = F.one_hot(index, len(self.experts)).float()  # [b, t, top, experts]
        count = len(self.experts)
        if self.new:
            load = chosen.flatten(0, 1).mean(0)  # [top, experts]
            self.aux = (load * scores.flatten(0, 1).mean(0)).sum() * count * self.coef
        else:
            share = chosen.sum((1, 2)) / (x.shape[1] * self.top / count)  # [b, experts]
            self.aux = (share * scores.mean(1)).sum(1).mean() * self.coef
        routed = (chosen * weight[..., None]).sum(2)  # [b, t, experts]
        out = torch.stack([e(x) for e in self.experts], -1) @ routed[..., None]
        made = out[..., 0]
        for shared in getattr(self, "shared_experts", ()):
            made = made + shared(x)
        return made


class Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.input_layernorm = Norm(c["hidden_size"], c["eps"])
        self.post_attention_layernorm = Norm(c["hidden_size"], c["eps"])
        self.mlp = Experts(c) if c["experts"] else Mlp(c["hidden_size"], c["width"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Inner(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["layers"]))
        self.norm = Norm(c["hidden_size"], c["eps"])


class MiniMind(nn.Module):
    """The causal language model, head tied to the embedding. `c`: see `config_of`."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = Inner(c)
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab"], bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """`[b, t]` token ids to logits `[b, t, vocab]`."""
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))

    def aux(self) -> Tensor:
        """The balancing losses of the last forward together; 0 without experts."""
        return sum((m.aux for m in self.modules() if isinstance(m, Experts)), torch.zeros(()))


def config_of(known: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What `MiniMind` is built from: MiniMind's own config, widths from the weights' shapes."""
    first = "model.layers.0."
    heads = known["num_attention_heads"]
    new = f"{first}self_attn.q_norm.weight" in shapes
    dim = shapes[f"{first}self_attn.q_proj.weight"][0] // heads
    experts = {n.split(".")[5] for n in shapes if n.startswith(f"{first}mlp.experts.")}
    vocab, hidden = shapes["model.embed_tokens.weight"]
    layers = {n.split(".")[2] for n in shapes if n.startswith("model.layers.")}
    return {
        "vocab": vocab,
        "hidden_size": hidden,
        "layers": len(layers),
        "heads": heads,
        "head_dim": dim,
        "qk_norm": new,
        "kv_heads": shapes[f"{first}self_attn.k_proj.weight"][0] // dim,
        "theta": known.get("rope_theta", 1e6),
        "eps": known.get("rms_norm_eps", 1e-6 if new else 1e-5),
        "experts": len(experts),
        "width": shapes.get(f"{first}mlp.gate_proj.weight", (0,))[0],
        "moe_width": shapes.get(f"{first}mlp.experts.0.gate_proj.weight", (0,))[0],
        "shared": len({n.split(".")[5] for n in shapes if n.startswith(f"{first}mlp.shared_experts.")}),
        "top": known.get("num_experts_per_tok", 1 if new else 2),
        "norm_topk": known.get("norm_topk_prob", True),
        "aux": known.get("router_aux_loss_coef", 5e-4) if new else known.get("aux_loss_alpha", 0.1),
    }


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Average the next-token loss of a micro-batch, logits `[b, t, vocab]`, labels `[b, t]`; -100 is left out."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
