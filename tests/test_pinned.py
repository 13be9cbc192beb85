"""Page-locked memory: what is dropped, in whatever way, never takes a later copy; what does not arrive is noticed."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable
from tensorkeep.training import _staging
from tensorkeep.training._pinned import PinnedPages, forget_last_error, pinned_memory
from tensorkeep.training._staging import SAMPLED, Samples, Stage, Staged
from tensorkeep.training.saver import Keep, Saver, State, load
from tensorkeep.training.state_files import files_of
from tests.gpu import needs_gpu

MB = 1 << 20


def whole(value: float, device: str, megabytes: int = 8) -> State:
    """One tensor of one value, large enough for a copy of its own, and small ones that are gathered."""
    model = {"w": torch.full((megabytes * MB // 4,), float(value), device=device)}
    model |= {f"b{n}": torch.full((100 + n,), float(value), device=device) for n in range(5)}
    return State(model, {}, {}, {"step": 1})


def test_sampled_places_begin_at_the_first_byte_and_end_at_the_last() -> None:
    for size in (1, 2, SAMPLED - 1, SAMPLED, SAMPLED + 1, 10_000):
        raw = torch.arange(size).to(torch.uint8)
        places, values = _staging._sample(raw, 7)
        assert (places[0], places[-1], len(places)) == (7, 7 + size - 1, min(size, SAMPLED))
        assert torch.equal(values, raw[places - 7]) and bool((places.diff() > 0).all())


def test_bytes_that_did_not_arrive_are_an_error_before_anything_is_made_of_them() -> None:
    target = torch.arange(4096).to(torch.uint8)
    places, values = _staging._sample(target.clone(), 0)
    staged = Staged()
    staged.samples = [Samples(target, [places], values, None)]
    assert staged.wait() == {}
    staged.samples = [Samples(target, [places], values, None)]
    target[1000:3000] = 0  # as where a copy went elsewhere
    with pytest.raises(TensorkeepError, match="the copy off the GPU did not arrive: 31 of 64 sampled bytes differ"):
        staged.wait()


def test_memory_for_images_is_ordinary_until_cuda_is_asked() -> None:
    memory = durable.allocate(10_000, PinnedPages)
    assert isinstance(memory.obj, PinnedPages) and not memory.obj.registered and len(memory) == 12_288
    memory.obj.unregister()  # nothing to do, and no CUDA to do it


@needs_gpu
@pytest.mark.parametrize(
    "way", ["closed", "dropped", "in a cycle", "after an error", "while copying", "images outlive"]
)
def test_a_stage_that_is_gone_never_takes_a_later_copy(way: str) -> None:
    """The next memory of the same size gets the same address; with a stale registration it would keep its old bytes."""
    addresses = set()
    for turn in range(1, 201 if way == "dropped" else 41):
        stage = Stage()
        staged = stage.copy(files_of(whole(turn, "cuda")), frozenset())
        if way != "while copying":
            images = staged.wait()
            found = torch.frombuffer(images["model.safetensors"], dtype=torch.uint8)
            layout = files_of(whole(turn, "cpu"))[0][0]
            slot = next(s for s in layout.slots if s.tensor == "w")
            got = found[slot.start : slot.start + slot.nbytes].view(torch.float32)
            assert bool((got == turn).all()), f"turn {turn}: {got.unique().tolist()[:3]}"
            addresses.add(found.data_ptr())
            del found, got
        if way == "closed":
            stage.close()
        elif way == "in a cycle":
            stage.me = stage  # type: ignore[attr-defined]
        elif way == "after an error":
            with pytest.raises(RuntimeError, match="in the middle"):
                raise RuntimeError("in the middle")
        if way == "images outlive":
            kept = staged.images
            del stage, staged
            assert bytes(kept["model.safetensors"][:8])
            del kept, images
            continue
        del stage, staged
        if way != "while copying":
            del images
        if way == "in a cycle":
            gc.collect()
    assert way == "while copying" or len(addresses) < 40  # addresses do come back: else this proves nothing


@needs_gpu
def test_a_second_run_in_the_process_saves_what_it_should(tmp_path: Path) -> None:
    for run in range(4):
        saver = Saver(tmp_path / f"run{run}", Keep(1))
        for step in (1, 2):
            state = whole(10 * run + step, "cuda")
            state.document["step"] = step
            saver.save(state)
            state.model["w"].add_(0)
            path = saver.wait()
            assert path is not None and bool((load(path).model["w"] == 10 * run + step).all())
        if run % 2:
            saver.close()
        else:
            saver._lock.close()  # the process goes on without closing it, as after an error elsewhere
        del saver


@needs_gpu
def test_a_call_that_fails_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    assert int(cudart.cudaHostUnregister(4096)) != 0  # sets CUDA's last error
    forget_last_error()
    assert torch.ones(3, device="cuda").sum().item() == 3  # would raise it
    assert int(cudart.cudaHostUnregister(4096)) != 0
    with pytest.raises(RuntimeError):  # and here it does: else the test above proves nothing
        torch.ones(3, device="cuda")
    assert torch.ones(3, device="cuda").sum().item() == 3


@needs_gpu
@pytest.mark.parametrize("stale", [64 * MB, 65 * MB, 128 * MB])
def test_what_another_library_left_registered_takes_no_copy(stale: int) -> None:
    gone = durable.allocate(stale)
    address = torch.frombuffer(gone, dtype=torch.uint8).data_ptr()
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    assert int(cudart.cudaHostRegister(address, len(gone), 0)) == 0
    del gone  # unmapped, and still registered
    for value in (7, 8):
        memory, _ = pinned_memory(64 * MB)
        target = torch.frombuffer(memory, dtype=torch.uint8)
        target.copy_(torch.full((64 * MB,), value, dtype=torch.uint8, device="cuda"))
        assert bool((target == value).all())
        del target, memory
    if int(cudart.cudaHostUnregister(address)):
        forget_last_error()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch
from tensorkeep.training.saver import Keep, Saver, load
from tests.test_pinned import whole
saver = Saver(Path(sys.argv[1]), Keep(2))
for step in (1, 2, 3):
    state = whole(step, "cuda", 64)
    state.document["step"] = step
    saver.save(state)
    torch.ones(9, device="cuda").sum().item()
    assert bool((load(saver.wait()).model["w"] == step).all())
print("pinned" if saver._stage.pinned else saver.refusal())
saver.close()
"""


@needs_gpu
def test_a_small_limit_on_locked_memory_costs_speed_and_nothing_else(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "run", root, root / "src"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "pinned" or "cudaHostRegister failed" in done.stdout
