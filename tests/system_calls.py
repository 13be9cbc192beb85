"""Record what a program did to files by strace, and rebuild what a crash at any point may leave on the disk."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CALLS = "openat,open,creat,mkdir,mkdirat,write,pwrite64,writev,pwritev,fsync,fdatasync,sync_file_range,rename,renameat,"
CALLS += "renameat2,link,linkat,unlink,unlinkat,rmdir,ftruncate,truncate,fallocate,symlink,symlinkat"
LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>)?(.*)\Z")
QUOTED = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
ON = re.compile(r"(?:AT_FDCWD|\d+)<((?:\\x[0-9a-f]{2})*)>")


@dataclass
class Call:
    """A call that succeeded: its name, the paths it is about, the bytes it wrote, its numbers, the rest of its text."""

    name: str
    paths: list[str]
    data: bytes
    numbers: list[int]
    text: str


def record(command: Sequence[str], log: Path, **options: object) -> list[Call]:
    """Run a command under strace; its calls in the order in which they came back."""
    strace = ["strace", "-f", "-y", "-xx", "--seccomp-bpf", "-s", "1000000", "-o", str(log), "-e", f"trace={CALLS}"]
    subprocess.run([*strace, *command], check=True, **options)  # type: ignore[call-overload]
    return list(_calls(log.read_text()))


def _calls(text: str) -> Iterator[Call]:
    begun: dict[str, str] = {}
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None or match[3].startswith(("+++", "---")):
            continue
        pid, resumed, rest = match.groups()
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>")
            continue
        whole = begun.pop(pid) + rest if resumed else rest
        name, _, rest = whole.partition("(")
        arguments, _, result = rest.rpartition(" = ")
        if result.startswith(("-1", "?")):
            continue
        yield _call(name, arguments.rstrip().removesuffix(")"), result)


def _call(name: str, arguments: str, result: str) -> Call:
    on = [_text(m) for m in ON.findall(arguments)]
    quoted = [m.groups() for m in QUOTED.finditer(arguments)]
    assert not any(cut for _, cut in quoted), "strace cut a string short"
    rest = ON.sub("", QUOTED.sub("", arguments))
    numbers = [int(n) for n in re.findall(r"(?<![\w|])\d+(?![\w])", rest)]
    if name in ("write", "pwrite64"):
        data = _bytes(quoted[0][0]) if quoted else b""
        return Call(name, on, data[: int(result.split()[0])], numbers, arguments)
    names = [_text(text) for text, _ in quoted]
    bases = on if len(on) == len(names) else on * len(names)
    paths = [n if n.startswith("/") or not bases else f"{bases[i]}/{n}" for i, n in enumerate(names)]
    return Call(name, paths or on, b"", numbers, arguments)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _text(text: str) -> str:
    return _bytes(text).decode()


@dataclass(eq=False)
class File:
    """Its bytes as programs see them, and as the last fsync left them on the disk."""

    data: bytearray = field(default_factory=bytearray)
    safe: bytes = b""

    def after(self, model: str) -> bytes:
        """Return what a crash leaves of the file.

        `kill`: everything; `drop`: what was fsynced; `zero`: the length without the rest's data; `half` of what was not
        fsynced.
        """
        if model == "kill" or bytes(self.data) == self.safe:
            return bytes(self.data)
        if model in ("drop", "lost", "strict", "mixed"):
            return self.safe
        rest = len(self.data) - len(self.safe)
        if model == "zero":
            return self.safe + bytes(max(rest, 0))
        return bytes(self.data[: len(self.safe) + max(rest, 0) // 2])


@dataclass(eq=False)
class Folder:
    """Its names as programs see them, and as the last fsync of the folder itself left them on the disk."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    safe: dict[str, File | Folder] = field(default_factory=dict)


MODELS = ("kill", "drop", "zero", "half", "lost", "strict", "mixed")


class Disk:
    """A file system as far as recorded calls have come.

    Names are journalled, as ext4, xfs and btrfs do: they survive in their order, at the latest with the next fsync of
    anything; under the model `lost` those after the last fsync are gone. Under `strict` a name survives when its own
    folder was fsynced, which is all that POSIX says; it says nothing of the others, and under `mixed` what happened to
    files inside a folder is on the disk before what happened to the folder's name.
    """

    def __init__(self) -> None:
        self.root = Folder()
        self.journalled: dict[str, File | None] = {}

    def apply(self, call: Call) -> None:
        path = call.paths[0] if call.paths else ""
        if call.name in ("openat", "open", "creat"):
            self._open(path, call.text)
        elif call.name in ("mkdir", "mkdirat"):
            self._put(path, Folder())
        elif call.name in ("write", "pwrite64"):
            file = self._file(path)
            at = call.numbers[-1] if call.name == "pwrite64" else len(file.data)
            file.data.extend(bytes(max(0, at - len(file.data))))
            file.data[at : at + len(call.data)] = call.data
        elif call.name in ("ftruncate", "truncate"):
            file, size = self._file(path), call.numbers[-1]
            file.data = bytearray(file.data[:size]) + bytes(max(0, size - len(file.data)))
        elif call.name in ("fsync", "fdatasync"):
            found = self._at(path)
            if isinstance(found, File):
                found.safe = bytes(found.data)
            elif found is not None:
                found.safe = dict(found.names)
            self.journalled = self._flat("names")
        elif call.name.startswith("rename"):
            other = call.paths[1]
            one, two = self._take(path), self._take(other) if self._at(other) is not None else None
            assert one is not None
            self._put(other, one)
            if "RENAME_EXCHANGE" in call.text:
                assert two is not None
                self._put(path, two)
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            self._take(path)
        else:
            raise AssertionError(f"no rule for {call.name}")

    def _open(self, path: str, flags: str) -> None:
        if "O_CREAT" in flags and self._at(path) is None:
            self._put(path, File())
        elif "O_TRUNC" in flags:
            self._file(path).data.clear()

    def _parent(self, path: str) -> tuple[Folder, str]:
        """The folder a path lies in; one that was there before the recording is on the disk already."""
        here = self.root
        *parts, last = Path(path).parts[1:]
        for part in parts:
            if part not in here.names:
                here.names[part] = here.safe[part] = Folder()
            found = here.names[part]
            assert isinstance(found, Folder)
            here = found
        return here, last

    def _at(self, path: str) -> File | Folder | None:
        folder, name = self._parent(path)
        return folder.names.get(name)

    def _file(self, path: str) -> File:
        found = self._at(path)
        assert isinstance(found, File), path
        return found

    def _put(self, path: str, what: File | Folder) -> None:
        folder, name = self._parent(path)
        folder.names[name] = what

    def _take(self, path: str) -> File | Folder:
        folder, name = self._parent(path)
        return folder.names.pop(name)

    def _flat(self, which: str) -> dict[str, File | None]:
        out: dict[str, File | None] = {}

        def walk(folder: Folder, at: str) -> None:
            innermost = not any(isinstance(found, Folder) for found in folder.names.values())
            own = ("names" if innermost else "safe") if which == "mixed" else which
            for name, found in getattr(folder, own).items():
                out[f"{at}/{name}"] = found if isinstance(found, File) else None
                if isinstance(found, Folder):
                    walk(found, f"{at}/{name}")

        walk(self.root, "")
        return out

    def after(self, model: str) -> dict[str, bytes | None]:
        """Every path and its bytes after a crash under this model; None for folders."""
        which = {"strict": "safe", "mixed": "mixed"}.get(model, "names")
        names = self.journalled if model == "lost" else self._flat(which)
        return {path: None if file is None else file.after(model) for path, file in names.items()}


def build(left: dict[str, bytes | None], top: str, target: Path) -> None:
    """Write what a crash left of the tree `top` into the empty folder `target`."""
    for path, data in sorted(left.items()):
        if path == top or path.startswith(top + "/"):
            place = target / path[len(top) + 1 :]
            if data is None:
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
