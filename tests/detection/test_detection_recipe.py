"""A detection recipe reads strictly, writes back to itself, refuses contradictions, and takes short names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.detection.data.augment import AugmentConfig
from tensorkeep.detection.model.config import (
    AdapterConfig,
    BackboneConfig,
    DetectorConfig,
    HeadConfig,
    LoraConfig,
    ProjectionConfig,
    VitConfig,
)
from tensorkeep.detection.model.groups import OptimizerConfig
from tensorkeep.detection.recipe.schema import (
    REFUSED,
    ClassifierConfig,
    DataConfig,
    DetectionRecipe,
    EvaluationConfig,
    PostProcessingConfig,
    ScheduleConfig,
    SplitConfig,
    TrainingConfig,
)
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.detection.results.nms import METHODS, Suppression
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.recipe import changed, plain, to_yaml
from tensorkeep.training.schema import from_mapping
from tensorkeep.training.shipped import shipped, shipped_recipe
from tests.recipe_values import counts, optimizers, optional, rates, schedules, several, shares, texts, trainings

NAMES = [recipe.name for recipe in shipped() if recipe.kind == "detection"]
BASE = "adatad_thumos_videomae_s"

# -- strategies: recipes that contradict nothing, with every field drawn ----------------------------------------------

reals = st.floats(allow_nan=False, allow_infinity=False)
below_one = st.floats(0, 1, exclude_max=True)
ranges = st.tuples(st.floats(1e-300, 1), st.floats(1, 1e300))
splits = st.builds(SplitConfig, texts, texts, texts, optional(texts))
augments = st.builds(
    AugmentConfig,
    counts,
    counts,
    st.just("resized"),
    st.tuples(st.floats(1e-9, 0.5), st.floats(0.5, 1)),
    ranges,
    shares,
    st.integers(0, 9),
    st.floats(0, 10),
    st.tuples(rates, rates, rates, rates),
)
adapters = st.builds(
    AdapterConfig,
    st.sampled_from(["tia", "plain", "qlora"]),
    shares,
    optional(several(st.integers(0, 40))),
    counts,
    rates,
    shares,
    st.sampled_from([4, 8]),
)
loras = st.builds(LoraConfig, counts, rates, shares, several(texts))
nms = st.builds(
    Suppression,
    st.sampled_from(METHODS),
    st.floats(1e-9, 9),
    shares,
    reals,
    reals,
    shares,
    counts,
    st.booleans(),
    optional(st.floats(1e-9, 1)),
)
evaluations = st.builds(
    EvaluationConfig,
    st.sampled_from(["activitynet", "thumos14"]),
    several(st.floats(1e-9, 1)),
    optional(texts),
    optional(texts),
    optional(texts),
    several(counts),
)


@st.composite
def recipes(draw: st.DrawFn) -> DetectionRecipe:
    video, agnostic = draw(st.booleans()), draw(st.booleans())
    scale, size = draw(st.integers(1, 8)), draw(st.integers(1, 1000))
    dim = draw(st.integers(1, 50)) * 4
    levels, augment = draw(st.integers(0, 4)), draw(optional(augments))
    data = DataConfig(
        train=draw(splits),
        test=draw(splits),
        class_map=draw(optional(texts)),
        inputs="video" if video else "features",
        file_pattern=draw(texts) + "{video}" + draw(texts),
        mode=draw(st.sampled_from(["sliding", "resized"])),
        window_size=size,
        feature_stride=draw(st.integers(1, 9)) * scale,
        sample_stride=draw(st.integers(1, 9)),
        scale_factor=scale,
        offset_frames=draw(st.integers()),
        fps=draw(optional(rates)),
        window_overlap_ratio=draw(below_one),
        floor_frames=draw(st.booleans()),
        trunc_thresh=draw(optional(shares)),
        crop_ratio=draw(optional(ranges)),
        min_length=draw(optional(rates)),
        class_agnostic=agnostic,
        crop_size=augment.size if augment else draw(counts),
        augment=augment,
        broken=draw(st.sampled_from(["error", "skip", "keep"])),
        cache=draw(st.sampled_from([None, "kept/frames"])) if video else None,
        cache_gib=draw(rates.filter(bool)),
        feature_layout=draw(st.sampled_from(["tc", "ct"])),
        feature_channels=draw(optional(st.tuples(st.integers(), st.integers()))),
    )
    backbone = BackboneConfig(
        vit=VitConfig(
            embed_dim=dim,
            heads=draw(st.sampled_from([1, 2, 4])),
            chunk_frames=scale,
            tubelet=1,
            drop_path=draw(shares),
            mean=draw(st.tuples(reals, reals, reals)),
        ),
        adapter=draw(optional(adapters)),
        lora=draw(optional(loras)),
        tuning=draw(st.sampled_from(["adapter", "none"])),
        checkpointing=draw(st.sampled_from(["segments", "none"])),
        output_length=size,
    )
    head = HeadConfig(
        classes=1 if agnostic else draw(counts),
        strides=tuple(range(1, levels + 2)),
        ranges=tuple(draw(st.tuples(reals, reals)) for _ in range(levels + 1)),
        centre_radius=draw(optional(rates)),
    )
    training = draw(trainings(TrainingConfig, tuple(REFUSED)))
    return DetectionRecipe(
        model=DetectorConfig(
            ProjectionConfig(in_channels=dim, branch_layers=levels), head, backbone if video else None
        ),
        data=data,
        optimizer=OptimizerConfig(**vars(draw(optimizers))),
        schedule=ScheduleConfig(**vars(draw(schedules))),
        training=training if video else dataclasses.replace(training, quantize_backbone=None, pretrained=None),
        post_processing=PostProcessingConfig(
            draw(shares),
            draw(counts),
            draw(nms),
            ClassifierConfig(draw(texts)) if agnostic else None,
            draw(st.booleans()),
        ),
        evaluation=draw(evaluations),
    )


@settings(deadline=None, max_examples=50)
@given(recipes())
def test_reading_what_was_written_gives_the_same_recipe(tmp_path_factory: pytest.TempPathFactory, recipe: Any) -> None:
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    again = read_recipe(path)
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)


# -- the recipes that come with it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_whole_and_reads_back(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    sections = {f.name for f in dataclasses.fields(DetectionRecipe)} - {"checkpoint"}  # hosts' own folders are rare
    assert set(yaml.safe_load(shipped_recipe(name).text)) == sections
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert read_recipe(tmp_path / "again.yaml") == recipe
    assert recipe.model.backbone is not None
    assert recipe.training.pretrained or name == "own_small"  # that one begins with nothing, for a first look


def test_the_seeds_form_and_a_quantized_backbone_differ_from_adatad_where_they_say() -> None:
    plain_recipe = read_recipe(BASE)
    seeds = read_recipe("adatad_thumos_videomae_s_qlora")
    nf4 = read_recipe("videomae_s_thumos_qlora")
    assert dataclasses.replace(seeds, model=plain_recipe.model) == plain_recipe
    assert seeds.model.backbone is not None and seeds.model.backbone.adapter is not None
    assert (seeds.model.backbone.adapter.kind, seeds.model.backbone.adapter.quantize_bits) == ("qlora", 4)
    assert nf4.training.quantize_backbone == "nf4" and nf4.model.backbone is not None
    backbone = dataclasses.replace(nf4.model.backbone, frozen_dtype="float32")
    assert nf4.model.backbone.frozen_dtype == "bfloat16"  # the memory of docs/benchmarks.md
    assert dataclasses.replace(nf4.model, backbone=backbone) == plain_recipe.model


@pytest.mark.parametrize(
    "section", ["", "data", "data.train", "data.augment", "training", "post_processing.nms", "evaluation"]
)
def test_an_unknown_key_is_an_error_with_what_was_meant(section: str) -> None:
    document = plain(read_recipe(BASE))
    target = document
    for part in filter(None, section.split(".")):
        target = target[part]
    known = next(key for key in reversed(target) if len(key) > 4)
    target[known[:-1] + "x"] = target[known]
    with pytest.raises(TensorkeepError, match=f"unknown key '{known[:-1]}x'") as caught:
        from_mapping(DetectionRecipe, document, "r.yaml")
    assert known in str(caught.value.hint) and str(caught.value.where).startswith("r.yaml")


@pytest.mark.parametrize(
    "name, text, what",
    [
        ("data.window_size", "384", "output_length 768 is not data.window_size 384"),
        ("data.inputs", "features", "the model has a backbone"),
        ("model.backbone", "null", "the model has no backbone"),
        ("data.class_agnostic", "true", "head.classes is 20"),
        ("data.file_pattern", "a.mp4", "does not say"),
        ("data.mode", "whole", "for features alone"),
        ("data.mode", "slidng", "not one of"),
        ("data.scale_factor", "3", "no multiple of scale_factor"),
        ("data.crop_size", "200", "augment.size 160 is not crop_size 200"),
        ("data.window_overlap_ratio", "1", "must be in"),
        ("data.window_size", "0", "at least 1"),
        ("data.augment.flip", "2", "out of range"),
        ("data.augment.area", "[0.5, 0.1]", "no ranges"),
        ("data.train", "{annotations: a, subset: b}", "lacks the key 'folder'"),
        ("data.window_size", "7.5", "expected int"),
        ("training.micro_batch", "3", "does not divide"),
        ("training.ema", "1", "must be in"),
        ("training.precision", "fp8", "not one of"),
        ("training.workers", "-1", "negative"),
        ("training.save_every", "0", "at least 1"),
        ("evaluation.protocol", "thumos", "unknown protocol"),
        ("evaluation.thresholds", "[0]", "must lie in"),
        ("post_processing.nms.method", "soft", "unknown suppression"),
        ("schedule.floor", "high", "expected a number"),
        ("training.quantize_backbone", "nf8", "not one of"),
    ],
)
def test_what_does_not_fit_is_one_error(name: str, text: str, what: str) -> None:
    with pytest.raises(TensorkeepError, match=what):
        read_recipe(BASE, [(name, text)])


def test_a_trained_backbone_is_not_quantized_and_class_agnostic_detections_need_names() -> None:
    with pytest.raises(TensorkeepError, match="trains cannot be quantized"):
        read_recipe(BASE, [("quantize_backbone", "nf4"), ("model.backbone.tuning", "all")])
    with pytest.raises(TensorkeepError, match="nothing names the classes"):
        read_recipe("adatad_anet_videomae_s", [("post_processing.classifier", "null")])


# -- changes on the command line --------------------------------------------------------------------------------------


def test_the_seeds_short_names_reach_what_they_mean() -> None:
    seeds = read_recipe("adatad_thumos_videomae_s_qlora", [("lora_r", "4"), ("quantize_bits", "8")])
    lora = read_recipe("adatad_thumos_videomae_s_lora", [("lora_r", "4"), ("lora_dropout", "0")])
    assert seeds.model.backbone is not None and seeds.model.backbone.adapter is not None
    assert (seeds.model.backbone.adapter.lora_r, seeds.model.backbone.adapter.quantize_bits) == (4, 8)
    assert lora.model.backbone is not None and lora.model.backbone.lora is not None and lora.model.backbone.adapter
    assert (lora.model.backbone.lora.lora_r, lora.model.backbone.lora.lora_dropout) == (4, 0.0)
    assert lora.model.backbone.adapter.lora_r == 16
    for flag, kind in (("true", "plain"), ("false", "qlora")):
        backbone = read_recipe(BASE, [("use_plain_adapter", flag)]).model.backbone
        assert backbone is not None and backbone.adapter is not None and backbone.adapter.kind == kind
    assert read_recipe(BASE, [("quantize_backbone", "nf4")]).training.quantize_backbone == "nf4"


def test_one_window_size_sets_the_three_lengths_that_must_agree() -> None:
    recipe = read_recipe(BASE, [("window_size", "1024")])
    assert recipe.model.backbone is not None
    assert (recipe.data.window_size, recipe.model.backbone.output_length) == (1024, 1024)
    assert recipe.model.projection.max_length == 1024
    small = read_recipe(BASE, [("crop_size", "112")]).data
    assert small.augment is not None and (small.crop_size, small.augment.size) == (112, 112)


def test_changes_reach_into_lists_and_leave_the_document_alone() -> None:
    document = {"optimizer": {"groups": [{"pattern": "adapter", "lr": 1.0}]}}
    assert changed(document, [("optimizer.groups.0.lr", "2"), ("training.ema", "null")]) == {
        "optimizer": {"groups": [{"pattern": "adapter", "lr": 2}]},
        "training": {"ema": None},
    }
    assert document == {"optimizer": {"groups": [{"pattern": "adapter", "lr": 1.0}]}}


@pytest.mark.parametrize(
    "recipe, name, text, what",
    [
        ("adatad_thumos_videomae_s", "lora_r", "4", "nothing with lora_r"),
        ("adatad_thumos_videomae_s_lora", "quantize_bits", "8", "nothing with quantize_bits"),
        ("adatad_thumos_videomae_s", "use_plain_adapter", "yes please", "true or false"),
        ("adatad_thumos_videomae_s", "optimizer.groups.7.lr", "1", "has no '7'"),
        ("adatad_thumos_videomae_s", "training.seed.x", "1", "has no 'x'"),
        ("adatad_thumos_videomae_s", "training.seed", "[", "is no value"),
        ("adatad_thumos_videomae_s", "trainng.seed", "1", "no field 'trainng.seed'"),
    ],
)
def test_a_change_that_fits_nothing_is_one_error(recipe: str, name: str, text: str, what: str) -> None:
    with pytest.raises(TensorkeepError, match=what):
        read_recipe(recipe, [(name, text)])


def test_a_name_that_could_mean_two_things_is_refused() -> None:
    both = [("model.backbone.adapter.kind", "qlora"), ("lora_r", "4")]
    with pytest.raises(TensorkeepError, match=r"could mean model\.backbone\.adapter\.lora_r or"):
        read_recipe("adatad_thumos_videomae_s_lora", both)


@pytest.mark.parametrize("text", ["", "[1, 2]", "model: [", "a: &a [*a]", "\x00", "1"])
def test_a_file_that_is_no_recipe_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(TensorkeepError, match=r"r\.yaml"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(TensorkeepError):
        read_recipe(tmp_path / "gone.yaml")
