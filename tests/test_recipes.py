"""Shared fields mean the same in both kinds of recipe or are refused by name, and old words are still read."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep import cli
from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.augmentation import Augmentation
from tensorkeep.language.recipe import REFUSED as LANGUAGE_REFUSED
from tensorkeep.language.recipe import AdapterConfig, DataConfig, EvaluationConfig, LanguageRecipe
from tensorkeep.language.recipe_text import language_recipe, read_language
from tensorkeep.training import migration, sections
from tensorkeep.training.job import Loop
from tensorkeep.training.recipe import to_yaml
from tensorkeep.training.saver import Keep
from tensorkeep.training.schedules import Schedule, schedule_of
from tensorkeep.training.sections import CheckpointConfig, ScheduleConfig, TrainingConfig
from tensorkeep.training.shipped import shipped, shipped_recipe
from tests.recipe_values import optimizers, optional, schedules, several, shares, texts, trainings

SAMPLES = 40  # of an epoch
LANGUAGE: dict[str, Any] = {"version": 2, "model": "m", "data": {"files": ["a"]}, "training": {"updates": 9}}
LANGUAGE |= {"evaluation": {"files": ["b"]}, "adapter": {}}


def read(kind: str, training: dict[str, Any]) -> Any:
    """A small recipe of either kind, with `training` said in its section of that name."""
    if kind == "language":
        return language_recipe({**LANGUAGE, "training": {"updates": 9, **training}})
    pytest.importorskip("torch")
    from tensorkeep.detection.recipe.text import detection_recipe

    document = yaml.safe_load(shipped_recipe("synthetic_tiny").text)
    if "quantize_compute" in training:
        document["model"]["backbone"] |= {"frozen_dtype": "bfloat16", "checkpointing": "segments"}
    own = {name: value for name, value in document["training"].items() if name != "epochs"}
    return detection_recipe({**document, "training": {**own, **training}})


def loop_of(kind: str, recipe: Any) -> Loop:
    pytest.importorskip("transformers" if kind == "language" else "av")
    return importlib.import_module(f"tensorkeep.{kind}.job").loop_of(recipe, SAMPLES)


def refused(kind: str) -> dict[str, str]:
    if kind == "language":
        return LANGUAGE_REFUSED
    from tensorkeep.detection.recipe.schema import REFUSED

    return REFUSED


# -- the round trip of a language recipe (detection's is in detection/test_detection_recipe.py) ------------------------


@st.composite
def recipes(draw: st.DrawFn) -> LanguageRecipe:
    training = draw(trainings(TrainingConfig, tuple(LANGUAGE_REFUSED)))
    data = DataConfig(
        files=draw(several(texts).filter(bool)),
        length=draw(st.integers(2, 2**40)),
        packing="none",
        bos=draw(st.booleans()),
        eos=draw(st.booleans()),
        cache=draw(optional(texts)),
        augmentation=draw(optional(st.builds(Augmentation, shares, shares))),
    )
    evaluation = draw(st.builds(EvaluationConfig, several(texts), st.just("auto"), optional(st.integers(1, 99))))
    return LanguageRecipe(
        data=data,
        training=training,
        model=draw(texts),
        tokenizer=draw(optional(texts)),
        objective="sft",
        beta=draw(shares),
        trainable=draw(several(texts)),
        adapter=draw(st.builds(AdapterConfig, st.integers(), shares, shares, several(texts), st.booleans())),
        evaluation=evaluation if training.best else draw(optional(st.just(evaluation))),
        optimizer=draw(optimizers),
        schedule=draw(schedules),
        continued_from=draw(optional(st.dictionaries(texts, st.one_of(texts, st.integers(), st.none()), max_size=3))),
    )


@settings(deadline=None, max_examples=100)
@given(recipes())
def test_reading_what_was_written_gives_the_same_recipe(tmp_path_factory: pytest.TempPathFactory, recipe: Any) -> None:
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert read_language(path) == recipe


# -- every field, in both kinds ---------------------------------------------------------------------------------------

# field of `training` -> another value than either kind's default, and what of the loop it decides
FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "updates": (7, {"updates": 7}),
    "epochs": (3.0, {"updates": 60}),
    "batch_size": (8, {"batch": 8}),
    "micro_batch": (1, {"micro": 1}),
    "seed": (5, {"seed": 5}),
    "workers": (3, {"workers": 3}),
    "precision": ("bf16", {"precision": "bf16"}),
    "clip": (0.5, {"clip": 0.5}),
    "compile": (True, {"compile": True}),
    "graph": (True, {"graph": True}),
    "deterministic": (True, {"deterministic": True}),
    "parallel": ("fsdp", {"parallel": "fsdp"}),
    "replicas": (2, {"replicas": 2}),
    "unit": ("epochs", {"save_every": 60}),  # with save_every 3
    "log_every": (4, {"log_every": 4}),
    "save_every": (5, {"save_every": 5}),
    "evaluate_every": (6, {"evaluate_every": 6}),
    "evaluate_from": (2, {"evaluate_from": 2}),
    "keep_last": (9, {"keep": Keep(9, None)}),
    "keep_every": (4, {"keep": Keep(3, 4)}),
    "background": (True, {"background": True}),
    "best": ("-other", {"best": "-other"}),
    "patience": (2, {"patience": 2}),
    "watchdog": (60.0, {"watchdog": 60.0}),
    # not the loop's: what the model is, what is averaged and who is told
    "ema": (0.5, {}),
    "quantize_backbone": ("fp4", {}),
    "quantize_compute": ("fp8", {"precision": "bf16"}),  # with precision bf16
    "pretrained": ("p", {}),
    "gradient_checkpointing": (True, {}),
    "kept": ("narrow", {}),
    "memory": ("least", {}),
    "memory_limit_gib": (12.0, {}),
    "trackers": (("wandb",), {}),
}
PLAIN = {
    "unit": "updates",
    "batch_size": 2,
    "keep_last": 3,
    "best": "-loss",
    "save_every": 3,
    "updates": 11,
    "evaluate_every": None,
}


def test_every_field_of_the_section_and_of_the_loop_is_in_the_table() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(TrainingConfig)}
    decided = {name for _, decides in FIELDS.values() for name in decides}
    assert decided | {"checkpoint"} == {field.name for field in dataclasses.fields(Loop)}


@pytest.mark.parametrize("kind", ["language", "detection"])
def test_where_checkpoints_lie_on_several_hosts_is_said_in_both_kinds(kind: str) -> None:
    recipe = dataclasses.replace(read(kind, PLAIN | {"parallel": "fsdp"}), checkpoint=CheckpointConfig(True, 1))
    assert loop_of(kind, recipe).checkpoint == CheckpointConfig(True, 1)
    assert loop_of(kind, read(kind, PLAIN)).checkpoint == CheckpointConfig(False, 0)
    with pytest.raises(TensorkeepError, match="only shards are kept by each host"):
        dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, parallel="ddp"))


@pytest.mark.parametrize("kind", ["language", "detection"])
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_means_the_same_in_both_kinds_or_is_refused_by_name(kind: str, name: str) -> None:
    value, decides = FIELDS[name]
    said = {**PLAIN, name: list(value) if isinstance(value, tuple) else value}
    if name == "epochs":
        said["updates"] = None
    if name == "quantize_compute":
        said["precision"] = "bf16"
    if name in refused(kind):
        with pytest.raises(TensorkeepError) as caught:
            read(kind, said)
        assert caught.value.where == f"training.{name}" and refused(kind)[name] in caught.value.what
        return
    recipe = read(kind, said)
    assert getattr(recipe.training, name) == value
    before, after = loop_of(kind, read(kind, PLAIN)), loop_of(kind, recipe)
    changed = {f.name for f in dataclasses.fields(Loop) if getattr(before, f.name) != getattr(after, f.name)}
    assert changed == set(decides) and {part: getattr(after, part) for part in decides} == decides


def test_a_field_of_a_kind_is_one_of_the_shared_sections() -> None:
    pytest.importorskip("torch")
    from tensorkeep.detection.model.groups import OptimizerConfig
    from tensorkeep.detection.recipe import schema

    for own, shared in (
        (schema.TrainingConfig, sections.TrainingConfig),
        (schema.ScheduleConfig, sections.ScheduleConfig),
        (OptimizerConfig, sections.OptimizerConfig),
    ):
        assert [f.name for f in dataclasses.fields(own)] == [f.name for f in dataclasses.fields(shared)]
        assert issubclass(own, shared)


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd", "minimind", "opentad"])
def test_a_schedule_may_count_epochs_or_updates(kind: Any) -> None:
    warmup = 0 if kind == "minimind" else 2
    training = TrainingConfig(updates=40, batch_size=10)  # four updates an epoch
    updates = schedule_of(ScheduleConfig(kind, "updates", warmup * 4, decay=8, ends_at=60), training, SAMPLES)
    epochs = schedule_of(ScheduleConfig(kind, "epochs", warmup, decay=2, ends_at=15), training, SAMPLES)
    assert isinstance(updates, Schedule) and updates.total == 60
    assert [updates(k, 0.1) for k in range(60)] == [epochs(k, 0.1) for k in range(60)]


# -- older words ------------------------------------------------------------------------------------------------------

# of version 1: what is said, in a recipe and as a flag; what it says now
OLD: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "training.batch": ("language", 4, {"training.batch_size": 4}),
    "training.every": ("detection", "updates", {"training.unit": "updates"}),
    "training.best": ("detection", "loss", {"training.best": "-loss"}),
    "optimizer.clip_norm": ("detection", 0.5, {"training.clip": 0.5}),
    "optimizer.backbone": (
        "detection",
        [{"name": "adapter", "lr": 0.1}, {"name": "", "lr": 0.2, "weight_decay": 0.0}],
        {
            "optimizer.groups": [
                {"pattern": "adapter", "lr": 0.1, "weight_decay": 0.05},
                {"pattern": "^backbone.*", "lr": 0.2, "weight_decay": 0.0},
            ]
        },
    ),
    "schedule.warmup_epochs": ("detection", 3, {"schedule.warmup": 3.0}),
    "schedule.epochs": ("detection", 30, {"training.epochs": 30.0, "schedule.ends_at": None}),
    "schedule.stop_epoch": ("detection", 6, {"training.epochs": 6.0, "schedule.ends_at": 24.0}),
}


def built(kind: str, document: dict[str, Any], changes: list[tuple[str, str]], said: list[str]) -> Any:
    from tensorkeep.training.recipe import plain

    if kind == "language":
        return plain(language_recipe(document, changes, remark=said.append))
    pytest.importorskip("torch")
    from tensorkeep.detection.recipe.text import detection_recipe

    return plain(detection_recipe(document, changes, remark=said.append))


def test_every_old_word_is_in_the_table() -> None:
    assert set(OLD) == set(migration.OLD)


@pytest.mark.parametrize("way", ["recipe", "flag"])
@pytest.mark.parametrize("name", OLD)
def test_an_old_word_is_read_and_said_once(name: str, way: str) -> None:
    kind, value, meant = OLD[name]
    document = dict(LANGUAGE) if kind == "language" else yaml.safe_load(shipped_recipe("synthetic_tiny").text)
    changes = [(name.replace("_", "-"), json.dumps(value))] if way == "flag" else []
    if way == "recipe":
        section, _, key = name.partition(".")
        rest = {k: v for k, v in document.get(section, {}).items() if f"{section}.{k}" not in meant}
        document = {k: v for k, v in document.items() if k != "version"} | {section: {**rest, key: value}}
        if name == "schedule.epochs":
            document["training"] = {k: v for k, v in document["training"].items() if k != "epochs"}
        if name == "optimizer.clip_norm":
            assert "clip" not in document["training"]
    said: list[str] = []
    made = built(kind, document, changes, said)
    assert {path: migration.at(made, path) for path in meant} == meant
    assert len(said) == 1 and said[0].count(f"{name} ") + said[0].count(f"{name}:") == 1 and " now" in said[0]


def test_a_whole_recipe_of_version_1_has_every_field_of_today() -> None:
    pytest.importorskip("torch")
    from tensorkeep.detection.recipe.text import kept_of as detection
    from tensorkeep.language.recipe_text import kept_of as language

    data = Path(__file__).parent / "data" / "version_0_1_0"
    for kind, kept_of in (("language", language), ("detection", detection)):
        stored = yaml.safe_load((data / kind / "run" / "recipe.yaml").read_text())
        assert kept_of(stored) == kept_of(kept_of(stored)) and kept_of(stored)["version"] == 2
        stored["training"]["graph"] = None  # left open where the recipe says nothing, which runs of then launched
        assert kept_of(yaml.safe_load((data / kind / "started_from.yaml").read_text())) == kept_of(stored)


def test_patterns_of_version_1_keep_their_meaning() -> None:
    old = {"trainable": ["norm", "*.layers.1.*"], "optimizer": {"groups": [{"pattern": "embed", "lr": 1.0}]}}
    made, said = migration.migrated(old)
    assert made["trainable"] == ["*norm*", "^*.layers.1.*$"] and len(said) == 2
    assert made["optimizer"]["groups"] == [{"pattern": "*embed*", "lr": 1.0}]
    kept = {"trainable": ["*"], "optimizer": {"groups": [{"pattern": "lora_A", "lr": 1.0}]}}
    assert migration.migrated(kept) == ({"version": 2, **kept}, [])
    assert migration.migrated(old | {"version": 2}) == (old | {"version": 2}, [])


@pytest.mark.parametrize(
    "document, what",
    [
        ({"training": {"batch": 4, "batch_size": 8}}, r"says both training\.batch and training\.batch_size"),
        ({"version": 3}, "version 3 is not known"),
        ({"version": "2"}, "version '2' is not known"),
        ({"version": 2, "training": {"updates": 9, "batch": 4}}, "unknown key 'batch'"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(document: dict[str, Any], what: str) -> None:
    with pytest.raises(TensorkeepError, match=what):
        language_recipe({**{k: v for k, v in LANGUAGE.items() if k != "version"}, **document})


def test_an_old_word_in_allow_means_the_field_of_today() -> None:
    for old, now in (("training.batch", "training.batch_size"), ("stop_epoch", "schedule.ends_at"), ("ema", "ema")):
        assert now in migration.names_now(old)


# -- shipped recipes, by name -----------------------------------------------------------------------------------------


def test_recipes_are_listed_and_shown_as_they_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recipes"]
    assert {row["kind"] for row in found} == {"language", "detection"} and len(found) == len(shipped()) > 15
    assert all(row["about"] and "\n" not in row["about"] for row in found)
    assert cli.main(["recipe", "list"]) == 0
    assert "smollm2_qlora" in capsys.readouterr().out
    for recipe in shipped():
        assert cli.main(["recipe", "show", recipe.name]) == 0
        assert capsys.readouterr().out == recipe.text
        assert yaml.safe_load(recipe.text)["version"] == migration.VERSION
    written = tmp_path / "mine.yaml"
    assert cli.main(["recipe", "show", "own_data", "--out", str(written)]) == 0
    assert written.read_text() == shipped_recipe("own_data").text
    assert cli.main(["recipe", "show", "own_data", "--out", str(written)]) == 2
    capsys.readouterr()
    assert cli.main(["recipe", "show", "smollm2_qlora", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["adapter"]["lora_r"] == 16


def test_a_name_stands_for_a_recipe_and_a_file_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "language", "smollm2_qlora", "--print-recipe", "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    Path("smollm2_qlora").write_text(yaml.safe_dump(LANGUAGE))
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["model"] == "m"
    for words in (["train", "language", "smolm2_sft"], ["recipe", "show", "smolm2_sft"]):
        assert cli.main(words) == 2
        assert "did you mean smollm2_sft" in capsys.readouterr().err
    assert cli.main(["train", "language", "recipes/language/smollm2_sft.yaml"]) == 2  # where it was once
    assert "did you mean smollm2_sft" in capsys.readouterr().err
