"""Find the checkpoint that a run goes on from: its newest valid one, or one that was named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.storage.run_manifest import as_finding
from tensorkeep.training import distributed
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World, gathered
from tensorkeep.training.hosts import Hosts
from tensorkeep.training.saver import State

Read = Callable[[Path], State]


class Found(NamedTuple):
    """A checkpoint to go on from.

    Args:
        state: None where the run begins anew.
        name: what to call it in a remark.
        skipped: damaged checkpoints that were passed over.
        place: its folder, None where it came from elsewhere.
        whole: where it lies on several hosts: what `forget` closes.
        fetched: bytes of it that came from other hosts.
    """

    state: State | None
    name: str
    skipped: list[Finding]
    place: Path | None = None
    whole: Any = None
    fetched: int = 0


def find(
    run: Path,
    resume: str | Path | State,
    world: World,
    damaged: Mapping[Path, Finding] = MappingProxyType({}),
    hosts: Hosts | None = None,
    shared: bool = False,
) -> Found:
    """Find what to go on from: the run's newest valid checkpoint, one that was named, or nothing.

    The first rank chooses for all. A run begun from elsewhere goes on from its own checkpoints, so that the same
    command may be given again.

    Args:
        run: the run's folder.
        resume: as `fit` takes it.
        world: this process among its peers.
        damaged: checkpoints that were opened before and turned out to be damaged, with what was found.
        hosts: where every host keeps its own ranks' shards: the newest checkpoint that is whole among all is taken.
        shared: the ranks hold the model in shards, so a checkpoint that lies whole in files is read by all together.

    Raises:
        TensorkeepError: every checkpoint is damaged, the named one is not there, or going on from it would mix two
            runs.
    """
    if hosts is not None and not _elsewhere(run, resume, world):
        return _find_among(run, str(resume) == "never", world, damaged, hosts)
    read, nothing = partial(checkpoint.opened, world=world if shared else None), Found(None, "", [])
    found = distributed.together(world, lambda: _choose(run, resume, damaged, read) if world.first else nothing)
    chosen: Found = gathered(world, found._replace(state=None) if world.first else None)[0]

    def state() -> State | None:
        if world.first:
            return found.state
        if chosen.place is not None:
            return read(chosen.place)
        return resume if chosen.name and isinstance(resume, State) else None

    return chosen._replace(state=distributed.together(world, state))


def _elsewhere(run: Path, resume: str | Path | State, world: World) -> bool:
    """Whether a checkpoint was named that the run has not gone on from yet."""
    if not isinstance(resume, State) and str(resume) in ("auto", "never"):
        return False
    inside = not isinstance(resume, State) and Path(resume).resolve().is_relative_to(run.resolve())
    return inside or not any(gathered(world, bool(checkpoint.steps(run))))


def _find_among(run: Path, never: bool, world: World, damaged: Mapping[Path, Finding], hosts: Hosts) -> Found:
    """Find the newest checkpoint of which every file is on some host, and open it on all."""
    from tensorkeep.training._gathering import newest_whole, none_whole

    broken = {path.name: found for path, found in damaged.items()}
    while True:
        whole, skipped, count = newest_whole(run, hosts, world, broken)
        if whole is None:
            if skipped and not never:
                raise none_whole(run, skipped, count, hosts)
            return Found(None, "", [])
        if never:
            raise TensorkeepError(
                "holds checkpoints already", where=run, hint="--resume auto goes on; --out names another folder"
            )
        whole.assemble()
        try:
            state = distributed.together(world, partial(checkpoint.opened, whole.path))
        except TensorkeepError as error:
            broken[whole.folder.name] = as_finding(error, "warning")
            whole.close()
            continue
        if state.shards is not None:
            state.shards.fetch = partial(whole.fetch, state.shards)
        return Found(state, whole.folder.name, skipped, whole.folder, whole)


def forget(found: Found, failed: bool = False) -> int:
    """Take away what was made for reading a checkpoint.

    Args:
        found: it has been read, or could not be; every rank must call this.
        failed: the run ends, so nobody is waited for.

    Returns:
        Bytes that came from other hosts, to all ranks.
    """
    return 0 if found.whole is None else found.whole.close(failed)


def _choose(run: Path, resume: str | Path | State, damaged: Mapping[Path, Finding], read: Read) -> Found:
    """Find what to go on from, on one rank."""
    own = checkpoint.steps(run)
    if isinstance(resume, State) or str(resume) not in ("auto", "never"):
        named = _named(run, resume, own, damaged, read)
        if named is not None:
            return named
    never = not isinstance(resume, State) and str(resume) == "never"
    try:
        found = checkpoint.newest(run, read, damaged) if own else None
    except TensorkeepError:
        if not never:
            raise
        found = None  # every one is damaged: nothing is lost by beginning anew
    if found is not None and never:
        raise TensorkeepError(
            "holds checkpoints already", where=run, hint="--resume auto goes on; --out names another folder"
        )
    return Found(None, "", []) if found is None else Found(found[0], found[1].name, found[2], found[1])


def _named(
    run: Path, resume: str | Path | State, own: list[int], damaged: Mapping[Path, Finding], read: Read
) -> Found | None:
    """Load the checkpoint that was named; None where the run has gone on from it already."""
    if isinstance(resume, State):
        return None if own else Found(resume, "a file from elsewhere", [])
    folder = Path(resume)
    inside = folder.resolve().is_relative_to(run.resolve())
    if own and not inside:
        return None
    if (folder / "checkpoints").is_dir():
        found = checkpoint.newest(folder, read, damaged)
        if found is None:
            raise TensorkeepError("the run holds no checkpoint", where=folder, hint="name a step folder or a file")
        return Found(found[0], str(found[1]), found[2], found[1])
    state = read(folder)
    newer = [step for step in own if step > state.document["step"]] if inside else []
    if newer:
        raise TensorkeepError(
            f"the run has newer checkpoints, up to step {newer[0]}, which would be mixed with what comes now",
            where=run,
            hint="name another folder (--out) to go on from this step, or remove the newer ones first",
        )
    return Found(state, str(folder), [], folder)
