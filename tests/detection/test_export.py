"""A detector's run as OpenTAD's checkpoint: every tensor twice, live and averaged, and the run's numbers from both."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorkeep import cli
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.start import load_detector, open_detector
from tests.detection import runs
from tests.tools import ROOT

GROUPS = [{"pattern": "^backbone", "lr": 0.05, "weight_decay": 0.05}]
LORA = {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "adapters": {},
    "whole": {"model__backbone__tuning": "all", "model__backbone__adapter": None, "optimizer__groups": GROUPS},
    "codes": {"training__quantize_backbone": "nf4"},
    "updates": {
        "training__quantize_backbone": "nf4",
        "model__backbone__lora": LORA,
        "optimizer__groups": GROUPS,
        "model__backbone__adapter": {"kind": "qlora", "ratio": 0.25, "quantize_bits": 8, **LORA},
    },
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a run of a kind once."""
    data = runs.dataset(tmp_path_factory.mktemp("videos"), videos=2, held_out=1)
    short = {"training__epochs": 2, "training__ema": 0.5, "training__evaluate_every": 99, "optimizer__lr": 0.05}

    @cache
    def trained(kind: str, **changes: Any) -> Path:
        run = tmp_path_factory.mktemp(kind) / "run"
        runs.trained(runs.recipe(data, **{**short, **KINDS[kind], **changes}), run)
        return run

    return trained


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = cli.main([str(w) for w in words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def names_of_opentad(adapters: bool) -> set[str]:
    """What OpenTAD's strict load asks for, from its own list of a larger model: two blocks, two levels, one of each."""
    listed = json.loads((ROOT / "tests/data/opentad/optimizer_groups.json").read_text())["parameters"]
    out = {"backbone.model.backbone.pos_embed", "rpn_head.loss_normalizer"}
    for name, _ in listed:
        block, level = (
            re.search(r"\.blocks\.(\d+)\.", name),
            re.match(r"(neck\.fpn_norms|rpn_head\.scale)\.(\d+)", name),
        )
        more = re.match(r"(projection\.(embed|stem|branch|embed_norm)|rpn_head\.\w+_head\.head)\.[1-9]", name)
        towers = re.match(r"rpn_head\.(cls|reg)_(convs|norms?)\.[1-9]", name)
        if (block and block[1] != "0") or (level and int(level[2]) > 1) or more or towers:
            continue
        out |= {name, name.replace(".blocks.0.", ".blocks.1.")}
    return {n for n in out if adapters or ".adapter." not in n}


def outputs(detector: Detector) -> list[Tensor]:
    """What a detector makes of two videos of noise."""
    frames = torch.randint(0, 256, (2, 3, 32, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made: Any = detector.eval()(frames, torch.ones(2, 16, dtype=torch.bool))
    found: list[Tensor] = []

    def gather(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value.float())
        elif isinstance(value, (list, tuple)):
            for inner in value:
                gather(inner)
        elif hasattr(value, "__dict__"):
            gather(list(vars(value).values()))

    gather(made)
    assert found
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_opentads_file_of_a_run_is_the_whole_detector_and_its_average(
    run_of: Callable[..., Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(kind)
    code, text = told(capsys, "convert", run, tmp_path / "out.pth", "--to", "pth", "--naming", "opentad")
    assert code == 0, text
    file = torch.load(tmp_path / "out.pth", weights_only=True)
    wanted = names_of_opentad(adapters=kind != "whole")
    for part in ("state_dict", "state_dict_ema"):
        assert {n.removeprefix("module.") for n in file[part]} == wanted
        assert all(t.dtype == torch.float32 for n, t in file[part].items() if not n.endswith("loss_normalizer"))
    assert file["epoch"] == 1
    found = {}
    for average in (False, True):
        ours = outputs(open_detector(run, ema=average, best=False).detector)
        opened = open_detector(tmp_path / "out.pth", run / "recipe.yaml", ema=average)
        assert opened.averaged is average
        for one, other in zip(ours, outputs(opened.detector), strict=True):
            assert (one - other).abs().max() <= 1e-5 * max(1.0, float(one.abs().max()))
        found[average] = ours
    assert max(float((a - b).abs().max()) for a, b in zip(found[False], found[True])) > 1e-3


def test_a_step_folder_and_an_hf_folder_hold_the_whole_detector_too(
    run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("updates")
    step = sorted((run / "checkpoints").glob("step-*"))[0]
    assert told(capsys, "convert", step, tmp_path / "one.pth", "--to", "pth", "--naming", "opentad")[0] == 0
    ours = outputs(open_detector(step, ema=False).detector)
    theirs = outputs(load_detector(tmp_path / "one.pth", run / "recipe.yaml"))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    for flags, average in (([], False), (["--ema"], True)):
        out = tmp_path / f"hf{average}"
        assert told(capsys, "convert", run, out, "--to", "hf", *flags)[0] == 0
        ours = outputs(open_detector(run, ema=average, best=False).detector)
        theirs = outputs(load_detector(out))  # the recipe that lies beside the weights
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_a_run_without_an_average_says_so(
    run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("adapters", training__ema=None)
    code, text = told(capsys, "convert", run, tmp_path / "out.pth", "--to", "pth", "--naming", "opentad")
    assert code == 0 and "keeps no average" in text
    file = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(t, file["state_dict_ema"][n]) for n, t in file["state_dict"].items())


def test_every_command_that_is_proposed_for_a_detectors_run_works(
    run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("adapters")
    monkeypatch.chdir(tmp_path)
    tried = 0
    for words in (["convert", run, "no", "--to", "peft"], ["merge", run, "no"], ["convert", run, "no", "--to", "dcp"]):
        code, text = told(capsys, *words)
        for hint in re.findall(r"tensorkeep ((?:convert|merge) [^\n;(]*)", text):
            tried += 1
            proposed = [w.replace("OUT", f"hint{tried}") for w in shlex.split(hint)]
            assert told(capsys, *proposed)[0] == 0, hint
        assert code == 0 or "tensorkeep" in text
    assert tried == 2
