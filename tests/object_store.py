"""A bucket for tests: moto's server on loopback, and ways to make it fail as stores do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": host,
            "no_proxy": host,
        }.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # one made before knows another store
        fsspec.filesystem("s3").mkdir("checkpoints")
        yield "s3://checkpoints"
    server.stop()


def small_parts(patch: pytest.MonkeyPatch, size: int) -> None:
    """Send parts of a few bytes, which the server here is told to take."""
    patch.setattr("tensorkeep.storage.multipart.PART", size)
    patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


def calls_of(system: Any, patch: pytest.MonkeyPatch, before: Callable[[str, dict[str, Any]], None]) -> list[str]:
    """Call `before` ahead of every one of S3's calls that we make; return their names as they are made."""
    made: list[str] = []
    call = system.call_s3

    def spy(method: str, **asked: Any) -> Any:
        before(method, asked)
        made.append(method)
        return call(method, **asked)

    patch.setattr(system, "call_s3", spy, raising=False)
    return made
