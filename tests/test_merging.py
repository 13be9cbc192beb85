"""Merges: the exact sum rounded once, every variant against PEFT, refusals, and the mistakes of other mergers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorkeep.adapters import merging
from tensorkeep.adapters._view import round_to
from tensorkeep.adapters.merging import base_digests, figures, merge, overall, refuse_merged_before, refuse_other_base
from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.proof import read_certificate
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.quantization import encoding as quant_encoding
from tensorkeep.quantization.encoding import Encoding
from tests.helpers import EMBEDDING, HEAD, LLAMA, assert_same, held, model_tensors, refused, write_hf
from tests.parity import qlora
from tests.parity.outcome import be_quiet
from tests.parity.qlora import variant

FAST = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Q, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], name: str = "adapter_model.safetensors", **config: Any
) -> Path:
    write_hf(folder, {f"base_model.model.{n}": t for n, t in tensors.items()})
    (folder / "model.safetensors").rename(folder / name)
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def pair(module: str, rows: int = 8, columns: int = 8, rank: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=draw),
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=draw),
    }


def merged(base: Path, *adapters: tuple[Path, float], out: Path, to: str = "hf", **options: Any) -> Any:
    job = plan_merge(read(base), open_adapters([(read(a), w) for a, w in adapters]), to, **options)
    return job, merge(job, str(out), to)


def update(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


@FAST
@given(
    st.integers(1, 9),
    st.lists(st.sampled_from([1.0, 0.5, -0.25, 3.0]), min_size=1, max_size=3),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 99),
)
def test_a_merge_is_the_exact_sum_rounded_once(
    tmp_path_factory: Any, rank: int, weights: list[float], dtype: str, seed: int
) -> None:
    place = tmp_path_factory.mktemp("m")
    tensors = model_tensors(dtype=DTYPES[dtype])
    base = write_hf(place / "base", tensors, LLAMA)
    made = [pair(Q, rank=rank, seed=seed + i) for i in range(len(weights))]
    folders = [write_adapter(place / f"a{i}", m, r=rank, lora_alpha=2 * rank) for i, m in enumerate(made)]
    merged(base, *zip(folders, weights), out=place / "out")
    exact = tensors[f"{Q}.weight"].double() + sum(w * 2 * update(m, Q) for w, m in zip(weights, made))
    wanted = torch.from_numpy(np.asarray(round_to(exact.numpy(), dtype)).astype(np.float32)).to(DTYPES[dtype])
    ours = held(place / "out")
    assert torch.equal(ours[f"{Q}.weight"], wanted)
    assert_same(
        {n: t for n, t in ours.items() if n != f"{Q}.weight"}, {n: t for n, t in tensors.items() if n != f"{Q}.weight"}
    )


def test_float64_is_rounded_to_bf16_once() -> None:
    """Just above the middle of two bfloat16: by way of float32 it would fall on the middle, and from there to even."""
    value = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-40])
    assert round_to(value, "BF16").astype(np.float64).tolist() == [1 + 2**-7, 1.0, 1.0, 1 + 2**-6, -1 - 2**-7]


@pytest.mark.filterwarnings("ignore")
def test_every_variant_of_an_odd_geometry_is_peft_s(tmp_path: Path) -> None:
    """Patterns, rsLoRA, DoRA, embeddings, saved modules, on floats and every quantized form; read, written, damaged."""
    be_quiet()
    place = variant.write(
        tmp_path / "odd", ("nf4_dq", "int8"), ("adapter_patterns", "adapter_rslora_dora"), num_hidden_layers=1
    )
    found = list(qlora.cases(tmp_path, tmp_path / "work"))
    assert [o.line for o in found if not o.figure <= o.tolerance] == [] and len(found) > 30
    assert place.is_dir()


@pytest.mark.filterwarnings("ignore")
def test_conv1d_and_biases_are_peft_s(tmp_path: Path) -> None:
    """GPT-2 keeps [in, out]; its biases train too; DoRA's lengths then run over columns."""
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    be_quiet()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=12, n_head=2, n_layer=1, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    ids = torch.arange(8)[None]
    for label, options in {
        "dora": {"use_dora": True},
        "bias": {"bias": "all"},
        "lora_bias": {"lora_bias": True},
    }.items():
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        tuned = get_peft_model(
            model,
            LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **options),
        )
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0.3, 0.2)
        tuned.save_pretrained(tmp_path / label)
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
        wanted = PeftModel.from_pretrained(model, str(tmp_path / label)).eval()(input_ids=ids).logits
        merged(tmp_path / "base", (tmp_path / label, 1.0), out=tmp_path / f"{label}-merged")
        again, info = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path / f"{label}-merged", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert qlora.relative(again.eval()(input_ids=ids).logits, wanted) < 2e-6, label


def test_a_convolution_s_update_is_peft_s(tmp_path: Path) -> None:
    """A ViT's patch embedding: A is [r, in, *kernel], B [out, r, 1, 1]."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["projection"]))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    merged(tmp_path / "base", (tmp_path / "adapter", 1.0), out=tmp_path / "merged")
    ours, before = held(tmp_path / "merged"), held(tmp_path / "base")
    (changed,) = (n for n in ours if not torch.equal(ours[n], before[n]))
    wanted = tuned.merge_and_unload().state_dict()[changed]
    assert changed.endswith("projection.weight") and qlora.relative(ours[changed], wanted) < 1e-6
    assert ours.keys() == before.keys()


# -- quantized bases --------------------------------------------------------------------------------------------------


def quantized_case(tmp_path: Path, size: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Path, Path]:
    draw = torch.Generator().manual_seed(0)
    tensors = model_tensors() | {f"{Q}.weight": torch.randn(96, 160, generator=draw)}
    adapter = {n: t * size for n, t in pair(Q, 96, 160, seed=4).items()}
    quantization = {"kind": "nf4", "block": 64, "double": True, "modules": [Q]}
    return (
        tensors,
        adapter,
        write_hf(tmp_path / "base", tensors, LLAMA),
        write_adapter(tmp_path / "ours", adapter, "adapter.safetensors", quantization=quantization),
    )


def test_an_adapter_of_a_quantized_base_is_merged_onto_what_it_was_trained_on(tmp_path: Path) -> None:
    tensors, adapter, base, folder = quantized_case(tmp_path, 0.3)
    job, done = merged(base, (folder, 1.0), out=tmp_path / "trained")
    weight = tensors[f"{Q}.weight"].numpy()
    seen = quant_encoding.through(weight, Encoding("nf4", 64, True))
    wanted = (torch.from_numpy(seen).double() + 1.5 * update(adapter, Q)).float()
    assert torch.equal(held(tmp_path / "trained")[f"{Q}.weight"], wanted)
    distance = float(np.linalg.norm(seen - weight) / np.linalg.norm(seen))
    assert overall(done.moved)["original_distance"] == pytest.approx(distance, rel=1e-5) and 0.08 < distance < 0.11
    merged(base, (folder, 1.0), out=tmp_path / "original", onto="original")
    exact = (tensors[f"{Q}.weight"].double() + 1.5 * update(adapter, Q)).float()
    assert torch.equal(held(tmp_path / "original")[f"{Q}.weight"], exact)
    assert job.kind == "nf4 (double)"


def test_requantizing_would_erase_a_small_update_and_ours_keeps_it(tmp_path: Path) -> None:
    """PEFT merges into the 4-bit weight and quantizes again: of an update of 2 % next to nothing survives."""
    tensors, adapter, base, folder = quantized_case(tmp_path, 0.1)
    job, done = merged(base, (folder, 1.0), out=tmp_path / "out")
    (row,) = figures(job, done.moved)
    seen = quant_encoding.through(tensors[f"{Q}.weight"].numpy(), Encoding("nf4", 64, True)).astype(np.float64)
    delta = 1.5 * update(adapter, Q).numpy()
    again = quant_encoding.through((seen + delta).astype(np.float32), Encoding("nf4", 64, True)).astype(np.float64)
    survives = float(((again - seen) * delta).sum() / (delta**2).sum())
    assert row["kept"] == pytest.approx(survives, abs=1e-6) and survives < 0.25
    ours = held(tmp_path / "out")[f"{Q}.weight"].double().numpy() - seen
    assert float((ours * delta).sum() / (delta**2).sum()) == pytest.approx(1, abs=1e-5)


def test_rounding_twice_loses_what_rounding_once_keeps(tmp_path: Path) -> None:
    """MiniMind adds fp16(B A) to fp16 weights and rounds again."""
    tensors = {n: t.half() for n, t in model_tensors().items()}
    adapter = {n: t.half() for n, t in pair(Q, seed=7).items()}
    merged(
        write_hf(tmp_path / "base", tensors, LLAMA),
        (write_adapter(tmp_path / "a", adapter, lora_alpha=2), 1.0),
        out=tmp_path / "out",
    )
    exact = tensors[f"{Q}.weight"].double() + update(adapter, Q)
    ours = held(tmp_path / "out")[f"{Q}.weight"].double()
    twice = (tensors[f"{Q}.weight"] + update(adapter, Q).half()).double()
    assert (ours - exact).square().sum() < 0.8 * (twice - exact).square().sum()


# -- ties, refusals ---------------------------------------------------------------------------------------------------


def tied(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    tensors = model_tensors(head=False)
    return tensors, write_hf(tmp_path / "base", tensors, {**LLAMA, "tie_word_embeddings": True})


def test_a_tie_is_never_broken_unasked(tmp_path: Path) -> None:
    tensors, base = tied(tmp_path)
    folder = write_adapter(tmp_path / "a", pair("lm_head", rows=10))
    with refused("T01", "lm_head", "--untie"):
        plan_merge(read(base), open_adapters([(read(folder), 1.0)]))
    merged(base, (folder, 1.0), out=tmp_path / "out", untie=True)
    ours = held(tmp_path / "out")
    assert torch.equal(ours[EMBEDDING], tensors[EMBEDDING]) and not torch.equal(ours[HEAD], ours[EMBEDDING])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    together = write_adapter(tmp_path / "b", pair("lm_head", rows=10), ensure_weight_tying=True)
    merged(base, (together, 1.0), out=tmp_path / "both")
    assert torch.equal(held(tmp_path / "both")[EMBEDDING], ours[HEAD]) and HEAD not in held(tmp_path / "both")


def test_what_fits_no_weight_is_refused_with_near_misses(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", model_tensors(), LLAMA)
    for module, rows, words in ((Q.replace("q_proj", "q_prj"), 8, "did you mean"), (Q, 9, "made for [9, 8]")):
        folder = write_adapter(tmp_path / f"a{rows}{module[-5:]}", pair(module, rows))
        with refused("A01", words):
            plan_merge(read(base), open_adapters([(read(folder), 1.0)]))


@pytest.mark.parametrize(
    ("config", "code", "word"),
    [
        ({"peft_type": "VERA"}, "A01", "VeRA adapter saved without"),
        ({"peft_type": "HRA"}, "A01", "is a HRA adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "A01", "pissa"),
        ({"use_qalora": True}, "A01", "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "A01", "alora"),
        ({"r": 3}, "A02", "rank 2"),
        ({"lora_alpha": "x"}, "A02", "lora_alpha"),
        ({"use_dora": True}, "A02", "magnitude"),
    ],
)
def test_what_is_no_sum_is_refused_by_name(tmp_path: Path, config: dict[str, Any], code: str, word: str) -> None:
    with refused(code, word):
        open_adapters([(read(write_adapter(tmp_path / "a", pair(Q), **config)), 1.0)])


def test_merging_twice_is_refused_by_certificate_and_by_the_weights(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = model_tensors() | {f"{Q}.weight": torch.randn(96, 160, generator=draw)}
    base, folder = write_hf(tmp_path / "base", tensors, LLAMA), write_adapter(tmp_path / "a", pair(Q, 96, 160))
    _, done = merged(base, (folder, 1.0), out=tmp_path / "once")
    said = read_certificate(read(tmp_path / "once"))["merge"]  # type: ignore[index]
    assert said["adapters"][0]["digest"] == open_adapters([(read(folder), 1.0)])[0].digest
    assert said["terms"] == {f"{Q}.weight": [{"adapter": 0, "kind": "pair", "scale": 1.5, "weight": 1.0}]}
    assert done.base_digest == base_digests(read(base))[0]
    for weight in (1.0, -1.0):
        with refused("A03", "already"):
            refuse_merged_before(read(tmp_path / "once"), open_adapters([(read(folder), weight)]))
    (tmp_path / "once" / "tensorkeep.json").unlink()
    with refused("A03", "once (coefficient"):
        merged(tmp_path / "once", (folder, 1.0), out=tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_another_base_is_refused_with_both_digests(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", model_tensors(), LLAMA)
    other = write_hf(tmp_path / "other", {n: t + 1 for n, t in model_tensors().items()}, LLAMA)
    digest = base_digests(read(base))[0]
    sources = open_adapters(
        [(read(write_adapter(tmp_path / "a", pair(Q), "adapter.safetensors", base_digest=digest)), 1.0)]
    )
    refuse_other_base(read(base), sources)
    with refused("A04", digest, base_digests(read(other))[0]):
        refuse_other_base(read(other), sources)


def test_a_base_of_another_type_than_the_one_it_names_is_refused(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", model_tensors(), LLAMA)
    other = write_hf(tmp_path / "other", model_tensors(), {**LLAMA, "model_type": "qwen2"})
    folder = write_adapter(tmp_path / "a", pair(Q), base_model_name_or_path=str(tmp_path / "base"))
    sources = open_adapters([(read(folder), 1.0)])
    refuse_other_base(read(base), sources)
    with refused("A04", "a llama", "is a qwen2"):
        refuse_other_base(read(other), sources)


def test_an_adapter_that_spoils_weights_leaves_no_sink(tmp_path: Path) -> None:
    tensors = pair(Q)
    tensors[f"{Q}.lora_B.weight"][0, 0] = float("nan")
    base = write_hf(tmp_path / "base", model_tensors(), LLAMA)
    with refused("V01", "not finite"):
        merged(base, (write_adapter(tmp_path / "a", tensors), 1.0), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_computation_that_does_not_repeat_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_hf(tmp_path / "base", model_tensors(), LLAMA)
    job = plan_merge(read(base), open_adapters([(read(write_adapter(tmp_path / "a", pair(Q))), 1.0)]))
    real = merging.write_tensor

    def flipped(*arguments: Any) -> Any:
        sums = real(*arguments)
        sums.digest = "0" * 32
        return sums

    monkeypatch.setattr(merging, "write_tensor", flipped)
    with refused("F03", "computed twice"):
        merge(job, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# -- folders ----------------------------------------------------------------------------------------------------------


def test_our_folder_becomes_peft_s_exactly(tmp_path: Path) -> None:
    ours = write_adapter(
        tmp_path / "ours",
        pair(Q),
        "adapter.safetensors",
        base_digest="0" * 32,
        kind="lora",
        alpha_pattern={"q_proj": 5},
    )
    theirs = write_adapter(tmp_path / "theirs", pair(Q), alpha_pattern={"q_proj": 5})
    plan = make_plan([read(ours)], "peft")
    convert(plan, str(tmp_path / "out"), "peft")
    assert_same(held(tmp_path / "out"), held(theirs))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() and not plan.notes
    said = read(tmp_path / "out").metadata["adapter"]  # the weights' header says what PEFT's config has no field for
    assert (said["base_digest"], said["kind"]) == ("0" * 32, "lora")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == json.loads(
        (theirs / "adapter_config.json").read_text()
    )


@pytest.mark.parametrize(("to", "naming"), [("dcp", "torchtitan"), ("pth", None), ("dcp", "hf")])
def test_every_sink_holds_the_same_weights(tmp_path: Path, to: str, naming: str | None) -> None:
    base, folder = (
        write_hf(tmp_path / "base", model_tensors(), LLAMA),
        write_adapter(tmp_path / "a", pair(Q) | pair(LAST)),
    )
    merged(base, (folder, 1.0), out=tmp_path / "hf")
    merged(base, (folder, 1.0), out=tmp_path / "other", to=to, naming=naming)
    convert(make_plan([read(tmp_path / "other")], "hf"), str(tmp_path / "back"), "hf")
    assert_same(held(tmp_path / "back"), held(tmp_path / "hf"))
    merged(tmp_path / "other", (write_adapter(tmp_path / "b", pair(LAST, seed=9)), 1.0), out=tmp_path / "more")
    merged(tmp_path / "hf", (tmp_path / "b", 1.0), out=tmp_path / "same")
    assert_same(held(tmp_path / "more"), held(tmp_path / "same"))


def test_an_adapter_that_no_weights_can_hold_says_how_it_is_used(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {"prompt_embeddings": torch.ones(4, 8)}, peft_type="PROMPT_TUNING")
    with pytest.raises(TensorkeepError, match="PROMPT_TUNING") as caught:
        open_adapters([(read(folder), 1.0)])
    assert caught.value.code == "A01" and "beside its base" in (caught.value.hint or "")
