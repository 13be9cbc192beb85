"""Texts, conversations, token caches and rows: what goes into training is what the files say, with the right marks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data import tokens as token_files
from tensorkeep.language.data.augmentation import Augmentation
from tensorkeep.language.data.batches import Collate
from tensorkeep.language.data.chat import Chat, marks
from tensorkeep.language.data.conversations import Conversation, Preference, conversation
from tensorkeep.language.data.packing import plan
from tensorkeep.language.data.samples import LiveConversations, PackedData, as_line
from tensorkeep.language.data.texts import records
from tensorkeep.language.data.tokens import Encoded, cached, fingerprint
from tests.language_files import CHATML, CONVERSATIONS, TAGGED, THINKING, preferences, texts, tokenizer, write_jsonl


def minimind_marks(ids: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> list[bool]:
    r"""MiniMind's rule: tokens after each `begin` (bos + "assistant\n") up to and with the next `end` (eos + "\n").

    >>> minimind_marks([9, 1, 5, 6, 2, 7], begin=[1], end=[2])
    [False, False, True, True, True, False]
    """
    out, at = [False] * len(ids), 0
    while at < len(ids):
        if list(ids[at : at + len(begin)]) != list(begin):
            at += 1
            continue
        start = stop = at + len(begin)
        while stop < len(ids) and list(ids[stop : stop + len(end)]) != list(end):
            stop += 1
        stop = min(stop + len(end), len(ids))
        out[start:stop] = [True] * (stop - start)
        at = stop
    return out


def spans_of_minimind(made: Any, ids: list[int]) -> list[bool]:
    begin = made("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    return minimind_marks(ids, begin, made("<|im_end|>\n", add_special_tokens=False)["input_ids"])


# -- texts ------------------------------------------------------------------------------------------------------------


def test_minimind_and_openai_files_are_read_as_they_are(tmp_path: Path) -> None:
    tools = '[{"name": "clock"}]'
    rows: list[dict[str, Any]] = [
        {
            "conversations": [
                {"role": "system", "content": "", "tools": tools},
                {"role": "user", "content": "time?"},
                {"role": "assistant", "content": "", "tool_calls": '[{"name": "clock", "arguments": {}}]'},
            ]
        },
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": ""}],
            "tools": [],
        },
    ]
    first, second = records([write_jsonl(tmp_path / "a.jsonl", rows)], "sft")
    assert isinstance(first, Conversation) and first.tools == [{"name": "clock"}]
    assert first.messages[2]["tool_calls"] == [{"name": "clock", "arguments": {}}] and "tools" not in first.messages[0]
    assert second == Conversation([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}])
    assert str(next(records([texts(tmp_path / "t.jsonl", 2)], "pretrain"))).startswith("The quick")
    (tmp_path / "plain.txt").write_text("one\n\ntwo")
    assert list(records([tmp_path / "plain.txt"], "pretrain")) == ["one\n\ntwo"]
    assert all(isinstance(r, Preference) for r in records([preferences(tmp_path / "p.jsonl")], "dpo"))


@pytest.mark.parametrize(
    ("line", "objective", "what"),
    [
        ('{"text": "a"', "pretrain", "line 2: is no JSON"),
        ('{"txt": "a"}', "pretrain", "has none of text"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "pretrain", "is a record for sft"),
        ('{"messages": [{"content": "q"}]}', "sft", "message 0 has no role"),
        ('{"chosen": [{"role": "user", "content": "q"}]}', "dpo", "no rejected"),
        ("[" * 100_000, "pretrain", "line 2: is no JSON"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, objective: Any, what: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(TensorkeepError) as caught:
        list(records([tmp_path / "a.jsonl"], objective))
    assert what in caught.value.line and "a.jsonl: line 2" in caught.value.line


# -- chat -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, THINKING])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_marks_are_those_of_minimind_on_its_template(template: str, messages: list[dict[str, Any]]) -> None:
    made = tokenizer(template)
    ids, counted = Chat(made).encode(Conversation(messages))
    assert counted == spans_of_minimind(made, ids)
    answers = "".join(m["content"] for m in messages if m["role"] == "assistant")
    text = made.decode([i for i, c in zip(ids, counted) if c])
    assert text.replace("<think>\n\n</think>\n\n", "").replace("<|im_end|>\n", "") == answers


def test_marks_are_those_of_minimind_with_tools_and_thinking() -> None:
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Noon.", "reasoning_content": "the clock says noon"},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome."},
    ]
    for length in (2, 4, 6):
        made = tokenizer(THINKING)
        ids, counted = Chat(made).encode(Conversation(messages[:length], [{"name": "clock"}]))
        assert counted == spans_of_minimind(made, ids) and sum(counted) > 4


def test_generation_tags_of_a_template_give_the_same_marks() -> None:
    for messages in CONVERSATIONS:
        assert Chat(tokenizer(TAGGED)).encode(Conversation(messages)) == Chat(tokenizer()).encode(
            Conversation(messages)
        )


def test_a_template_whose_answers_cannot_be_found_is_refused() -> None:
    upper = "{% for m in messages %}{{ m.content }}{% if not loop.last %} | {% endif %}{% endfor %}"
    upper += "{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(TensorkeepError, match="cannot be found"):
        Chat(tokenizer(upper)).encode(Conversation(CONVERSATIONS[0]))
    with pytest.raises(TensorkeepError, match="crosses the border"):
        marks([(0, 3)], [(1, 3)], "abc")
    with pytest.raises(TensorkeepError, match="no chat template"):
        Chat(tokenizer(None))


def test_augmentation_depends_on_the_generator_alone() -> None:
    chat, one = Chat(tokenizer(THINKING)), Conversation(CONVERSATIONS[0])
    both = Augmentation(system=0.5, empty_think=0.5)

    def drawn(seed: int) -> tuple[list[int], list[bool]]:
        return chat.encode(one, both, torch.Generator().manual_seed(seed))

    made = [drawn(seed) for seed in range(40)]
    torch.manual_seed(99)
    assert made == [drawn(seed) for seed in range(40)]
    kinds = {chat.tokenizer.decode(ids).replace("\n", " ") for ids, _ in made}
    assert len(kinds) > 4 and any("<think>" in k for k in kinds) and any("<think>" not in k for k in kinds)
    for ids, counted in made:
        assert counted == spans_of_minimind(chat.tokenizer, ids)


def test_live_conversations_are_the_cached_ones_where_nothing_is_drawn(tmp_path: Path) -> None:
    chat = Chat(tokenizer())
    lines = cached(tmp_path, "x", lambda: (Encoded(list(as_line(Conversation(c)))) for c in CONVERSATIONS), 256)
    live = LiveConversations(lines, chat, Augmentation(0.0, 1.0), 30, "x")
    for index, messages in enumerate(CONVERSATIONS):
        ids, counted = chat.encode(Conversation(messages))
        sample = live.sample(index, torch.Generator())
        assert sample["input_ids"].tolist() == ids[:30]
        assert [label != -100 for label in sample["labels"].tolist()] == counted[:30]


# -- tokens on disk ---------------------------------------------------------------------------------------------------


def documents() -> list[Encoded]:
    return [Encoded([1, 2, 3], [False, True, True]), Encoded([4, 5], [False, True]), Encoded([65535], [True])]


def test_a_cache_holds_what_it_was_given_and_is_made_once(tmp_path: Path) -> None:
    made = cached(tmp_path, "a", documents, 65536)
    assert made.ids.dtype == np.uint16 and made.ids.tolist() == [1, 2, 3, 4, 5, 65535]
    assert (
        made.offsets.tolist() == [0, 3, 5, 6] and made.marks is not None and made.marks.tolist() == [0, 1, 1, 0, 1, 1]
    )
    again = cached(tmp_path, "a", lambda: pytest.fail("made twice"), 65536)  # type: ignore[arg-type,return-value]
    assert again.ids.tolist() == made.ids.tolist()
    wide = cached(tmp_path, "b", lambda: [Encoded([65536])], 65537)
    assert wide.ids.dtype == np.uint32 and wide.marks is None
    with pytest.raises(TensorkeepError, match="C02"):
        cached(tmp_path, "c", lambda: [Encoded([9])], 9)
    with pytest.raises(TensorkeepError, match="empty"):
        cached(tmp_path, "d", list, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # what failed left nothing


@pytest.mark.parametrize("name", [token_files.TOKENS, token_files.MARKS, token_files.OFFSETS, token_files.INDEX])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_cache_is_made_again_loudly(tmp_path: Path, name: str, damage: str) -> None:
    made = cached(tmp_path, "a", documents, 65536).ids.tolist()
    path = tmp_path / "a" / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data[:-1] if damage == "cut" else data)
    said: list[str] = []
    assert cached(tmp_path, "a", documents, 65536, said.append).ids.tolist() == made
    assert len(said) == 1 and "made again" in said[0]
    assert cached(tmp_path, "a", documents, 65536, said.append) and len(said) == 1


def test_a_fingerprint_changes_with_bytes_borders_and_settings(tmp_path: Path) -> None:
    a, b, c = (tmp_path / n for n in "abc")
    a.write_text("one"), b.write_text("two"), c.write_text("onetwo")
    found = [fingerprint([a, b], {}), fingerprint([c], {}), fingerprint([b, a], {}), fingerprint([a, b], {"bos": True})]
    assert len(set(found)) == 4
    a.write_text("onE")
    assert fingerprint([a, b], {}) != found[0]


# -- rows -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=25),
    st.integers(2, 16),
    st.sampled_from(["concatenate", "first_fit"]),
)
def test_every_token_but_the_first_of_a_document_is_a_target_once(
    lengths: list[int], length: int, packing: Any
) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    if max(lengths) < 2:
        with pytest.raises(TensorkeepError):
            plan(bounds, length, packing)
        return
    rows = plan(bounds, length, packing)
    found: list[int] = []
    for row in range(len(rows)):
        segments = rows.segments(row)
        assert sum(b - a for a, b in segments) <= length and segments
        for a, b in segments:
            assert any(low <= a < b <= high for low, high in itertools.pairwise(bounds))  # never over a border
            found += range(a + 1, b)
    assert sorted(found) == sorted(set(range(bounds[-1])) - set(bounds[:-1]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=60))
def test_first_fit_leaves_no_two_rows_that_would_fit_into_one(lengths: list[int]) -> None:
    rows = plan([0, *itertools.accumulate(lengths)], 16, "first_fit")
    filled = sorted(sum(b - a for a, b in rows.segments(row)) for row in range(len(rows)))
    assert len(filled) < 2 or filled[0] + filled[1] > 16


def test_a_batch_is_padded_at_the_right_and_padding_goes_on_with_the_last_document(tmp_path: Path) -> None:
    stored = cached(tmp_path, "a", lambda: [Encoded(range(1, 6)), Encoded([7, 8]), Encoded([9, 10, 11])], 100)
    data = PackedData(stored, plan(stored.offsets, 5, "first_fit"), "first_fit 5")
    batch = Collate(0)([data.sample(i, torch.Generator()) for i in range(2)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
    assert batch["labels"].tolist() == [[-100, 2, 3, 4, 5], [-100, 8, -100, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]
    assert batch["segments"].tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    short = Collate(99)(
        [
            data.sample(0, torch.Generator()),
            {"input_ids": torch.tensor([3]), "labels": torch.tensor([-100]), "lengths": [1]},
        ]
    )
    assert short["input_ids"][1].tolist() == [3, 99, 99, 99, 99] and short["labels"][1].tolist() == [-100] * 5
    assert "segments" not in short
    mixed = Collate(99)(
        [data.sample(1, torch.Generator()), {"input_ids": torch.arange(7), "labels": torch.arange(7), "lengths": [7]}]
    )
    assert mixed["segments"][0].tolist() == [0, 0, 1, 1, 1, 1, 1] and mixed["input_ids"][0].tolist()[5:] == [99, 99]
    assert mixed["position_ids"][0].tolist() == [0, 1, 0, 1, 2, 3, 4]
    filled = Collate(99, multiple=4)([data.sample(1, torch.Generator())])  # to a length of few
    assert filled["input_ids"].tolist() == [[7, 8, 9, 10, 11, 99, 99, 99]]
    assert filled["segments"].tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]] and filled["labels"][0, 5:].tolist() == [-100] * 3


def test_a_conversation_without_messages_is_refused() -> None:
    with pytest.raises(TensorkeepError, match="no list of messages"):
        conversation([], None, "here")
