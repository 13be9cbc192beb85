"""S3 where fsspec's own calls fall short: ranges of one version of an object, and uploads that outlive their process.

An upload in parts (multipart) is invisible until it is completed, and stays with the store when its process dies: the
parts are listed with their sizes and MD5s, so a later process sends what is missing.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError

_TRIES = 5  # of one range, each going on where the last one broke off
_PIECE = 1 << 20  # bytes taken from a connection at a time


def speaks_s3(system: Any) -> bool:
    """Tell whether a file system of fsspec is s3fs, whose client takes S3's own calls.

    Args:
        system: as `remote.connect` gives it.
    """
    return hasattr(system, "call_s3") and hasattr(system, "split_path")


def get_range(system: Any, path: str, start: int, length: int, etag: str | None) -> bytearray:
    """Read bytes of an object; a connection that breaks off is taken up again where it broke.

    Args:
        system: s3fs.
        path: bucket and key.
        start: first byte.
        length: number of bytes.
        etag: the version that is read, as the listing gave it; None for any.

    Returns:
        The bytes, fewer where the object ends before.

    Raises:
        TensorkeepError: the object is another one by now.
        OSError: as s3fs gives it.
    """
    from fsspec.asyn import sync

    found: bytearray = sync(system.loop, _get, system, path, start, length, etag)
    return found


async def _get(system: Any, path: str, start: int, length: int, etag: str | None) -> bytearray:
    from s3fs.core import S3_RETRYABLE_ERRORS

    bucket, key, _ = system.split_path(path)
    whole, got = bytearray(length), 0
    for attempt in range(_TRIES if length else 0):
        wanted: dict[str, Any] = {"Range": f"bytes={start + got}-{start + length - 1}"}
        if etag:
            wanted["IfMatch"] = etag
        try:
            answer = await system._call_s3("get_object", Bucket=bucket, Key=key, **wanted)
            body = answer["Body"]
            try:
                while data := await body.read(_PIECE):
                    if got + len(data) > length:
                        raise OSError("the store sent more bytes than were asked for")
                    whole[got : got + len(data)] = data
                    got += len(data)
            finally:
                body.close()
            return whole[:got] if got < length else whole
        except S3_RETRYABLE_ERRORS:
            if attempt + 1 == _TRIES:
                raise
            await asyncio.sleep(0.1 * 2**attempt)
        except failures() as error:
            if error_code(error) != "PreconditionFailed":
                raise
            raise TensorkeepError(
                "changed while it was read: the store has another object of this name now",
                where=f"s3://{path}",
                hint="wait until its writer is done, then run again",
            ) from None
    return whole


def error_code(error: BaseException) -> str:
    """Return S3's own word for an error, through whatever s3fs made of it; an empty string where there is none.

    Args:
        error: what a call raised.
    """
    seen: BaseException | None = error
    while seen is not None:
        answer = getattr(seen, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            return str(answer["Error"].get("Code", ""))
        seen = seen.__cause__ or seen.__context__
    return ""


# -- uploads in parts -------------------------------------------------------------------------------------------------


class Unfinished(NamedTuple):
    """An upload in parts that is neither completed nor given up.

    Attributes:
        path: bucket and key.
        upload: S3's id of it.
        begun: when it was begun, as text.
    """

    path: str
    upload: str
    begun: str

    @property
    def abort_command(self) -> str:
        """The command that gives it up by hand."""
        bucket, _, key = self.path.partition("/")
        return f"aws s3api abort-multipart-upload --bucket {bucket} --key {key} --upload-id {self.upload}"


class Part(NamedTuple):
    """A part that the store has.

    Attributes:
        size: its bytes.
        etag: its MD5 in hex, unless the bucket is encrypted with keys of its own.
    """

    size: int
    etag: str


def unfinished(system: Any, path: str) -> list[Unfinished]:
    """List the uploads in parts that were begun for an object or for objects below it, the oldest first.

    Args:
        system: s3fs.
        path: bucket and key, of an object or of a folder.
    """
    bucket, key, _ = system.split_path(path)
    found: list[Unfinished] = []
    for answer in _pages(
        system,
        "list_multipart_uploads",
        {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
        Bucket=bucket,
        Prefix=key.rstrip("/"),
    ):
        for entry in answer.get("Uploads") or ():
            if entry["Key"] == key.rstrip("/") or entry["Key"].startswith(key.rstrip("/") + "/"):
                found.append(Unfinished(f"{bucket}/{entry['Key']}", entry["UploadId"], str(entry.get("Initiated"))))
    return sorted(found, key=lambda u: (u.begun, u.path, u.upload))


def parts(system: Any, begun: Unfinished) -> dict[int, Part]:
    """List the parts that the store has of an upload, by number; none where the upload is gone by now.

    Args:
        system: s3fs.
        begun: the upload.
    """
    bucket, key, _ = system.split_path(begun.path)
    marks = {"PartNumberMarker": "NextPartNumberMarker"}
    try:
        return {
            entry["PartNumber"]: Part(entry["Size"], entry["ETag"].strip('"'))
            for answer in _pages(system, "list_parts", marks, Bucket=bucket, Key=key, UploadId=begun.upload)
            for entry in answer.get("Parts") or ()
        }
    except failures() as error:
        if error_code(error) == "NoSuchUpload":
            return {}
        raise


def _pages(system: Any, method: str, marks: dict[str, str], **asked: Any) -> Iterator[dict[str, Any]]:
    """Ask for a listing page by page; `marks` says where the next page begins."""
    while True:
        answer = system.call_s3(method, **asked)
        yield answer
        if not answer.get("IsTruncated"):
            return
        asked |= {mark: answer[value] for mark, value in marks.items() if answer.get(value) is not None}


def abort(system: Any, begun: Unfinished) -> None:
    """Give an upload up; the store drops its parts. One that is gone already is no error.

    Args:
        system: s3fs.
        begun: the upload.
    """
    bucket, key, _ = system.split_path(begun.path)
    try:
        system.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=begun.upload)
    except failures() as error:
        if error_code(error) != "NoSuchUpload":
            raise


def failures() -> tuple[type[BaseException], ...]:
    """Return the exception types that stores' clients raise: built-in ones, and those of the libraries loaded."""
    found: list[type[BaseException]] = [OSError, ValueError, RuntimeError, EOFError]
    for module, names in (("botocore.exceptions", ("BotoCoreError", "ClientError")), ("aiohttp", ("ClientError",))):
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names]
    return tuple(found)
