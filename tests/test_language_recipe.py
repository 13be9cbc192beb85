"""A language run from its recipe builds, trains, is killed and goes on bitwise; it can start from any checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tensorkeep.adapters.files import load_adapter
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.language._optimizer import make_optimizer
from tensorkeep.language.evaluation import evaluate_checkpoint
from tensorkeep.language.export import exported
from tensorkeep.language.job import build, loop_of
from tensorkeep.language.recipe_text import language_recipe, read_language
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.loop import fit
from tensorkeep.training.recipe import to_yaml
from tensorkeep.training.sections import GroupRule, OptimizerConfig
from tensorkeep.training.shipped import shipped
from tests.language_files import (
    THINKING,
    config,
    conversations,
    model,
    preferences,
    save_model,
    save_tokenizer,
    texts,
)

RECIPES = [recipe.name for recipe in shipped() if recipe.kind == "language"]
Document = dict[str, Any]


def recipe_of(tmp_path: Path, **sections: Any) -> Document:
    """A small pretraining from a config; `sections` are merged in."""
    if not (tmp_path / "tok").exists():
        save_tokenizer(tmp_path / "tok")
        texts(tmp_path / "a.jsonl")
        conversations(tmp_path / "c.jsonl")
        preferences(tmp_path / "p.jsonl")
    document: Document = {
        "version": 2,
        "config": config(),
        "tokenizer": str(tmp_path / "tok"),
        "data": {"files": str(tmp_path / "a.jsonl"), "length": 32, "packing": "first_fit"},
        "training": {"updates": 6, "batch_size": 4, "log_every": 1},
        "optimizer": {"lr": 1e-3},
    }
    for name, section in sections.items():
        document[name] = (
            {**document.get(name, {}), **section} if isinstance(section, dict) and name != "config" else section
        )
    return document


def trained(document: Document, run: Path, **flags: Any) -> Any:
    recipe = language_recipe(document)
    job = build(recipe, run)
    return fit(job, run, loop_of(recipe, len(job.data)), **flags)


def rows(run: Path) -> list[dict[str, Any]]:
    return metrics.comparable(run / metrics.METRICS)


def newest(run: Path) -> checkpoint.State:
    found = checkpoint.newest(run)
    assert found is not None
    return found[0]


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    a, b = newest(one), newest(other)
    for name in ("model", "optimizer", "ema"):
        mine, theirs = getattr(a, name), getattr(b, name)
        assert mine.keys() == theirs.keys() and mine
        assert all(torch.equal(mine[n].view(-1).view(torch.uint8), theirs[n].view(-1).view(torch.uint8)) for n in mine)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["pretrain", "sft", "live", "dpo"])
def test_a_run_that_was_cut_ends_bitwise_where_the_whole_one_ends(tmp_path: Path, objective: str) -> None:
    save_model(tmp_path / "base", template=THINKING, attention_dropout=0.2)
    recipe_of(tmp_path)
    more: Document = {
        "pretrain": {},
        "sft": {"data": {"files": str(tmp_path / "c.jsonl"), "length": 64}},
        "live": {
            "data": {
                "files": str(tmp_path / "c.jsonl"),
                "packing": "none",
                "length": 64,
                "augmentation": {"system": 0.5, "empty_think": 0.5},
            }
        },
        "dpo": {"data": {"files": str(tmp_path / "p.jsonl"), "packing": "none", "length": 48}, "beta": 0.5},
    }[objective]
    more |= {"objective": {"live": "sft"}.get(objective, objective), "config": None, "model": str(tmp_path / "base")}
    more |= {
        "tokenizer": None,
        "evaluation": {"files": [more.get("data", {}).get("files", str(tmp_path / "a.jsonl"))], "rows": 3},
    }
    document = recipe_of(tmp_path, **more)
    document["training"] |= {"ema": 0.9, "save_every": 2, "evaluate_every": 3, "best": "-loss", "micro_batch": 2}
    trained(document, tmp_path / "whole")
    # cut: the first checkpoints of the whole run, and rows from after them
    cut = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    for step in (6, 4):
        checkpoint.run_folder.delete(cut, [step]) if step in checkpoint.steps(cut) else None
    assert trained(document, cut).level == "exact"
    assert_same_run(tmp_path / "whole", cut)
    assert rows(cut)[-2]["loss"] < rows(cut)[0]["loss"] + (0.5 if objective != "pretrain" else 0.0)


def test_the_recipe_in_the_run_alone_goes_on(tmp_path: Path) -> None:
    document = recipe_of(tmp_path)
    recipe = language_recipe(document)
    assert language_recipe(yaml.safe_load(to_yaml(recipe))) == recipe
    trained(document, tmp_path / "run")
    again = read_language(tmp_path / "run" / "recipe.yaml")
    assert again == recipe
    job = build(again, tmp_path / "run")
    assert fit(job, tmp_path / "run", loop_of(again, len(job.data))).level == "exact"


def test_another_cache_or_worker_count_is_no_other_run(tmp_path: Path) -> None:
    document = recipe_of(tmp_path, training={"save_every": 3})
    trained(document, tmp_path / "whole")
    trained(document, tmp_path / "run")
    checkpoint.run_folder.delete(tmp_path / "run", [6])
    moved = recipe_of(tmp_path, training={"save_every": 3, "workers": 1}, data={"cache": str(tmp_path / "elsewhere")})
    assert trained(moved, tmp_path / "run").level == "exact"
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    with pytest.raises(TensorkeepError, match=r"optimizer\.lr was 0\.001, is 0\.002"):
        trained(recipe_of(tmp_path, optimizer={"lr": 2e-3}), tmp_path / "run")
    texts(tmp_path / "a.jsonl", 25)
    with pytest.raises(TensorkeepError, match=r"data\.fingerprint"):
        trained(document, tmp_path / "run")


@pytest.mark.parametrize("codes", [None, "nf4"])
def test_an_adapter_run_keeps_the_adapter_alone_and_goes_on_bitwise(tmp_path: Path, codes: str | None) -> None:
    save_model(tmp_path / "base", hidden_size=64, intermediate_size=64, head_dim=16)
    adapter = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "targets": ["q_proj", "v_proj"]}
    document = recipe_of(
        tmp_path,
        config=None,
        model=str(tmp_path / "base"),
        adapter=adapter,
        training={"save_every": 2, "ema": 0.9, "quantize_backbone": codes, "gradient_checkpointing": True},
        evaluation={"files": [str(tmp_path / "a.jsonl")]},
        optimizer={"groups": [{"pattern": "lora_B", "lr": 2e-3}]},
    )
    trained(document, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    checkpoint.run_folder.delete(tmp_path / "cut", [6])
    outcome = trained(document, tmp_path / "cut")
    assert outcome.level == "exact"
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    state = newest(tmp_path / "cut")
    assert {n.rpartition(".")[2] for n in state.model} == {"lora_A", "lora_B"} and state.base is not None
    assert state.base["path"] == str(tmp_path / "base") and state.base["digest"]
    # elsewhere: an adapter folder that names its base and gives the average's numbers
    recipe = language_recipe({**document, "training": {**document["training"], "ema": None}})
    fresh = build(recipe, tmp_path / "fresh")
    load_adapter(fresh.model, exported(tmp_path / "cut", tmp_path / "adapter"), state.base["digest"])
    assert fresh.evaluate is not None
    with torch.no_grad():
        assert fresh.evaluate(fresh.model.eval())["loss"] == pytest.approx(outcome.evaluation["loss"], rel=1e-6)
    assert evaluate_checkpoint(str(tmp_path / "cut"))["loss"] == pytest.approx(outcome.evaluation["loss"], rel=1e-6)


def test_a_resumed_evaluation_is_that_of_the_weights(tmp_path: Path) -> None:
    document = recipe_of(
        tmp_path,
        evaluation={"files": [str(tmp_path / "a.jsonl")]},
        training={"ema": 0.5, "best": "-loss"},
        data={"packing": "concatenate"},
    )
    run = tmp_path / "run"
    outcome = trained(document, run)
    found = evaluate_checkpoint(str(run))
    assert found["loss"] == pytest.approx(outcome.evaluation["loss"], rel=1e-6) and found["ema"] and found["step"] == 6
    raw = evaluate_checkpoint(str(run), ema=False)
    assert raw["loss"] != found["loss"] and raw["tokens"] == found["tokens"]
    assert evaluate_checkpoint(str(run), best=True) == found
    # elsewhere the weights alone: the same numbers as --no-ema, or the average where it is asked for
    average = evaluate_checkpoint(str(exported(run, tmp_path / "average")), [str(tmp_path / "a.jsonl")], length=32)
    assert average["loss"] == pytest.approx(found["loss"], rel=1e-5)
    convert(make_plan([read(run)], "hf"), str(tmp_path / "hf"), "hf")
    bare = evaluate_checkpoint(str(tmp_path / "hf"), [str(tmp_path / "a.jsonl")], length=32)
    assert bare["loss"] == pytest.approx(raw["loss"], rel=1e-5) and bare["step"] is None


# -- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "to", "naming"), [("olmo2", "dcp", None), ("llama", "dcp", "torchtitan"), ("qwen3", "pth", "minimind")]
)
def test_a_start_of_another_format_is_converted_into_the_run_and_proven(
    tmp_path: Path, kind: str, to: Any, naming: str | None
) -> None:
    save_model(tmp_path / "hf", kind, tie_word_embeddings=kind == "qwen3")
    plan = make_plan([read(tmp_path / "hf")], to, naming=naming)
    convert(plan, str(tmp_path / "source"), to)
    (tmp_path / "source" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    document = recipe_of(tmp_path, config=None, model=str(tmp_path / "source"))
    said: list[str] = []
    job = build(language_recipe(document), tmp_path / "run", World(), said.append)
    assert any("proven equal to the plan" in line for line in said)
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    found = job.model.state_dict()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert (tmp_path / "run" / "base" / "tensorkeep.json").is_file() and (tmp_path / "run" / "config.json").is_file()
    build(language_recipe(document), tmp_path / "run", World(), said.append)
    assert sum("proven" in line for line in said) == 1  # made once


def test_trackers_are_chosen_by_name_and_change_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("tensorkeep.training.trackers.wandb", lambda run, project: told.append)
    trained(recipe_of(tmp_path, training={"save_every": 3}), tmp_path / "run")
    checkpoint.run_folder.delete(tmp_path / "run", [6])
    assert (
        trained(recipe_of(tmp_path, training={"trackers": ["wandb"], "save_every": 3}), tmp_path / "run").level
        == "exact"
    )
    assert [row["step"] for row in told] == [4, 5, 6]


def test_a_start_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "llama")
    document = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(document))
    with pytest.raises(TensorkeepError, match="missing keys"):
        build(language_recipe(recipe_of(tmp_path, config=None, model=str(tmp_path / "hf"))), tmp_path / "run")


def test_a_model_from_nothing_is_the_same_each_time_and_draws_nothing(tmp_path: Path) -> None:
    recipe = language_recipe(recipe_of(tmp_path))
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    made = [build(recipe, tmp_path / str(i)).model.state_dict() for i in range(2)]
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])


def test_config_and_tokenizer_of_a_start_that_ended_early_are_not_taken_for_the_next_model_s(tmp_path: Path) -> None:
    for name, theta in (("one", 10_000.0), ("other", 500_000.0)):
        save_model(tmp_path / name, "llama", rope_theta=theta)
    lacking = recipe_of(tmp_path, config=None, model=str(tmp_path / "one"))
    lacking["data"] |= {"files": str(tmp_path / "absent.jsonl")}
    with pytest.raises(TensorkeepError, match="no such file"):
        build(language_recipe(lacking), tmp_path / "run")
    made = language_recipe(recipe_of(tmp_path, config=None, model=str(tmp_path / "other")))
    with pytest.raises(TensorkeepError, match=r"config\.json is not that of this model") as caught:
        build(made, tmp_path / "run")
    assert "choose another --out, or remove" in str(caught.value.hint)
    (tmp_path / "run" / "config.json").unlink()
    job = build(made, tmp_path / "run")
    fit(job, tmp_path / "run", loop_of(made, len(job.data)))
    assert read(tmp_path / "run").config == read(tmp_path / "other").config


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorkeepError, match="C02"):
        build(language_recipe(recipe_of(tmp_path, config=config(vocab_size=300))), tmp_path / "run")


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ([("training.update", "3")], "no field 'training.update'"),
        ([("training.precision", "bf8")], "'bf8' is not one of"),
        ([("training.quantize_backbone", "nf4")], "weights that train cannot be quantized"),
        ([("training.best", "-loss")], "nothing is evaluated"),
        ([("data.augmentation.system", "0.2"), ("objective", "sft")], "cannot be packed"),
        ([("training.updates", "null")], "neither updates nor epochs"),
        ([("model", "null"), ("config", "null")], "neither model nor config"),
        ([("data.length", "[3]")], "expected int"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(tmp_path: Path, changes: list[tuple[str, str]], what: str) -> None:
    with pytest.raises(TensorkeepError) as caught:
        language_recipe(recipe_of(tmp_path), changes)
    assert what in caught.value.line


def test_flags_change_any_field_and_short_names_stand_for_their_places(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    flags = [
        ("training.epochs", "2"),
        ("lora-r", "8"),
        ("lora_alpha", "4"),
        ("quantize_backbone", "nf4"),
        ("data.files", "b.txt"),
        ("model", str(tmp_path / "base")),
        ("config.hidden_size", "64"),
    ]
    made = language_recipe(recipe_of(tmp_path), flags[:-1])
    assert made.training.epochs == 2 and made.training.updates is None and made.config is None
    assert made.adapter is not None and (made.adapter.lora_r, made.adapter.lora_alpha) == (8, 4)
    assert made.training.quantize_backbone == "nf4" and made.data.files == ("b.txt",)
    assert (language_recipe(recipe_of(tmp_path), flags[-1:]).config or {})["hidden_size"] == 64
    assert language_recipe(recipe_of(tmp_path), [("trainable", "full")]).trainable == ("*",)


def test_groups_take_names_in_order_and_an_empty_one_is_explained() -> None:
    made = model("llama")
    rules = (GroupRule("*embed*", 1e-4, 0.0), GroupRule("^layers.1", 2e-4), GroupRule("layers.1", 3e-4))
    groups = make_optimizer(made, OptimizerConfig(1e-3, 0.1, groups=(rules[0], rules[2]))).param_groups
    assert [(g["label"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("*embed*", 1e-4, 0.0),
        ("layers.1", 3e-4, 0.1),
        ("weights", 1e-3, 0.1),
        ("norms and biases", 1e-3, 0.0),
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(made.parameters()))
    with pytest.raises(TensorkeepError, match="went to the earlier rule 'model'"):
        make_optimizer(made, OptimizerConfig(groups=(GroupRule("model", 1.0), GroupRule("*embed*", 1.0))))
    with pytest.raises(TensorkeepError, match="no trainable parameter has that name"):
        make_optimizer(made, OptimizerConfig(groups=(rules[1],)))


def test_only_named_parameters_train(tmp_path: Path) -> None:
    document = recipe_of(tmp_path, trainable=["*.layers.1.*", "model.norm.weight"])
    job = build(language_recipe(document), tmp_path / "run")
    trainable = [n for n, p in job.model.named_parameters() if p.requires_grad]
    assert trainable and all(n.startswith(("model.layers.1.", "model.norm.")) for n in trainable)
    with pytest.raises(TensorkeepError, match="fits no parameter"):
        build(language_recipe(recipe_of(tmp_path, trainable=["*.layer.1.*"])), tmp_path / "other")


SMALL = {
    "data.length": "48",
    "training.batch_size": "4",
    "training.micro_batch": "2",
    "training.workers": "0",
    "training.updates": "1",
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_trains_at_a_tiny_size(tmp_path: Path, name: str) -> None:
    recipe_of(tmp_path)
    kind = {"olmo2_continue": "olmo2", "smollm2_sft": "llama"}.get(name, "qwen3")
    small = dict(SMALL)
    written = read_language(name)
    small["data.files"] = str(tmp_path / {"pretrain": "a.jsonl", "sft": "c.jsonl", "dpo": "p.jsonl"}[written.objective])
    if written.model is not None:
        small["model"] = str(
            save_model(tmp_path / "base", kind, THINKING, hidden_size=64, intermediate_size=64, head_dim=16)
        )
    else:
        sizes = {
            "vocab_size": 320,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        small |= {f"config.{name}": str(size) for name, size in sizes.items()}
    if written.tokenizer is not None:
        small["tokenizer"] = str(tmp_path / "tok") if "augmentation" not in small else ""
    made = read_language(name, small.items())
    job = build(made, tmp_path / "run")
    outcome = fit(job, tmp_path / "run", loop_of(made, len(job.data)))
    assert outcome.reason == "done" and outcome.step == 1


def test_false_asks_for_nothing_where_a_field_is_refused() -> None:
    """Recipes of runs from before the default was null say it."""
    document: dict[str, Any] = {"version": 2, "model": "m", "data": {"files": "a.jsonl"}, "training": {"updates": 1}}
    document["training"]["graph"] = False
    assert language_recipe(document).training.graph is False
    document["training"]["graph"] = True
    with pytest.raises(TensorkeepError, match="graph is refused"):
        language_recipe(document)
