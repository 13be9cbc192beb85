"""What an object store costs: `convert`, `verify` and a resumed upload beside s3fs's own put and get, in one run.

    python -m benchmarks.stores [--megabytes 384] [--rounds 3] [--dir DIR]

The store is moto's server on loopback, in a process of its own that is started anew for every round. Each figure is of
a process of its own: seconds from the first call to the last (imports are done before), requests that it sent, its peak
memory. s3fs's put and get move the bytes and check nothing; `convert` plans, digests and proves.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.many import build
from benchmarks.measure import versions

SERVER = """
import logging, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(36000)
"""
KILLED = 0.6  # part of the data after which the upload that is resumed was killed


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """Start moto in a process of its own; give the environment in which `s3://bench` is there."""
    running = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        address = f"http://127.0.0.1:{running.stdout.readline().strip()}"
        told = {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
            "AWS_EC2_METADATA_DISABLED": "true",
            # moto answers late under load
            "FSSPEC_S3": '{"config_kwargs": {"read_timeout": 300, "connect_timeout": 60}}',
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        yield {**os.environ, **told}
    finally:
        running.kill()
        running.wait()


def child(what: str, source: str, target: str) -> None:
    """Do one thing and print its seconds, requests and peak memory."""
    import fsspec
    from fsspec.asyn import sync_wrapper
    from s3fs import S3FileSystem

    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    requests: Counter[str] = Counter()
    call = S3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        requests[method] += 1
        return await call(self, method, *arguments, **named)

    S3FileSystem._call_s3, S3FileSystem.call_s3 = counted, sync_wrapper(counted)
    system = fsspec.filesystem("s3")
    if not system.exists("bench"):
        system.mkdir("bench")
    requests.clear()
    whole = sum(p.stat().st_size for p in Path(source).iterdir()) if "://" not in source else 0

    def stop(step: str, done: int, total: int) -> None:
        if what == "killed" and step == "write" and done > KILLED * total:
            os._exit(9)

    began = time.perf_counter()
    if what == "s3fs put":
        for path in Path(source).iterdir():
            system.put_file(str(path), f"{target}/{path.name}")
    elif what == "s3fs get":
        Path(target).mkdir()
        for path in system.ls(source, detail=False):
            system.get_file(path, f"{target}/{path.rpartition('/')[2]}")
    elif what == "verify":
        view = read(source)
        for name in view:
            view.digest(name)
    else:
        convert(make_plan([read(source)], "hf"), target, "hf", None, False, stop)
    seconds = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "requests": requests, "memory": memory, "bytes": whole}))


def measured(environment: dict[str, str], what: str, source: str, target: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.stores", "--child", what, source, target]
    made = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if what == "killed":
        return {}
    if made.returncode:
        raise SystemExit(made.stderr)
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


def a_round(source: Path, folder: Path, number: int) -> dict[str, dict[str, Any]]:
    """Measure everything once against a new server; who goes first changes from round to round."""
    found: dict[str, dict[str, Any]] = {}
    for out in ("got", "converted"):
        shutil.rmtree(folder / out, ignore_errors=True)
    with server() as environment:

        def do(what: str, source: str | Path, target: str | Path, name: str | None = None) -> None:
            os.sync()
            made = found[name or what] = measured(environment, what, str(source), str(target))
            if made:
                print(f"round {number}: {what} {made['seconds']:.1f} s", file=sys.stderr, flush=True)

        there = [("s3fs put", "s3://bench/put"), ("convert to s3", "s3://bench/made")]
        for what, target in there[:: 1 if number % 2 else -1]:
            do(what, source, target)
        back = [("s3fs get", "s3://bench/put", "got"), ("convert from s3", "s3://bench/made", "converted")]
        for what, url, target in back[:: 1 if number % 2 else -1]:
            do(what, url, folder / target)
        do("verify", "s3://bench/made", "")
        do("killed", source, "s3://bench/again")
        do("resumed", source, "s3://bench/again")
    for out in ("got", "converted"):
        shutil.rmtree(folder / out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=384)
    parser.add_argument("--tensors", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("build/bench-stores"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    source = build(arguments.dir / "source", arguments.tensors, arguments.megabytes * 1_000_000)
    size = sum(p.stat().st_size for p in source.iterdir())
    rounds = [a_round(source, arguments.dir, number) for number in range(arguments.rounds)]
    shutil.rmtree(source)
    print(versions("tensorkeep", "s3fs", "moto"))
    print(f"\n{arguments.megabytes} MB in {arguments.tensors} tensors; medians of {arguments.rounds} rounds\n")
    print("| | MB/s, of each round | beside s3fs, median | requests | requests a GB | peak MB |")
    print("|---|---|---|---|---|---|")
    for what in rounds[0]:
        if what == "killed":
            continue
        runs = [r[what] for r in rounds]
        rates = " ".join(f"{size / 1e6 / r['seconds']:.0f}" for r in runs)
        beside = {"convert to s3": "s3fs put", "resumed": "s3fs put"}.get(what, "s3fs get")
        ratio = statistics.median(r[beside]["seconds"] / r[what]["seconds"] for r in rounds)
        count = runs[-1]["requests"]
        told = ", ".join(f"{n} {word}" for word, n in sorted(count.items(), key=lambda e: -e[1]))
        shown = "" if what.startswith("s3fs") else f"{ratio:.2f}"
        memory = max(r["memory"] for r in runs)
        print(f"| {what} | {rates} | {shown} | {told} | {sum(count.values()) / (size / 1e9):.0f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
