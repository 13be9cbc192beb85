"""Objects sent to S3 in parts, several at a time, which a later process takes up where a killed one stopped.

Every part is sent with its MD5, which S3 compares with what arrived, and S3's answer is compared with it again. A part
that an earlier process sent is not sent again where its number, size and MD5 are those of the bytes that are due now:
nothing is believed of an earlier upload but what the store itself says of its parts. Nothing is visible before
`Upload.complete`, which names every part's MD5, so that no mixture of two writers can come about.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.s3 import Part, Unfinished, abort, failures, parts, unfinished

PART = 16 << 20  # bytes of a part; more where the object would have too many
_MOST_PARTS = 9000  # S3 takes 10 000 parts of one object
_AT_ONCE = 5  # parts under way


def part_size(size: int) -> int:
    """Return the bytes of each part of an object, which depend on its size alone: so parts sent before fit.

    Args:
        size: bytes of the object.

    Example:
        >>> part_size(1 << 30) >> 20, part_size(1 << 40) >> 20
        (16, 117)
    """
    return PART if size <= PART * _MOST_PARTS else -(-size // (_MOST_PARTS << 20)) << 20


class Sending:
    """The parts under way to one place, of all its objects together.

    Args:
        system: s3fs.
        path: bucket and key of the object, or of the folder.
    """

    def __init__(self, system: Any, path: str) -> None:
        self.system = system
        self.pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="tensorkeep-send")
        self.room = threading.BoundedSemaphore(_AT_ONCE)
        self.before: dict[Unfinished, dict[int, Part]] = {}
        with contextlib.suppress(PermissionError):  # who may not list uploads may still write: everything is sent then
            self.before = {begun: parts(system, begun) for begun in unfinished(system, path)}
        self.kept = self.sent = 0  # bytes that earlier processes had sent, and that this one did

    def adopt(self, path: str) -> tuple[Unfinished | None, dict[int, Part]]:
        """Return the upload of an object that has most of it already, and its parts."""
        found = [(sum(p.size for p in there.values()), u) for u, there in self.before.items() if u.path == path]
        if not found:
            return None, {}
        best = max(found, key=lambda f: f[0])[1]
        return best, self.before[best]

    def close(self) -> None:
        """Wait for what is under way; nothing more is sent."""
        self.pool.shutdown(cancel_futures=True)


class Upload:
    """One object on its way into S3.

    Args:
        sending: of all objects.
        path: bucket and key.
        size: bytes of the object.
        there: the ETag of an object that is there and is compared with, part by part sums, instead of sending; None
            to send.
    """

    def __init__(self, sending: Sending, path: str, size: int, there: str | None = None) -> None:
        self.sending, self.path, self.size, self.there = sending, path, size, there
        self.begun, self.found = sending.adopt(path)
        self.confirmed = (
            True  # S3 gave every part's MD5 back; it does not where a bucket has encryption keys of its own
        )
        self.parts: list[Future[tuple[str, bytes]]] = []
        self._pieces: list[bytes] = []
        self._held, self._size = 0, part_size(size)
        self._lock = threading.Lock()

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes; waits where enough parts are under way."""
        view = memoryview(data)
        while len(view):
            taken = view[: self._size - self._held]
            self._pieces.append(bytes(taken))
            self._held += len(taken)
            view = view[len(taken) :]
            if self._held == self._size:
                self._send()

    def _send(self) -> None:
        number = len(self.parts) + 1
        self.sending.room.acquire()
        for done in self.parts[-2 * _AT_ONCE :]:
            if done.done() and done.exception() is not None:
                self.sending.room.release()
                done.result()  # one that failed ends the whole
        data, self._pieces, self._held = b"".join(self._pieces), [], 0
        try:
            future = self.sending.pool.submit(self._deliver, number, data)
        except BaseException:
            self.sending.room.release()
            raise
        future.add_done_callback(lambda _: self.sending.room.release())
        self.parts.append(future)

    def _deliver(self, number: int, data: bytes) -> tuple[str, bytes]:
        """Send a part unless it is there; return its ETag and MD5."""
        md5 = hashlib.md5(data, usedforsecurity=False)
        if self.there is not None:
            return "", md5.digest()
        found = self.found.get(number)
        if found is not None and found == (len(data), md5.hexdigest()):
            with self._lock:
                self.sending.kept += len(data)
            return found.etag, md5.digest()
        bucket, key, _ = self.sending.system.split_path(self.path)
        answer = self.sending.system.call_s3(
            "upload_part",
            Bucket=bucket,
            Key=key,
            UploadId=self._begin().upload,
            PartNumber=number,
            Body=data,
            ContentMD5=base64.b64encode(md5.digest()).decode(),
        )
        etag = str(answer["ETag"]).strip('"')
        with self._lock:
            self.sending.sent += len(data)
            self.confirmed &= self._confirmed(etag, md5.hexdigest())
        return etag, md5.digest()

    @staticmethod
    def _confirmed(etag: str, md5: str) -> bool:
        return etag == md5

    def _begin(self) -> Unfinished:
        """Return this object's upload, begun when its first part is due."""
        with self._lock:
            if self.begun is None:
                bucket, key, _ = self.sending.system.split_path(self.path)
                answer = self.sending.system.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
                self.begun = Unfinished(self.path, answer["UploadId"], "")
            return self.begun

    def end(self) -> None:
        """Wait until the store has every part.

        Raises:
            TensorkeepError: the object that is there has other bytes.
        """
        if self._held or not self.parts:
            self._send()
        for part in self.parts:
            part.result()
        if self.there is not None and self.there != self.etag:
            raise TensorkeepError(
                "is there already, written by a command that was killed, and has other bytes",
                where=f"s3://{self.path}",
                hint="the source changed since: replace it with --overwrite",
            )

    @property
    def etag(self) -> str:
        """What S3 calls the object once it is completed: the MD5 of its parts' MD5s, and their number."""
        digests = b"".join(part.result()[1] for part in self.parts)
        return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(self.parts)}"

    def complete(self) -> None:
        """Make the object appear under its name; what stood there is replaced in the same instant.

        Raises:
            TensorkeepError: F03, the store put together something else.
        """
        if self.there is not None:
            return
        bucket, key, _ = self.sending.system.split_path(self.path)
        listed = [{"PartNumber": i + 1, "ETag": f'"{p.result()[0]}"'} for i, p in enumerate(self.parts)]
        try:
            answer = self.sending.system.call_s3(
                "complete_multipart_upload",
                Bucket=bucket,
                Key=key,
                UploadId=self._begin().upload,
                MultipartUpload={"Parts": listed},
            )
        except failures():
            # an answer that came too late or not at all: the second attempt finds no upload, for the first one worked
            if not self.confirmed or self._in_place() != (self.etag, self.size):
                raise
            return
        if self.confirmed and str(answer.get("ETag", "")).strip('"') != self.etag:
            raise TensorkeepError(
                "the store put other parts together than were sent",
                where=f"s3://{self.path}",
                code="F03",
                hint="run again",
            )

    def _in_place(self) -> tuple[str, int] | None:
        """Return ETag and size of the object that is there now; None where there is none."""
        with contextlib.suppress(OSError):
            self.sending.system.invalidate_cache()
            found = self.sending.system.info(self.path)
            return str(found.get("ETag")).strip('"'), int(found["size"])
        return None

    def give_up(self) -> None:
        """Let the store drop what it has of the object."""
        if self.begun is not None:
            abort(self.sending.system, self.begun)


def left_there(sending: Sending, done: Iterable[Unfinished]) -> list[str]:
    """Give up the uploads of other processes to the same place that did not move since `sending` began.

    A store has no locks: an upload that grew meanwhile is another's at work, and stays.

    Args:
        sending: of what is in place now.
        done: the uploads that were completed.

    Returns:
        What was given up, in words.
    """
    gone, cleared = set(done), []
    for begun, before in sending.before.items():
        if begun not in gone and (there := parts(sending.system, begun)) == before:
            abort(sending.system, begun)
            size = sum(p.size for p in there.values())
            cleared.append(
                f"an unfinished upload of {begun.path.rpartition('/')[2]} ({len(there)} parts, {size} bytes)"
            )
    return cleared
