"""Save and load a run's checkpoints: everything training needs, by name, in the dtype it is trained in.

A save is a temporary folder on the same file system, every file digested and fsynced, the manifest last, then one
rename; only when the folder it went into is on the disk as well is the save acknowledged, and only then are older
checkpoints deleted. A load compares every byte with its digest in the pass that reads it. Killed, cut off or out of
room at any instant, the newest checkpoint that was acknowledged is there and whole.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.storage import durable, run_folder, run_manifest
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import left_over
from tensorkeep.storage.placement import remove
from tensorkeep.storage.run_folder import CHECKPOINTS, EMA, METADATA, MODEL, OPTIMIZER, STATE
from tensorkeep.training._restart import LOCK_WAIT, restarts
from tensorkeep.training._retention import Keep, best, mark_best, prune
from tensorkeep.training._save_work import Work
from tensorkeep.training._staging import Stage, Staged
from tensorkeep.training.distributed import World
from tensorkeep.training.state_files import File, State, encoded, files_of, tensors_in

if TYPE_CHECKING:  # torch.distributed.checkpoint takes seconds to load: only where there are shards
    from tensorkeep.training._shard_plan import ShardPlan
    from tensorkeep.training._shard_work import ShardWork
    from tensorkeep.training.hosts import Hosts


def save(run: Path, state: State, keep: Keep = Keep()) -> Path:
    """Save one checkpoint; it is on the disk for good when this returns.

    Args:
        run: the run's folder, made where it is not there.
        state: what to save; `state.document["step"]` names the checkpoint.
        keep: which older checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        TensorkeepError: the disk is full or fails, the run is read-only or saved into by another process, a name or
            dtype cannot be stored, or weights are NaN or Inf (V01). What was there before is untouched.

    Example:
        >>> save(Path("run"), State({"w": torch.ones(2)}, {}, {}, {"step": 7}))      # doctest: +SKIP
        PosixPath('run/checkpoints/step-000007')
    """
    saver = Saver(run, keep, background=False)
    try:
        saver.save(state)
        path = saver.wait()
    finally:
        saver.close()
    assert path is not None
    return path


class Saver:
    """Saves the checkpoints of one run, one at a time; holds the run's lock from construction to `close`.

    In the background `save` returns once the copy is under way, otherwise when the checkpoint is durable. What goes on
    after that (writing, deleting older ones) is over when `wait` returns, and its errors are raised by the next `save`,
    `wait` or `close`. Optimizers of torch wait for the copy by themselves; whatever else changes parameters, moments or
    averages in place (a replayed graph) calls `before_step` first.

    Args:
        run: the run's folder.
        keep: which checkpoints stay.
        background: write behind the training (None: where tensors are on a GPU).
        world: this process among those that hold the state in shards, of which each has a Saver and writes its own
            shards; the first one holds the lock, commits and deletes. None: the state is whole here.
        hosts: where every host keeps its own ranks' shards in a folder of its own; the first rank of each locks it.

    Attributes:
        stalls: seconds that each save held the caller.
        copies: seconds until the tensors of each save were copied.
        durations: seconds until each save was durable.

    Raises:
        TensorkeepError: another process saves into the run, or it cannot be written.
    """

    def __init__(
        self,
        run: Path,
        keep: Keep = Keep(),
        background: bool | None = None,
        world: World | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self.run, self.keep, self.background = Path(run), keep, background
        self.world, self.hosts = world or World(), hosts
        self._shards: ShardPlan | None = None
        if self.world.size > 1:
            from tensorkeep.training._shard_plan import ShardPlan

            self._shards = ShardPlan(self.world, hosts)
        self.stalls: list[float] = []
        self.copies: list[float] = []
        self.durations: list[float] = []
        self._stage = Stage()
        self._flight: threading.Thread | None = None
        self._staged: Staged | None = None
        self._failed: BaseException | None = None
        self._path: Path | None = None
        self._hook: Any = None
        self._lock = ExitStack()
        if not (hosts.leads if hosts is not None else self.world.first):
            return
        self._lock.enter_context(run_folder.locked(self.run, LOCK_WAIT if restarts() else 0.0))
        try:
            for name in run_folder.remains(self.run):  # nobody else is at work here: these were interrupted
                remove(self.run / CHECKPOINTS / name)
            for step in run_folder.steps(self.run) if hosts is not None else []:  # copies from another host
                folder = run_folder.folder_of(self.run, step)
                for name in left_over(folder):
                    remove(folder / name)
        except BaseException:
            self._lock.close()
            raise

    def save(self, state: State, first: Callable[[], None] | None = None) -> None:
        """Save a checkpoint, after waiting for the save before it; errors as those of the function `save`.

        Of a state in shards every rank must call it.

        Args:
            state: the run's state.
            first: what must have been done before the checkpoint is in place; whoever writes does it.
        """
        started = time.perf_counter()
        self.wait()
        document = encoded(state.document)
        files: list[File]
        if self._shards is not None:
            part = self._shards.part(self.run, state, document)
            files, steady = [(part.share.layout, part.tensors)], part.steady
        else:
            files, part = files_of(state), None
            steady = frozenset(name.rpartition("/")[0] for name in state.optimizer)
            needed = sum(durable.padded(layout.size) for layout, _ in files) + len(document) + (1 << 20)
            run_folder.room_for(self.run, needed)
        on_device = any(t.is_cuda for _, tensors in files for t in tensors.values())
        background = on_device if self.background is None else self.background
        if on_device or background:
            self._staged = self._stage.copy(files, steady)
        base, lost = copy.deepcopy(state.base), tuple(state.not_captured)
        step = state.document["step"]
        work: Work | ShardWork
        if part is None:
            work = Work(self.run, self.keep, step, base, lost, files, document, self._staged, started, first)
        else:
            from tensorkeep.training._shard_commit import About
            from tensorkeep.training._shard_work import ShardWork

            named = self.hosts.held if self.hosts is not None else ()
            about = About(step, base, lost, {STATE: document}, named)
            if self._staged is not None:
                part = part._replace(tensors={})
            work = ShardWork(
                self.run, self.keep, step, self.world, part, about, self._staged, started, self.hosts, first
            )
        if background:
            self._hook = self._hook or (register_optimizer_step_pre_hook(self._before) if on_device else None)
            self._fly(lambda: self._finish(work, tidy=True))
            self.stalls.append(time.perf_counter() - started)
            return
        try:
            self._finish(work)
        finally:
            self.stalls.append(time.perf_counter() - started)
        self._fly(work.tidy)

    def sizes(self, state: State) -> list[int]:
        """Tell how many bytes a save of this state puts into the run's folder, file by file; every rank must call it.

        Args:
            state: as `save` takes it, but tensors may lie on meta.

        Raises:
            TensorkeepError: a tensor cannot be stored.
        """
        if self._shards is not None:
            return self._shards.sizes(state)
        return [*(durable.padded(layout.size) for layout, _ in files_of(state, hollow=True)), 1 << 20]

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint that this saver has on the disk, None before the first."""
        path = self._path  # a writer's thread sets it when the checkpoint is durable
        return None if path is None else run_manifest.step_of(path.name)

    @property
    def flying(self) -> bool:
        """Whether something of a save is still going on."""
        return self._flight is not None and self._flight.is_alive()

    def before_step(self) -> None:
        """Make the current stream wait until the copy under way has been made."""
        staged = self._staged  # the writer's thread lets go of it when it is done
        if staged is not None:
            staged.before_step()

    def refusal(self) -> str:
        """Tell once why copies off the GPU hold the training while they are made; "" where they do not."""
        why, self._stage.refused = self._stage.refused, ""
        return why

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Hook of torch's optimizers."""
        self.before_step()

    def _finish(self, work: Work | ShardWork, tidy: bool = False) -> None:
        """Write a checkpoint, note how long it took and, with `tidy`, delete older ones."""
        try:
            self._path = work.carry_out()
        finally:
            self._staged = None
        self.copies.append(work.staged.seconds if work.staged is not None else work.seconds)
        self.durations.append(work.seconds)
        if tidy:
            work.tidy()

    def _fly(self, work: Callable[[], None]) -> None:
        """Work in a thread; an error there is raised by the caller's next call."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  carried to the caller's thread
                self._failed = error

        self._flight = threading.Thread(target=guarded, name="tensorkeep-save")
        self._flight.start()

    def wait(self) -> Path | None:
        """Wait until the save in flight is durable, and raise what went wrong in it.

        Returns:
            The folder of the newest checkpoint saved here, None before the first.
        """
        if self._flight is not None:
            self._flight.join()
            self._flight = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        return self._path

    def close(self) -> None:
        """Wait, give back memory and lock, and raise what went wrong in the last save."""
        try:
            self.wait()
        finally:
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            self._stage.close()
            self._lock.close()


def load(folder: Path) -> State:
    """Read a checkpoint, comparing every byte with its digest.

    Args:
        folder: a step folder.

    Returns:
        The state; its tensors are whole, on the CPU; those of one file may lie in one piece of memory.

    Raises:
        TensorkeepError: the checkpoint is not finished (F01), truncated (F02), damaged (F03, names the tensors), lacks
            a file (F05), or its manifest or a header makes no sense (F06, F07).
    """
    state = opened(folder)
    if state.shards is None:
        return state
    parts = state.shards.whole()
    return replace(state, model=parts["model"], optimizer=parts["optimizer"], ema=parts["ema"], shards=None)


def opened(folder: Path, world: World | None = None) -> State:
    """Read a checkpoint as `load` does, but leave the tensors of a sharded one where they are.

    Args:
        folder: a step folder.
        world: those who hold the model in shards and read a whole checkpoint together: its tensors too stay where they
            are. None: nobody.

    Returns:
        The state; where its tensors lie in shards it has `shards` to read them from, and those in it lie on meta.

    Raises:
        TensorkeepError: as `load`, of what was read.
    """
    folder = Path(folder)
    manifest = run_manifest.read_manifest(folder)
    run_manifest.check_sizes(folder, manifest)
    weights = run_folder.weights_file(list(manifest.files))
    sharded = METADATA in manifest.files
    if (weights is None and not sharded) or STATE not in manifest.files:
        raise TensorkeepError(f"has no {STATE if weights else MODEL}", where=folder, code="F05", tensors=())
    tensors: dict[str, dict[str, Tensor]] = {}
    document: Any = None
    later = sharded or world is not None
    for name, entry in manifest.files.items():
        if later and name != STATE and (sharded or name in (weights, OPTIMIZER, EMA)):
            continue
        wanted = name in (weights, OPTIMIZER, EMA, STATE)
        image = durable.allocate(entry.size) if wanted else None
        run_manifest.read_whole(folder, name, manifest, image)
        if image is not None and name == STATE:
            document = parse_json(bytes(image[: entry.size]), folder / name)
        elif image is not None:
            tensors[name] = tensors_in(folder, name, image[: entry.size], manifest)
    if not isinstance(document, dict) or document.get("step") != manifest.step:
        raise TensorkeepError(f"is not the state of step {manifest.step}", where=folder / STATE, code="F07")
    base, lost = manifest.base, manifest.not_captured
    if later:
        shards = _later(folder, manifest, weights, world)
        parts = shards.parts
        return State(parts["model"], parts["optimizer"], parts["ema"], document, base, lost, shards)
    assert weights is not None
    return State(tensors[weights], tensors.get(OPTIMIZER, {}), tensors.get(EMA, {}), document, base, lost)


def _later(folder: Path, manifest: run_manifest.Manifest, weights: str | None, world: World | None) -> Any:
    """Give what reads the tensors of a checkpoint when and where they are wanted."""
    if METADATA in manifest.files:
        from tensorkeep.training._shard_load import Shards

        return Shards(folder, manifest)
    from tensorkeep.training._whole_load import WholeFiles

    assert weights is not None and world is not None
    files = {"model": weights, "optimizer": OPTIMIZER, "ema": EMA}
    return WholeFiles(folder, manifest, {p: f for p, f in files.items() if f in manifest.files}, world)


def steps(run: Path) -> list[int]:
    """List the steps that have a folder in this run, newest first."""
    return run_folder.steps(Path(run))


def newest(
    run: Path, read: Callable[[Path], State] = load, damaged: Mapping[Path, Finding] = MappingProxyType({})
) -> tuple[State, Path, list[Finding]] | None:
    """Load the newest valid checkpoint of a run.

    Args:
        run: the run's folder.
        read: `load`, or `opened`.
        damaged: checkpoints that are known to be damaged, with what was found.

    Returns:
        The state, its folder, and a finding for each newer checkpoint that is damaged; None where there is no
        checkpoint.

    Raises:
        TensorkeepError: there are checkpoints, and all of them are damaged.
    """
    run = Path(run)
    skipped: list[Finding] = []
    for step in run_folder.steps(run):
        folder = run_folder.folder_of(run, step)
        if folder in damaged:
            skipped.append(damaged[folder])
            continue
        try:
            return read(folder), folder, skipped
        except TensorkeepError as error:
            skipped.append(run_manifest.as_finding(error, "warning"))
    if skipped:
        raise TensorkeepError(
            f"all {len(skipped)} checkpoints are damaged; the newest: {skipped[0].message}",
            where=run,
            code=skipped[0].code,
            hint="start again in another folder, or --resume never",
            tensors=skipped[0].tensors,
        )
    return None


__all__ = ["Keep", "Saver", "State", "best", "load", "mark_best", "newest", "opened", "prune", "save", "steps"]
