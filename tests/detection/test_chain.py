from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tensorkeep.detection.model._chain import group_starts
from tensorkeep.detection.model.config import AdapterConfig, LoraConfig
from tensorkeep.detection.model.detector import video_features
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.detection.model.quantization import quantize_backbone
from tensorkeep.detection.model.vit import Block, VisionTransformer
from tensorkeep.errors import TensorkeepError
from tensorkeep.training._graphs import capture_step
from tensorkeep.training.offload import HostStore
from tests.detection import tiny
from tests.gpu import DEVICES, needs_gpu

DEEP = replace(tiny.VIT, depth=5, drop_path=0.5)


def _backbone(mode: str, quantized: bool = False, device: str = "cpu", **changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    backbone = tiny.detector(checkpointing=mode, **{"vit": DEEP, **changes}).backbone
    assert backbone is not None
    if quantized:
        quantize_backbone(backbone)
    return backbone.to(device).train()


def _gradients(backbone: VisionTransformer, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    frames = tiny.batch()[0].to(backbone.pos_embed.device)
    video_features(backbone, frames, 8).square().sum().backward()
    found = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return found


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tuning", ["adapter", "all"])
@pytest.mark.parametrize("mode", ["two_level", "offload"])
def test_what_is_kept_changes_no_bit_of_the_gradients(mode: str, tuning: str, quantized: bool, device: str) -> None:
    if quantized and tuning == "all":
        pytest.skip("what trains is not quantized")
    wanted = _gradients(_backbone("segments", quantized, device, tuning=tuning))
    backbone = _backbone(mode, quantized, device, tuning=tuning)
    assert len(wanted) == (112 if tuning == "all" else 45)
    assert _equal(_gradients(backbone), wanted) and _equal(_gradients(backbone), wanted)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("mode", ["segments", "two_level", "offload"])
def test_the_backward_by_hand_is_that_of_autograd(mode: str, quantized: bool) -> None:
    wanted, found = (_gradients(_backbone(m, quantized).double()) for m in ("none", mode))
    assert wanted.keys() == found.keys()
    assert all((found[name] - grad).norm() <= 1e-12 * grad.norm() for name, grad in wanted.items())


@pytest.mark.parametrize("mode", ["two_level", "offload"])
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": AdapterConfig(blocks=(2, 3))},
        {"adapter": AdapterConfig("plain", blocks=(4,))},
        {"adapter": None, "tuning": "all"},
        {"adapter": None, "lora": LoraConfig(lora_r=2)},
    ],
    ids=["adapters in the middle", "the last alone", "no adapter", "LoRA alone"],
)
def test_where_the_adapters_are_does_not_matter(mode: str, changes: dict[str, object]) -> None:
    wanted, found, plain = (_gradients(_backbone(m, **changes).double()) for m in ("segments", mode, "none"))
    assert wanted and _equal(found, wanted) and found.keys() == plain.keys()
    assert all((found[name] - grad).norm() <= 1e-12 * grad.norm() for name, grad in plain.items())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("mode", ["segments", "two_level", "offload"])
def test_pieces_of_single_chunks_sum_to_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, mode: str, quantized: bool
) -> None:
    monkeypatch.setattr("tensorkeep.detection.model._recompute.SEGMENT_ELEMENTS", 1)
    monkeypatch.setattr("tensorkeep.detection.model._recompute.SEGMENT_COPIES", 10**9)
    wanted = _gradients(_backbone("none", quantized))
    found = _gradients(_backbone(mode, quantized))
    for name, grad in wanted.items():
        assert torch.allclose(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name


@pytest.mark.parametrize("mode", ["two_level", "offload"])
@pytest.mark.parametrize(
    "form",
    [
        {"adapter": AdapterConfig("qlora", lora_r=2, lora_dropout=0.5)},
        {"lora": LoraConfig(lora_r=2, lora_dropout=0.5)},
    ],
    ids=["in the adapters", "in LoRA"],
)
def test_dropout_is_replayed(mode: str, form: dict[str, object]) -> None:
    backbone = _backbone(mode, **form).double()
    name = next(name for name, p in backbone.named_parameters() if "blocks.1" in name and name.endswith("lora_B"))
    weight = backbone.get_parameter(name)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    frames = tiny.batch()[0]

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        return video_features(backbone, frames, 8).double().square().mean()

    loss().backward()
    around = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            around.append(loss().item())
    slope = (around[0] - around[1]) / 2e-5
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-2)


def test_two_level_keeps_the_inputs_of_few_blocks_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = replace(DEEP, depth=16, drop_path=0.0)
    most = {}
    for mode in ("two_level", "offload"):  # without a GPU `offload` keeps all
        backbone, calls = _backbone(mode, vit=vit), []
        monkeypatch.setattr("tensorkeep.detection.model._chain.KeptInputs.get", _watch(calls))
        _gradients(backbone)
        monkeypatch.undo()
        most[mode] = max(calls)
    assert most == {"two_level": 5, "offload": 15}  # 5 * 6 / 2 >= 15: block 0 has nothing below it that trains


def _watch(calls: list[int]):  # type: ignore[no-untyped-def]
    from tensorkeep.detection.model._chain import KeptInputs

    get = KeptInputs.get

    def watched(self: KeptInputs, index: int, again):  # type: ignore[no-untyped-def]
        x = get(self, index, again)
        calls.append(len(self.inputs) + 1)
        return x

    return watched


@pytest.mark.parametrize("count", range(1, 60))
def test_groups_cover_every_link_and_no_group_needs_more_than_the_last(count: int) -> None:
    starts = group_starts(count)
    assert starts[0] == 0 and starts == sorted(set(starts))
    lengths = [b - a for a, b in zip(starts, [*starts[1:], count])]
    assert sum(lengths) == count
    assert max(index + length for index, length in enumerate(lengths)) == len(starts)


def test_a_gradient_that_others_read_is_not_overwritten() -> None:
    # the last block has no adapter: what comes back may be anybody's
    backbone = _backbone("two_level", adapter=AdapterConfig(blocks=(1,)))
    out = backbone.encode(torch.randn(2, 8, 32), VideoShape(1, 2, 2, 2))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    out.register_hook(lambda grad: seen.append((grad, grad.clone())))
    out.square().sum().backward()
    assert torch.equal(*seen[0]) and seen[0][0].is_contiguous()


def test_a_second_backward_is_refused() -> None:
    for mode in ("two_level", "offload"):
        out = video_features(_backbone(mode), tiny.batch()[0], 8).sum()
        out.backward(retain_graph=True)
        with pytest.raises(TensorkeepError, match="already"):
            out.backward()


def test_evaluation_keeps_nothing() -> None:
    backbone = _backbone("two_level").eval()
    with torch.no_grad():
        wanted = _backbone("none").eval()(tiny.batch()[0][:, :, :4], 1)
        assert torch.equal(backbone(tiny.batch()[0][:, :, :4], 1), wanted)


def test_a_copy_of_a_model_has_main_memory_of_its_own() -> None:
    store = HostStore()
    store.free.append(torch.zeros(4, dtype=torch.uint8))
    assert copy.deepcopy(store).free == [] and isinstance(_backbone("offload").blocks[0], Block)


@needs_gpu
def test_main_memory_is_reused_from_step_to_step_and_after_a_forward_alone() -> None:
    backbone = _backbone("offload", device="cuda")
    _gradients(backbone)
    held = len(backbone._host.free)
    video_features(backbone, tiny.batch()[0].cuda(), 8)  # its graph is dropped
    _gradients(backbone)
    assert held == len(backbone._host.free) == 4


@needs_gpu
@pytest.mark.parametrize("mode", ["two_level", "offload"])
def test_a_recorded_step_gives_the_gradients_of_a_launched_one(mode: str) -> None:
    vit = replace(DEEP, image_size=64, drop_path=0.0)
    frames = torch.randint(0, 256, (2, 3, 32, 64, 64), dtype=torch.uint8).cuda()
    found = []
    for recorded in (False, True):
        backbone = _backbone(mode, device="cuda", vit=vit)
        parameters = [p for p in backbone.parameters() if p.requires_grad]

        def step() -> torch.Tensor:
            grads = torch.autograd.grad(video_features(backbone, frames, 8).square().mean(), parameters)  # noqa: B023
            return torch.cat([grad.flatten() for grad in grads])

        run = capture_step(step, warmup=2) if recorded else step
        found.append([run().clone() for _ in range(3)])
    for launched, replayed in zip(*found):
        assert launched.norm() > 0 and (replayed - launched).norm() < 1e-5 * launched.norm()
