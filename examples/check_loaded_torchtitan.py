"""check_loaded in a torchtitan-style script: `python examples/check_loaded_torchtitan.py`.

torchtitan fuses q, k and v and hands out copies in its state_dict: `dcp.load` into those copies, without a
`load_state_dict` after it, leaves the fused weight at its random start. The model here has torchtitan 0.3's names,
fusion and RoPE table in a few lines, so that the script runs without torchtitan; with it, only `Model()` changes.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from tensorkeep.diagnosis.live.loaded import check_loaded

HEADS, GROUPS, SIZE, WIDTH = 4, 2, 8, 32
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "rope_theta": 10000.0,
}


class Fused(nn.Module):
    """q, k and v in one matrix: for each group its q heads, its k head, its v head."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * SIZE, bias=False)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._merge)

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        weight = state.pop(f"{prefix}wqkv.weight").reshape(GROUPS, HEADS // GROUPS + 2, SIZE, WIDTH)
        for name, piece in zip(("wq", "wk", "wv"), (weight[:, :-2], weight[:, -2], weight[:, -1])):
            state[f"{prefix}{name}.weight"] = piece.reshape(-1, WIDTH).contiguous()

    @staticmethod
    def _merge(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        pieces = [state.pop(f"{prefix}{n}.weight").reshape(GROUPS, -1, SIZE, WIDTH) for n in ("wq", "wk", "wv")]
        state[f"{prefix}wqkv.weight"] = torch.cat(pieces, dim=1).reshape(-1, WIDTH)


class Model(nn.Module):
    """Names as in torchtitan 0.3; no forward is needed to check a load."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(96, WIDTH)
        layer = nn.ModuleDict(
            {"attention": nn.ModuleDict({"qkv_linear": Fused(), "wo": nn.Linear(WIDTH, WIDTH, bias=False)})}
        )
        layer["attention_norm"], layer["ffn_norm"] = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        shapes = {"w1": (WIDTH, 48), "w2": (48, WIDTH), "w3": (WIDTH, 48)}
        layer["feed_forward"] = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in shapes.items()})
        self.layers = nn.ModuleDict({"0": layer})
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 96, bias=False)
        self.register_buffer("freqs_cis", self._precompute_freqs_cis(), persistent=False)

    def _precompute_freqs_cis(self) -> torch.Tensor:
        inverse = 1.0 / (CONFIG["rope_theta"] ** (torch.arange(0, SIZE, 2).float() / SIZE))
        angles = torch.outer(torch.arange(128), inverse).float()
        return torch.polar(torch.ones_like(angles), angles)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(Model().state_dict(), checkpoint_id=folder, no_dist=True)
        model = Model()
        state = model.state_dict()
        dcp.load(state, checkpoint_id=folder, no_dist=True)  # fills what state_dict() handed out: copies of q, k, v

        for finding in check_loaded(model, folder, config=CONFIG):
            print(finding.severity, finding.code, finding.message)
        model.load_state_dict(state)  # the line that was forgotten
        findings = check_loaded(model, folder, config=CONFIG)
        print("after load_state_dict:", findings or "every tensor and every buffer is right")
        assert not findings


if __name__ == "__main__":
    main()
