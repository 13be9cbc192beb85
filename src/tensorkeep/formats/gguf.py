"""Read and write GGUF (`gguf`): llama.cpp's single files, and reading also their numbered splits.

Block-quantized tensors appear as what they decode to, F32, with `encoding` naming the stored type; they are decoded
row by row while they are streamed. Config and tokenizer stand in the file's metadata: they become the companions that
the other formats have as files, and the other way round (`gguf_metadata`). Decoding, encoding and the header's bytes
are the gguf package's.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats._gguf_header import DAMAGED, MAGIC, Header, TensorInfo, read_gguf_header
from tensorkeep.formats._gguf_tokenizer import tokenizer_files
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.gguf_config import FACTORS, companions, hf_config, not_in_config
from tensorkeep.formats.gguf_families import LONG, SHORT
from tensorkeep.formats.gguf_metadata import metadata_of, put_metadata
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.files import Folder, short_file
from tensorkeep.storage.layout import FileLayout, Fixed, SinkTensor, Slot, Trailer
from tensorkeep.storage.record import BLOCK_TYPES, Block, TensorRecord

LOOKS = ".gguf"
ENDINGS = (".gguf",)
TIED = "one"
# ggml types that are stored as they are computed with; the others decode to F32
PLAIN_TYPES = {word: word for word in ["F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"]}
_ALIGNMENT = 32  # bytes; GGUF's default, which no metadata needs to say
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf\Z")


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether these files are GGUF; `single`: they are one file named by the user."""
    if single:
        return names[0].endswith(".gguf") or (folder.size(names[0]) >= 4 and folder.read(names[0], 0, 4) == MAGIC)
    return any(n.endswith(".gguf") for n in names)


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Open a GGUF file, a folder with one, or a split file named by any of its parts.

    A config or tokenizer that cannot be made is a note (C03) of the view.

    Args:
        folder: where the files lie.
        names: the files to look at.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: F02 where a file is truncated, F05 where a split is missing, F07 where a header contradicts
            itself, and one with a hint where the gguf package is not installed.
    """
    package()
    files = _files(folder, names, path)
    records: dict[str, TensorRecord] = {}
    metadata: dict[str, Any] = {}
    for file in files:
        header = read_gguf_header(folder, file)
        metadata = {**header.metadata, **metadata}
        for record in _records(header, folder, file):
            if record.name in records:
                raise TensorkeepError(
                    f"{record.name} is in {records[record.name].file} and in {file}", where=path, code="F07"
                )
            records[record.name] = record
    if metadata.get("split.count", 1) != len(files):
        raise TensorkeepError(
            f"is part {metadata.get('split.no', 0)} of {metadata['split.count']}, and {len(files)} is here",
            where=path,
            code="F05",
            hint="get all parts, and keep their names: NAME-00001-of-00003.gguf",
        )
    view = StateView(path, "gguf", folder, records, metadata={"gguf": metadata}, decode=decode)
    _describe(view, metadata)
    return view


def package() -> Any:
    """Import the gguf package, or raise the error that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise TensorkeepError(
            f"reading GGUF needs the gguf package: {error}", hint="pip install 'tensorkeep[language]'"
        ) from None
    return gguf


def _files(folder: Folder, names: list[str], path: str) -> list[str]:
    """Choose the file to read, or all parts of a split one in order."""
    found = [n for n in names if n.endswith(".gguf")] or names[:1]
    splits = [m for n in found if (m := _SPLIT.match(n))]
    if splits and len({(m["stem"], m["count"]) for m in splits}) == 1 and len(splits) == len(found):
        first, present = splits[0], set(folder.names())
        wanted = [f"{first['stem']}-{i + 1:05}-of-{first['count']}.gguf" for i in range(int(first["count"]))]
        absent = [n for n in wanted if n not in present]
        if absent or not wanted:
            raise TensorkeepError(
                f"{len(absent)} of its parts are not there, first {absent[:1]}",
                where=path,
                code="F05",
                hint="get all parts",
            )
        return wanted
    if len(found) > 1:
        raise TensorkeepError(
            f"holds {len(found)} models: {', '.join(found[:5])}", where=path, hint="name one of the files"
        )
    return found


def _records(header: Header, folder: Folder, file: str) -> list[TensorRecord]:
    """List a file's tensors with their byte ranges, which must be aligned, apart, and inside the file."""
    where, size = f"{folder.url}/{file}", folder.size(file)
    records = [_record(info, header, file, where) for info in header.tensors]
    at, before = 0, "the header"
    for record in sorted(records, key=lambda r: (r.blocks[0].start, r.blocks[0].nbytes)):
        block = record.blocks[0]
        if block.start < at:
            raise TensorkeepError(
                f"{record.name} and {before} overlap at byte {block.start}", where=where, code="F07", hint=DAMAGED
            )
        at, before = block.start + block.nbytes, record.name
        if at > size:
            raise short_file(where, block.start, block.nbytes, size)
    return records


def _record(info: TensorInfo, header: Header, file: str, where: str) -> TensorRecord:
    """Turn one header entry into a record."""

    def wrong(what: str, hint: str = DAMAGED) -> TensorkeepError:
        return TensorkeepError(f"{info.name}: {what}", where=where, code="F07", hint=hint)

    gguf = package()
    try:
        kind = gguf.GGMLQuantizationType(info.kind)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise wrong(f"unknown ggml type {info.kind}", "a newer gguf package may know it: pip install -U gguf") from None
    row = info.shape[-1] if info.shape else 1
    if row % per_block:
        raise wrong(f"rows of {row} are not whole blocks of {per_block} ({kind.name})")
    if info.offset % header.alignment:
        raise wrong(f"offset {info.offset} is not a multiple of {header.alignment}")
    nbytes = math.prod(info.shape) // per_block * block_bytes
    block = Block(file, header.start + info.offset, nbytes, (0,) * len(info.shape), info.shape)
    if kind.name in PLAIN_TYPES:
        return TensorRecord(info.name, PLAIN_TYPES[kind.name], info.shape, (block,))
    return TensorRecord(info.name, "F32", info.shape, (block,), encoding=kind.name)


def decode(record: TensorRecord, raw: memoryview) -> memoryview:
    """Decode whole rows of a block-quantized tensor to float32.

    Args:
        record: the tensor; `encoding` names its ggml type.
        raw: any number of whole blocks, in stored order. Formulas: gguf.quants, which follows ggml-quants.c.

    Returns:
        The bytes of the values as little-endian float32.

    Raises:
        TensorkeepError: the installed gguf cannot decode this type.
    """
    import numpy as np

    gguf = package()
    kind = gguf.GGMLQuantizationType[record.encoding]
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # gguf works through 16 rows at a time: few long rows are several times faster than many short ones
    blocks = np.frombuffer(raw, np.uint8)
    wide = next(n for n in (256, 64, 16, 4, 1) if blocks.size % (block_bytes * n) == 0)
    try:
        with np.errstate(all="ignore"):  # a damaged scale may be infinite; what comes of it is data, not a fault here
            values = gguf.dequantize(blocks.reshape(-1, block_bytes * wide), kind)
    except NotImplementedError:  # gguf's way to say that it has no decoder for the kind
        raise TensorkeepError(
            f"{record.name}: gguf cannot decode {record.encoding}",
            hint="pip install -U gguf, or take another quantization",
        ) from None
    made: memoryview = np.ascontiguousarray(values, dtype="<f4").view(np.uint8).reshape(-1).data
    return made


def encoded(values: memoryview, encoding: str) -> tuple[memoryview, memoryview]:
    """Quantize whole rows of float32 to blocks.

    Args:
        values: any number of whole blocks, little-endian float32. Formulas: gguf.quants, which follows ggml-quants.c.
        encoding: the ggml type, a key of `storage.record.BLOCK_TYPES`.

    Returns:
        The bytes to store, and those of the float32 values that they decode to.
    """
    import numpy as np

    gguf = package()
    kind = gguf.GGMLQuantizationType[encoding]
    elements = BLOCK_TYPES[encoding][0]
    blocks = np.frombuffer(values, "<f4")
    wide = next(n for n in (256, 64, 16, 4, 1) if blocks.size % (elements * n) == 0)
    with np.errstate(all="ignore"):  # a block that holds an infinity has no scale; its values are said by the cast
        made = gguf.quantize(blocks.reshape(-1, elements * wide), kind)
        back = gguf.dequantize(made, kind)
    stored = np.ascontiguousarray(made).reshape(-1).view(np.uint8)
    return stored.data, np.ascontiguousarray(back, dtype="<f4").reshape(-1).view(np.uint8).data


def layout(
    tensors: Sequence[SinkTensor],
    *,
    name: str = "model.gguf",
    config: Mapping[str, Any] | None = None,
    companions: Sequence[Companion] = (),
    **_: Any,
) -> list[FileLayout]:
    """Lay out one file: the metadata of config and tokenizer, then the tensors at multiples of 32 bytes.

    Args:
        tensors: the tensors to be written, under llama.cpp's names.
        name: name of the file.
        config: the model's config.
        companions: the files beside the source; tokenizer.json and its neighbours become metadata.

    Returns:
        The one file.

    Raises:
        TensorkeepError: C03 where the metadata cannot say what config and tokenizer say.
    """
    import numpy as np

    gguf = package()
    entries, factors = metadata_of(config, companions, tensors)
    kinds = {t.name: t.dtype if t.encoding == "plain" else t.encoding for t in tensors}
    sizes = {t.name: (t.shape, t.nbytes) for t in tensors}
    for tensor, values in factors.items():
        kinds[tensor], sizes[tensor] = "F32", ((len(values),), 4 * len(values))
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "header", entries["general.architecture"])
        put_metadata(writer, entries)
        for tensor, (shape, nbytes) in sizes.items():
            kind = gguf.GGMLQuantizationType[kinds[tensor]]
            writer.add_tensor_info(tensor, shape, np.dtype("f4"), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = (Path(folder) / "header").read_bytes()
    at = -(-len(header) // _ALIGNMENT) * _ALIGNMENT
    segments: list[Fixed | Slot | Trailer] = [Fixed(0, header.ljust(at, b"\0"))]
    for tensor, (_shape, nbytes) in sizes.items():
        made = factors.get(tensor)
        segments.append(Slot(at, nbytes, tensor) if made is None else Fixed(at, struct.pack(f"<{len(made)}f", *made)))
        at += nbytes
        room = -at % _ALIGNMENT
        if room:
            segments.append(Fixed(at, b"\0" * room))
            at += room
    return [FileLayout(name, segments)]


def _describe(view: StateView, metadata: dict[str, Any]) -> None:
    """Give the view config, tokenizer and generation config as the files that a Hugging Face folder has."""
    try:
        factors = _factors(view)
        view.config = hf_config(metadata, view.records, factors)
        view.metadata["not_in_config"] = not_in_config(metadata, view.records, factors)
        view.companions += companions(view.config)
    except TensorkeepError as error:
        view.notes.append(Note("C03", f"no config was made: {error.what}"))
        architecture = metadata.get("general.architecture")
        view.config = {"model_type": architecture} if isinstance(architecture, str) else None
    try:
        files, remark = tokenizer_files(metadata)
        view.companions += [Companion(name, _json(document), view.path) for name, document in files.items()]
        view.notes += [Note("C03", remark)] if remark else []
    except TensorkeepError as error:
        view.notes.append(Note("C03", f"the tokenizer was not carried: {error.what}"))


def _json(document: Any) -> bytes:
    # byte-level vocabularies are not ASCII; escaped they would be several times larger
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def _factors(view: StateView) -> dict[str, list[float]]:
    """Return the tensors by which llama.cpp divides RoPE's frequencies, by name, of those that the file has."""
    out = {}
    for name in (FACTORS, LONG, SHORT):
        record = view.records.get(name)
        if record is not None and record.encoding == "plain" and record.dtype == "F32" and record.elements <= 4096:
            out[name] = view.array(name).reshape(-1).tolist()
    return out
