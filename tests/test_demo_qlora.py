"""Chapter `qlora` on a tiny model: the whole story holds, and each promise is one that can be broken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorkeep.adapters import merging
from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.commands.demo import qlora as demo_qlora
from tensorkeep.commands.demo.story import load_hf
from tensorkeep.formats.view import read
from tests.language_files import LINES, save_model


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool, list[str], list[Any]]:
    """Run the chapter once: its folder, verdict, lines and trained job."""
    place = tmp_path_factory.mktemp("qlora")
    base = save_model(place / "base", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    for name in ("text.txt", "held-out.txt"):
        (place / name).write_text("\n".join(LINES * 12))
    document = demo_qlora.qlora_recipe(base, place / "text.txt", place / "held-out.txt")
    document["data"]["length"] = 32
    (place / "recipe.yaml").write_text(yaml.safe_dump(document))
    said, kept = list[str](), list[Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_qlora, "LENGTH", 32)
        train = demo_qlora.train
        patch.setattr(demo_qlora, "train", lambda *a: kept.append(train(*a)) or kept[-1])
        held = demo_qlora.trained_and_merged(place / "recipe.yaml", base, place, place / "held-out.txt", said.append)
    return place, held, said, kept


def test_every_promise_holds(told: tuple[Path, bool, list[str], list[Any]]) -> None:
    place, held, said, kept = told
    story = "\n".join(said)
    assert held, story
    assert kept[0].averaged < kept[0].before and kept[0].averaged != kept[0].last
    assert "PEFT's merge_and_unload" in story and "nf4" in story and story.count("update ") == demo_qlora.UPDATES
    assert (place / "adapter" / "adapter_model.safetensors").is_file() and (
        place / "merged" / "tensorkeep.json"
    ).is_file()


def test_a_merge_onto_other_weights_than_it_was_trained_on_is_told_apart(
    told: tuple[Path, bool, list[str], list[Any]],
) -> None:
    place, _, _, kept = told
    job = plan_merge(
        read(place / "base"), open_adapters([(read(place / "adapter"), 1.0)]), onto="original", dtype="F32"
    )
    merging.merge(job, str(place / "original"))
    right, most = demo_qlora.distances(kept[0].job, load_hf(place / "merged").float().eval())
    wrong, _ = demo_qlora.distances(kept[0].job, load_hf(place / "original").float().eval())
    assert right <= demo_qlora.CLOSE and right <= most * 10 and wrong > 1000 * demo_qlora.CLOSE


@pytest.mark.parametrize("broken", [{"before": 0.0}, {"averaged": 1.0}])
def test_a_broken_promise_fails_the_chapter(
    told: tuple[Path, bool, list[str], list[Any]], broken: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity that rose, or is not what the files give again."""
    place, _, _, kept = told
    for name in ("adapter", "merged"):
        shutil.rmtree(place / name)
    monkeypatch.setattr(demo_qlora, "LENGTH", 32)
    monkeypatch.setattr(demo_qlora, "train", lambda *_: replace(kept[0], **broken))
    said: list[str] = []
    assert not demo_qlora.trained_and_merged(
        place / "recipe.yaml", place / "base", place, place / "held-out.txt", said.append
    )


def test_no_line_of_the_held_out_text_is_trained_on(tmp_path: Path) -> None:
    seen = demo_qlora.write_topics(tmp_path / "a", demo_qlora.TOPICS).read_text("utf-8")
    unseen = demo_qlora.write_topics(tmp_path / "b", demo_qlora.HELD_OUT).read_text("utf-8")
    lines = [line.strip() for line in unseen[: demo_qlora.HELD_OUT_CHARACTERS].splitlines() if len(line.strip()) > 30]
    assert len(lines) > 40 and not [line for line in lines if line in seen]
