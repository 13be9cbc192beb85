"""`python -m tests.parity.backbones FILE...`: what an author's backbone computed, against ours.

A file is what `backbones_guest/record.py` writes: the original's weights, inputs, outputs and gradients. One line a
case, `PASS|FAIL name figure tolerance`; exit code 1 where any fails. `--record PYTHON FOLDER WHAT=CHECKOUT...` runs the
originals first, unmodified, by the interpreter of their environment, and larger than the files of tests/data. Figures
are relative to the largest number of the original's. V-JEPA 2 is transformers' own class, in this process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tensorkeep.conversion.naming import opentad
from tensorkeep.detection.model.config import AdapterConfig, BackboneConfig, SwinConfig, VitConfig
from tensorkeep.detection.model.detector import build_backbone
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.detection.model.weights import load_backbone

SCRIPT = Path(__file__).parent / "backbones_guest" / "record.py"
Case = tuple[str, float, float]
MODES = ("none", "blocks", "attention", "segments", "two_level", "offload")


class Recorded(NamedTuple):
    """What an original computed."""

    name: str
    shape: dict[str, Any]
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {n[len(prefix) :]: t for n, t in self.tensors.items() if n.startswith(prefix)}


def recorded(path: Path) -> Recorded:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Recorded(path.stem.removesuffix("_large"), json.loads((file.metadata() or {})["shape"]), tensors)


def far(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the original's largest number; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-12))


def vit_config(shape: dict[str, Any]) -> VitConfig:
    names = ("image_size", "patch_size", "embed_dim", "depth", "heads", "mlp_dim", "tubelet")
    return VitConfig(**{name: shape[name] for name in names}, chunk_frames=shape["frames"], drop_path=0.0)


def encoder_cases(was: Recorded, kind: str) -> Iterator[Case]:
    """An encoder's tokens after the last block, by weights that went through the loader."""
    vit = build_backbone(BackboneConfig(vit_config(was.shape), kind=kind, tuning="none")).eval()
    left = load_backbone(vit, was.under("weights/"))
    yield "weights left out are of the head", float(sum(vit_name(kind, name) for name in left)), 0
    theirs = was.tensors["out/tokens"]
    extra = int(kind == "internvideo2")  # the class token
    with torch.no_grad():
        ours = vit(was.tensors["in/frames"], len(theirs)).flatten(2).transpose(1, 2)
    yield "tokens", far(ours, theirs[:, extra:]), 1e-5
    if kind == "videomae":
        weights = was.under("weights/")
        pooled = vit.fc_norm(ours.mean(1))
        logits = nn.functional.linear(pooled, weights["head.weight"], weights["head.bias"])
        yield "logits", far(logits, was.tensors["out/logits"]), 1e-5


def vit_name(kind: str, name: str) -> bool:
    """Whether a tensor that was left out looks like one of the encoder."""
    return name.startswith(("blocks.", "patch_embed.", "cls_token")) or (kind == "internvideo2" and name == "pos_embed")


def ladder_cases(was: Recorded) -> Iterator[Case]:
    """OpenTAD's side-tuning: feature map and gradients, under OpenTAD's names."""
    shape = was.shape
    adapter = AdapterConfig("ladder", shape["ratio"], tuple(shape["rungs"]))
    vit = build_backbone(BackboneConfig(vit_config(shape), adapter))
    prefix = "backbone.model.backbone."
    renamed = {str(opentad.to_hf(prefix + n)).removeprefix("backbone."): t for n, t in was.under("weights/").items()}
    vit.load_state_dict(renamed)  # strictly
    back = {str(opentad.from_hf(f"backbone.{n}")).removeprefix(prefix) for n in vit.state_dict()}
    yield "names there and back", float(len(back ^ was.under("weights/").keys())), 0
    frames, weights = was.tensors["in/frames"], was.tensors["in/weights"]
    chunk = shape["frames"]
    chunks = frames.unflatten(2, (-1, chunk)).transpose(1, 2).flatten(0, 1)
    for mode in MODES:
        vit.checkpointing = mode  # type: ignore[assignment]
        vit.train().zero_grad()
        maps = vit(chunks, len(frames))
        yield f"feature map ({mode})", far(maps, was.tensors["out/maps"]), 1e-5
        (maps * weights).sum().backward()  # type: ignore[no-untyped-call]
        theirs = was.under("grad/")
        ours = {str(opentad.from_hf(f"backbone.{n}")).removeprefix(prefix): p.grad for n, p in vit.named_parameters()}
        ours = {name: grad for name, grad in ours.items() if grad is not None}
        yield f"gradients, names ({mode})", float(len(ours.keys() ^ theirs.keys())), 0
        yield f"gradients ({mode})", max(far(ours[n], g) for n, g in theirs.items() if n in ours), 1e-4


def reversible_cases(was: Recorded) -> Iterator[Case]:
    """Re2TAL's reversible Swin: feature map and gradients, by its own backward there and by both of ours here."""
    shape = was.shape
    fields = {name: tuple(shape[name]) for name in ("patch", "depths", "heads", "window")}
    swin = SwinConfig(channels=shape["embed_dim"], drop_path=0.0, **fields)  # type: ignore[arg-type]
    for mode in ("none", "reversible"):
        config = BackboneConfig(kind="reversible_swin", swin=swin, tuning="all", checkpointing=mode)  # type: ignore[arg-type]
        net = build_backbone(config).train()
        prefix = "backbone.model.backbone."
        weights = was.under("weights/")
        yield f"left out ({mode})", float(len(load_backbone(net, {prefix + n: t for n, t in weights.items()}))), 0
        yield f"names ({mode})", float(len(net.state_dict().keys() ^ weights.keys())), 0
        maps = net(was.tensors["in/frames"], 1)
        yield f"feature map ({mode})", far(maps, was.tensors["out/maps"]), 1e-5
        (maps * was.tensors["in/weights"]).sum().backward()
        theirs, ours = was.under("grad/"), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        yield f"gradients, names ({mode})", float(len(ours.keys() ^ theirs.keys())), 0
        yield f"gradients ({mode})", max(far(ours[n], g) for n, g in theirs.items() if n in ours), 1e-4


def vjepa2_cases(large: bool = False) -> Iterator[Case]:
    """V-JEPA 2's features by transformers' class, and the gradients of the same adapters put on it."""
    import transformers

    torch.manual_seed(0)
    dim, heads, depth, size = (96, 4, 6, 64) if large else (44, 2, 2, 32)
    config = transformers.VJEPA2Config(
        crop_size=size,
        frames_per_clip=4,
        hidden_size=dim,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        mlp_ratio=2.0,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    theirs = transformers.VJEPA2Model(config).eval()
    wake(theirs)
    shape = VitConfig(size, 16, dim, depth, heads, 2 * dim, 4, 2, 0.0)
    vit = build_backbone(BackboneConfig(shape, AdapterConfig(), kind="vjepa2", checkpointing="none"))
    left = load_backbone(vit, theirs.state_dict())
    yield "left out are the predictor's", float(sum(not n.startswith("predictor.") for n in left)), 0
    frames = torch.randint(0, 256, (1, 3, 8, size, size), dtype=torch.uint8)
    chunks = frames.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)  # two chunks of one video
    pixels = (chunks.float() - torch.tensor(shape.mean).view(3, 1, 1, 1)) / torch.tensor(shape.std).view(3, 1, 1, 1)
    grid = VideoShape(1, 2, size // 16, size // 16)
    with torch.no_grad():
        wanted = theirs.get_vision_features(pixels.transpose(1, 2))
        yield "features", far(vit(chunks, 1).flatten(2).transpose(1, 2), wanted), 1e-5
    # what is left of a difference in float32 is rounding: in float64 it must all but vanish
    vit, theirs, pixels = vit.double(), theirs.double(), pixels.double()
    wake(nn.ModuleList(block.adapter for block in vit.blocks))
    handles = [
        layer.register_forward_hook(lambda _m, _i, out, adapter=block.adapter: (adapter(out[0], grid), *out[1:]))
        for layer, block in zip(theirs.encoder.layer, vit.blocks)
    ]
    out = theirs.get_vision_features(pixels.transpose(1, 2))
    weights = torch.randn(out.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    wanted_grads = {n: p.grad.clone() for n, p in vit.named_parameters() if p.grad is not None}
    for handle in handles:
        handle.remove()
    yield from _by_mode(vit, chunks, out.detach(), weights, wanted_grads)


def _by_mode(
    vit: VisionTransformer, chunks: Tensor, wanted: Tensor, weights: Tensor, grads: dict[str, Tensor]
) -> Iterator[Case]:
    for mode in MODES:
        vit.checkpointing = mode  # type: ignore[assignment]
        vit.train().zero_grad()
        ours = vit(chunks, 1).flatten(2).transpose(1, 2)
        yield f"features under adapters, float64 ({mode})", far(ours, wanted), 1e-9
        (ours * weights).sum().backward()  # type: ignore[no-untyped-call]
        own = {n: p.grad for n, p in vit.named_parameters() if p.grad is not None}
        yield f"gradients, names ({mode})", float(len(own.keys() ^ grads.keys())), 0
        figure = max(far(own[n], g) for n, g in grads.items() if n in own)
        yield f"gradients of adapters, float64 ({mode})", figure, 1e-9


def wake(module: nn.Module) -> None:
    """Move every parameter off its start, so that each one matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


KINDS: dict[str, Any] = {
    "videomaev2": lambda was: encoder_cases(was, "videomae"),
    "internvideo1": lambda was: encoder_cases(was, "videomae"),
    "internvideo2": lambda was: encoder_cases(was, "internvideo2"),
    "internvideo2_separate": lambda was: encoder_cases(was, "internvideo2"),
    "ladder": ladder_cases,
    "re2tal": reversible_cases,
}


def cases(files: Iterable[Path]) -> Iterator[Case]:
    """(name, figure, tolerance) of every case; a case passes where the figure is at most the tolerance."""
    for path in files:
        was = recorded(path)
        for name, figure, tolerance in KINDS[was.name](was):
            yield f"{path.stem}/{name}", figure, tolerance


def main(argv: list[str]) -> int:
    files = [Path(word) for word in argv]
    if argv[:1] == ["--record"]:
        python, folder, sources = argv[1], Path(argv[2]), [word.partition("=") for word in argv[3:]]
        files = [folder / f"{what}_large.safetensors" for what, _, _ in sources]
        for (what, _, checkout), file in zip(sources, files):
            command = [python, str(SCRIPT), what, checkout, str(file), "--large"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    failed = 0
    found = [*cases(files), *((f"vjepa2/{n}", figure, limit) for n, figure, limit in vjepa2_cases(large=True))]
    for name, figure, tolerance in found:
        passed = figure <= tolerance  # NaN fails
        failed += not passed
        print(f"{'PASS' if passed else 'FAIL'} {name.replace(' ', '_')} {figure:.3g} {tolerance:.3g}", flush=True)
    print(f"{len(found) - failed} of {len(found)} cases pass", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
