from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorkeep import detection
from tensorkeep.detection.model.detector import (
    Detector,
    build_detector,
    count_parameters,
    padded_length,
    read_detector_config,
)
from tensorkeep.detection.model.groups import OptimizerConfig, detector_groups
from tensorkeep.detection.recipe.schema import ScheduleConfig
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.ema import Ema
from tensorkeep.training.recipe import read_section
from tests.detection import tiny
from tests.tools import ROOT

RECIPES = ROOT / "src" / "tensorkeep" / "recipes" / "detection"
# (ViT, adapters, whole detector) of the originals
PUBLISHED = {
    "adatad_thumos_videomae_s": (21_879_936, 1_006_860, 49_582_504),
    "adatad_thumos_videomae_b": (86_227_200, 4_004_364, 117_517_096),
    "adatad_thumos_videomae_l": (303_860_736, 14_217_240, None),
    "adatad_thumos_videomae_h": (631_607_040, 29_593_632, None),
    "adatad_thumos_videomae_v2_g": (1_011_610_752, 44_746_280, None),
    "adatad_anet_videomae_s": (21_879_936, 1_006_860, None),
    "adatad_thumos_videomae_s_qlora": (21_879_936, 1_185_420, None),
    "adatad_thumos_videomae_s_lora": (21_879_936, 1_006_860 + 1_179_648, None),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("adatad_*.yaml")))
def test_each_recipe_builds_and_groups_all_that_trains(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    with torch.device("meta"):
        model = Detector(read_detector_config(path))
    groups = detector_groups(model, read_section(path, "optimizer", OptimizerConfig))
    counts = count_parameters(model)
    assert sum(p.numel() for group in groups for p in group["params"]) == counts["total"].trainable
    assert read_section(path, "schedule", ScheduleConfig).warmup == 5
    if name in PUBLISHED:
        vit, adapter, total = PUBLISHED[name]
        assert (counts["vit"].total, counts["adapter"].total) == (vit, adapter)
        assert total is None or counts["total"].total == total
        assert counts["vit"].trainable == 0


def test_thumos_s_has_the_originals_parts_and_the_seeds_form_trains_a_third() -> None:
    with torch.device("meta"):
        plain = count_parameters(Detector(read_detector_config(RECIPES / "adatad_thumos_videomae_s.yaml")))
        seeds = count_parameters(Detector(read_detector_config(RECIPES / "adatad_thumos_videomae_s_qlora.yaml")))
    assert [plain[part].total for part in ("projection", "neck", "head")] == [23_505_920, 6_144, 3_183_644]
    assert plain["adapter"].trainable == 1_006_860 and seeds["adapter"].trainable == 300_684


def test_names_users_look_for_are_there() -> None:
    assert issubclass(detection.VisionTransformerQLoRA, detection.VisionTransformerAdapter)


def test_building_twice_gives_the_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(build_detector(tiny.detector().config))
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_loss_has_a_gradient_for_every_trainable_parameter_and_no_other() -> None:
    model = tiny.detector(checkpointing="blocks").train()
    frames, mask, segments, labels = tiny.batch()
    model.loss(model(frames, mask), segments, labels).cost.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    silent = {name for name, grad in grads.items() if not grad.any()}
    assert silent <= {"head.scale.0.scale", "head.scale.2.scale"}  # levels whose few offsets are all clipped at 0


@pytest.mark.filterwarnings("ignore")
def test_every_operation_of_a_step_has_a_deterministic_backward() -> None:
    # on CPU this refuses what torch knows to be nondeterministic on any device it runs on; the table below is CUDA's
    frames, mask, segments, labels = tiny.batch()
    model = tiny.detector(checkpointing="blocks").train()
    torch.use_deterministic_algorithms(True)
    try:
        loss = model.loss(model(frames, mask), segments, labels).cost
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    seen = _backward_names(model.loss(model(frames, mask), segments, labels).cost.grad_fn)
    refused = ("Upsample", "MaxPool", "AdaptiveAvg", "IndexPut", "IndexAdd", "ScatterAdd", "ReflectionPad", "Cumsum")
    assert seen and not [name for name in seen if name.startswith(refused)]


def _backward_names(root: object) -> set[str]:
    names: set[str] = set()
    todo, done = [root], set()
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        names.add(type(node).__name__)
        todo += [following for following, _ in node.next_functions]  # type: ignore[attr-defined]
    return names


def test_a_video_without_a_valid_step_does_not_spoil_its_batch() -> None:
    model = tiny.detector().train()
    frames, mask, segments, labels = tiny.batch()
    mask[1] = False
    loss = model.loss(model(frames, mask), segments, labels).cost
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("checkpointing", ["none", "segments"])
def test_data_parallel_gives_the_same_gradients_and_the_average_the_same_names(
    checkpointing: str, tmp_path: Path
) -> None:
    frames, mask, segments, labels = tiny.batch()
    alone, wrapped = tiny.detector(checkpointing=checkpointing), tiny.detector(checkpointing=checkpointing)
    wrapped.load_state_dict(alone.state_dict())
    alone.train().loss(alone(frames, mask), segments, labels).cost.backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(wrapped)
        wrapped.loss(parallel.train()(frames, mask), segments, labels).cost.backward()
        assert Ema(parallel).tensors.keys() == Ema(alone).tensors.keys()
    finally:
        torch.distributed.destroy_process_group()
    for (name, one), two in zip(alone.named_parameters(), wrapped.parameters()):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-6), name


def test_padding_goes_to_the_maximum_or_to_the_next_length_every_level_divides() -> None:
    config = tiny.detector().config
    assert [padded_length(n, config) for n in (1, 8, 9, 13)] == [8, 8, 12, 16]
    local = detection.DetectorConfig(tiny.projection(windows=(5,)), tiny.HEAD)
    assert padded_length(9, local) == 16  # stride 4 times 2 * (5 // 2)


def test_long_videos_run_in_training_and_evaluation_with_positions() -> None:
    config = detection.DetectorConfig(tiny.projection(positions=True, windows=(5,)), tiny.HEAD)
    model = Detector(config)
    features, mask = torch.randn(1, 32, 21), torch.ones(1, 21, dtype=torch.bool)
    for mode in (True, False):
        out = model.train(mode)(features, mask)
        assert [x.shape[-1] for x in out.logits] == [32, 16, 8]
        assert not out.masks[0][0, 21:].any()


def test_inputs_that_do_not_fit_are_refused_with_sizes() -> None:
    model = tiny.detector()
    frames, mask, _, _ = tiny.batch()
    with pytest.raises(TensorkeepError, match="mask has 6 steps, the features 8"):
        model(frames, mask[:, :6])
    with pytest.raises(TensorkeepError, match="6 frames are not a multiple of the chunk of 4"):
        model(frames[:, :, :6], mask)


def test_a_recipe_with_a_mistake_names_file_key_and_near_miss(tmp_path: Path) -> None:
    text = (RECIPES / "adatad_thumos_videomae_s.yaml").read_text()
    path = tmp_path / "mine.yaml"
    for old, new, said in (
        ("embed_dim:", "embed_dims:", "did you mean embed_dim"),
        ("kind: tia", "kind: tai", "'tai' is not one of"),
        ("depth: 12", "depth: twelve", "expected int, got 'twelve'"),
        ("in_channels: 384", "in_channels: 512", "not the ViT's 384"),
        ("strides: [1, 2, 4, 8, 16, 32]", "strides: 1", "expected a list"),
        ("model:", "modle:", "no section 'model'"),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(TensorkeepError, match=said):
            read_detector_config(path)
    path.write_text("model: [")
    with pytest.raises(TensorkeepError, match="cannot be read"):
        read_detector_config(path)
