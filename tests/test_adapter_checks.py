"""Checks of adapters: do they fit, does the config describe them, are they merged, is it the right base?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorkeep.cli import main
from tensorkeep.diagnosis.checks.a04_another_base import base_digest
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.formats.view import read
from tests import quant_files as files
from tests.quant_files import QLORA, Tensors, findings, gaussian, matrices, model, needs_qlora, said

FAST = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def lora(tensors: Tensors, rank: int = 4, seed: int = 0, size: float = 0.1) -> Tensors:
    out: Tensors = {}
    for i, name in enumerate(matrices(tensors)):
        rows, columns = tensors[name].shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        out[f"{stem}.lora_A.weight"] = gaussian((rank, columns), seed + i, 0.1)
        out[f"{stem}.lora_B.weight"] = gaussian((rows, rank), seed + 50 + i, size)
    return out


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> str:
    files.write(folder, tensors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    document = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "base_model_name_or_path": "base",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return str(folder)


def merged(tensors: Tensors, adapter: Tensors, times: float = 1.0, scale: float = 2.0) -> Tensors:
    out = dict(tensors)
    for name in matrices(tensors):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        out[name] = (
            tensors[name] + times * scale * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
        ).astype(np.float32)
    return out


@needs_qlora
@pytest.mark.parametrize("adapter", ["adapter_lora", "adapter_rslora_dora"])
@pytest.mark.parametrize("base", [None, "base", "quant_nf4_dq", "quant_int8", "quant_fp4"])
def test_sound_adapter_fixtures_raise_nothing(adapter: str, base: str | None) -> None:
    found, undecided = findings(QLORA / adapter, QLORA / base if base else None)
    assert (said(found), said(found, "warning"), undecided) == (set(), set(), set())


@needs_qlora
def test_the_merged_fixture_is_recognised_from_every_side() -> None:
    whole = QLORA / "merged_lora.safetensors"
    assert said(findings(QLORA / "adapter_lora", whole)[0]) == {"A03"}
    for checkpoint, reference in ((whole, QLORA / "adapter_lora"), (whole, QLORA / "base")):
        found, _ = findings(checkpoint, reference)
        assert said(found) == set() and "A03" in said(found, "info")


def test_a_merged_model_is_a_model_beside_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No name of an adapter is one of its model's, which says nothing of the model."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from tests.language_files import save_model

    save_model(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    live = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    live.save_pretrained(tmp_path / "adapter")
    assert main(["merge", *(str(tmp_path / n) for n in ("base", "adapter", "merged"))]) == 0
    capsys.readouterr()
    assert main(["diagnose", str(tmp_path / "merged"), "--reference", str(tmp_path / "adapter"), "--json"]) == 0
    found = {f["code"]: f["severity"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found.get("A03") == "info" and "K05" not in found


def test_training_that_moved_the_norms_too_is_no_merged_adapter(tmp_path: Path) -> None:
    """A few steps change matrices by updates of low rank, as an adapter does, and everything else as well."""
    tensors = model(3)
    base = files.write(tmp_path / "base", tensors)
    merge = merged(tensors, lora(tensors, seed=4, size=0.3))
    trained = {n: t if t.ndim > 1 else t + np.float32(0.01) for n, t in merge.items()}
    for name, values, said_of in (("merged", merge, {"A03"}), ("trained", trained, set())):
        found, _ = findings(files.write(tmp_path / name, values), base)
        assert {"A03"} & said(found, "info") == said_of


@FAST
@given(st.integers(0, 40), st.sampled_from([0.03, 0.1, 0.3]))
def test_an_update_is_counted_in_the_weights(tmp_path: Path, seed: int, size: float) -> None:
    tensors, adapter = model(seed), lora(model(seed), seed=seed + 1, size=size)
    stored = write_adapter(tmp_path / "adapter", adapter)
    for times, as_base, as_checkpoint in ((0, set(), set()), (1, {"A03"}, set()), (2, {"A03"}, {"A03"})):
        whole = files.write(tmp_path / "model", merged(tensors, adapter, times))
        assert said(findings(stored, whole, "A")[0]) == as_base
        assert said(findings(whole, stored, "A")[0]) == as_checkpoint


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora(model(1, layers=3)))
    found, _ = findings(adapter, files.write(tmp_path / "short", model(1, layers=2)), "A")
    assert [(f.code, sorted(f.tensors)) for f in found if f.severity == "error"] == [
        ("A01", ["model.layers.2.self_attn.o_proj.weight", "model.layers.2.self_attn.q_proj.weight"])
    ]
    found, _ = findings(adapter, files.write(tmp_path / "narrow", model(1, layers=3, columns=64)), "A")
    assert [(f.code, len(f.tensors)) for f in found if f.severity == "error"] == [("A01", 6)]


@pytest.mark.parametrize(
    "change", [{"r": 8}, {"rank_pattern": {"q_proj": 2}}, {"lora_alpha": None}, {"lora_alpha": 0}, {"use_dora": True}]
)
def test_configs_that_do_not_describe_the_weights(tmp_path: Path, change: dict[str, Any]) -> None:
    assert said(findings(write_adapter(tmp_path, lora(model(1)), **change), None, "A")[0]) == {"A02"}


def test_halves_and_empty_promises(tmp_path: Path) -> None:
    tensors = lora(model(1))
    lost = next(n for n in tensors if "lora_B" in n)
    found, _ = findings(
        write_adapter(
            tmp_path, {n: t for n, t in tensors.items() if n != lost}, target_modules=["q_proj", "o_proj", "k_proj"]
        ),
        None,
        "A",
    )
    assert (said(found), said(found, "warning")) == ({"A02"}, {"A02"})


def test_the_base_is_told_by_its_digest_and_by_dora(tmp_path: Path) -> None:
    base, other = files.write(tmp_path / "base", model(1)), files.write(tmp_path / "other", model(2))
    signed = write_adapter(tmp_path / "signed", lora(model(1)), base_digest=base_digest(read(base)))
    assert said(findings(signed, base, "A")[0]) == set()
    assert said(findings(signed, other, "A")[0]) == {"A04"}
    tensors = lora(model(1), size=0.001)
    for name in matrices(model(1)):
        lengths = np.linalg.norm(model(1)[name], axis=1)
        tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = (
            lengths * np.random.default_rng(3).uniform(0.95, 1.05, lengths.size)
        ).astype(np.float32)
    dora = write_adapter(tmp_path / "dora", tensors, use_dora=True)
    assert said(findings(dora, base, "A")[0]) == set()
    assert said(findings(dora, other, "A")[0]) == {"A04"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["q_proj", "(a+)+$", "[", "x"]), inner, max_size=3)
    ),
)


@FAST
@given(
    st.sampled_from(
        "r lora_alpha rank_pattern alpha_pattern target_modules modules_to_save use_dora use_rslora base_digest".split()
    ),
    JSON,
)
def test_no_adapter_config_can_break_the_checks(tmp_path: Path, key: str, value: Any) -> None:
    stored = write_adapter(tmp_path / "adapter", lora(model(1, 1)), **{key: value})
    base = files.write(tmp_path / "base", model(1, 1))
    for reference in (None, base):
        found, _ = findings(stored, reference, "A")
        assert said(found) <= {"A02", "A04"}
        json.dumps([f.to_json() for f in found])


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4", "corda"])
def test_an_adapter_that_starts_as_a_part_of_its_base_is_not_merged_already(tmp_path: Path, start: str) -> None:
    """PiSSA puts the largest singular directions of the weight into A and B, so the base holds their product once."""
    tensors, adapter = model(3), {}
    for name in matrices(tensors):
        u, s, v = np.linalg.svd(tensors[name], full_matrices=False)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        root = np.sqrt(s[:4] / 2)  # the scale is 2
        adapter[f"{stem}.lora_A.weight"] = (root[:, None] * v[:4]).astype(np.float32)
        adapter[f"{stem}.lora_B.weight"] = (u[:, :4] * root).astype(np.float32)
    base = files.write(tmp_path / "base", tensors)
    plain = write_adapter(tmp_path / "plain", adapter)
    assert said(findings(plain, base)[0]) == {"A03"}
    odd = write_adapter(tmp_path / "odd", adapter, init_lora_weights=start)
    assert "A03" not in {f.code for f in findings(odd, base)[0]}


@pytest.mark.parametrize("half", ["A", "B"])
def test_an_adapter_that_does_nothing_is_a_warning(tmp_path: Path, half: str) -> None:
    tensors = model(4)
    adapter = lora(tensors)
    idle = {n: np.zeros_like(t) if f"lora_{half}" in n else t for n, t in adapter.items()}
    path = write_adapter(tmp_path / "idle", idle)
    base = files.write(tmp_path / "base", tensors)
    for reference in (None, base):
        found = diagnose(path, str(reference) if reference else None).findings
        assert [f.severity for f in found if f.code == "A05"] == ["warning"]
        assert not [f for f in found if f.code == "V05"]
    one = next(n for n in idle if f"lora_{half}" in n)
    other = write_adapter(tmp_path / "half", {**idle, one: adapter[one]})
    (found,) = [f for f in diagnose(other).findings if f.code == "A05"]
    module = one.removeprefix("base_model.model.").rpartition(".lora_")[0]
    assert found.evidence["idle"] == found.evidence["pairs"] - 1 and not any(module in n for n in found.tensors)
    assert not [f for f in diagnose(write_adapter(tmp_path / "whole", adapter)).findings if f.code == "A05"]
