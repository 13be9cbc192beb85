"""Say how a run stands: as lines for people, and as a document for programs."""

from __future__ import annotations

import sys
from typing import Any

from tensorkeep.commands.watch._looking import Look, number
from tensorkeep.output import duration, size, sparkline
from tensorkeep.training.metrics import finite
from tensorkeep.training.status import RUNNING


def parts(found: Look) -> list[str]:
    """The figures of the newest update."""
    loss, lr, norm = (number(found.row, name) for name in ("loss", "lr", "grad_norm"))
    memory = (found.status or {}).get("memory")
    told = [
        "" if loss is None else f"loss {loss:.4f}",
        "" if lr is None else f"lr {lr:.2e}",
        "" if norm is None else f"grad norm {norm:.3g}",
        "" if found.rate is None else f"{found.rate[0]:,.0f} {found.rate[1]}/s",
        f"{size(memory, memory=True)} memory" if memory else "",
    ]
    return [part for part in told if part]


def lines(found: Look, columns: int = 80) -> list[str]:
    """What a person is told, the most important first."""
    of, step, evaluated = found.status or {}, found.step, (found.evaluation or {}).get("evaluation") or {}
    told = [f"{found.run}: {_state(found)}"]
    if step is not None and found.updates:
        share = f"  {100 * step // found.updates} %"
        left = "" if found.left is None else f"  {duration(found.left)} left"
        told.append(f"step {step}/{found.updates}{share}{left}")
    elif step is not None:
        told.append(f"step {step}")
    if figures := parts(found):
        told.append("  ".join(figures))
    if bars := sparkline(found.losses, max(min(columns - 24, 120), 8), sys.stdout):
        told.append(f"loss {bars} of {len(found.losses)} rows")
    if evaluated:
        named = [name for name in evaluated if name != "count"]
        figures = [f"{name} {value:.4g}" for name in named if (value := number(evaluated, name)) is not None]
        told.append(f"evaluated at step {found.evaluation and found.evaluation['step']}: {', '.join(figures)}")
    if found.saved is not None:
        told.append(
            f"newest checkpoint: step {found.saved}" + ("" if found.best is None else f"; best: step {found.best}")
        )
    if of.get("resumed") is not None:
        told.append(
            f"resumed from step {of['resumed']}, {of.get('level') or 'as it was saved'}{_proof(of.get('proof'))}"
        )
    if found.damaged:
        count = f"{found.damaged} line{'s' if found.damaged > 1 else ''}"
        told.append(f"warning: {count} of metrics.jsonl cannot be read as rows, and were passed over")
    if found.age is not None and found.state in (RUNNING, "starting", "dead", "silent", "unknown"):
        told.append(f"last sign of the run: {duration(found.age)} ago")
    return told + _hints(found)


def _proof(proof: dict[str, Any] | None) -> str:
    """What the steps that were made again say of the resume."""
    if not proof or not proof["steps"]:
        return ""
    steps, plural = ", ".join(map(str, proof["steps"])), "s" if len(proof["steps"]) > 1 else ""
    if proof["equal"]:
        return f"; step{plural} {steps} made again: losses equal, bit for bit"
    return f"; step{plural} {steps} made again: losses differ"


def _state(found: Look) -> str:
    """The state in words, with the process."""
    of = found.status or {}
    place = f"process {of['pid']} of {of['host']}" if of.get("pid") is not None and of.get("host") else "its process"
    words = {
        RUNNING: f"running ({place})" + (f", at the {of['doing']} of step {found.step}" if of.get("doing") else ""),
        "starting": "starting; a process holds the folder and has made no update yet",
        "dead": f"dead: {place} is gone and left no reason (killed, or the machine went off)",
        "silent": f"no sign of life from {place}, which cannot be asked from this machine",
        "unknown": "has no status.json, and no process that can be seen from here trains into it",
    }
    if found.state == "failed":
        error = of.get("error") or {}
        return f"failed: {error.get('message', 'it left no reason')}"
    return words.get(found.state, found.state)


def _hints(found: Look) -> list[str]:
    """What to do next."""
    error = (found.status or {}).get("error") or {}
    again = f"the same train command goes on from step {found.saved}" if found.saved is not None else ""
    again = again or "the same train command begins it anew: it has no checkpoint yet"
    hints = {
        "failed": error.get("hint") or again,
        "dead": again,
        "interrupted": again,
        "silent": "look on that machine whether the process lives",
        "unknown": "it may be a run of an older version, or one that starts on another machine",
    }
    return [f"hint: {hints[found.state]}"] if found.state in hints else []


def document(found: Look) -> dict[str, Any]:
    """What a program is told."""
    of, evaluation = found.status or {}, found.evaluation
    alive = {RUNNING: True, "starting": True, "silent": None, "unknown": None}.get(found.state, False)
    resumed = None if of.get("resumed") is None else {"step": of["resumed"], "level": of.get("level")}
    told = {
        "run": str(found.run),
        "state": found.state,
        "alive": alive,
        "host": of.get("host"),
        "pid": of.get("pid"),
        "doing": of.get("doing"),
        "step": found.step,
        "updates": found.updates,
        "row": found.row,
        "evaluation": evaluation and {"step": evaluation["step"], **evaluation["evaluation"]},
        "rate": found.rate and {"value": found.rate[0], "unit": f"{found.rate[1]}/s"},
        "seconds_left": found.left,
        "seconds_since": found.age,
        "memory": of.get("memory"),
        "checkpoint": found.saved,
        "best": found.best,
        "resumed": resumed,
        "proof": of.get("proof"),
        "damaged_lines": found.damaged,
        "error": of.get("error"),
    }
    return dict(finite(told))
