"""Fuzzing: whatever the bytes, a reader gives a view whose data can be read, or one TensorkeepError."""

from __future__ import annotations

import json
import math
import pickle
import random
import resource
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.dcp import METADATA, metadata
from tensorkeep.storage import state_dicts
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.pickle_values import Global, Object, Persistent
from tensorkeep.storage.pickle_writing import emit
from tests.counting import calls_at_most
from tests.samples import everything, read_all

CALLS = 1_000_000  # for one small file; honest ones take some thousands
MEGABYTES = 600  # more than any of these tiny files may cost


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = everything(tmp_path_factory.mktemp("samples"))
    gguf = _gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")
    return {**made, "gguf": gguf}


@pytest.fixture(scope="module", autouse=True)
def memory_stays_bounded() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


def _gguf(path: Path) -> Path:
    """Two tensors and a few keys: enough to reach every branch of a header reader."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def survives(path: Path, calls: int = CALLS) -> TensorkeepError | None:
    """Read everything; only our error may come out, after so many calls at most, on one line, with the place."""
    raised = None
    try:
        with calls_at_most(max(calls, CALLS)):
            view = read_all(path)
            for name, record in view.items():
                if record.nbytes < 1 << 20 and record.encoding == "plain":
                    assert len(view.bytes(name)) == record.nbytes
                    view.array(name) if record.dtype not in ("F4", "F6_E2M3", "F6_E3M2") else None
    except TensorkeepError as error:
        assert error.exit_code == 2 and error.where and "\n" not in error.line and len(error.line) < 4000
        raised = error
    return raised


# -- bytes out of nowhere -------------------------------------------------------------------------------------------

NAMES = [
    "m.safetensors",
    "m.pth",
    "m.bin",
    "m",
    "m.gguf",
    ".metadata",
    "model.safetensors.index.json",
    "adapter_config.json",
]
STARTS = [
    b"",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x80\x02",
    b"\x80\x04\x95",
    b"GGUF\x03\0\0\0",
    b"\x08\0\0\0\0\0\0\0{}      ",
    b'{"weight_map": ',
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(NAMES), st.sampled_from(STARTS), st.binary(max_size=300), st.booleans())
def test_no_bytes_make_a_reader_fail_otherwise(
    tmp_path: Path, name: str, start: bytes, rest: bytes, whole: bool
) -> None:
    folder = tmp_path / "x"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(start + rest)
    if name == "adapter_config.json":
        (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    survives(folder if whole else folder / name)


# -- mutated real files ---------------------------------------------------------------------------------------------


def mutate(data: bytes, dice: random.Random, places: list[int]) -> bytes:
    """One to three damages, half of them at places that mean something."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        at = dice.choice(places) if places and dice.random() < 0.5 else dice.randrange(max(len(out), 1))
        at = min(max(at + dice.randint(-4, 8), 0), max(len(out) - 1, 0))
        size = dice.choice([1, 1, 2, 4, 8, 16, 64])
        kind = dice.randrange(7)
        if kind == 0 and out:
            out[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            out[at : at + size] = dice.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * size
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + size]
        elif kind == 4:
            out[at:at] = dice.randbytes(size)
        elif kind == 5:
            out[at:at] = out[at : at + size * 4]
        else:
            out[at : at + 8] = struct.pack("<Q", dice.choice([0, 1, 2**31, 2**32 - 1, 2**47, 2**63, 2**64 - 1]))
    return bytes(out)


def structure(data: bytes) -> list[int]:
    """Header length, JSON punctuation, zip signatures and their fields, the first pickle opcodes."""
    places = [0, 4, 8, max(len(data) - 22, 0)]
    for mark in (
        b"PK\x01\x02",
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"\x80\x02",
        b"offset",
        b"sizes",
        b"dtype",
        b"shape",
        b"[",
        b":",
        b"storage",
    ):
        at = data.find(mark)
        while at >= 0 and len(places) < 2000:
            places += [at, at + len(mark), at + 20, at + 42]
            at = data.find(mark, at + 1)
    return places


KINDS = ["single", "sharded", "dcp", "pth", "legacy", "peft", "gguf"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_of_every_format_are_read_or_refused(kind: str, samples: dict[str, Path], tmp_path: Path) -> None:
    dice = random.Random(kind)
    source = samples[kind]
    originals = {p.name: p.read_bytes() for p in ([source] if source.is_file() else source.iterdir())}
    places = {name: structure(data) for name, data in originals.items()}
    refused = 0
    for _ in range(150):
        name = dice.choice(sorted(originals))
        (tmp_path / "x").mkdir(exist_ok=True)
        for other, data in originals.items():
            (tmp_path / "x" / other).write_bytes(mutate(data, dice, places[other]) if other == name else data)
        refused += survives(tmp_path / "x" if source.is_dir() else tmp_path / "x" / source.name) is not None
    assert refused > 35, "hardly any damage was noticed"


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_noticed(kind: str, samples: dict[str, Path], tmp_path: Path) -> None:
    source = samples[kind]
    originals = {
        p.name: p.read_bytes() for p in ([source] if source.is_file() else source.iterdir()) if p.name != "config.json"
    }
    for name, data in originals.items():
        (tmp_path / "x").mkdir(exist_ok=True)
        for other, whole in originals.items():
            (tmp_path / "x" / other).write_bytes(whole)
        for length in sorted(
            {*range(0, min(len(data), 64), 7), *(len(data) * k // 25 for k in range(25)), len(data) - 1}
        ):
            (tmp_path / "x" / name).write_bytes(data[:length])
            error = survives(tmp_path / "x" if source.is_dir() else tmp_path / "x" / name)
            padding = kind == "gguf" or name.endswith(".distcp")  # zeros behind the last tensor are no loss
            assert error is not None or (padding and length > len(data) - 1100), (name, length)


# -- hostile counts -------------------------------------------------------------------------------------------------


def safetensors_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


BIG = 1 << 47
HEADERS = {
    "length 2**63": (2**63).to_bytes(8, "little") + b"{}",
    "length beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "shape 2**47": safetensors_of({"a": entry(shape=[BIG])}, bytes(8)),
    "shape and offsets 2**47": safetensors_of({"a": entry(shape=[BIG], data_offsets=[0, 4 * BIG])}, bytes(8)),
    "empty but huge": safetensors_of({"a": entry(shape=[0, BIG, BIG], data_offsets=[0, 0])}),
    "a million dimensions": safetensors_of({"a": entry(shape=[BIG] * 1_000_000)}, bytes(8)),
    "forty dimensions": safetensors_of({"a": entry(shape=[1] * 40, data_offsets=[0, 4])}, bytes(4)),
    "number of 4000 digits": safetensors_of(
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, ' + b"9" * 4000 + b"]}}"
    ),
    "number of 10000 digits": safetensors_of(
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 8]}}'
    ),
    "nested lists": safetensors_of(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested shape": safetensors_of(
        b'{"a": {"dtype": "F32", "shape": ' + b"[" * 900 + b"]" * 900 + b', "data_offsets": [0, 8]}}'
    ),
    "dtype a list": safetensors_of({"a": entry(dtype=["F32"])}, bytes(8)),
    "true as a size": safetensors_of({"a": entry(shape=[True, 2])}, bytes(8)),
    "float offsets": safetensors_of({"a": entry(data_offsets=[0.0, 8.0])}, bytes(8)),
    "reversed offsets": safetensors_of({"a": entry(data_offsets=[8, 0])}, bytes(8)),
    "negative offsets": safetensors_of({"a": entry(data_offsets=[-8, 0])}, bytes(8)),
    "half a byte": safetensors_of({"a": entry(dtype="F4", shape=[3], data_offsets=[0, 2])}, bytes(2)),
    "100000 names, one twice": safetensors_of(
        b"{" + b",".join(b'"%d": 0' % n for n in [*range(100_000), 99_999]) + b"}"
    ),
    "lone surrogate": safetensors_of(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "not an object": safetensors_of([1, 2]),
    "metadata a list": safetensors_of({"__metadata__": [1], "a": 3}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_safetensors_headers_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(HEADERS[kind])
    error = survives(path)
    assert error is not None and error.code in ("F02", "F07") and str(path) in error.line


def archive(path: Path, value: Any, storage: bytes = bytes(16), raw: bytes | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("m/data.pkl", emit(value) if raw is None else raw)
        out.writestr("m/data/0", storage)
    return path


def tensor(
    shape: Any, strides: Any, offset: Any = 0, elements: Any = 4, key: Any = "0", kind: str = "FloatStorage"
) -> Object:
    identity = Persistent(("storage", Global("torch", kind), key, "cpu", elements))
    return Object(Global("torch._utils", "_rebuild_tensor_v2"), (identity, offset, shape, strides, False, None))


def doubled(levels: int, open_: bytes, close: bytes) -> bytes:
    """A pickle whose every level holds the level below ten times: small to store, 10**levels to walk."""
    out = b"\x80\x02" + open_ + b"K\x01" + close + b"q\x00"
    for _ in range(levels):
        out += (
            open_
            + b"".join(b"X\x01\0\0\0%ch\x00" % (97 + i) if open_ == b"}(" else b"h\x00" for i in range(10))
            + close
            + b"q\x00"
        )
    return out + b"."


VALUES: dict[str, Any] = {
    "shape 2**47": tensor((BIG,), (1,)),
    "shape 2**47 of one element": tensor((BIG,), (0,)),
    "2**40 of one element, declared large": tensor((1 << 40,), (0,), elements=1 << 60),
    "stride beyond": tensor((2,), (1 << 61,)),
    "offset beyond": tensor((2,), (1,), offset=1 << 40),
    "number of 30000 bits": tensor((2,), (1,), offset=1 << 30_000 >> 28_000, elements=1 << 2000),
    "negative stride": tensor((2,), (-1,)),
    "key a tuple": tensor((2,), (1,), key=("0", "0")),
    "no such storage": tensor((2,), (1,), key="7"),
    "elements beyond the entry": tensor((100,), (1,), elements=100),
    "empty but huge": tensor((0, BIG, BIG), (1, 1, 1)),
    "forty dimensions": tensor((1,) * 40, (1,) * 40),
    "unknown storage": tensor((2,), (1,), kind="QInt8Storage"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_hostile_tensor_entries_are_refused(kind: str, tmp_path: Path) -> None:
    error = survives(archive(tmp_path / "m.pth", {"a": VALUES[kind]}))
    assert error is not None and error.code in ("F02", "F04", "F07") and "m.pth" in error.line


def wrapped(levels: int) -> bytes:
    inner = emit(tensor((2,), (1,)))[2:-1]
    return (
        b"\x80\x02}X\x01\0\0\0a" + b"ctorch._utils\n_rebuild_parameter\n" * levels + inner + b"\x85R" * levels + b"s."
    )


PICKLES = {
    "dicts of dicts to 10**40": doubled(40, b"}(", b"u"),
    "dicts of dicts to 10**9": doubled(9, b"}(", b"u").replace(b"}(K\x01u", b"]K\x01a", 1),
    "lists of lists to 10**9": doubled(9, b"](", b"e"),
    "lists of lists to 10**200": doubled(200, b"](", b"e"),
    "tuples of tuples to 10**9": doubled(9, b"(", b"t"),
    "100000 dicts deep": b"\x80\x02" + b"}X\x01\0\0\0a" * 100_000 + b"N" + b"s" * 100_000 + b".",
    "a dict in itself": b"\x80\x02}q\0X\x01\0\0\0ah\0s.",
    "a list in itself": b"\x80\x02]q\0h\0a.",
    "100000 parameters deep": wrapped(100_000),
    "a long key at every level": b"\x80\x02"
    + b"".join(b"}X" + struct.pack("<I", 1 << 16) + b"k" * (1 << 16) for _ in range(30))
    + b"N"
    + b"s" * 30
    + b".",
    "a million references": b"\x80\x02}q\0](" + b"h\0" * 1_000_000 + b"e.",
}
REFUSED = (
    "dicts of dicts to 10**40",
    "lists of lists to 10**200",
    "a dict in itself",
    "a list in itself",
    "100000 dicts deep",
)


@pytest.mark.parametrize("kind", PICKLES)
def test_deep_and_shared_pickles_cost_neither_stack_nor_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dicts are walked up to what a state dict may name at most, lists and tuples up to a sixteenth of it."""
    if kind.startswith(("lists", "tuples")):
        monkeypatch.setattr(state_dicts, "_MOST_LETTERS", state_dicts._MOST_LETTERS >> 4)
    error = survives(archive(tmp_path / "m.pth", None, raw=PICKLES[kind]), 20_000_000)
    if "10**9" in kind:
        assert error is not None and error.code == "F07"
    if kind in REFUSED:  # it shares its way to many leaves
        assert error is not None and error.code in ("F02", "F07")


# -- zips -----------------------------------------------------------------------------------------------------------


def test_every_field_of_a_zip_directory_may_lie(samples: dict[str, Path], tmp_path: Path) -> None:
    data = samples["pth"].read_bytes()
    places = [at for mark in (b"PK\x01\x02", b"PK\x05\x06") for at in range(len(data)) if data.startswith(mark, at)]
    path = tmp_path / "m.pth"
    for at in (places[0], places[1], places[-1]):
        for field in range(4, 46, 2):
            for lie in (0, 1, 0x7FFF, 0xFFFF):
                path.write_bytes(data[: at + field] + struct.pack("<H", lie) + data[at + field + 2 :])
                survives(path)


@pytest.mark.parametrize("field", range(5))
def test_zip64_fields_may_lie(field: int, tmp_path: Path) -> None:
    numbers = [3, 3, 200, 500, 0]
    numbers[field] = 2**63 if field % 2 else 2**64 - 1
    path = tmp_path / "m.pth"
    end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, *numbers[:4])
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, numbers[4] or 30, 1)
    path.write_bytes(
        b"PK\x03\x04"
        + bytes(26)
        + end
        + locator
        + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    )
    assert survives(path) is not None


# -- DCP metadata ---------------------------------------------------------------------------------------------------


def dcp_folder(folder: Path, data: bytes, file: str = "__0_0.distcp", size: int = 1000) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / METADATA).write_bytes(data)
    (folder / file).write_bytes(bytes(size))
    return folder


@pytest.mark.parametrize(
    "place",
    [
        ("__0_0.distcp", 0, 1 << 62),
        ("__0_0.distcp", 1 << 61, 10),
        ("__0_0.distcp", 1 << 20_000, 10),
        ("__0_0.distcp", 990, 11),
    ],
)
def test_dcp_places_beyond_the_file_are_refused(place: tuple[str, int, int], tmp_path: Path) -> None:
    if place[1] > 1 << 64:
        place = (place[0], 1 << 2000, 10)  # what LONG1 can hold
    error = survives(dcp_folder(tmp_path / "x", metadata([SinkTensor("a", "F32", (2,))], {"a": {(0,): place}}, None)))
    assert error is not None and error.code in ("F02", "F07")


def test_thousands_of_dcp_chunks_are_checked_in_time(tmp_path: Path) -> None:
    from tensorkeep.formats._cover import overlapping
    from tensorkeep.storage.record import Block

    def grid(rows: int, columns: int) -> list[Block]:
        return [Block("f", 0, 0, (r, c), (1, 1)) for r in range(rows) for c in range(columns)]

    with calls_at_most(20_000_000):  # each block against each would be 400 million
        assert not overlapping(grid(1, 30_000)) and not overlapping(grid(150, 150))
        assert overlapping([*grid(150, 150), Block("f", 0, 0, (75, 75), (1, 1))])
        assert overlapping([Block("f", 0, 0, (0, i), (1, 20_000)) for i in range(20_000)])
        staircase = [Block("f", 0, 0, (i, i), (20_000, 1) if i % 2 else (1, 20_000)) for i in range(20_000)]
        overlapping(staircase)
        pinwheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
        assert not overlapping([Block("f", 0, 0, o, s) for o, s in pinwheel])
        assert overlapping([Block("f", 0, 0, o, s) for o, s in [*pinwheel, ((1, 1), (1, 1))]])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=6))
def test_overlap_of_dcp_chunks_is_what_counting_cells_says(chunks: list[tuple[int, int, int, int]]) -> None:
    from tensorkeep.formats._cover import overlapping
    from tensorkeep.storage.record import Block

    blocks = [Block("f", 0, 0, (r, c), (h, w)) for r, c, h, w in chunks]
    cells = [(r + i, c + j) for r, c, h, w in chunks for i in range(h) for j in range(w)]
    assert overlapping(blocks) == (len(set(cells)) < len(cells))


ODD_STATES = [
    None,
    3,
    (),
    [],
    {},
    {"state_dict_metadata": {}},
    {"state_dict_metadata": {"a": 3}, "storage_data": {}},
    {"state_dict_metadata": [], "storage_data": {3: 4}},
]


@pytest.mark.parametrize("state", ODD_STATES, ids=str)
def test_dcp_metadata_of_another_shape_is_refused(state: Any, tmp_path: Path) -> None:
    made = Object(Global("torch.distributed.checkpoint.metadata", "Metadata"), state=state)
    for value in (made, state, [made]):
        error = survives(dcp_folder(tmp_path / "x", emit(value)))
        assert error is not None and error.code == "F07"


def test_ordinary_pickles_and_other_python_objects_are_no_checkpoints(tmp_path: Path) -> None:
    for value in ({"a": 1}, [math.pi], OrderedDict(a=1), "text", None, 1 << 10_000):
        for protocol in (2, 4, 5):
            path = tmp_path / "m.pth"
            path.write_bytes(pickle.dumps(value, protocol))
            error = survives(path)
            assert error is not None and error.hint
