"""Losses: packed documents do not see each other, the head goes in chunks, preferences start at ln 2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._dpo import PreferenceLoss, answer_sums, with_reference
from tensorkeep.language.data.batches import Collate, block_mask, targets_of
from tensorkeep.language.data.chat import Chat
from tensorkeep.language.data.conversations import Preference
from tensorkeep.language.data.packing import plan
from tensorkeep.language.data.preferences import CollatePairs, Pairs, pairs_of
from tensorkeep.language.data.samples import PackedData
from tensorkeep.language.data.texts import records
from tensorkeep.language.data.tokens import Encoded, cached
from tensorkeep.language.losses import TokenLoss, cross_entropy_sum, headless, plain_head, refuse_packing
from tensorkeep.training.distributed import World
from tensorkeep.training.schedules import Schedule
from tensorkeep.training.sections import ScheduleConfig
from tests.language_files import model, preferences, tokenizer

KINDS = ("llama", "qwen3", "olmo2")
DOCUMENTS = [list(range(5 + i, 5 + i + n)) for i, n in enumerate((9, 4, 13, 2, 7, 5))]


def packed(tmp_path: Path, length: int, packing: Any) -> PackedData:
    stored = cached(tmp_path, f"{packing}", lambda: (Encoded(d) for d in DOCUMENTS), 320)
    return PackedData(stored, plan(stored.offsets, length, packing), "")


def whole(data: PackedData) -> dict[str, Tensor]:
    return Collate(0)([data.sample(i, torch.Generator()) for i in range(len(data))])


def gradients(made: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_have_the_losses_they_have_alone(tmp_path: Path, kind: str, attention: str) -> None:
    made = model(kind)
    made.config._attn_implementation = attention  # all versions from 4.51 read it at the forward
    loss = TokenLoss(plain_head(made))
    alone = 0.0
    for document in DOCUMENTS:
        ids = torch.tensor([document])
        logits = made(input_ids=ids).logits
        alone += float(nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").detach().double())
    batch = whole(packed(tmp_path, 13, "first_fit"))
    assert "segments" in batch and len(batch["input_ids"]) < len(DOCUMENTS)
    count = targets_of(batch)
    assert count == sum(len(d) - 1 for d in DOCUMENTS)
    together = float(loss(made, batch, 1.0)["loss"].detach())
    assert together / count == pytest.approx(alone / count, abs=1e-6)
    bare = {k: v for k, v in batch.items() if k in ("input_ids", "labels")}
    seen = float(loss(made, bare, 1.0)["loss"].detach())
    assert abs(seen / count - alone / count) > 1e-3  # without the mask documents see each other, and it shows


def test_rows_of_one_document_need_no_mask(tmp_path: Path) -> None:
    made = model("qwen3")
    batch = whole(packed(tmp_path, 13, "none"))
    assert "segments" not in batch
    loss = TokenLoss(plain_head(made))
    other = whole(packed(tmp_path, 13, "first_fit"))
    one, two = (float(loss(made, b, 10.0)["loss"].detach()) for b in (batch, other))
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_in_chunks_gives_loss_and_gradients_of_transformers(tmp_path: Path, kind: str) -> None:
    made = model(kind)
    batch = whole(packed(tmp_path, 13, "none"))
    count = targets_of(batch)
    theirs = made(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    theirs.backward()
    expected = gradients(made)
    assert plain_head(made)
    for plain in (True, False):
        ours = TokenLoss(plain, chunk=7)(made, batch, count)["loss"]
        ours.backward()
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
        found = gradients(made)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_chunks_do_not_change_the_sum() -> None:
    head, hidden = nn.Linear(8, 50, bias=True), torch.randn(33, 8, requires_grad=True)
    targets = torch.randint(50, (33,))
    for one in (cross_entropy_sum(hidden, head, targets, 10), cross_entropy_sum(hidden, head, targets, 100)):
        torch.testing.assert_close(one, nn.functional.cross_entropy(head(hidden), targets, reduction="sum"))
    assert float(cross_entropy_sum(hidden[:0], head, targets[:0])) == 0.0


def test_a_soft_cap_too_weak_to_show_in_small_logits_is_noticed_by_its_name() -> None:
    made = model("recurrent_gemma", logits_soft_cap=30.0, lru_width=32, attention_window_size=32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1e-3)
    assert not plain_head(made)


def test_a_head_that_is_more_than_a_matrix_is_noticed(tmp_path: Path) -> None:
    capped, scaled = model("gemma2", final_logit_softcapping=30.0), model("cohere", logit_scale=0.25)
    assert not plain_head(capped) and plain_head(scaled)  # a scale may as well be put on what goes into the head
    batch = whole(packed(tmp_path, 13, "none"))
    for made in (capped, scaled):
        ours = TokenLoss(plain_head(made))(made, batch, targets_of(batch))["loss"]
        theirs = made(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)


def test_the_head_is_back_after_a_forward_that_fails() -> None:
    made = model("llama")
    names, head = list(made.state_dict()), made.lm_head
    with pytest.raises(ZeroDivisionError), headless(made, True):
        raise ZeroDivisionError
    assert made.lm_head is head and list(made.state_dict()) == names


def test_a_batch_without_targets_still_has_a_backward() -> None:
    made = model("qwen3")
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[-100, -100]])}
    loss = TokenLoss(True)(made, batch, 1.0)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0.0 and any(p.grad is not None for p in made.parameters())


def test_a_mixture_balances_its_experts_by_share(tmp_path: Path) -> None:
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    made = model("qwen3_moe", router_aux_loss_coef=0.5, **fields)
    batch = whole(packed(tmp_path, 13, "none"))
    count = targets_of(batch)
    named = TokenLoss(plain_head(made), router=0.5)(made, batch, count)
    assert float(named["balance"]) > 0.1
    assert float(named["loss"]) == pytest.approx(float(named["tokens"] + named["balance"]))
    half = TokenLoss(plain_head(made), router=0.5)(made, batch, 2 * count)
    assert float(half["balance"]) == pytest.approx(float(named["balance"]) / 2)


def test_models_with_windows_of_their_own_are_not_packed() -> None:
    refuse_packing(model("qwen3").config, 64)
    with pytest.raises(TensorkeepError, match="window of 16"):
        refuse_packing(model("mistral", sliding_window=16).config, 64)
    refuse_packing(model("mistral", sliding_window=64).config, 64)


def test_a_block_mask_is_causal_and_keeps_to_its_segment() -> None:
    seen = block_mask(torch.tensor([[0, 0, 1]]))[0, 0]
    assert seen.tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    added = block_mask(torch.tensor([[0, 0, 1]]), torch.float32)[0, 0]
    assert torch.equal(added == 0, seen) and float(added.min()) == torch.finfo(torch.float32).min


# -- schedules --------------------------------------------------------------------------------------------------------


def test_minimind_schedule_is_its_formula() -> None:
    rate, total = Schedule(ScheduleConfig("minimind"), 50), 50
    for update in range(total):
        assert rate(update, 5e-4) == 5e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * (update + 1) / total)))
    assert rate(total - 1, 5e-4) == pytest.approx(5e-5)


def test_wsd_is_stable_then_falls_in_a_straight_line() -> None:
    rate = Schedule(ScheduleConfig("wsd", warmup=0.1, decay=4, final=0.0), 20)
    found = [round(rate(update, 1.0), 6) for update in range(20)]
    assert found == [0.5, 1.0, *[1.0] * 15, 0.75, 0.5, 0.25]
    assert Schedule(ScheduleConfig("constant"), 20)(7, 2.0) == 2.0
    with pytest.raises(TensorkeepError, match="longer than the run"):
        Schedule(ScheduleConfig("wsd", warmup=10, decay=15), 20)


# -- preferences ------------------------------------------------------------------------------------------------------


def pairs(tmp_path: Path) -> Pairs:
    chat, docs = Chat(tokenizer()), []
    for one in records([preferences(tmp_path / "p.jsonl")], "dpo"):
        assert isinstance(one, Preference)
        docs += [Encoded(*chat.encode(side)) for side in one]
    return Pairs(cached(tmp_path, "tokens", lambda: docs, 320), None, "64")


def test_preferences_start_at_ln_2_and_learn(tmp_path: Path) -> None:
    made = model("qwen3")
    said: list[str] = []
    settings: Any = (tmp_path, "start", World(), 0, 4, said.append)
    data = with_reference(pairs(tmp_path), made, True, *settings)
    assert data.reference is not None and data.reference.shape == (6, 2) and len(data) == 6
    batch = CollatePairs(0)([data.sample(i, torch.Generator()) for i in range(6)])
    loss, start = PreferenceLoss(True, beta=0.5), {n: p.clone() for n, p in made.named_parameters()}
    first = loss(made, batch, pairs_of(batch))
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=1e-5) and float(first["margin"]) == pytest.approx(
        0, abs=1e-5
    )
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    for _ in range(8):
        optimizer.zero_grad()
        loss(made, batch, pairs_of(batch))["loss"].backward()
        optimizer.step()
    last = loss(made, batch, pairs_of(batch))
    assert float(last["loss"]) < 0.5 and float(last["accuracy"]) == 1.0
    # the reference is that of the start weights, also when the run comes back with trained ones
    assert torch.equal(
        torch.tensor(with_reference(pairs(tmp_path), made, True, *settings).reference), torch.tensor(data.reference)
    )
    (path,) = tmp_path.glob("reference-*.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(start[name])
    again = with_reference(pairs(tmp_path), made, True, *settings)
    assert again.fingerprint() == data.fingerprint() and len(said) == 1 and "computed again" in said[0]


def test_an_answer_sum_is_the_log_probability_of_its_tokens(tmp_path: Path) -> None:
    made, data = model("llama"), pairs(tmp_path)
    batch = CollatePairs(0)([data.sample(i, torch.Generator()) for i in range(3)])
    for chunk in (5, 1000):
        sums = answer_sums(made, batch, True, chunk)
        logs = made(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        wanted = batch["labels"][:, 1:]
        expected = (logs.gather(-1, wanted.clamp(min=0)[..., None])[..., 0] * (wanted != -100)).sum(-1)
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
