"""Read torch.save archives: a zip with one entry per storage, and a pickle that makes tensors of them.

A `.pth` file is one archive; a DCP data file is many, one per tensor. Both are read here without torch and without
unpickling; `archive_writing` writes them in a fixed layout that torch 2.4 and later load.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.storage._lazy_bits import refuse_lazy
from tensorkeep.storage._likeness import Likeness, likeness
from tensorkeep.storage._range import Ends, Range
from tensorkeep.storage._zip_ends import UTF8, end_bytes, wrong_end
from tensorkeep.storage.files import Folder
from tensorkeep.storage.pickle_values import Global, Object, Persistent
from tensorkeep.storage.pickles import LARGEST_PICKLE, parse
from tensorkeep.storage.record import DTYPES, FROM_TORCH, MOST_DIMENSIONS, checked_shape, nbytes

# typed storages name their dtype; an UntypedStorage gets it from _rebuild_tensor_v3
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
}
STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}

# What an honest checkpoint names. Every one is inert here; those that build tensors are interpreted below.
_PLAIN_GLOBALS = """
torch.storage.UntypedStorage torch.storage.TypedStorage torch.storage._LegacyStorage torch.UntypedStorage
torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor_v3
torch._utils._rebuild_wrapper_subclass torch._utils._rebuild_parameter
torch._utils._rebuild_parameter_with_state torch._tensor._rebuild_from_type_v2
torch.Size torch.device torch.Tensor torch.nn.parameter.Parameter torch.nn.Parameter torch.serialization._get_layout
collections.OrderedDict collections.defaultdict collections.Counter
builtins.set builtins.frozenset builtins.dict builtins.list builtins.int builtins.float builtins.bool builtins.str
builtins.complex builtins.bytearray builtins.range __builtin__.set __builtin__.dict __builtin__.list __builtin__.xrange
argparse.Namespace _codecs.encode datetime.datetime datetime.timedelta
pathlib.PosixPath pathlib.PurePosixPath pathlib._local.PosixPath pathlib._local.PurePosixPath
numpy.core.multiarray.scalar numpy._core.multiarray.scalar
numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct numpy.ndarray numpy.dtype
"""
TENSOR_GLOBALS = frozenset(
    [f"{module}.{storage}" for module in ("torch", "torch.storage") for storage in _STORAGES]
    + [f"torch.{dtype.torch}" for dtype in DTYPES.values() if dtype.torch]
    + _PLAIN_GLOBALS.split()
)


class Stored(NamedTuple):
    """Describe one tensor as the pickle does: a window into a storage.

    Attributes:
        dtype: the element type as safetensors spells it, e.g. "BF16".
        shape: sizes of the tensor.
        strides: steps between neighbours, in elements.
        offset: first element within the storage.
        storage: key of the storage; its bytes are the zip entry `data/KEY`.
        elements: number of elements of the whole storage.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: str
    elements: int  # of the storage


# elements that strides of 0 may make out of fewer; a hostile file asks for 1 << 47
_LARGEST_EXPANSION = 1 << 26


def stored_tensor(value: Object, where: object) -> Stored | None:
    """Read the tensor that a pickled `_rebuild_tensor*` call describes; nothing is built.

    Args:
        value: an object out of the pickle, as `pickles.parse` gives it.
        where: the file, for messages.

    Returns:
        The description with all sizes checked, or None where the object is no tensor.

    Raises:
        TensorkeepError: F07 where the call cannot describe a tensor of its storage, and without a code where its values
            are the conjugate or the negative of what is stored.
    """
    call = _unwrapped(value)
    if call is None:
        return None
    name, args = call

    def wrong(what: str) -> TensorkeepError:
        return TensorkeepError(f"damaged tensor entry: {what}", where=where, code="F07", hint="copy the file again")

    if len(args) < 4 or not isinstance(args[0], Persistent) or not isinstance(args[0].value, tuple):
        raise wrong("no storage")
    identity, offset, shape, strides = args[0].value, args[1], sizes_of(args[2]), _strides(args[3])
    known = len(identity) >= 5 and identity[0] == "storage" and isinstance(identity[1], Global)
    if not known or not is_count(identity[4]):
        raise wrong("an unknown storage")
    if type(identity[2]) not in (str, int) or (len(identity) > 5 and identity[5] is not None):
        raise wrong("a storage without a plain key")
    if shape is None or strides is None or len(shape) != len(strides) or not is_count(offset):
        raise wrong("sizes, strides or offset are not whole numbers, or too large")
    if name == "_rebuild_tensor_v3":
        dtype = FROM_TORCH.get(args[6].name) if len(args) > 6 and isinstance(args[6], Global) else None
    else:
        dtype = _STORAGES.get(identity[1].name)
    if dtype is None:
        raise wrong(f"a storage of type {shown(identity[1].name)}")
    refuse_lazy(name, args, where)
    elements = identity[4] if name != "_rebuild_tensor_v3" else identity[4] * 8 // DTYPES[dtype].bits
    span = sum((n - 1) * s for n, s in zip(shape, strides)) + 1 if 0 not in shape else 0
    if span and offset + span > elements:
        raise wrong(f"it spans {offset + span} elements of a storage of {elements}")
    if math.prod(shape) > max(span, _LARGEST_EXPANSION):
        raise wrong(f"it repeats {span} elements {math.prod(shape)} times")
    return Stored(dtype, shape, strides, offset, str(identity[2]), elements)


def _unwrapped(value: Object) -> tuple[str, tuple[Any, ...]] | None:
    """Find the innermost `_rebuild_tensor*` call: parameters and subclasses wrap it, honestly at most twice."""
    name, args = value.call.name, value.args
    for _ in range(4):
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return name, args
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and args and isinstance(args[0], Object):
            name, args = args[0].call.name, args[0].args
        elif (
            name == "_rebuild_from_type_v2"
            and len(args) > 2
            and isinstance(args[0], Global)
            and isinstance(args[2], tuple)
        ):
            name, args = args[0].name, args[2]
        else:
            return None
    return None


def is_count(value: Any) -> TypeGuard[int]:
    """Tell whether a value from an untrusted file is a whole number that can be a size or a position.

    Args:
        value: anything.

    Example:
        >>> is_count(3), is_count(-1), is_count(True)
        (True, False, False)
    """
    return type(value) is int and 0 <= value < 1 << 62


def sizes_of(value: Any) -> tuple[int, ...] | None:
    """Return a shape that a pickle holds as torch.Size, tuple or list; None where it is none, or too large.

    Args:
        value: what the pickle holds.
    """
    if isinstance(value, Object) and value.call.name == "Size" and len(value.args) == 1:
        value = value.args[0]
    return checked_shape(value)


def _strides(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, (tuple, list)) or len(value) > MOST_DIMENSIONS or not all(is_count(n) for n in value):
        return None
    return tuple(value)


# -- reading a zip ------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One uncompressed entry of a zip.

    Attributes:
        start: first byte of its data, counted from the start of the file.
        size: bytes of its data.
        crc: CRC-32 of its data as the zip says; 0 where the writer did not compute it.
    """

    start: int
    size: int
    crc: int

    def known_crc(self, start: int, size: int) -> int | None:
        """Return the CRC-32 of a byte range of the entry; None unless the range is the whole entry.

        torch writes 0 where it was told not to compute the checksum; that counts as unknown.

        Args:
            start: first byte, counted from the start of the entry.
            size: number of bytes.
        """
        return self.crc if (start, size) == (0, self.size) and self.crc else None


def lone_tensor(folder: Folder, file: str, start: int, length: int, what: object) -> tuple[Stored | None, Entry | None]:
    """Read what an archive says of the one tensor in it, in two small reads.

    Args:
        folder: where the file lies.
        file: its name.
        start: first byte of the archive in the file.
        length: bytes of the archive.
        what: the tensor, for messages.

    Returns:
        The tensor's description, and the entry that holds its bytes; None for what is not there.

    Raises:
        TensorkeepError: the archive is damaged, as `zip_entries`, `saved_value` and `stored_tensor` say.
    """
    ends = Ends(folder, start, length)
    for known, described in _alike.get(length, ()):
        rest = ends.read(file, start, known.data) + ends.read(file, start + known.end, length - known.end)
        if (crc := known.crc_of(rest)) is not None:
            return described, Entry(start + known.data, known.end - known.data, crc)
    found = zip_entries(ends, file, start, length)
    data = _pickle_of(ends, file, found)
    tensor = _described.get(data)
    if tensor is None:
        value, _ = parse(data, TENSOR_GLOBALS, f"{folder.url}/{file}")
        tensor = stored_tensor(value, what) if isinstance(value, Object) else None
        if tensor is not None and len(data) <= _SHORT:
            if len(_described) >= _MOST:
                _described.clear()
            _described[data] = tensor
    entry = found.get(f"data/{tensor.storage}") if tensor is not None else None
    if tensor is not None and entry is not None:
        at, end = entry.start - start, entry.start + entry.size - start
        rest = ends.read(file, start, at) + ends.read(file, start + end, length - end)
        if (new := likeness(rest, at, end, entry.crc)) is not None:
            if len(_alike) >= _LENGTHS:
                _alike.clear()
            _alike[length] = [(new, tensor), *_alike.get(length, ())][:_SHAPES]
    return tensor, entry


# archives of lone tensors by their length, and what they describe
_alike: dict[int, list[tuple[Likeness, Stored]]] = {}
_LENGTHS, _SHAPES = 256, 4  # how many lengths are remembered, and how many archives of each

# pickles of lone tensors, which are equal for all of one dtype and shape, and what they describe
_described: dict[bytes, Stored] = {}
_SHORT, _MOST = 1024, 4096  # bytes of one that is remembered, and how many are

# what zipfile raises for damaged archives, and of ways to compress or encrypt that it does not know
_ZIP_FAILURES = (zipfile.BadZipFile, struct.error, ValueError, OSError, EOFError, RuntimeError, IndexError)


def zip_entries(folder: Folder, file: str, start: int, length: int) -> dict[str, Entry]:
    """List the entries of an archive by their name below its top folder.

    Args:
        folder: where the file lies.
        file: its name.
        start: first byte of the archive in the file.
        length: bytes of the archive.

    Returns:
        Entry name ("data.pkl", "data/0") -> where its bytes lie.

    Raises:
        TensorkeepError: F02 where the zip is truncated, F07 where entries repeat, overlap, or are compressed.
    """
    where = f"{folder.url}/{file}"
    try:
        with zipfile.ZipFile(Range(folder, file, start, length)) as archive:
            infos = archive.infolist()
    except _ZIP_FAILURES as error:
        raise TensorkeepError(
            f"the archive at {start} is damaged or truncated: {error}",
            where=where,
            code="F02",
            hint="copy the file again",
        ) from None
    short = min(length, end_bytes(infos))
    tail = folder.read(file, start + length - short, short)
    if (wrong := wrong_end(tail, length, infos)) is not None:
        raise _damaged_zip(wrong, where)
    out: dict[str, Entry] = {}
    seen = set[str]()  # torch looks names up whatever their case
    for info in infos:
        name = info.filename.partition("/")[2] or info.filename
        if name.lower() in seen:
            raise _damaged_zip(f"{shown(info.filename)} occurs twice", where)
        seen.add(name.lower())
        out[name] = _entry(info, folder, file, start, length)
    spans = sorted((e.start, e.start + e.size, n) for n, e in out.items() if e.size)
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise _damaged_zip(f"{shown(first)} and {shown(second)} overlap", where)
    return out


def _damaged_zip(what: str, where: object, code: str = "F07") -> TensorkeepError:
    """Make the error for a zip that cannot have been written by torch.save."""
    return TensorkeepError(f"damaged archive: {what}", where=where, code=code, hint="copy the file again")


def _entry(info: zipfile.ZipInfo, folder: Folder, file: str, start: int, length: int) -> Entry:
    """Find an entry's bytes, checking the zip's directory against the entry's own header."""
    where, name = f"{folder.url}/{file}", shown(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise _damaged_zip(f"{name} is compressed or encrypted, torch.save never does that", where)
    if info.header_offset < 0 or info.header_offset + 30 > length:
        raise _damaged_zip(f"{name} begins outside its archive", where, "F02")
    called = info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437")
    local = folder.read(file, start + info.header_offset, min(30 + len(called), length - info.header_offset))
    if local[:4] != b"PK\x03\x04":
        raise _damaged_zip(f"{name} has no entry where the archive says", where)
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    if name_length != len(called) or local[30:] != called or info.volume:  # a flipped bit: torch finds no such entry
        raise _damaged_zip(f"{name} has another name, or disk, in its own header", where)
    data = start + info.header_offset + 30 + name_length + extra_length
    if data + info.file_size > start + length:
        raise _damaged_zip(f"{name} ends behind its archive", where, "F02")
    return Entry(data, info.file_size, info.CRC)


def saved_value(folder: Folder, file: str, found: dict[str, Entry], opaque: set[str] | None = None) -> Any:
    """Read what was saved (`data.pkl`) as plain data: dicts, lists, numbers, and `Object` for calls.

    Args:
        folder: where the file lies.
        file: its name.
        found: the archive's entries, from `zip_entries`.
        opaque: where this is given, names of somebody's own objects are put into it and not refused.

    Returns:
        The value; tensors are `Object`s that name their storage.

    Raises:
        TensorkeepError: F04 where the pickle names what a checkpoint does not need, F02, F03 or F07 where it is
            damaged, and without a code where this is no archive of torch.save or a big-endian one.
    """
    value, _ = parse(_pickle_of(folder, file, found), TENSOR_GLOBALS, f"{folder.url}/{file}", opaque=opaque)
    return value


def _pickle_of(folder: Folder, file: str, found: dict[str, Entry]) -> bytes:
    """Read an archive's `data.pkl`, which must fit its own CRC-32."""
    where = f"{folder.url}/{file}"
    pickle = found.get("data.pkl")
    if pickle is None:
        raise TensorkeepError(
            "is a zip, but holds no data.pkl of torch.save", where=where, hint="is this a checkpoint?"
        )
    order = found.get("byteorder")
    if order is not None and folder.read(file, order.start, min(order.size, 3)) == b"big":
        raise TensorkeepError(
            "was written on a big-endian machine", where=where, hint="save it again on a little-endian one"
        )
    if pickle.size > LARGEST_PICKLE:
        raise _damaged_zip(f"data.pkl has {pickle.size} bytes, more than {LARGEST_PICKLE}", where)
    data = folder.read(file, pickle.start, pickle.size)
    if pickle.crc and zlib.crc32(data) != pickle.crc:  # before a name in it is believed
        raise _damaged_zip("data.pkl does not fit its own CRC-32", where, "F03")
    return data


def storage_bytes(tensor: Stored) -> tuple[int, int]:
    """Return the byte range of its storage that a tensor touches.

    Args:
        tensor: as `stored_tensor` describes it.

    Returns:
        (first byte within the storage, number of bytes).

    Example:
        >>> storage_bytes(Stored("F32", (2, 2), (2, 1), 4, "0", 8))
        (16, 16)
    """
    width = DTYPES[tensor.dtype].bits // 8
    if 0 in tensor.shape:
        return 0, 0
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides)) + 1
    return tensor.offset * width, max(span * width, nbytes(tensor.dtype, ()) if not tensor.shape else 0)
