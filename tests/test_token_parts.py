"""Tokens in parts: the same tokens as in one piece, whoever makes them, killed or grown; and every source's records."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data import parts as token_parts
from tensorkeep.language.data.parts import Joined, Part, cached_parts, parts_of
from tensorkeep.language.data.sources import expanded
from tensorkeep.language.data.texts import objective_of, records, records_of
from tensorkeep.language.data.tokens import Encoded, fingerprint


def rows(path: Path, count: int, start: int = 0) -> Path:
    text = "".join(json.dumps({"text": f"row {start + n} " + "é" * (n % 7)}) + "\n" for n in range(count))
    path.write_text(text, encoding="utf-8")
    return path


def encoded(part: Part, calls: Any = None) -> list[Encoded]:
    if calls is not None:
        calls.append(part)
    found = records_of(part.path, "pretrain", "auto", part.begin, part.end)
    return [Encoded(list(str(text).encode())) for text in found]


def made(folder: Path, files: list[Path], size: int | None, calls: Any = None, shift: int = 0) -> Any:
    digest, parts = parts_of(files, {}, size=size)
    return cached_parts(folder, digest, parts, lambda p: encoded(p, calls), 256, shift=shift)


def documents(tokens: Any) -> list[bytes]:
    ends = tokens.offsets.tolist()
    return [bytes(tokens.ids[a:b].astype(np.uint8)) for a, b in itertools.pairwise(ends)]


@given(st.lists(st.text("ab\né", max_size=12), min_size=1, max_size=12), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=80)
def test_every_line_is_read_once_wherever_a_file_is_divided(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, ended: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts) + ("\n" if ended else "")
    path.write_text(text, encoding="utf-8")
    digest, parts = parts_of([path], {"bos": True}, size=size)
    found = [str(r) for p in parts for r in records_of(p.path, "pretrain", "auto", p.begin, p.end)]
    assert found == texts == [str(r) for r in records([path], "pretrain")]
    assert digest == fingerprint([path], {"bos": True})


def test_parts_joined_are_the_whole(tmp_path: Path) -> None:
    files = [rows(tmp_path / "a.jsonl", 50), rows(tmp_path / "b.jsonl", 7, 50), tmp_path / "c.txt"]
    files[2].write_text("plain")
    whole, divided = made(tmp_path / "one", files, None), made(tmp_path / "many", files, 300, shift=2)
    assert documents(whole) == documents(divided) and whole.fingerprint == divided.fingerprint
    assert len(divided) == 58 and len(divided.ids) == int(divided.offsets[-1]) and isinstance(divided.ids, Joined)
    assert whole.lengths.tolist() == divided.lengths.tolist()


def test_a_cache_made_whole_is_taken_as_it_is(tmp_path: Path) -> None:
    from tensorkeep.language.data.tokens import cached

    files = [rows(tmp_path / "a.jsonl", 5), rows(tmp_path / "b.jsonl", 5)]
    digest, parts = parts_of(files, {})
    before = cached(tmp_path / "cache", digest, lambda: [r for p in parts for r in encoded(p)], 256)
    calls: list[Part] = []
    after = cached_parts(tmp_path / "cache", digest, parts, lambda p: encoded(p, calls), 256)
    assert documents(before) == documents(after) and not calls


def test_a_file_that_is_added_or_grows_costs_its_own_tokens_alone(tmp_path: Path) -> None:
    a, b = rows(tmp_path / "a.jsonl", 40), rows(tmp_path / "b.jsonl", 5)
    made(tmp_path / "cache", [a, b], 300)
    calls: list[Part] = []
    made(tmp_path / "cache", [a, b, rows(tmp_path / "c.jsonl", 3)], 300, calls)
    assert {part.path.name for part in calls} == {"c.jsonl"}
    calls.clear()
    with a.open("a") as file:
        file.write('{"text": "more"}\n')
    tokens = made(tmp_path / "cache", [a, b], 300, calls)
    assert len(calls) == 1 and calls[0].begin > 0 and b"more" in documents(tokens)


def test_one_file_that_becomes_two_keeps_its_tokens(tmp_path: Path) -> None:
    a = rows(tmp_path / "a.jsonl", 4)
    made(tmp_path / "cache", [a], None)
    calls: list[Part] = []
    made(tmp_path / "cache", [a, rows(tmp_path / "b.jsonl", 2)], None, calls)
    assert [part.path.name for part in calls] == ["b.jsonl"]


def slow(folder: Path, files: list[Path], pause: float, shift: int, out: Any) -> None:
    digest, parts = parts_of(files, {}, size=300)
    calls = []

    def encode(part: Part) -> list[Encoded]:
        calls.append(part.begin)
        time.sleep(pause)
        return encoded(part)

    tokens = cached_parts(folder, digest, parts, encode, 256, shift=shift)
    out.put((calls, documents(tokens)))


def test_processes_share_the_parts_and_one_that_is_killed_leaves_the_rest(tmp_path: Path) -> None:
    files = [rows(tmp_path / "a.jsonl", 60)]
    fork = multiprocessing.get_context("fork")
    out = fork.Queue()
    dying = fork.Process(target=slow, args=(tmp_path / "cache", files, 0.2, 0, fork.Queue()))
    dying.start()
    while len([p for p in (tmp_path / "cache").glob("[0-9a-f]*") if (p / "cache.json").is_file()]) < 2:
        time.sleep(0.01)
    os.kill(dying.pid or 0, signal.SIGKILL)
    dying.join()
    pair = [fork.Process(target=slow, args=(tmp_path / "cache", files, 0.05, k * 3, out)) for k in range(2)]
    for one in pair:
        one.start()
    found = [out.get(timeout=60) for _ in pair]
    for one in pair:
        one.join()
    want = documents(made(tmp_path / "other", files, None))
    assert [documents_ for _, documents_ in found] == [want, want]
    left = [p.name for p in (tmp_path / "cache").iterdir() if p.name.endswith("tensorkeep-tmp")]
    assert left == [] and list((tmp_path / "cache" / ".making").iterdir()) == []
    count = Counter(begin for calls, _ in found for begin in calls)
    total = len(parts_of(files, {}, size=300)[1])
    assert max(count.values()) == 1 and len(count) <= total - 2  # each once, and what was there not at all


def test_a_part_without_a_document_may_be_and_all_of_them_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert (
        documents(made(tmp_path / "c", [rows(tmp_path / "a.jsonl", 2), tmp_path / "empty.jsonl"], None))[0][:4]
        == b"row "
    )
    (tmp_path / "e2.jsonl").write_text("\n")
    with pytest.raises(TensorkeepError, match="the data is empty"):
        made(tmp_path / "d", [tmp_path / "empty.jsonl", tmp_path / "e2.jsonl"], None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": {"a": 1}}', "text is no text but"),
        ('{"text": null}', "text is no text but"),
        ('{"text": "a\\ud800b"}', "character 1 is half of one"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "message 0: character 0 is half of one"),
        ("{}", "but nothing"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(TensorkeepError, match=said) as caught:
        list(records([tmp_path / "a.jsonl"], "sft" if "messages" in line else "pretrain"))
    assert "line 2" in caught.value.line


def test_a_wrong_line_of_a_later_part_is_named_by_its_number(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 40)
    lines = path.read_text().splitlines()
    lines[30] = "{broken"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TensorkeepError, match="line 31: is no JSON"):
        made(tmp_path / "cache", [path], 300)


# -- sources ----------------------------------------------------------------------------------------------------------


def test_folders_and_patterns_stand_for_their_files(tmp_path: Path) -> None:
    rows(tmp_path / "b.jsonl", 1)
    rows(tmp_path / "a.jsonl", 1)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "t.txt").write_text("x")
    (tmp_path / "notes.pdf").write_text("x")
    assert [p.name for p in expanded([tmp_path])] == ["a.jsonl", "b.jsonl", "t.txt"]
    assert [p.name for p in expanded([tmp_path / "*.jsonl", tmp_path / "deep" / "t.txt"])] == [
        "a.jsonl",
        "b.jsonl",
        "t.txt",
    ]
    for bad, said in ((tmp_path / "*.csv", "fits no file"), (tmp_path / "empty", "holds no texts")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(TensorkeepError, match=said):
            expanded([bad])


def test_packed_lines_are_read_and_their_damage_is_named(tmp_path: Path) -> None:
    plain = rows(tmp_path / "a.jsonl", 30)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(records([packed], "pretrain")) == list(records([plain], "pretrain"))
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(TensorkeepError, match="is damaged"):
        list(records([packed], "pretrain"))


def test_webdataset_members_of_one_name_are_a_record(tmp_path: Path) -> None:
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "w") as file:
        for name, data in (("000.txt", b"one"), ("000.jpg", b"\xff"), ("001.json", b'{"text": "two", "id": 7}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    assert list(records([path], "pretrain")) == ["one", "two"]
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(TensorkeepError, match=r"shard-000\.tar"):
        list(records([path], "pretrain"))


def test_tables_of_parquet_and_of_datasets_are_read(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{n}"}] for n in range(600)]
    table = arrow.table({"messages": messages, "id": list(range(600))})
    parquet.write_table(table, tmp_path / "chat.parquet", row_group_size=100)
    found = list(records([tmp_path / "chat.parquet"], "sft"))
    assert len(found) == 600 and found[599].messages[1]["content"] == "a599"  # type: ignore[union-attr]
    assert objective_of(tmp_path / "chat.parquet") == "sft"
    saved = tmp_path / "saved"  # as `Dataset.save_to_disk` lays it out
    saved.mkdir()
    for k in range(2):
        with arrow.OSFile(str(saved / f"data-0000{k}-of-00002.arrow"), "wb") as sink:
            part = arrow.table({"text": [f"text {k} {n}" for n in range(3)]})
            with arrow.ipc.new_stream(sink, part.schema) as writer:
                writer.write_table(part)
    names = [{"filename": f"data-0000{k}-of-00002.arrow"} for k in range(2)]
    (saved / "state.json").write_text(json.dumps({"_data_files": names, "_fingerprint": "x"}))
    assert list(records([saved], "pretrain")) == [f"text {k} {n}" for k in range(2) for n in range(3)]
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "both" / "train").mkdir()
    (tmp_path / "both" / "train" / "state.json").write_text("{}")
    with pytest.raises(TensorkeepError, match="holds the splits train") as caught:
        expanded([tmp_path / "both"])
    assert "both/train" in str(caught.value.hint)
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "chat.parquet").read_bytes()[:900])
    with pytest.raises(TensorkeepError, match="cannot be read after row 0"):
        list(records([tmp_path / "bad.parquet"], "sft"))


def test_progress_says_parts_rate_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_parts, "_TOLD", 0.0)
    said: list[str] = []
    digest, parts = parts_of([rows(tmp_path / "a.jsonl", 40)], {}, size=300)
    cached_parts(tmp_path / "cache", digest, parts, encoded, 256, said.append)
    assert any(f"of {len(parts)} parts" in line and "tokens/s" in line and "min left" in line for line in said)
