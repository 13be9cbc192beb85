"""Damaged and hostile GGUF files: one clear error, no hang, no memory blow-up."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import view
from tests.gguf_files import write_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def header(tensors: int = 0, keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 1 << 62
HOSTILE = {
    "empty": (b"", "F02"),
    "magic alone": (b"GGUF", "F02"),
    "not gguf": (b"GGUX" + bytes(60), "F07"),
    "version": (header(version=9), "F07"),
    "big-endian": (header(version=3 << 24), "F07"),
    "many tensors": (header(tensors=HUGE), "F07"),
    "many keys": (header(keys=HUGE), "F07"),
    "more keys than bytes": (header(keys=1000), "F02"),
    "long key": (header(keys=1, body=struct.pack("<Q", HUGE)), "F02"),
    "long array": (header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE)), "F02"),
    "array of arrays": (header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(100)), "F07"),
    "value type": (header(keys=1, body=text(b"k") + struct.pack("<I", 77) + bytes(100)), "F07"),
    "key twice": (header(keys=2, body=2 * (text(b"k") + struct.pack("<IB", 0, 1))), "F07"),
    "key not text": (header(keys=1, body=text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "F07"),
    "alignment": (header(keys=1, body=text(b"general.alignment") + struct.pack("<II", 4, 0)), "F07"),
    "dims": (header(1, body=text(b"a") + struct.pack("<I", 1 << 31) + bytes(100)), "F07"),
    "large dims": (header(1, body=info(b"a", (HUGE, HUGE), 0, 0)), "F07"),
    "type": (header(1, body=info(b"a", (4,), 999, 0)), "F07"),
    "removed type": (header(1, body=info(b"a", (32,), 4, 0)), "F07"),
    "half block": (header(1, body=info(b"a", (33,), 3, 0)), "F07"),
    "offset": (header(1, body=info(b"a", (4,), 0, 7) + bytes(100)), "F07"),
    "beyond the end": (header(1, body=info(b"a", (4,), 0, 1 << 40)), "F02"),
    "truncated data": (header(1, body=info(b"a", (1000,), 0, 0) + bytes(100)), "F02"),
    "name twice": (header(2, body=2 * info(b"a", (4,), 0, 0) + bytes(100)), "F07"),
    "overlap": (header(2, body=info(b"a", (16,), 0, 0) + info(b"b", (16,), 0, 32) + bytes(300)), "F07"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    data, code = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(TensorkeepError) as error:
        view.read(path)
    assert error.value.code == code, error.value


def test_every_truncation_is_one_clear_error(tmp_path: Path, tiny: Path) -> None:
    whole, path = tiny.read_bytes(), tmp_path / "x.gguf"
    for end in [*range(0, 1600, 13), len(whole) // 2, len(whole) - 40]:
        path.write_bytes(whole[:end])
        with pytest.raises(TensorkeepError) as error:
            view.read(path)
        assert error.value.code == "F02"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2200), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
def test_mutated_headers_raise_only_our_error(tmp_path: Path, tiny: Path, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(tiny.read_bytes())
    for at, put in changes:
        data[at : at + len(put)] = put
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    try:
        ours = view.read(path)
        for name in list(ours)[:3]:
            ours.digest(name)
        make_plan([ours], "hf")
    except TensorkeepError:
        pass


def test_missing_package_says_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(TensorkeepError, match="gguf package") as error:
        view.read(tiny)
    assert error.value.hint == "pip install 'tensorkeep[language]'"
