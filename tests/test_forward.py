"""A forward reads the loss that transformers gives, whatever the format; a reported loss is explained or left open."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tensorkeep.diagnosis.checks import b01_buffer_uninitialised as b01
from tensorkeep.diagnosis.checks import l01_loss_too_high as l01
from tensorkeep.diagnosis.live.forward import Forward, measure, symptoms
from tensorkeep.diagnosis.live.reported import explain_loss
from tensorkeep.errors import Inconclusive
from tensorkeep.formats.view import read
from tests.checkpoints import hf_tensors, titan_state, write_flame, write_model, write_titan

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
WORDS = [f"w{i}" for i in range(80)]
TEXT = " ".join(WORDS[(i * i + 3 * (i // 7)) % 80] for i in range(700))


def write_tokenizer(folder: Path, bos: bool = False) -> None:
    """A tokenizer of whole words: id i + 3 is `w{i}`."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {"<u>": 0, "<s>": 1, "a": 2, **{w: i + 3 for i, w in enumerate(WORDS)}}, unk_token="<u>"
        )
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in three formats, its tokenizer beside the hf folder."""
    folder = tmp_path_factory.mktemp("forward")
    model = write_model(folder / "hf", "Llama", dtype=torch.float32, initializer_range=0.3, max_position_embeddings=256)
    write_tokenizer(folder / "hf")
    write_flame(folder / "flame", model.state_dict())
    write_titan(folder / "titan", titan_state(hf_tensors(folder / "hf"), model.config))
    return folder


def pieces() -> torch.Tensor:
    """The same pieces as `measure` takes, by its description: equal lengths, spread evenly, no remainder."""
    ids = [int(w[1:]) + 3 for w in TEXT.split()]
    return torch.tensor([ids[s : s + 256] for s in (0, 444)])


def test_the_loss_is_the_one_transformers_gives(made: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "hf").eval()
    ids = pieces()
    seen = measure(read(made / "hf"), TEXT)
    assert seen.loss == pytest.approx(float(model(ids, labels=ids).loss.detach()), abs=1e-5) and seen.tokens == 512
    losses = functional.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").detach()
    assert seen.early == pytest.approx(float(losses[:, :32].mean()), abs=1e-4)
    assert seen.late == pytest.approx(float(losses[:, 192:].mean()), abs=1e-4)
    assert seen.leak < 1e-4 and seen.uniform == pytest.approx(math.log(96)) and list(l01.judge(seen)) == []


@pytest.mark.parametrize("form", ["flame/checkpoint/step-0", "titan"])
def test_every_format_gives_the_reference_bit_for_bit(made: Path, form: str) -> None:
    seen = measure(read(made / form), TEXT, read(made / "hf"))
    assert (
        seen.max_logit_difference == 0.0 and seen.loss == seen.reference_loss and seen.kl == pytest.approx(0, abs=1e-6)
    )
    document = json.loads(json.dumps(seen.to_json()))
    assert document["loss"] == seen.loss and document["loading"] == {}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("Olmo2", {}),
        ("Qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_other_architectures_run_from_dcp_as_from_hf(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    write_model(tmp_path / "hf", kind, dtype=torch.float32, initializer_range=0.3, **options)
    write_tokenizer(tmp_path / "hf")
    state = {n: t for n, t in hf_tensors(tmp_path / "hf").items()}
    step = write_flame(tmp_path / "flame", state)
    seen = measure(read(step), TEXT, read(tmp_path / "hf"))
    assert seen.max_logit_difference == 0.0 and seen.loading == {}


def test_a_fault_moves_the_loss_and_missing_tensors_are_told(made: Path, tmp_path: Path) -> None:
    state = hf_tensors(made / "hf")
    state["model.norm.weight"] = torch.zeros(32)
    del state["model.layers.1.mlp.up_proj.weight"]
    step = write_flame(tmp_path, state)
    seen = measure(read(step), TEXT, read(made / "hf"))
    assert seen.loss == pytest.approx(math.log(96), abs=1e-4) and seen.loading == {
        "missing_keys": ["model.layers.1.mlp.up_proj.weight"]
    }
    assert "ln V" in symptoms(seen)[0]
    again = measure(read(step), TEXT, read(made / "hf"))
    assert again == seen  # what is missing is drawn from a fixed seed


def test_what_cannot_be_run_is_inconclusive(made: Path, tmp_path: Path) -> None:
    with pytest.raises(Inconclusive, match="no config"):
        measure(read(write_flame(tmp_path, hf_tensors(made / "hf"))), TEXT)
    with pytest.raises(Inconclusive, match="fewest"):
        measure(read(made / "hf"), "w1 w2 w3")
    with pytest.raises(Inconclusive, match="cannot be read"):
        measure(read(made / "hf"), tmp_path / "absent.txt")
    write_model(tmp_path / "bare", "Llama")
    with pytest.raises(Inconclusive, match="tokenizer"):
        measure(read(tmp_path / "bare"), TEXT)
    write_model(tmp_path / "small", "Llama", vocab_size=40)
    write_tokenizer(tmp_path / "small")
    with pytest.raises(Inconclusive, match="another model's tokenizer"):
        measure(read(tmp_path / "small"), TEXT)


def test_a_bos_that_the_tokenizer_adds_is_in_front_of_every_piece(made: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "Llama", dtype=torch.float32, initializer_range=0.3, max_position_embeddings=256)
    write_tokenizer(tmp_path / "hf", bos=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = pieces()
    logits = model(torch.cat([torch.full((2, 1), 1), ids], dim=1)).logits.detach()[:, 1:]
    wanted = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
    assert measure(read(tmp_path / "hf"), TEXT).loss == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize(
    ("figures", "word"),
    [
        ({"loss": 5.48, "early": 5.3, "late": 5.4}, "RoPE"),  # inv_freq = 0, measured on SmolLM2
        ({"loss": 10.803, "entropy": 10.8027}, "ln V"),
        ({"loss": 10.92, "entropy": 10.7, "top1": 0.0}, "fresh"),
        ({"loss": 23.2}, "swapped"),
        ({"loss": 2.48, "leak": 0.7, "reference_loss": 2.89}, "causal"),
        ({"loss": 9.66, "offsets": {"0": 11.3, "2": 2.9}}, "distance 2"),
        ({"loss": float("nan")}, "not finite"),
    ],
)
def test_known_patterns_are_put_into_words(figures: dict[str, Any], word: str) -> None:
    seen = Forward(**{"uniform": 10.8027, "entropy": 2.6, "top1": 0.4, **figures})
    assert any(word in s for s in symptoms(seen))
    assert (
        symptoms(
            Forward(
                2.887, early=3.87, late=2.42, offsets={"0": 11.3, "2": 9.66}, uniform=10.8027, entropy=2.58, top1=0.434
            )
        )
        == []
    )


def test_a_model_trained_with_shifted_labels_or_without_a_mask_is_l01() -> None:
    shifted = Forward(9.66, offsets={"0": 11.3, "2": 2.9}, uniform=10.8)
    leaking = Forward(2.48, leak=0.7, uniform=10.8)
    assert [f.code for s in (shifted, leaking) for f in l01.judge(s)] == ["L01", "L01"]
    assert list(l01.judge(Forward(5.4, offsets={"0": 11.3, "2": 9.66}, uniform=10.8))) == []


# -- reported losses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(made: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(made / "hf").eval()


def batch(padded: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 83, (3, 40), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 25:] = mask[2, 31:] = 0
        ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}


def by_hand(model: Any, given: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each mistake computed as somebody would make it."""
    ids, mask = given["input_ids"], given.get("attention_mask", torch.ones_like(given["input_ids"]))
    logits = model(**given).logits.detach()
    labels = ids.masked_fill(mask == 0, -100)

    def ce(x: torch.Tensor, y: torch.Tensor, **options: Any) -> float:
        return float(functional.cross_entropy(x.reshape(-1, x.shape[-1]), y.reshape(-1), **options))

    right = ce(logits[:, :-1], labels[:, 1:])
    return {
        "right": right,
        "not shifted": ce(logits, labels),
        "shifted twice": ce(logits[:, :-2], labels[:, 2:]),
        "shifted three times": ce(logits[:, :-3], labels[:, 3:]),
        "smoothing": ce(logits[:, :-1], labels[:, 1:], label_smoothing=0.1),
        "softmax": ce(logits.softmax(-1)[:, :-1], labels[:, 1:]),
        "sum over tokens instead": ce(logits[:, :-1], labels[:, 1:], reduction="sum"),
        "bits": right / math.log(2),
        "8 accumulated": 8 * right,
        "division by 4": right / 4,
        "padding (or the prompt) counted": ce(logits[:, :-1], ids[:, 1:]),
    }


@pytest.mark.parametrize("padded", [False, True])
def test_a_reported_loss_is_explained_by_the_mistake_that_gives_it(model: Any, padded: bool) -> None:
    given = batch(padded)
    numbers = by_hand(model, given)
    assert explain_loss(model, given, numbers.pop("right")) == []
    if not padded:
        del numbers["padding (or the prompt) counted"]
    for name, value in numbers.items():
        (found,) = explain_loss(model, given, value)
        assert found.code == "L01" and name in found.evidence["fits"], (name, found.evidence["fits"])


def test_a_lost_causal_mask_and_packing_are_explained(model: Any) -> None:
    given = batch()
    ids = given["input_ids"]
    seen = model(input_ids=ids, attention_mask=torch.zeros(3, 1, 40, 40)).logits.detach()
    value = float(functional.cross_entropy(seen[:, :-1].reshape(-1, 96), ids[:, 1:].reshape(-1)))
    assert "causal" in explain_loss(model, given, value)[0].evidence["fits"]


def test_labels_that_the_data_shifted_are_recognised(model: Any) -> None:
    ids = batch()["input_ids"]
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    right = float(model(ids, labels=ids).loss.detach())
    twice = float(model(ids, labels=labels).loss.detach())  # transformers shifts once more
    assert explain_loss(model, {"input_ids": ids, "labels": labels}, right) == []
    assert "twice" in explain_loss(model, {"input_ids": ids, "labels": labels}, twice)[0].evidence["fits"]


def test_what_no_mistake_explains_is_inconclusive_and_the_model_is_left_as_it_was(model: Any) -> None:
    model.train()
    with pytest.raises(Inconclusive, match="none of the known"):
        explain_loss(model, batch(), 3.14159)
    assert model.training and model.model.layers[0].training
    model.eval()
    with pytest.raises(Inconclusive, match="input_ids"):
        explain_loss(model, {"labels": batch()["input_ids"]}, 1.0)


# -- B01 from a folder ------------------------------------------------------------------------------------------------


def test_stored_frequencies_are_checked_against_the_config(made: Path, tmp_path: Path) -> None:
    from tensorkeep.diagnosis.evidence.case import Case

    state = hf_tensors(made / "hf")
    right = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    config = json.loads((made / "hf" / "config.json").read_text())
    for scale, count in ((1.0, 0), (0.25, 1)):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = right * scale
        step = write_flame(tmp_path / f"s{scale}", state)
        case = Case(str(step), view=read(step), config=config)
        assert [f.severity for f in b01.check(case)] == ["error"] * count
    old = Case(str(step), view=read(made / "hf"), config={**config, "transformers_version": "4.57.3"}, target="flame")
    assert [f.severity for f in b01.check(old)] == ["info"]
