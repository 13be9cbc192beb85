"""A clip's memory is used again once nobody holds it, and never before."""

import gc

import numpy as np
import torch

from tensorkeep.detection.data.clip_memory import clip_memory

SHAPE = (16, 3, 160, 160)


def filled(value: int) -> torch.Tensor:
    made = clip_memory(SHAPE)
    made[...] = value
    return torch.from_numpy(made)


def test_what_is_held_in_any_way_is_never_written_to_again():
    whole, part, turned = filled(1), filled(2)[3:5, 0], filled(3).permute(0, 2, 3, 1)
    seen = filled(4).numpy()[2:]
    own = clip_memory(SHAPE)
    own[...] = 9
    cut = own[1:3, :, 4]  # a slice alone, of no tensor
    del own
    gc.collect()
    for value in range(5, 9):
        filled(value)
    assert (whole == 1).all() and (part == 2).all() and (turned == 3).all() and (seen == 4).all()
    assert (cut == 9).all()
    places = {t.untyped_storage().data_ptr() for t in (whole, part, turned)}
    assert len(places) == 3


def test_memory_that_nobody_holds_is_taken_again_for_a_clip_of_about_its_size():
    first = filled(1)
    place = first.data_ptr()
    del first
    again = clip_memory((15, *SHAPE[1:]))
    assert again.ctypes.data == place and again.shape == (15, *SHAPE[1:])
    del again
    assert clip_memory((4, *SHAPE[1:])).ctypes.data != place  # a small clip keeps no large one


def test_small_arrays_are_their_own():
    assert clip_memory((2, 3, 8, 8)).base is None
    assert clip_memory((2, 3, 8, 8)).dtype == np.uint8
