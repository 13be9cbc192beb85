"""Run an author's backbone, as its files are, and write what it computes: weights, inputs, outputs, gradients.

`PYTHON record.py WHAT CHECKOUT FILE.safetensors [--large]`, by the interpreter of an environment of its own
(benchmarks/envs/backbones.txt), without the project. WHAT is one of `SOURCES`; `--large` takes a wider and deeper one.
Torchvision, which the authors' code imports and does not call here, is an empty package.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

EMPTY = ("torchvision", "decord", "flash_attn")


class _Named(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})  # a class, so that it can be a base


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in EMPTY else None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def load(path, package=None):
    """Import one file of a checkout, as a module of `package` where it imports its neighbours."""
    name = Path(path).stem if package is None else f"{package}.{Path(path).stem}"
    if package is not None and package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(Path(path).parent)]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def wake(model, scale=0.05):
    """Move every parameter off its start, so that each one matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def normalised(frames):
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1, 1)
    return (frames.float() - mean) / std


def frames_of(count, time, size, seed=0):
    return torch.randint(
        0, 256, (count, 3, time, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def videomaev2(checkout, large, internvideo=False):
    """VideoMAEv2's (or InternVideo's) `VisionTransformer`: tokens after the last block and the pooled clip."""
    folder = "InternVideo1/Pretrain/VideoMAE/modeling_finetune.py" if internvideo else "models/modeling_finetune.py"
    module = load(Path(checkout) / folder)
    patch, dim, heads, mlp = (14, 88 if large else 44, 2, 48 / 11) if not internvideo else (16, 32, 2, 4)
    size, depth = (4 * patch, 6) if large else (2 * patch, 2)
    size = 224 if internvideo else size  # InternVideo's table of positions is always that of 224 pixels and 16 frames
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
    model = module.VisionTransformer(
        **sizes,
        mlp_ratio=mlp,
        qkv_bias=True,
        norm_layer=lambda d: torch.nn.LayerNorm(d, eps=1e-6),
        init_values=0.0,
        all_frames=16,
        num_classes=3,
        init_scale=1.0,
    ).eval()
    wake(model)
    frames = frames_of(2 if not internvideo else 1, 16, size)
    got = {}
    model.blocks[-1].register_forward_hook(lambda _m, _i, out: got.update(tokens=out))
    with torch.no_grad():
        logits = model(normalised(frames))
    shape = {"image_size": size, "patch_size": patch, "embed_dim": dim, "depth": depth, "heads": heads}
    shape.update(mlp_dim=int(dim * mlp), frames=16, tubelet=2)
    return shape, model.state_dict(), {"frames": frames}, {"tokens": got["tokens"], "logits": logits}, {}


def internvideo1(checkout, large):
    return videomaev2(checkout, large, internvideo=True)


def internvideo2(checkout, large, separate=False):
    """InternVideo2's encoder without flash-attention: tokens after the last block, with the class token."""
    module = load(Path(checkout) / "InternVideo2/single_modality/models/internvideo2.py", "internvideo2_models")
    dim, depth, heads, size, frames = (96, 6, 4, 56, 8) if large else (32, 2, 2, 28, 4)
    model = module.InternVideo2(
        img_size=size,
        patch_size=14,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4,
        attn_pool_num_heads=2,
        clip_embed_dim=16,
        num_frames=frames,
        tubelet_size=1,
        num_classes=3,
        use_flash_attn=False,
        use_fused_rmsnorm=False,
        use_fused_mlp=False,
        sep_pos_embed=separate,
    ).eval()
    wake(model, 0.2)
    clip = frames_of(2, frames, size)
    got = {}
    model.blocks[-1].register_forward_hook(lambda _m, _i, out: got.update(tokens=out))
    with torch.no_grad():
        logits = model(normalised(clip))
    shape = {"image_size": size, "patch_size": 14, "embed_dim": dim, "depth": depth, "heads": heads, "mlp_dim": 4 * dim}
    shape.update(frames=frames, tubelet=1)
    return shape, model.state_dict(), {"frames": clip}, {"tokens": got["tokens"], "logits": logits}, {}


def internvideo2_separate(checkout, large):
    return internvideo2(checkout, large, separate=True)


def ladder(checkout, large):
    """OpenTAD's `VisionTransformerLadder`: the feature map, and the gradients of a weighted sum of it."""
    module = load(Path(checkout) / "opentad/models/backbones/vit_ladder.py")
    dim, depth, heads, size, rungs = (96, 8, 4, 64, [4, 5, 6, 7]) if large else (32, 3, 2, 24, [1, 2])
    patch = 16 if large else 8
    model = module.VisionTransformerLadder(
        img_size=2 * patch,
        patch_size=patch,
        embed_dims=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2,
        num_frames=4,
        tubelet_size=2,
        with_cp=True,
        total_frames=8,
        adapter_index=rungs,
        drop_path_rate=0.1,
        return_feat_map=True,
    )
    wake(model)
    frames = frames_of(2, 8, size)
    chunks = frames.view(2, 3, 2, 4, size, size).transpose(1, 2).flatten(0, 1)
    model.train()
    maps = model(normalised(chunks))
    weights = torch.randn(maps.shape, generator=torch.Generator().manual_seed(2))
    (maps * weights).sum().backward()
    shape = {"image_size": 2 * patch, "patch_size": patch, "embed_dim": dim, "depth": depth, "heads": heads}
    shape.update(mlp_dim=2 * dim, frames=4, tubelet=2, rungs=rungs, ratio=0.25)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return shape, model.state_dict(), {"frames": frames, "weights": weights}, {"maps": maps.detach()}, grads


def re2tal(checkout, large):
    """OpenTAD's reversible Swin: the feature map, and the gradients by its own backward."""
    module = load(Path(checkout) / "opentad/models/backbones/re2tal_swin.py")
    dim, depths, heads = (24, [2, 2, 4], [2, 4, 4]) if large else (12, [2, 2], [2, 4])
    model = module.SwinTransformer3D_inv(
        patch_size=(2, 4, 4),
        embed_dim=dim,
        depths=depths,
        num_heads=heads,
        window_size=(4, 3, 3),
        drop_path_rate=0.0,
        patch_norm=True,
        norm_eval=False,
    )
    wake(model)
    frames = frames_of(1, 12, 52 if large else 30)
    model.train()
    maps = model(normalised(frames))
    weights = torch.randn(maps.shape, generator=torch.Generator().manual_seed(2))
    (maps * weights).sum().backward()
    shape = {"embed_dim": dim, "depths": depths, "heads": heads, "window": [4, 3, 3], "patch": [2, 4, 4]}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return shape, model.state_dict(), {"frames": frames, "weights": weights}, {"maps": maps.detach()}, grads


SOURCES = {
    "videomaev2": videomaev2,
    "internvideo1": internvideo1,
    "internvideo2": internvideo2,
    "internvideo2_separate": internvideo2_separate,
    "ladder": ladder,
    "re2tal": re2tal,
}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=SOURCES)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--large", action="store_true")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape, state, inputs, outputs, grads = SOURCES[given.what](given.checkout, given.large)
    groups = {"weights": state, "in": inputs, "out": outputs, "grad": grads}
    tensors = {f"{group}/{n}": t.detach().contiguous() for group, held in groups.items() for n, t in held.items()}
    save_file(tensors, given.file, {"shape": json.dumps(shape)})


if __name__ == "__main__":
    main(sys.argv[1:])
