"""One pattern language: the same pattern means the same names, whoever asks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import nn

from tensorkeep.adapters.lora import add_lora
from tensorkeep.cli import main
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import exactly, matches, near_pattern
from tensorkeep.formats.view import read
from tensorkeep.language._optimizer import choose_trainable, make_optimizer
from tensorkeep.quantization.modules import quantize_
from tensorkeep.training._resume import _may_differ
from tensorkeep.training.sections import GroupRule, OptimizerConfig
from tests.counting import calls_at_most

PAGE = Path(__file__).parents[1] / "docs/concepts/patterns.md"

letters = st.sampled_from("ab1")
segment = st.text(letters, min_size=1, max_size=3)
names = st.lists(segment, min_size=1, max_size=5).map(".".join)
pieces = st.sampled_from(["a", "b", "1", ".", "*", "?", "[ab]", "[!a]"])
bodies = st.lists(pieces, min_size=1, max_size=6).map("".join)


def covers(pattern: str, text: str) -> bool:
    """Whether a pattern without `^` and `$` is spelt out by the whole text: letter by letter, by trying everything."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(covers(pattern[1:], text[n:]) for n in range(len(text) + 1))
    if not text:
        return False
    if pattern[0] == "[":
        inside, _, rest = pattern[1:].partition("]")
        wanted = (text[0] in inside[1:]) != inside.startswith("!") if inside[0] == "!" else text[0] in inside
        return wanted and covers(rest, text[1:])
    return pattern[0] in ("?", text[0]) and covers(pattern[1:], text[1:])


def defined(pattern: str, name: str) -> bool:
    """The definition: some run of whole segments is covered, from the first or to the last where that is asked."""
    front, back = pattern.startswith("^"), pattern.endswith("$")
    parts = name.split(".")
    runs = [(i, j) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    return any(
        covers(pattern.removeprefix("^").removesuffix("$"), ".".join(parts[i:j]))
        for i, j in runs
        if (i == 0 or not front) and (j == len(parts) or not back)
    )


@given(st.sampled_from(["", "^"]), bodies, st.sampled_from(["", "$"]), names)
def test_a_pattern_fits_as_it_is_defined(front: str, body: str, back: str, name: str) -> None:
    assert matches(name, [front + body + back]) == defined(front + body + back, name)


@given(st.lists(bodies, max_size=4), names)
def test_several_patterns_fit_where_one_of_them_does(patterns: list[str], name: str) -> None:
    assert matches(name, patterns) == any(matches(name, [p]) for p in patterns)


@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8))
def test_exactly_fits_one_name(name: str, other: str) -> None:
    assert matches(name, [exactly(name)])
    assert matches(other, [exactly(name)]) == (other == name)
    assert not matches(f"a.{name}", [exactly(name)]) and not matches(f"{name}.a", [exactly(name)])


def test_the_page_tells_the_truth() -> None:
    examples = PAGE.read_text().partition("## Examples")[2]
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)`[^|]*\| `([^`]+)` \|$", examples, re.MULTILINE)
    assert len(rows) >= 10
    for pattern, fitting, other in rows:
        assert matches(fitting, [pattern]) and not matches(other, [pattern]), pattern


def test_case_matters_and_no_pattern_fits_nothing() -> None:
    assert not matches("model.Norm.weight", ["norm"]) and not matches("a", []) and not matches("a", [""])


def test_a_hundred_thousand_names_take_a_few_calls_each() -> None:
    many = [f"model.layers.{n % 64}.mlp.experts.{n}.up_proj.weight" for n in range(100_000)]
    patterns = ["q_proj", "*embed*", "layers.1", "^lm_head.weight$", "experts.*.gate_proj", "norm"]
    with calls_at_most(8 * len(many)):
        assert sum(matches(name, patterns) for name in many) == 1563


def test_stars_that_fit_in_many_ways_end() -> None:
    """An expression that tries every way would need some 10^17 steps; the limit only ends such a test."""
    line = "from tensorkeep.formats.names import matches; print(matches('a.' * 20_000, ['*a*a*a*a*b']))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=300)
    assert done.stdout == "False\n"


def test_near_misses_are_segments_or_names() -> None:
    there = ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
    assert "q_proj" in str(near_pattern("*.q_porj$", there)) and near_pattern("zzz", there) == ""
    assert "lm_head.weight" in str(near_pattern("^lm_haed.weight$", there))


# -- seven users, one answer ------------------------------------------------------------------------------------------

MODULES = ["layers.0.q_proj", "layers.0.up", "layers.1.q_proj", "layers.10.q_proj", "q_proj_norm", "proj"]
PATTERNS = ["q_proj", "layers.1", "*_proj", "^layers", "proj$", "layers.[01]", "layers.?.q_proj", "^proj$", "*0*"]


class Named(nn.Module):
    """Linears under the names of MODULES."""

    def __init__(self) -> None:
        super().__init__()
        for name in MODULES:
            at: nn.Module = self
            *parents, last = name.split(".")
            for part in parents:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            at.add_module(last, nn.Linear(64, 64, bias=False))


def _drop(pattern: str, folder: Path) -> set[str]:
    plan = make_plan([read(folder)], "pth", drop=[pattern])
    return {step.parts[0].name for step in plan.dropped}


def _tensors(pattern: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    capsys.readouterr()
    assert main(["inspect", str(folder), "--tensors", pattern, "--json"]) == 0
    return {t["name"] for t in json.loads(capsys.readouterr().out)["tensors"]}


def _trainable(pattern: str, folder: Path) -> set[str]:
    model = Named()
    choose_trainable(model, cast(Any, SimpleNamespace(trainable=(pattern,), adapter=None)))
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _groups(pattern: str, folder: Path) -> set[str]:
    model = Named()
    groups = make_optimizer(model, OptimizerConfig(groups=(GroupRule(pattern, 1e-3),))).param_groups
    chosen = {id(p) for g in groups if g["label"] == pattern for p in g["params"]}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def _targets(pattern: str, folder: Path) -> set[str]:
    return {f"{name}.weight" for name in add_lora(Named(), [pattern], r=2)}


def _quantized(pattern: str, folder: Path) -> set[str]:
    kept = set(MODULES) - set(quantize_(Named().requires_grad_(False), exclude=[pattern]))
    return {f"{name}.weight" for name in kept}


def _allowed(pattern: str, folder: Path) -> set[str]:
    return {f"{name}.weight" for name in MODULES if _may_differ(name, (pattern,))}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_user_of_patterns_gives_the_same_answer(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({f"{name}.weight": np.ones(2, np.float32) for name in MODULES}, tmp_path / "model.safetensors")
    parts = {f"{name}.weight": name for name in MODULES}
    # a pattern bound to the end of a module's name means the weight's name without its last segment
    of_modules = {full for full, name in parts.items() if matches(name, [pattern])}
    of_tensors = {full for full in parts if matches(full, [pattern])}
    assert of_modules and (of_tensors == of_modules or pattern.endswith("$"))
    users: list[Callable[[str, Path], set[str]]] = [_targets, _quantized, _allowed]
    for user in users:
        assert user(pattern, tmp_path) == of_modules, user.__name__
    pattern = pattern.replace("$", ".weight$")
    assert _tensors(pattern, tmp_path, capsys) == of_modules
    for user in (_drop, _trainable, _groups):
        assert user(pattern, tmp_path) == of_modules, user.__name__


def test_a_pattern_that_fits_nothing_is_an_error_that_says_what_is_near(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({f"{name}.weight": np.ones(2, np.float32) for name in MODULES}, tmp_path / "model.safetensors")
    for user in (_drop, _trainable, _groups, _targets):
        with pytest.raises(TensorkeepError, match="q_porj") as error:
            user("q_porj", tmp_path)
        assert "did you mean q_proj" in str(error.value.hint), user.__name__
    with pytest.raises(TensorkeepError, match="fits no linear") as error:
        quantize_(Named().requires_grad_(False), include=["q_porj"])
    assert "did you mean q_proj" in str(error.value.hint)
    assert main(["inspect", str(tmp_path), "--tensors", "q_porj"]) == 2
    assert "did you mean q_proj" in capsys.readouterr().err
