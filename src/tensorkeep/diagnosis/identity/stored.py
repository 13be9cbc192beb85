"""Statements on disk: written beside a checkpoint with their signature, the signature in its certificate too."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorkeep.diagnosis.identity.signing import LARGEST as LARGEST_SIGNATURE
from tensorkeep.diagnosis.identity.statement import LARGEST, Statement, places, read_statement
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats.earlier import LONE_CERTIFICATE
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import dump, parse_certificate, parse_json
from tensorkeep.storage.files import CERTIFICATE, local_path
from tensorkeep.storage.overwriting import lone_file
from tensorkeep.storage.placement import replacing, replacing_all, write_bytes

_STATEMENT_KIND = lone_file("a statement of tensorkeep", r'\{\s*"_type": "https://in-toto.io/Statement/v1"')
_BUNDLE_KIND = lone_file("a signature", r'\{\s*"mediaType":\s*"application/vnd.dev.sigstore.bundle')


@dataclass(frozen=True)
class Stored:
    """A statement as it lies on disk.

    Attributes:
        statement: what it says.
        data: its bytes, which are what is signed.
        signature: the bundle's bytes; None where it is not signed.
        where: the signature's file.
    """

    statement: Statement
    data: bytes
    signature: bytes | None
    where: str

    @property
    def hash(self) -> str:
        """SHA-256 of its bytes, in hex."""
        return hashlib.sha256(self.data).hexdigest()


def write_statement(
    data: bytes, signature: bytes | None, checkpoint: str | Path, out: Path | None = None, overwrite: bool = False
) -> Path:
    """Write a statement and its signature beside a checkpoint: both or neither.

    Args:
        data: from `statement.state`.
        signature: from `signing.sign`; None for none.
        checkpoint: what it is about; its certificate, where it has one, gets statement's hash and signature too.
        out: where the statement goes instead, a .json file; the signature lies beside it.
        overwrite: replace earlier ones.

    Returns:
        The statement's path.

    Raises:
        TensorkeepError: they exist, or the place cannot be written.
    """
    place, beside = (out, out.with_suffix(".sig")) if out is not None else places(local_path(str(checkpoint)))
    finals, kinds = [place], [_STATEMENT_KIND]
    if signature is not None or beside.exists():  # an earlier signature is of an earlier statement
        finals, kinds = [*finals, beside], [*kinds, _BUNDLE_KIND]
    with replacing_all(finals, [overwrite] * len(finals), kinds) as temporaries:
        write_bytes(temporaries[0], data)
        if len(finals) > 1:
            write_bytes(temporaries[1], signature or b"")
    if len(finals) > 1 and signature is None:
        beside.unlink()
    certificate = _certificate(checkpoint) if out is None else None
    if certificate is not None:
        document = parse_certificate(read_small(certificate, LARGEST), certificate)
        document["identity"] = _entry(data, signature)
        with replacing(certificate, True, LONE_CERTIFICATE) as temporary:
            write_bytes(temporary, dump(document))
    return place


def _entry(data: bytes, signature: bytes | None) -> dict[str, Any]:
    """Return what a certificate says of a statement."""
    held = None if signature is None else parse_json(signature, "signature")
    return {"statement_sha256": hashlib.sha256(data).hexdigest(), "signature": held}


def _certificate(checkpoint: str | Path) -> Path | None:
    """Return the certificate that lies beside a checkpoint; None without one."""
    path = local_path(str(checkpoint))
    place = path / CERTIFICATE if path.is_dir() else path.with_name(f"{path.name}.{CERTIFICATE}")
    return place if place.is_file() else None


def find_statement(checkpoint: str | Path, given: Path | None = None) -> Stored | None:
    """Read the statement that lies beside a checkpoint, or a given one.

    Args:
        checkpoint: what it is about.
        given: the statement's file, or a folder with one, where it lies elsewhere.

    Returns:
        The statement with its signature; None where there is none.

    Raises:
        TensorkeepError: F02, F03 or F07 where it is damaged; F05 where the given one is not there.
    """
    if given is not None:
        place, beside = places(given) if given.is_dir() else (given, given.with_suffix(".sig"))
        if not place.is_file():
            raise TensorkeepError("no statement is there", where=place, code="F05", hint=_make(checkpoint))
    elif "://" in str(checkpoint):
        return None
    else:
        place, beside = places(local_path(str(checkpoint)))
        if not place.is_file():
            return None
    data = read_small(place, LARGEST)
    signature = read_small(beside, LARGEST_SIGNATURE) if beside.is_file() else None
    where = str(beside)
    if signature is None and given is None and (kept := _in_certificate(checkpoint, data)) is not None:
        signature, where = kept
    return Stored(read_statement(data, place), data, signature, where)


def _in_certificate(checkpoint: str | Path, data: bytes) -> tuple[bytes, str] | None:
    """Return the signature that a checkpoint's certificate keeps of this very statement; None without one."""
    place = _certificate(checkpoint)
    if place is None:
        return None
    entry = parse_certificate(read_small(place, LARGEST), place).get("identity")
    given: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    fits = given.get("statement_sha256") == hashlib.sha256(data).hexdigest()
    return (dump(given["signature"]), str(place)) if fits and isinstance(given.get("signature"), dict) else None


def demanded(checkpoint: str | Path, given: Path | None = None) -> Stored:
    """Read a statement that must be there, with a signature.

    Args:
        checkpoint: what it is about.
        given: as of `find_statement`.

    Returns:
        The statement, whose signature is not checked yet.

    Raises:
        TensorkeepError: F05 where there is none, or it is not signed; else as `find_statement`.
    """
    found = find_statement(checkpoint, given)
    if found is None:
        raise TensorkeepError(
            "is not signed: no statement lies beside it", where=checkpoint, code="F05", hint=_make(checkpoint)
        )
    if found.signature is None:
        what = "is not signed: a statement is there, and no signature of it"
        raise TensorkeepError(what, where=found.statement.where, code="F05", hint=_make(checkpoint))
    return found


def _make(checkpoint: str | Path) -> str:
    return f"tensorkeep sign {word(checkpoint)} --key KEY.pem, or name one: --statement FILE"
