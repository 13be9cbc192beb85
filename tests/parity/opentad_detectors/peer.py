"""Runs in OpenTAD's environment: `peer.py OPENTAD MAMBA CASES OUT`, or `peer.py OPENTAD MAMBA CASES OUT --load`.

For each case of the JSON list CASES (its `model` dict, sizes and seed) OpenTAD's detector, built by its own code, with
random weights, predicts, computes losses and gradients, and makes detections; all of it goes to OUT/NAME.safetensors.
With `--load` it instead loads OUT/NAME.pth strictly, as tools/test.py does, and writes its logits to OUT/NAME.loaded.
With `--shapes` CASES lists configs of the checkout, and OUT/shapes.json gets names and shapes of their whole models.

What needs a GPU, or is not called, is replaced before OpenTAD is imported: backbones' packages are empty; CausalTAD's
two CUDA kernels are Mamba's own reference of its scan (MAMBA is a checkout of state-spaces/mamba) and plain attention.
"""

import ast
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import save_file

EMPTY = ("torchvision", "Align1D", "boundary_max_pooling_cuda", "mmaction", "mmcv", "pytorchvideo", "wandb")


class Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"register_module": classmethod(lambda cls, *a, **k: lambda x: x)})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in EMPTY else None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


def kernels(mamba):
    """Put the packages of CausalTAD's kernels into `sys.modules`."""
    source = (Path(mamba) / "mamba_ssm/ops/selective_scan_interface.py").read_text()
    (wanted,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == "selective_scan_ref")
    names = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(compile(ast.Module([wanted], []), "selective_scan_ref", "exec"), names)

    def inner(xz, conv, conv_bias, x_proj, dt_proj, A, B, C, D, delta_bias, delta_softplus):
        x, z = xz.chunk(2, dim=1)
        width = conv.shape[-1]
        x = F.silu(F.conv1d(x, conv, conv_bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[-1]])
        parts = F.linear(rearrange(x, "b d l -> (b l) d"), x_proj)
        rank, states, length = dt_proj.shape[1], A.shape[-1], x.shape[-1]
        delta = rearrange(dt_proj @ parts[:, :rank].t(), "d (b l) -> b d l", l=length)
        B = rearrange(parts[:, rank : rank + states], "(b l) n -> b n l", l=length)
        C = rearrange(parts[:, -states:], "(b l) n -> b n l", l=length)
        return names["selective_scan_ref"](x, delta, A, B, C, D, z, delta_bias, delta_softplus)

    def attention(qkv, deterministic, causal):
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        length = q.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def new(name):
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        return module

    for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.modules"):
        new(package)
    for name, members in {
        "mamba_ssm.ops.selective_scan_interface": {"mamba_inner_fn_no_out_proj": inner},
        "mamba_ssm.modules.mamba_simple": {"Mamba": None},
        "mamba_ssm.modules.mamba_new": {"Mamba": None},
        "flash_attn": {"flash_attn_qkvpacked_func": attention},
    }.items():
        vars(new(name)).update(members)


def built(case):
    """OpenTAD's detector of a case: every weight random, nothing dropped, no noise."""
    from mmengine.config import ConfigDict
    from opentad.models import build_detector

    torch.manual_seed(case["seed"])
    detector = build_detector(ConfigDict(json.loads(json.dumps(case["model"]))))
    with torch.no_grad():
        for name, p in detector.named_parameters():
            scale = 0.3 if name.endswith("scale") or p.ndim < 2 else 0.5 * p.std() + 0.1
            p.add_(torch.randn_like(p) * scale)
    for module in detector.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        if isinstance(module, (torch.nn.Dropout, torch.nn.Dropout1d)):
            module.p = 0.0
        if hasattr(module, "input_noise"):
            module.input_noise = 0.0
    return detector


def inputs(case):
    """Features, mask and segments of a case's two samples; what is past the end is no feature."""
    generator = torch.Generator().manual_seed(case["seed"])
    length, valid = case["length"], case["valid"]
    mask = torch.zeros(2, length, dtype=torch.bool)
    segments, labels = [], []
    for b in range(2):
        mask[b, : valid[b]] = True
        start = torch.rand(case["segments"], generator=generator) * valid[b] * 0.9
        size = 1 + torch.rand(case["segments"], generator=generator) ** 2 * valid[b] * 0.6
        segments.append(torch.stack([start, (start + size).clamp(max=valid[b])], 1))
        labels.append(torch.randint(case["model"]["rpn_head"]["num_classes"], (case["segments"],), generator=generator))
    # one of each is repeated with another class, and one nearly
    for b in range(2):
        segments[b][1], segments[b][2] = segments[b][0], segments[b][0] + 4e-4
    channels = case["model"]["projection"]["in_channels"]
    channels = sum(channels) if isinstance(channels, list) else channels
    features = torch.randn(2, channels, length, generator=generator) * mask[:, None]
    return features, mask, segments, [y.int() for y in labels]


def predicted(detector, features, mask, out, prefix="eval/"):
    """What the head makes of the features, level by level, in evaluation mode."""
    detector.eval()
    logits, got = [], {}
    handles = [detector.rpn_head.cls_head.register_forward_hook(lambda m, i, o: logits.append(o))]
    if hasattr(detector, "neck"):
        handles.append(detector.neck.register_forward_hook(lambda m, i, o: got.update(levels=o)))
    with torch.no_grad():
        found = detector.forward_test(features.clone(), mask.clone(), infer_cfg=None)
    for handle in handles:
        handle.remove()
    for level, x in enumerate(logits):
        out[f"{prefix}logits.{level}"] = x
        out[f"{prefix}neck.{level}"] = got["levels"][0][level]
        out[f"{prefix}mask.{level}"] = got["levels"][1][level]
    return found


def detections(detector, found, case):
    """OpenTAD's detections of both samples after suppression, as its post-processing writes them."""
    from mmengine.config import ConfigDict

    count = case["model"]["rpn_head"]["num_classes"]
    names = [str(k) for k in range(count)]
    if count == 1:  # which OpenTAD leaves to a classifier of videos

        def names(video, segments, scores):
            return segments, ["0"] * len(scores), scores

    nms = dict(use_soft_nms=True, sigma=0.5, max_seg_num=300, min_score=0.001, multiclass=True)
    post = ConfigDict(sliding_window=False, nms=nms, pre_nms_thresh=0.001, pre_nms_topk=2000)
    metas = [{"video_name": str(b), "fps": -1, "resize_length": case["length"], "duration": 100.0} for b in range(2)]
    return detector.post_processing(found, metas, post, names)


def run(case, folder):
    detector, (features, mask, segments, labels) = built(case), inputs(case)
    out = {f"weights/{name}": t for name, t in detector.state_dict().items()}
    out |= {"in/features": features, "in/mask": mask}
    for b in range(2):
        out[f"in/segments.{b}"], out[f"in/labels.{b}"] = segments[b], labels[b]
    found = predicted(detector, features, mask, out)
    if len(found) == 3:  # points, offsets of each class, scores
        out |= {"eval/points": found[0], "eval/offsets": found[1], "eval/scores": found[2]}
    else:
        for b in range(2):
            out[f"eval/proposals.{b}"], out[f"eval/scores.{b}"] = found[0][b], found[1][b]
    meta = {"case": case, "losses": {}, "detections": detections(detector, found, case)}
    for name in ("eval", "train1", "train2"):
        detector.train(name != "eval").zero_grad()
        given = (features.clone(), mask.clone(), [{}, {}], [s.clone() for s in segments], list(labels))
        losses = detector.forward_train(*given)
        meta["losses"][name] = {key: float(value.detach()) for key, value in losses.items()}
        meta["losses"][name]["normalizer"] = float(detector.rpn_head.loss_normalizer)
        if name == "train1":
            losses["cost"].backward()
            out |= {f"grad/{n}": p.grad for n, p in detector.named_parameters() if p.grad is not None}
    names = {id(p): n for n, p in detector.named_parameters()}
    groups = detector.get_optim_groups({"weight_decay": 0.05, "lr": 1e-4})
    meta["groups"] = [
        {"names": [names[id(p)] for p in g["params"]], "weight_decay": g["weight_decay"], "lr": g.get("lr", 1e-4)}
        for g in groups
    ]
    tensors = {name: t.detach().contiguous().clone() for name, t in out.items()}
    save_file(tensors, folder / f"{case['name']}.safetensors", {"meta": json.dumps(meta)})


def load(case, folder):
    detector, (features, mask, _, _) = built({**case, "seed": case["seed"] + 1}), inputs(case)
    file = torch.load(folder / f"{case['name']}.pth", map_location="cpu")
    for key in ("state_dict", "state_dict_ema"):
        detector.load_state_dict({n.removeprefix("module."): t for n, t in file[key].items()})  # strictly
    out = {}
    predicted(detector, features, mask, out)
    save_file({n: t.contiguous().clone() for n, t in out.items()}, folder / f"{case['name']}.loaded.safetensors")


def shapes(opentad, configs):
    from mmengine.config import Config
    from opentad.models import build_detector

    found = {}
    for name in configs:
        with torch.device("meta"):
            detector = build_detector(Config.fromfile(str(Path(opentad) / "configs" / name)).model)
        found[name] = {key: list(t.shape) for key, t in detector.state_dict().items()}
    return found


def main(opentad, mamba, cases, out, *options):
    sys.meta_path.insert(0, Finder())
    kernels(mamba)
    sys.path.insert(0, opentad)
    if "--shapes" in options:
        made = shapes(opentad, json.loads(Path(cases).read_text()))
        Path(out, "shapes.json").write_text(json.dumps(made))
        return
    for case in json.loads(Path(cases).read_text()):
        (load if "--load" in options else run)(case, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
