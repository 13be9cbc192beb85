"""An ext4 file system in a file, mounted by a loop device, whose power can be cut. Needs root, losetup and mkfs.ext4.

The cut is the kernel's own: EXT4_IOC_SHUTDOWN with NOLOGFLUSH (what xfstests calls godown) stops the file system at
once, with the journal as it is on the disk; the next mount replays that. What programs wrote and never fsynced is gone,
apart from what the kernel had happened to write back.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2  # _IOR('X', 125, u32), fs/ext4/ext4.h


def missing() -> str | None:
    """Say why there can be no such disk on this machine; None where there can."""
    if os.geteuid() != 0:
        return "only root mounts"
    for program in ("losetup", "mkfs.ext4", "mount", "umount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if subprocess.run(["losetup", "-f"], capture_output=True).returncode:
        return "no free loop device"
    return None


class Disk:
    """`top`: where it is mounted; `place`: the folder of the image."""

    def __init__(self, place: Path, megabytes: int = 512) -> None:
        self.top, self.image, self.device = place / "mounted", place / "image", ""
        self.top.mkdir()
        with self.image.open("wb") as file:
            file.truncate(megabytes << 20)  # sparse
        self.repaired = 0

    def fresh(self) -> None:
        """An empty file system, mounted; commits its journal every second, so that much is under way at any instant."""
        self.unmount()
        if not self.device:
            self.device = _run("losetup", "-f", "--show", str(self.image)).strip()
        _run("mkfs.ext4", "-q", "-F", self.device)
        self.mount()

    def mount(self) -> None:
        """Replays the journal; where that fails, fsck first."""
        command = ["mount", "-o", "commit=1", self.device, str(self.top)]
        if subprocess.run(command, capture_output=True).returncode:
            self.repaired += 1
            subprocess.run(["fsck.ext4", "-y", self.device], capture_output=True)
            _run(*command)

    def cut(self) -> None:
        """The power goes. Every call on the file system fails from here on."""
        handle = os.open(self.top, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        finally:
            os.close(handle)

    def back(self) -> None:
        """The power comes back: nothing of the time before is in memory."""
        self.unmount()
        self.mount()

    def unmount(self) -> None:
        for _ in range(50):  # a process that was killed may still be letting go of its files
            if not os.path.ismount(self.top):
                return
            if subprocess.run(["umount", str(self.top)], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        subprocess.run(["umount", "-l", str(self.top)], check=True)
        raise RuntimeError(f"{self.top} was in use to the end")

    def close(self) -> None:
        try:
            self.unmount()
        finally:
            if self.device:
                subprocess.run(["losetup", "-d", self.device], check=True)
                self.device = ""


@contextmanager
def disk(place: Path, megabytes: int = 512) -> Iterator[Disk]:
    """A disk for the body; neither mount nor loop device is left behind."""
    made = Disk(place, megabytes)
    try:
        yield made
    finally:
        made.close()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
