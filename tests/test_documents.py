"""Packed documents without a mask: each gives what it gives alone, forward and back, and a mask is never made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import families
from torch import Tensor

from tensorkeep.language import _documents, losses
from tensorkeep.language._documents import attend, documents_of
from tensorkeep.language._fits_rows import attend_documents
from tensorkeep.language.data.batches import Collate, make_sample, targets_of
from tensorkeep.language.job import build, loop_of
from tensorkeep.language.losses import TokenLoss, plain_head
from tensorkeep.language.recipe_text import language_recipe
from tensorkeep.training.loop import fit
from tests.gpu import needs_gpu
from tests.language_files import model, save_model, save_tokenizer, texts

LENGTHS = [[4, 6, 3, 2], [8, 7]]  # tokens of each document of two rows of 15


def _positions(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def _alone(query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]]) -> Tensor:
    """Softmax attention written out, a document at a time, `[b, t, h, d]`."""
    group, rows = query.shape[1] // key.shape[1], []
    for row, sizes in enumerate(lengths):
        parts = []
        for at, n in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes):
            q, k, v = (x[row, :, at : at + n] for x in (query, key, value))
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(
                ~torch.ones(n, n).bool().tril().to(q.device), -1e300
            )
            parts.append((scores.softmax(-1) @ v).transpose(0, 1))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _inputs(heads: int, groups: int, tokens: int, width: int, **how: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2, tokens, n, width, generator=generator, dtype=torch.float64) for n in (heads, groups, groups)]
    return [x.to(**how).transpose(1, 2).requires_grad_() for x in made]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_document_attends_as_alone_in_float64(groups: int) -> None:
    taken = _inputs(4, groups, 15, 8)
    documents = documents_of(_positions(LENGTHS))
    assert documents.sizes.tolist() == [6, 8] and documents.bounds[:7].tolist() == [0, 4, 10, 13, 15, 23, 30]
    found, expected = attend(*taken, documents), _alone(*taken, LENGTHS)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    slope = torch.randn(found.shape, dtype=torch.float64)
    for one, other in zip(torch.autograd.grad(found, taken, slope), torch.autograd.grad(expected, taken, slope)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize("width", [64, 128])
def test_a_document_attends_as_alone_on_a_gpu(width: int) -> None:
    lengths = [[300, 1, 700, 23], [1024]]
    taken = _inputs(8, 2, 1024, width, device="cuda")
    half = [x.detach().to(torch.bfloat16).requires_grad_() for x in taken]
    found = attend(*half, documents_of(_positions(lengths).cuda()))  # type: ignore[arg-type]
    wide = [x.detach().double().requires_grad_() for x in half]
    expected = _alone(*wide, lengths)  # type: ignore[arg-type]
    assert float((found - expected).norm() / expected.norm()) < 1e-2
    slope = torch.randn(found.shape, dtype=torch.bfloat16, device="cuda")
    for one, other in zip(torch.autograd.grad(found, half, slope), torch.autograd.grad(expected, wide, slope.double())):
        assert float((one - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize(
    ("numbers", "most", "expected"),
    [
        (1 << 31, 9, 1),
        (1 << 31, 2, 3),
        (8 * (30 + 128 * 6), 9, 4),  # a head at a time: two of each group
        (8 * (30 + 128 * 6) * 3, 9, 2),  # a group of two heads, not three heads
        (8 * (12 + 128 * 2) * 2, 2, 8),
    ],
)
def test_launches_within_what_a_kernel_counts_give_what_one_gives(
    numbers: int, most: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, documents = _inputs(4, 2, 15, 8), documents_of(_positions(LENGTHS))
    slope = torch.randn(2, 15, 4, 8, dtype=torch.float64)
    whole = attend(*taken, documents)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(whole, taken, slope)
    monkeypatch.setattr(_documents, "_NUMBERS", numbers)
    monkeypatch.setattr(_documents, "_DOCUMENTS", most)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in taken]
    cuts = list(_documents.launches(flat[0], flat[1], documents.bounds, 6))
    assert len(cuts) == expected
    for cut in cuts:
        rows = cut.tokens.stop - cut.tokens.start + 128 * (len(cut.bounds) - 1)
        assert rows * (cut.heads.stop - cut.heads.start) * 8 <= numbers and len(cut.bounds) - 1 <= most
    parts = attend(*taken, documents)  # type: ignore[arg-type]
    assert torch.equal(parts, whole)
    for one, other in zip(torch.autograd.grad(parts, taken, slope), wanted):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_the_memory_of_short_documents_is_that_of_their_queries() -> None:
    query, key = (torch.empty(32_768, n, 128, device="meta") for n in (32, 8))
    for length, expected in ((4096, 1), (256, 2), (16, 8)):
        bounds = torch.arange(0, 32_769, length, dtype=torch.int32)
        cuts = list(_documents.launches(query, key, bounds, len(bounds) - 1))
        assert len(cuts) == expected and cuts[-1].heads.stop == 32 and cuts[-1].groups.stop == 8


@needs_gpu
@pytest.mark.parametrize(("tokens", "document"), [(1 << 18, 16), (1 << 20, 8192)])
def test_gradients_are_right_beyond_what_a_kernel_counts(tokens: int, document: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    how: Any = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    taken = [torch.randn(1, tokens, n, 128, **how).transpose(1, 2).requires_grad_() for n in (32, 8, 8)]
    slope = torch.randn(1, tokens, 32, 128, **how)
    positions = torch.arange(tokens, device="cuda")[None] % document
    found = attend(*taken, documents_of(positions))  # type: ignore[arg-type]
    grads = torch.autograd.grad(found, taken, slope)
    for start in (0, tokens // 2, tokens - 8192):
        own = slice(start, start + 8192)
        some = [x.detach()[:, :, own].requires_grad_() for x in taken]
        expected = attend(*some, documents_of(positions[:, own]))  # type: ignore[arg-type]
        assert torch.equal(found[:, own], expected)
        for one, other in zip(grads, torch.autograd.grad(expected, some, slope[:, own])):
            assert float((one[:, :, own] - other).float().norm() / other.float().norm()) < 1e-3


def _batch() -> dict[str, Tensor]:
    """Rows of unlike lengths, so that one is padded."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for sizes in ([4, 6, 3, 2], [8, 5]):
        ids = torch.randint(5, 300, (sum(sizes),), generator=generator).numpy()
        rows.append(make_sample(ids, [True] * len(ids), sizes))
    return Collate(0)(rows)


def _loss_and_gradients(made: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = TokenLoss(plain_head(made))(made, batch, targets_of(batch))["loss"]
    loss.backward()
    found = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2", "olmo2", "gemma", "cohere", "phi3"])
def test_losses_and_gradients_are_those_of_the_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = model(kind).double(), _batch()
    loss, gradients = _loss_and_gradients(made, batch)
    config = made.config.to_dict()
    assert attend_documents(made) == "" and made.config.to_dict() == config
    monkeypatch.setattr(losses, "block_mask", None)  # calling it fails
    found, theirs = _loss_and_gradients(made, batch)
    torch.testing.assert_close(found, loss, rtol=1e-10, atol=0)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-6, atol=1e-9)


def test_values_narrower_than_queries_and_attention_of_its_own() -> None:
    batch = _batch()
    batch["input_ids"] %= 60
    for name, why in (("deepseek_v3", ""), ("gpt2", ""), ("falcon", "not SDPA")):
        made = families.model_of(name).eval()
        with torch.no_grad():
            expected = losses.forward(made, batch).logits
            assert why in (said := attend_documents(made)) and bool(said) is bool(why)
            assert _documents.uses(made) is not bool(why)
            torch.testing.assert_close(losses.forward(made, batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_mask_stays_where_documents_do_not_reach_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = _batch()
    for kind, fields, why in (
        ("llama", {"attention_dropout": 0.1}, "dropout"),
        ("gemma2", {}, "not SDPA"),
        ("stablelm", {}, "do not reach"),  # its attention gets none of the model's arguments
    ):
        made = model(kind, **fields)
        implementation = made.config._attn_implementation
        before = losses.forward(made.eval(), batch).logits
        assert why in attend_documents(made) and made.config._attn_implementation == implementation
        assert torch.equal(losses.forward(made, batch).logits, before)
    wrong = model("llama")
    monkeypatch.setattr(_documents, "attend", lambda query, *_: query.transpose(1, 2))
    assert "not those of the mask" in attend_documents(wrong) and not _documents.uses(wrong)


def test_a_padded_batch_of_single_documents_is_attended_as_before() -> None:
    made = model("llama").eval()
    ids, seen = torch.tensor([[5, 6, 7, 0], [5, 9, 8, 7]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    before = made(input_ids=ids, attention_mask=seen).logits
    assert attend_documents(made) == ""
    assert torch.equal(made(input_ids=ids, attention_mask=seen).logits, before)


def test_a_packed_run_makes_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(tmp_path / "tok")
    texts(tmp_path / "a.jsonl")
    save_model(tmp_path / "base")
    said: list[str] = []
    made: list[int] = []
    rows = losses.block_mask
    monkeypatch.setattr(
        losses, "block_mask", lambda segments, dtype=None: made.append(segments.shape[1]) or rows(segments)
    )
    recipe = language_recipe(
        {
            "version": 2,
            "model": str(tmp_path / "base"),
            "tokenizer": str(tmp_path / "tok"),
            "data": {"files": str(tmp_path / "a.jsonl"), "length": 64, "packing": "first_fit"},
            "training": {"updates": 2, "batch_size": 2, "gradient_checkpointing": True},
            "evaluation": {"files": str(tmp_path / "a.jsonl")},
        }
    )
    job = build(recipe, tmp_path / "run", remark=said.append)
    fit(job, tmp_path / "run", loop_of(recipe, len(job.data)))
    assert made and set(made) == {12}  # the trial's alone
    assert not any("mask" in line for line in said)
