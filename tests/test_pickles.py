"""Pickles as plain data: what is read equals what Python would load, and nothing is ever run."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.dcp import DCP_GLOBALS
from tensorkeep.storage.pickle_values import Global, Object, Persistent
from tensorkeep.storage.pickle_writing import emit
from tensorkeep.storage.pickles import parse
from tests.counting import calls_at_most
from tests.samples import write_dcp

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))
)
keys = st.text() | st.integers() | st.tuples(st.text(), st.integers())
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equality that tells 1 from True and 1.0."""
    return type(a) is type(b) and repr(a) == repr(b)


@given(plain)
def test_what_is_emitted_parses_to_the_same_value_and_python_loads_it(value: Any) -> None:
    data = emit(value)
    assert same(parse(data, (), "test")[0], value)
    assert same(pickle.loads(data), value)
    assert emit(value) == data


@given(plain, st.integers(0, 5))
def test_plain_data_of_every_protocol_reads_as_python_loads_it(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    found, end = parse(b"xyz" + data + b"rest", (), "test", 3)
    assert same(found, value) and end == 3 + len(data)
    assert same(parse(pickletools.optimize(data), (), "test")[0], value)


@given(st.binary(), st.integers(3, 5))
def test_bytes_read_as_python_loads_them(value: bytes, protocol: int) -> None:
    assert parse(pickle.dumps([value, value], protocol), (), "test")[0] == [value, value]


def test_objects_become_inert_descriptions() -> None:
    made, _ = parse(pickle.dumps(OrderedDict(a=1)), ("collections.OrderedDict",), "test")
    assert isinstance(made, Object) and made.call == Global("collections", "OrderedDict") and made.entries == {"a": 1}
    made, _ = parse(emit(Object(Global("m", "C"), state={"x": Persistent(("storage", "0"))})), ("m.*",), "test")
    assert made.state["x"].value == ("storage", "0")


# -- hostile --------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def evil_pickles(path: Path) -> dict[str, bytes]:
    call = f"touch {path}".encode()
    return {
        **{f"reduce in protocol {n}": pickle.dumps(Evil(path), n) for n in range(6)},
        "INST": b"(S'" + call + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + call + b"'\no.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(call)]) + call + b"\x85R.",
        "newobj": b"\x80\x02csubprocess\nPopen\n]X" + struct.pack("<I", len(call)) + call + b"a\x85\x81.",
        "then truncated": pickle.dumps(Evil(path))[:-1],
        "then nonsense": pickle.dumps(Evil(path))[:-1] + b"\xff",
        "behind an allowed one": b"\x80\x02ccollections\nOrderedDict\n)R0" + pickle.dumps(Evil(path), 2)[2:],
        "called through getattr": b"\x80\x02cbuiltins\ngetattr\ncos\npath\nX\x06\x00\x00\x00system\x86RX"
        + struct.pack("<I", len(call))
        + call
        + b"\x85R.",
    }


@pytest.mark.parametrize("kind", evil_pickles(Path("x")))
def test_a_hostile_pickle_is_refused_by_name_and_not_run(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(TensorkeepError) as error:
        parse(evil_pickles(target)[kind], DCP_GLOBALS, "evil.pth")
    assert error.value.code == "F04" and error.value.where == "evil.pth" and error.value.hint
    assert any(name in error.value.line for name in ("system", "Popen", "getattr"))
    assert not target.exists()


def test_the_hostile_pickles_of_these_tests_are_real(tmp_path: Path) -> None:
    target = tmp_path / "made"
    pickle.loads(evil_pickles(target)["reduce in protocol 2"])
    assert target.exists()


def test_only_the_globals_allowed_are_let_through() -> None:
    data = pickle.dumps(OrderedDict())
    assert parse(data, ("collections.OrderedDict",), "test")
    for allowed in ((), ("collections",), ("OrderedDict",), ("collections.orderedDict",)):
        with pytest.raises(TensorkeepError, match=r"collections\.OrderedDict"):
            parse(data, allowed, "test")


DAMAGED = {
    "empty": b"",
    "no stop": b"\x80\x02K\x01",
    "stop on nothing": b"\x80\x02.",
    "protocol 9": b"\x80\x09N.",
    "unknown opcode": b"\x80\x02\xfe.",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", (1 << 64) - 1) + b"x.",
    "huge long": b"\x80\x02\x8b" + struct.pack("<I", 1 << 31) + b"x.",
    "long of 1 MB": b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20) + b".",
    "negative length": b"T\xff\xff\xff\xffx.",
    "text long of 1 MB": b"L" + b"9" * (1 << 20) + b"L\n.",
    "pop of nothing": b"0.",
    "tuple of nothing": b"\x85.",
    "no mark": b"K\x01K\x02t.",
    "absent memo": b"h\x07.",
    "memo of nothing": b"q\x00.",
    "append to a number": b"K\x01K\x02a.",
    "items of a list": b"](K\x01K\x02u.",
    "odd items": b"}(K\x01u.",
    "list as a key": b"}]K\x01s.",
    "dict as a key": b"}}K\x01s.",
    "nested tuple as a key": b"}" + b")" + b"\x85" * 100_000 + b"K\x01s.",
    "call of a number": b"K\x01)R.",
    "build on a number": b"K\x01}b.",
    "not utf-8": b"X\x01\x00\x00\x00\xff.",
    "not a number": b"Iabc\n.",
    "not a float": b"Fabc\n.",
    "line without end": b"V" + b"x" * 100_000,
    "old string without quotes": b"Sabc\n.",
    "global without a name": b"cos\n",
    "global of numbers": b"K\x01K\x02\x93.",
    "many marks": b"(" * 100_000 + b".",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_pickle_is_one_clear_error(kind: str) -> None:
    try:
        with calls_at_most(1_000_000):
            parse(DAMAGED[kind], (), "damaged.pth")
    except TensorkeepError as error:
        assert error.where == "damaged.pth" and error.hint and error.code in ("F02", "F04") and "\n" not in error.line
    else:
        assert kind == "many marks"  # a mark left on the stack is no value, but does no harm


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail_otherwise(data: bytes) -> None:
    for start in (b"", b"\x80\x04", b"\x80\x02ctorch\nSize\n"):
        try:
            parse(start + data, DCP_GLOBALS, "test")
        except TensorkeepError as error:
            assert str(error)


@pytest.mark.parametrize("nest", [b"\x85", b"]\x86", b"Q", b"2a"])
def test_depth_and_cycles_cost_neither_stack_nor_time(nest: bytes) -> None:
    with calls_at_most(4_000_000):  # ten for each of 400,000 opcodes
        value, _ = (
            parse(b"\x80\x02](" + b"]" + nest * 200_000 + b"e.", (), "test")
            if nest != b"]\x86"
            else parse(b"\x80\x02]" + b"]\x86" * 200_000 + b".", (), "test")
        )
        del value


def test_a_million_references_to_one_memo_are_one_object() -> None:
    value, _ = parse(b"\x80\x02]q\x00](" + b"h\x00" * 1_000_000 + b"e.", (), "test")
    assert len(value) == 1_000_000 and all(item is value[0] for item in value)


# -- torch ----------------------------------------------------------------------------------------------------------


def as_plain(value: Any) -> Any:
    """torch's unpickled metadata spelled like our reading of it."""
    if isinstance(value, dict):
        return {as_key(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, torch.Size):
        return ("torch.Size", tuple(value))
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Enum):
        return type(value).__name__
    if type(value).__module__.startswith("torch.distributed.checkpoint") and hasattr(value, "__dict__"):
        state = value.__getstate__() if type(value).__name__ == "TensorProperties" else vars(value)
        return (type(value).__name__, as_plain(state))
    if isinstance(value, (list, tuple)):
        return [as_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def as_key(key: Any) -> Any:
    return key if isinstance(key, str) else repr(as_plain(key))


def ours_plain(value: Any) -> Any:
    """Our reading spelled the same way."""
    if isinstance(value, dict):
        return {(k if isinstance(k, str) else repr(ours_plain(k))): ours_plain(v) for k, v in value.items()}
    if isinstance(value, Global):
        return str(value)
    if isinstance(value, Object):
        if value.call.name == "Size":
            return ("torch.Size", value.args[0])
        if value.call.name == "_get_layout":
            return "layout"
        if value.call.name == "_MEM_FORMAT_ENCODING":
            return "_MEM_FORMAT_ENCODING"
        if value.call.name in ("PosixPath", "PurePosixPath"):
            return "PosixPath"
        return (value.call.name, ours_plain(value.state))
    if isinstance(value, (list, tuple)):
        return [ours_plain(v) for v in value]
    return value


def test_paths_are_plain_by_the_name_that_any_python_writes() -> None:
    """Python 3.13 alone names its own module of them."""
    for module in ("pathlib", "pathlib._local"):
        data = b"\x80\x02c" + module.encode() + b"\nPosixPath\nX\x01\0\0\0a\x85R."
        found, _ = parse(data, DCP_GLOBALS, "test")
        assert isinstance(found, Object) and found.args == ("a",)


def test_torchs_own_metadata_reads_as_torch_unpickles_it(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp")
    ours, _ = parse((folder / ".metadata").read_bytes(), DCP_GLOBALS, "test")
    theirs = FileSystemReader(folder).read_metadata()
    for name in ("state_dict_metadata", "planner_data", "storage_data"):
        mine, other = ours_plain(ours.state[name]), as_plain(getattr(theirs, name))
        assert mine == other and mine, name
