"""The parity runners on small folders of their layout, and on the full fixtures where those are at hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.checkpoints import write_case, write_trainer
from tests.parity import conversion, minimind
from tests.parity.outcome import Outcome, be_quiet, report

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT.parent / "shared" / "fixtures"
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def failures(outcomes: Iterable[Outcome]) -> tuple[list[str], int]:
    found = list(outcomes)
    return [o.line for o in found if not o.figure <= o.tolerance], len(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes and faults that the shared fixtures leave out."""
    be_quiet()
    place = tmp_path_factory.mktemp("cases")
    write_case(
        place / "llama_bias_11_layers",
        "Llama",
        attention_bias=True,
        mlp_bias=True,
        num_hidden_layers=11,
        hidden_size=16,
        intermediate_size=24,
    )
    write_case(
        place / "llama_scaled",
        "Llama",
        rope_parameters=SCALED,
        head_dim=24,
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    write_case(place / "llama_tie_conflict", "Llama", tie_word_embeddings=True, head=True)
    write_case(place / "qwen3_tied_bias", "Qwen3", attention_bias=True, head_dim=16, tie_word_embeddings=True)
    write_case(place / "olmo2_sharded", "Olmo2", titan=False, shards="20KB", tie_word_embeddings=False)
    write_trainer(place / "titan030_trainer_llama_scaled", place / "llama_scaled" / "hf")
    (place / "sick_llama" / "c00").mkdir(parents=True)
    return place


@pytest.mark.filterwarnings("ignore")
def test_conversion(folder: Path, tmp_path: Path) -> None:
    wrong, ran = failures(conversion.cases(folder, tmp_path))
    assert wrong == [] and ran > 80


@pytest.mark.filterwarnings("ignore")
def test_conversion_fails_where_a_tensor_differs(folder: Path, tmp_path: Path) -> None:
    """A runner that cannot fail proves nothing: one bit of one tensor, and the config of another RoPE."""
    import shutil

    for name in ("olmo2_sharded", "llama_scaled"):
        shutil.copytree(folder / name, tmp_path / "in" / name)
    data = next((tmp_path / "in" / "olmo2_sharded" / "hf").glob("model-00001*.safetensors"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    config = tmp_path / "in" / "llama_scaled" / "hf" / "config.json"
    config.write_text(config.read_text().replace('"factor": 8.0', '"factor": 2.0'))
    wrong, _ = failures(conversion.cases(tmp_path / "in", tmp_path / "out"))
    assert any("olmo2_sharded/flame_dcp_tf5_to_hf 1 0" in line for line in wrong)
    assert any("llama_scaled" in line and "logits" in line for line in wrong)


def test_minimind(tmp_path: Path) -> None:
    be_quiet()
    wrong, ran = failures(minimind.cases(ROOT / "tests" / "data" / "minimind", tmp_path))
    assert wrong == [] and ran >= 19


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("runner", [conversion, minimind], ids=["conversion", "minimind"])
def test_shared_fixtures(runner: object, tmp_path: Path) -> None:
    place = FIXTURES / str(runner.__name__).rpartition(".")[2] / "open"  # type: ignore[attr-defined]
    if not place.is_dir():
        pytest.skip(f"{place} is not there: the fixtures are kept outside the repository")
    be_quiet()
    assert failures(runner.cases(place, tmp_path))[0] == []  # type: ignore[attr-defined]


def test_the_report_counts_failures(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, nan = Outcome("a case", 0, 0), Outcome("b", 2, 1, "worse"), Outcome("c", float("nan"), 1)
    assert (report([good]), report([good, bad]), report([nan]), report([])) == (0, 1, 1, 1)
    assert capsys.readouterr().out.splitlines()[:3] == ["PASS a_case 0 0", "PASS a_case 0 0", "FAIL b 2 1  (worse)"]
