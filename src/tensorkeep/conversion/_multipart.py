"""Put an output into S3: its files in parts, which nobody sees; then everything appears, the certificate last.

1. Every file of tensors is sent in parts (`storage.multipart`). S3 compares each part's MD5 with what arrived, and
   its answer is compared again. A bucket with encryption keys of its own answers something else: not confirmed.
2. Sources are checked. What was sent is opened as a stranger would and compared with the plan: names, dtypes, shapes,
   digests. Where a file's MD5 is not confirmed, this is done after step 3, and its bytes are read from the store.
3. A list of what is about to appear, with ETags, is written under a temporary prefix. The uploads are completed, data
   before `.metadata` or the index, and the store's ETags and sizes are compared with those of what was sent; the
   certificate is put beside it; the list goes.

Where the store or the connection fails, or the process is killed, the parts stay with the store and the same command
goes on from them: it makes every part again and sends those of which the store has not the same MD5. Any other failure
gives the uploads up. With `overwrite` a folder's old metadata goes first, so that nobody reads half of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tensorkeep.conversion._held import Held, NotHeld
from tensorkeep.conversion._sending import JOURNAL, LAST, Target, send_files, small
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.proof import prove
from tensorkeep.conversion.sink import Checks, Progress, Result, result_of
from tensorkeep.conversion.streams import Sums, with_ties
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import recognised
from tensorkeep.storage.files import CERTIFICATE
from tensorkeep.storage.layout import FileLayout
from tensorkeep.storage.multipart import Sending, Upload, left_there
from tensorkeep.storage.remote import RemoteFolder, StoreFailed, explained_store, parent_of
from tensorkeep.storage.s3 import failures
from tensorkeep.storage.signals import held

_COMPLETED_AT_ONCE = 8
LEAST = 8 << 20  # bytes that are worth going on from; fewer are given up at once


class _File(Upload):
    """One file that is sent; what the store has of it is given up where the whole is, not before."""

    def give_up(self) -> None:
        """Leave it to `_Placing.give_up`."""


class _Placing:
    """The files of one output on their way into S3."""

    def __init__(self, target: Target, layouts: Sequence[FileLayout], plan: Plan) -> None:
        self.target, self.layouts, self.plan = target, layouts, plan
        with explained_store(target.url):
            self.sending = Sending(target.system, target.final)
        self.uploads: dict[str, _File] = {}
        self.small: dict[str, bytes] = {}
        self.appeared: list[str] = []

    def opened(self, layout: FileLayout) -> _File:
        path = self._path(layout.name)
        there = self.target.begun.get(path) if path in self.target.present else None
        self.uploads[layout.name] = _File(self.sending, path, layout.size, there)
        return self.uploads[layout.name]

    def _path(self, name: str) -> str:
        return f"{self.target.folder}/{name}"

    def send(self, progress: Progress) -> dict[str, Sums]:
        """Send every file that holds tensors; return the checksums."""
        with explained_store(self.target.url):
            sums = send_files([f for f in self.layouts if f.slots], self.opened, self.plan, progress)
        self.small = {f.name: small(f) for f in self.layouts if not f.slots}
        return with_ties(sums, self.plan)

    def note(self) -> None:
        """Leave the list of what is about to appear: with it a later command knows its own."""
        etags = {u.path: u.etag for u in self.uploads.values() if u.confirmed}
        etags |= {self._path(n): hashlib.md5(b, usedforsecurity=False).hexdigest() for n, b in self.small.items()}
        self.target.system.pipe_file(f"{self.target.stage}/{JOURNAL}", json.dumps(etags).encode())

    def appear(self) -> None:
        """Put everything in its place: what goes first goes, then data, small files, and metadata last."""
        system = self.target.system
        wanted = {self._path(f.name) for f in self.layouts}
        ends = (*LAST, CERTIFICATE)
        gone = [p for p in self.target.present if p not in wanted or p.endswith(ends)]
        for path in sorted(gone, key=lambda p: not p.endswith(ends)):
            system.rm_file(path)
        with ThreadPoolExecutor(_COMPLETED_AT_ONCE) as pool:
            self.appeared += [u.path for u in self.uploads.values()]
            for _ in pool.map(lambda u: u.complete(), self.uploads.values()):
                pass
        for name in sorted(self.small, key=lambda n: n.endswith(LAST)):
            self.appeared.append(self._path(name))
            system.pipe_file(self._path(name), self.small[name])

    def known(self, sums: dict[str, Sums]) -> dict[tuple[str, int, int], str]:
        """Return the digests of the places whose bytes the store has confirmed part by part, by file and range."""
        encodings = {t.name: t.encoding for t in self.plan.tensors}
        return {
            (layout.name, slot.start, slot.nbytes): sums[slot.tensor].digest
            for layout in self.layouts
            for slot in layout.slots
            if self.uploads[layout.name].confirmed and encodings.get(slot.tensor) == "plain"
        }

    def prove_sent(self, sums: dict[str, Sums], progress: Progress) -> bool:
        """Prove what was sent before anybody sees it; False where that takes bytes that only the store has."""
        if not all(upload.confirmed for upload in self.uploads.values()):
            return False
        held = Held(self.layouts, sums, self.target.url)
        names = held.names()
        try:
            view = recognised(held, names, self.target.url, single=self.target.single)
            prove(view, self.plan, sums, progress, self.known(sums))
        except NotHeld:
            return False
        return True

    def compare(self) -> None:
        """Compare ETags and sizes of what is in place with those of what was sent.

        Raises:
            TensorkeepError: F03, an object is not the one that was completed.
        """
        folder = RemoteFolder(self.target.system, self.target.folder, self._url())
        for layout in self.layouts:
            upload = self.uploads.get(layout.name)
            same = upload is None or not upload.confirmed or folder.etag(layout.name) == upload.etag
            if not same or folder.size(layout.name) != layout.size:
                raise TensorkeepError(
                    f"{layout.name} is not what was sent: another wrote it meanwhile",
                    where=self.target.url,
                    code="F03",
                    hint="see that one command writes there at a time, then run again with --overwrite",
                )

    def _url(self) -> str:
        return parent_of(self.target.url) if self.target.single else self.target.url

    def certify(self, certificate: bytes) -> None:
        """Put the certificate beside the rest, and take the list away."""
        system = self.target.system
        system.pipe_file(self._path(self.target.certificate), certificate)
        system.rm_file(f"{self.target.stage}/{JOURNAL}")

    def give_up(self) -> None:
        """Leave nothing with the store: no part, no object that appeared, no list."""
        system = self.target.system
        self.sending.close()
        with held():
            for upload in self.uploads.values():
                with contextlib.suppress(*failures()):
                    Upload.give_up(upload)
            for path in reversed(self.appeared):
                with contextlib.suppress(*failures()):
                    system.rm_file(path)
            with contextlib.suppress(*failures()):
                system.rm_file(f"{self.target.stage}/{JOURNAL}")

    def kept(self) -> str:
        """Say what stays with the store, and what to do about it."""
        self.sending.close()
        begun = [u.begun for u in self.uploads.values() if u.begun is not None]
        if not begun or self.sending.kept + self.sending.sent < LEAST:
            self.give_up()
            return ""
        size = (self.sending.kept + self.sending.sent) / 1e6
        return (
            f"{size:.0f} MB are with the store, in unfinished uploads: the same command goes on from them; "
            f"to give them up: {' && '.join(b.abort_command for b in begun[:3])}{' ...' if len(begun) > 3 else ''}"
        )


def place_parts(
    target: Target, layouts: Sequence[FileLayout], plan: Plan, checks: Checks, progress: Progress
) -> Result:
    """Carry out a plan into S3; the top of this file says how."""
    started = time.perf_counter()
    placing = _Placing(target, layouts, plan)
    try:
        sums = placing.send(progress)
        checks.sources(sums)
        checks.values(sums)
        written = time.perf_counter()
        with held(), explained_store(target.url):
            proven_before = placing.prove_sent(sums, progress)
            placing.note()
            placing.appear()
            placing.compare()
            if not proven_before:
                prove(target.url, plan, sums, progress, placing.known(sums))
            proven = time.perf_counter()
            placing.certify(checks.certificate(sums))
            cleared = left_there(placing.sending, [u.begun for u in placing.uploads.values() if u.begun is not None])
    except StoreFailed as error:
        error.hint = f"{error.hint}; {said}" if (said := placing.kept()) else error.hint
        raise
    except KeyboardInterrupt as error:
        error.left = placing.kept()  # type: ignore[attr-defined]  # the command line says it
        raise
    except BaseException:
        placing.give_up()
        raise
    finally:
        placing.sending.close()
    seconds = {"write": written - started, "prove": proven - written, "sync": time.perf_counter() - proven}
    result = result_of(target.url, list(layouts), sums, seconds)
    result.cleared, result.resumed = cleared, placing.sending.kept
    return result
