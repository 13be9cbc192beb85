"""Staging: the images hold the tensors as they were when the copy was asked for; on a GPU, whatever comes after."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tensorkeep.formats.safetensors import file_layout
from tensorkeep.storage.layout import FileLayout, Fixed, Slot
from tensorkeep.training._staging import GATHERED, SCRATCH, Stage, runs
from tensorkeep.training.saver import Keep, Saver, State, load
from tensorkeep.training.state_files import files_of, raw
from tests.gpu import needs_gpu
from tests.run_states import equal, state


def test_an_image_is_the_file(tmp_path: Path) -> None:
    before = state(3)
    stage = Stage()
    images = stage.copy(files_of(before), frozenset()).wait()
    for name, (layout, own) in zip(images, files_of(before)):
        for slot in layout.slots:
            assert images[name][slot.start : slot.start + slot.nbytes] == raw(own[slot.tensor].contiguous())
    assert bytes(images["model.safetensors"][:8]) != bytes(8)


def test_a_background_save_holds_what_the_tensors_were_when_it_was_asked_for(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Keep(2), background=True)
    changing = state(1)
    for step in (1, 2, 3):
        for part in (changing.model, changing.optimizer, changing.ema):
            for tensor in part.values():
                tensor.fill_(step)
        changing.document["step"] = step
        saver.save(changing)
        for part in (changing.model, changing.optimizer, changing.ema):
            for tensor in part.values():
                tensor.fill_(77)  # at once, while the writer is at work
    path = saver.wait()
    saver.close()
    assert path is not None and path.name == "step-000003"
    for step in (2, 3):
        found = load(tmp_path / f"checkpoints/step-00000{step}")
        values = [t for part in (found.model, found.optimizer, found.ema) for t in part.values()]
        assert len(values) == 9 and all(bool((t == step).all()) for t in values)
    assert len(saver.stalls) == len(saver.copies) == len(saver.durations) == 3


def test_images_are_used_again_and_grow_only_when_they_must() -> None:
    stage = Stage()
    sizes = {}
    for size in (64, 32, 64, 128):
        images = stage.copy(files_of(state(1, size=size)), frozenset()).wait()
        assert tensors_match(images["model.safetensors"], size)
        room = stage._images["model.safetensors"]
        sizes[size] = sizes.get(size, id(room))
        assert id(room) == sizes[size]
    assert sizes[64] == sizes[32] != sizes[128]


def tensors_match(image: memoryview, size: int) -> bool:
    (layout, own), *_ = files_of(state(1, size=size))
    return all(image[s.start : s.start + s.nbytes] == raw(own[s.tensor].contiguous()) for s in layout.slots)


def test_small_neighbours_are_gathered_and_large_tensors_are_not() -> None:
    at, slots = 0, []
    for index, size in enumerate([100, 200, GATHERED + 1, 300, 400] + [GATHERED] * 100):
        slots.append(Slot(at, size, f"t{index}"))
        at += size
    slots.append(Slot(at + 64, 10, "apart"))
    found = list(runs(slots))
    assert [slot for run in found for slot in run] == slots
    assert [len(run) for run in found[:3]] == [2, 1, 2 + (SCRATCH - 700) // GATHERED]
    assert found[-1] == [slots[-1]]
    assert all(sum(s.nbytes for s in run) <= SCRATCH for run in found)


def test_neighbours_are_gathered_over_a_small_gap_that_keeps_them_aligned() -> None:
    slots = [Slot(0, 64, "a"), Slot(128, 64, "b"), Slot(192, 4, "c"), Slot(200, 8, "d"), Slot(9216, 64, "e")]
    names = [[slot.tensor for slot in run] for run in runs(slots, 4096)]
    assert names == [["a", "b", "c"], ["d"], ["e"]]
    assert [[slot.tensor for slot in run] for run in runs(slots)] == [["a"], ["b", "c"], ["d"], ["e"]]


@needs_gpu
def test_what_lies_between_gathered_tensors_stays_in_the_image() -> None:
    tensors, segments, at = {}, [], 0
    for number in range(400):
        tensors[f"{number}.moment"] = torch.randn(number % 7 + 1, 33, device="cuda")
        tensors[f"{number}.step"] = torch.tensor(float(number))
        for name in (f"{number}.moment", f"{number}.step"):
            segments.append(Fixed(at, bytes([number % 251 + 1]) * (64 + -at % 64)))
            at += len(segments[-1].data)
            segments.append(Slot(at, tensors[name].nbytes, name))
            at += tensors[name].nbytes
    layout = FileLayout("a", segments)
    steady = frozenset(name for name in tensors if int(name.split(".")[0]) % 3)
    stage = Stage()
    for _ in range(2):  # again into the same memory
        own = {name: torch.randn_like(t) for name, t in tensors.items()}
        (found,) = stage.copy([(layout, own)], steady).wait().values()
        (wanted,) = Stage().copy([(layout, {name: t.cpu() for name, t in own.items()})], steady).wait().values()
        assert bytes(found) == bytes(wanted)


@needs_gpu
def test_an_optimizer_step_after_a_save_does_not_reach_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=True, device="cuda") for _ in range(16)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # a rate that moves every weight and overflows none
    saver = Saver(tmp_path, Keep(1))
    names = [n for n, _ in model.named_parameters()]
    for step in range(1, 6):
        model(torch.randn(64, 1024, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = {n: p.detach() for n, p in model.named_parameters()}
        moments = {f"{n}/exp_avg": optimizer.state[p]["exp_avg"] for n, p in zip(names, model.parameters())}
        wanted = [{n: t.cpu() for n, t in part.items()} for part in (now, moments)]
        saver.save(State(now, moments, {}, {"step": step}))
        model(torch.randn(64, 1024, device="cuda")).square().mean().backward()
        optimizer.step()  # waits for the copy by itself
        path = saver.wait()
        assert path is not None
        after = load(path)
        assert equal(after.model, wanted[0]) and equal(after.optimizer, wanted[1])
    assert saver._stage.pinned
    saver.close()


@needs_gpu
def test_buffers_that_the_next_forward_changes_are_copied_first(tmp_path: Path) -> None:
    big = torch.zeros(1 << 28, device="cuda")
    running = torch.zeros(1 << 20, device="cuda")
    with_saver = Saver(tmp_path, Keep(1))
    for step in range(1, 4):
        with_saver.save(State({"w": big, "running": running}, {"w/m": big.clone()}, {}, {"step": step}))
        running.add_(1)
        path = with_saver.wait()
        assert path is not None and bool((load(path).model["running"] == step - 1).all())
    with_saver.close()


def test_a_layout_without_tensors_has_an_image_too() -> None:
    stage = Stage()
    layout = file_layout("model.safetensors", [])
    assert len(stage.copy([(layout, {})], frozenset()).wait()["model.safetensors"]) >= layout.size


def test_fixed_bytes_are_those_of_the_layout_asked_for_last() -> None:
    stage, values = Stage(), torch.arange(3, dtype=torch.int16)
    for text in (b"onetwo", b"three!", b"onetwo"):
        layout = FileLayout("a", [Fixed(0, text), Slot(6, 6, "w")])
        for number in range(2):  # the same one again: only the tensor is copied
            image = stage.copy([(layout, {"w": values + number})], frozenset()).wait()["a"]
            assert bytes(image[:12]) == text + raw(values + number)
