"""Take a run's state, compare a checkpoint with the job, and put it back.

How exact a resume is has three levels. `exact`: versions, device and split are the same, so every later number is
bitwise what it would have been. `sample-exact`: the same samples in every global batch, other arithmetic.
`weights only`: the checkpoint held no optimizer state. A recipe, base or data that changed is an error that lists what
did.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats.names import matches
from tensorkeep.training import _sharding as sharding
from tensorkeep.training import randomness
from tensorkeep.training._names import Names
from tensorkeep.training.batches import is_flow
from tensorkeep.training.distributed import World, gathered
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.live_state import optimizer_state, put_optimizer, put_tensors, stored_tensors, undeclared
from tensorkeep.training.migration import names_now
from tensorkeep.training.saver import State

# what may differ between two starts of one run without changing what is computed
FREE = (
    "workers$",
    "micro$",
    "micro_batch$",
    "log_every$",
    "save_every$",
    "keep",
    "keep_last$",
    "keep_every$",
    "trackers",
    "background$",
    "parallel$",
    "replicas$",
    "local$",
    "graph$",
    "deterministic$",
    "watchdog$",
    "^data.cache$",
    "^data.cache_gib$",
)
LENGTH = ("updates", "epochs")  # names under which a longer run is allowed


def facts(loop: Loop, world: World, decoder: str | None = None) -> dict[str, Any]:
    """Collect what must be equal for equal bits: versions, device, threads, kernels, and how a batch is split.

    Args:
        loop: settings.
        world: this process among its peers.
        decoder: `Job.decoder`.
    """
    on_gpu = world.device.type == "cuda"
    sharded = loop.parallel == "fsdp" and world.size > 1
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "world_size": world.size,
        "micro": loop.micro,
        "precision": loop.precision,
        "compile": loop.compile,
        "graph": loop.graph or None,  # None as in checkpoints from before there was a choice
        "deterministic": loop.deterministic or None,
        "parallel": loop.parallel if world.size > 1 else None,
        "gathered": loop.precision if sharded and loop.precision == "bf16" else None,  # shards, for a forward
        "replicas": loop.replicas if sharded and loop.replicas > 1 else None,
        "decoder": decoder,
    }


@cache
def _processor() -> str:
    """Name this machine's processor: of two with the same instructions, libraries choose other kernels for each model.

    Written as `x86_64 AVX512 GenuineIntel 6 167`; where the system does not tell the model, without it.
    """
    told: dict[str, str] = {}
    with suppress(OSError):  # no Linux
        for line in Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            told[key.strip()] = value.strip()
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    model = [told[name] for name in names if name in told] or [platform.processor()]
    return " ".join(filter(None, [platform.machine(), torch.backends.cpu.get_cpu_capability(), *model]))


def data_facts(job: Job) -> dict[str, Any]:
    """Describe the data: its fingerprint and length, and a digest of each order that comes from elsewhere.

    Fingerprints may take a while, so a run asks once.
    """
    found: dict[str, Any] = {"fingerprint": job.data.fingerprint(), "length": len(job.data)}
    orders = {
        str(epoch): xxhash.xxh3_128(np.asarray(order, np.int64).tobytes()).hexdigest()
        for epoch, order in sorted(job.orders.items())
    }
    return found | ({"orders": orders} if orders else {})


def snapshot(
    job: Job,
    loop: Loop,
    world: World,
    step: int,
    samples: int,
    scaler: Any,
    evaluations: list[dict[str, Any]],
    data: dict[str, Any],
    names: Names | None = None,
) -> State:
    """Take the run's state after update `step`; every rank must call it.

    Each rank has random states of its own, which are collected. Tensors in shards stay where they are.

    Args:
        job: the live objects.
        loop: its settings are noted, to be compared on resume.
        world: this process among its peers.
        step: updates made.
        samples: samples consumed by them, over all ranks.
        scaler: torch's gradient scaler.
        evaluations: what each evaluation gave.
        data: what `data_facts` says.
        names: what is known of the job's model from a save before.
    """
    names = names or Names()
    tensors, ties = stored_tensors(job.model, job.base is not None, names)
    optimizer, groups = optimizer_state(job.model, job.optimizer, names.parameters())
    averages: dict[str, Tensor] = {} if job.ema is None else job.ema.state_dict()
    flow = job.data.state_at(samples) if is_flow(job.data) else None
    document = {
        "schema": 1,
        "step": step,
        "samples": samples,
        "epoch": samples // max(len(job.data), 1) if flow is None else flow["epoch"],
        "world_size": world.size,
        "batch": loop.batch,
        "seed": loop.seed,
        "updates": loop.updates,
        "data": data,
        "data_files": dict(getattr(job.data, "digests", {})),  # not compared: they name what changed
        "recipe": _plain(job.recipe),
        "facts": facts(loop, world, job.decoder),
        "ties": ties,
        "optimizer": groups,
        "scaler": scaler.state_dict(),
        "evaluations": [dict(e) for e in evaluations],
        "ema": None
        if job.ema is None
        else {"updates": job.ema.updates, "decay": job.ema.decay, "warmup": job.ema.warmup},
        "state": {name: thing.state_dict() for name, thing in job.state.items()},
        "rng": gathered(world, randomness.capture()),
        **({} if flow is None else {"flow": flow}),
    }
    return State(tensors, optimizer, averages, document, job.base, not_captured(job, names))


def _plain(recipe: Mapping[str, Any]) -> Any:
    """Turn a recipe into what JSON gives back of it."""
    try:
        return json.loads(json.dumps(recipe))
    except (TypeError, ValueError) as error:
        raise TensorkeepError(f"holds a value that is not plain: {error}", where="job.recipe") from None


def not_captured(job: Job, names: Names | None = None) -> tuple[str, ...]:
    """List the parts of a job that may hold state and declare none; the manifest names them."""
    out = [f"model ({name})" for name in undeclared(job.model, names)]
    for name in ("data", "collate", "loss", "count", "schedule", "divisor", "evaluate"):
        part = getattr(job, name)
        owner = getattr(part, "__self__", part)
        held = any(thing is owner for thing in (*job.state.values(), job.model))
        frozen = getattr(getattr(type(owner), "__dataclass_params__", None), "frozen", False)
        if name == "data" and not hasattr(owner, "state_dict"):
            continue  # its fingerprint says what it is
        if hasattr(owner, "__dict__") and vars(owner) and not _callable_only(owner) and not (held or frozen):
            out.append(f"{name} ({type(owner).__name__})")
    return tuple(out)


def _callable_only(thing: Any) -> bool:
    """Whether something is a plain function, class or module, whose attributes are not the run's state."""
    return isinstance(thing, type) or type(thing).__name__ in ("function", "builtin_function_or_method", "module")


# -- is it the same run? ----------------------------------------------------------------------------------------------


def compare(job: Job, loop: Loop, state: State, data: dict[str, Any], allow: tuple[str, ...] = ()) -> list[str]:
    """Refuse a job whose recipe, base, data, seed, global batch or length are not those of the checkpoint.

    The checkpoint's recipe is read as the job says (`read_recipe`), so one of an older version is no other recipe. What
    a checkpoint from elsewhere does not say is not compared.

    Args:
        job: the job as it is now.
        loop: its settings now.
        state: the checkpoint.
        data: what `data_facts` says now.
        allow: patterns of fields that may differ on purpose.

    Returns:
        The fields that differ because `allow` says that they may.

    Raises:
        TensorkeepError: lists the fields that differ (R04).
    """
    then = state.document
    now = {"seed": loop.seed, "batch": loop.batch, "updates": loop.updates, "data": data}
    parts = [name for name in now if name in then]
    base, noted = job.base or {}, state.base or {}
    both = ["digest", *(["config"] if "config" in base and "config" in noted else [])]  # older saves know no config
    mine, theirs = (
        dict(_flat({name: held[name] for name in parts})) | {f"base.{field}": of.get(field) for field in both}
        for held, of in ((now, base), (then, noted))
    )
    if then.get("recipe") is not None:
        stored = _plain(job.read_recipe(then["recipe"]))
        mine, theirs = dict(_flat(_plain(job.recipe))) | mine, dict(_flat(stored)) | theirs
    keys = sorted(mine.keys() | theirs.keys())
    differ = [key for key in keys if not _same(mine.get(key), theirs.get(key)) and not _may_differ(key)]
    files = _files_changed(then.get("data_files"), getattr(job.data, "digests", {}))
    if files:
        differ = sorted({*differ, "data.fingerprint"})
    differ = [key for key in differ if f"training.{key}" not in differ]  # what follows from a field of the recipe
    fields = [key for key in differ if not _may_differ(key, allow)]
    values = [(key, theirs.get(key), mine.get(key)) for key in fields]
    changed = [f"{key} was {shown(before)}, is {shown(after)}" for key, before, after in values if before != after]
    if "data.fingerprint" in fields:
        changed = [*files, *changed]
    if "base.digest" in fields:
        changed = [*_files_changed(noted.get("files"), base.get("files"), "base"), *changed]
    if changed:
        more = f" ({len(changed)} in all)" if len(changed) > 6 else ""
        meant = " --allow ".join(fields) if len(fields) <= 3 else "FIELD"
        raise TensorkeepError(
            f"the run is not the one that was saved: {'; '.join(changed[:6])}{more}",
            where="resume",
            code="R04",
            hint=f"nothing was changed; take the run's own recipe.yaml, or allow what is meant: --allow {meant}",
        )
    return [key for key in differ if key not in fields]


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, or name the same files in two ways: relative and absolute, or through a link."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    with suppress(OSError, ValueError):  # one is not there, or no path
        return Path(one).samefile(other) and "/" in one + other
    return False


def _files_changed(then: Any, now: Any, what: str = "data.files") -> list[str]:
    """Say which files of the data or the base are others than then; nothing where either side knows none."""
    if not isinstance(then, Mapping) or not isinstance(now, Mapping) or not then or not now:
        return []
    then = {name: digest for name, digest in then.items() if isinstance(digest, str)}
    if then.get("") != now.get(""):  # the digests of files are taken with it
        return ["data: the tokenizer, or what the recipe says of the data, is another (files were not told apart)"]
    kept = set(then.values())
    lines = [
        f"{what}: {name} {'has other content' if name in then else 'is new'}"
        for name, digest in now.items()
        if (then[name] != digest if name in then else digest not in kept)
    ]
    here = set(now.values())
    lines += [f"{what}: {name} is gone" for name in then if name not in now and then[name] not in here]
    return [*lines[:3], *([f"{what}: {len(lines) - 3} more files"] if len(lines) > 3 else [])]


def _may_differ(key: str, allow: tuple[str, ...] = ()) -> bool:
    """Whether a pattern names the field; updates follow from epochs, so either word allows a longer run.

    The seed is said twice: one word allows both.
    """
    spellings = {"updates": [f"training.{name}" for name in LENGTH], "seed": ["seed", "training.seed"]}.get(key, [key])
    allowed = [now for name in allow for now in names_now(name)]
    return any(matches(name, (*FREE, *allowed)) for name in spellings)


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested mapping."""
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# -- putting back -----------------------------------------------------------------------------------------------------


def put_back(
    job: Job, loop: Loop, world: World, state: State, scaler: Any, adopt: bool = False
) -> tuple[str, list[str]]:
    """Give every live object its state back, random states last.

    Args:
        job: its objects change in place.
        loop: settings now, to compare with those of the checkpoint.
        world: this process among its peers.
        state: the checkpoint.
        scaler: torch's gradient scaler.
        adopt: nobody else holds the state's tensors, so the optimizer may keep them instead of copies.

    Returns:
        The level reached, and why it is not a higher one.

    Raises:
        TensorkeepError: average or further state are there on one side only (R04), or tensors differ (K01).
    """
    then = state.document
    if "ema" in then and (job.ema is None) != (then["ema"] is None):
        raise TensorkeepError("the average (EMA) is on in one and off in the other", where="resume", code="R04")
    absent = [name for name in job.state if name not in then.get("state", {})]
    absent += ["data.streaming"] if is_flow(job.data) and "flow" not in then else []
    if absent:
        raise TensorkeepError(f"the checkpoint holds no state of {', '.join(absent)}", where="resume", code="R04")
    if state.shards is not None:
        from tensorkeep.training._shard_fill import filled

        state = filled(state, job.model, job.optimizer, job.ema.tensors if job.ema is not None else {}, world)
    put_tensors(job.model, state.model, base=job.base is not None)
    if "optimizer" in then:
        put_optimizer(job.model, job.optimizer, state.optimizer, then["optimizer"], adopt)
    if job.ema is not None and "ema" not in then:  # from elsewhere: the average begins at its weights
        trained = dict(job.model.named_parameters())
        job.ema.load_state_dict({name: trained[name].detach() for name in job.ema.tensors}, 0)
    elif job.ema is not None:
        own = job.ema.tensors
        averages = {
            n: sharding.like(t, own[n]) if n in own and own[n].shape == t.shape else t for n, t in state.ema.items()
        }
        job.ema.load_state_dict(averages, then["ema"]["updates"])
    if scaler.is_enabled() and then.get("scaler"):
        scaler.load_state_dict(then["scaler"])
    for name, thing in job.state.items():
        thing.load_state_dict(then["state"][name])
    if is_flow(job.data):
        job.data.go_to(then["flow"])
    return _level(loop, world, then, _put_random(loop, world, then), job.decoder)


def _put_random(loop: Loop, world: World, then: Mapping[str, Any]) -> list[str]:
    """Put back this rank's random states, or new ones made of seed and step; returns what could not come back."""
    states = then.get("rng") or []
    if len(states) == world.size and randomness.fits(states[world.rank]):
        randomness.restore(states[world.rank])
        return []
    randomness.seed_process(randomness.derive(loop.seed, then["step"]), world.rank)
    return [] if states else ["no random states (R01)"]


def _level(
    loop: Loop, world: World, then: Mapping[str, Any], lost: list[str], decoder: str | None = None
) -> tuple[str, list[str]]:
    """How exact the resume is, and why not more."""
    if "foreign" in then:  # who wrote it knows what it gives (MiniMind's weights are rounded to fp16)
        return then["foreign"]["level"], lost
    now, before = facts(loop, world, decoder), then.get("facts") or {}
    why = [
        f"{key} {shown(before.get(key))} -> {shown(value)}" for key, value in now.items() if before.get(key) != value
    ]
    if not before:
        why = ["written elsewhere"]
    if world.device.type == "cuda" and not (loop.deterministic or torch.are_deterministic_algorithms_enabled()):
        why.append("a GPU's kernels need not give the same bits twice: training.deterministic asks for those that do")
    if "optimizer" not in then:
        return "weights only", ["no optimizer state (R05)", *lost]
    return "sample-exact" if why or lost else "exact", [*why, *lost]
