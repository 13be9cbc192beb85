"""pytorch_lightning's own Trainer with the plugin: nothing is pickled, everything comes back, damage has a name."""

from __future__ import annotations

import enum
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tensorkeep
from tensorkeep.errors import TensorkeepError
from tensorkeep.integrations._plain import Encoder, decode_document
from tensorkeep.storage.certificate import parse_json
from tensorkeep.training.randomness import order
from tensorkeep.training.state_files import encoded

pl = pytest.importorskip("pytorch_lightning")
lightning = pytest.importorskip("tensorkeep.integrations.lightning")
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402

TensorkeepCheckpointIO, newest_valid = lightning.TensorkeepCheckpointIO, lightning.newest_valid

for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:.*")


class Net(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1))
        self.losses: list[str] = []

    def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        loss = (self.layers(x).squeeze(-1) - x.sum(-1)).square().mean()
        self.losses.append(loss.item().hex())
        self.log("loss", loss)
        return loss

    def validation_step(self, x: torch.Tensor, index: int) -> None:
        self.log("val", (self.layers(x).squeeze(-1) - x.sum(-1)).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])]


class InOrder:
    """A loader whose order is a function of the epoch; Lightning sets that, and saves the position since it has one."""

    def __init__(self) -> None:
        self.data = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        self.sampler = self
        self.epoch = self.at = 0

    def __len__(self) -> int:
        return 4

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = order(0, self.epoch, 32)
        for part in range(self.at, 4):
            self.at = (part + 1) % 4
            yield self.data[torch.from_numpy(rows[part * 8 : part * 8 + 8])]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def fit(out: Path, model: Net, resume: str | None = None, steps: int = 10, **saving: Any) -> Any:
    torch.manual_seed(5)
    saving = {"every_n_train_steps": 1, "save_top_k": -1, **saving}
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[TensorkeepCheckpointIO()],
        log_every_n_steps=1,
        callbacks=[
            ModelCheckpoint(dirpath=out, **saving),
            lightning.ExactResume(),
            EarlyStopping("loss", patience=100),
        ],
    )
    trainer.fit(model, InOrder(), torch.utils.data.DataLoader(torch.ones(8, 4), 8), ckpt_path=resume)
    return trainer


def fresh() -> Net:
    torch.manual_seed(0)
    return Net()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net]:
    out, model = tmp_path_factory.mktemp("whole"), fresh()
    fit(out, model)
    return out, model


def flip_a_bit(path: Path, at: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[at] ^= 4
    path.write_bytes(blob)


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_resume_within_and_between_epochs_is_bitwise(step: int, whole: tuple[Path, Net], tmp_path: Path) -> None:
    out, uninterrupted = whole
    (saved,) = out.glob(f"*step={step}.ckpt")
    model = fresh()
    fit(tmp_path, model, str(saved))
    assert model.losses == uninterrupted.losses[step:]
    assert equal(model.state_dict(), uninterrupted.state_dict())


def test_a_damaged_newest_is_an_error_that_names_the_tensor_and_is_passed_over(
    tmp_path: Path, whole: tuple[Path, Net], caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh()
    fit(tmp_path, model, steps=4)
    newest = newest_valid(tmp_path)
    assert newest is not None and newest.endswith("step=4.ckpt")
    flip_a_bit(Path(newest) / "model.safetensors", -6)
    with pytest.raises(TensorkeepError, match=r"damaged since it was written: layers\.") as caught:
        fit(tmp_path, fresh(), newest)
    assert caught.value.code == "F03"
    with caplog.at_level(logging.WARNING):
        before = newest_valid(tmp_path)
    assert before is not None and before.endswith("step=3.ckpt") and "F03" in caplog.text
    (Path(before) / "manifest.json").unlink()
    assert str(newest_valid(tmp_path)).endswith("step=2.ckpt")
    resumed = fresh()
    fit(tmp_path, resumed, newest_valid(tmp_path))
    assert equal(resumed.state_dict(), whole[1].state_dict())


def test_top_k_last_and_best_work_and_what_goes_is_gone(tmp_path: Path) -> None:
    model = fresh()
    trainer = fit(tmp_path, model, monitor="loss", save_top_k=2, save_last=True)
    names = {p.name for p in tmp_path.iterdir()}
    assert len(names) == 3 and "last.ckpt" in names and all(n.endswith(".ckpt") for n in names)
    assert trainer.validate(model, torch.utils.data.DataLoader(torch.ones(8, 4), 8), ckpt_path="best", verbose=False)
    weights = tensorkeep.read(tmp_path / "last.ckpt")  # a view like any other
    assert set(weights) == set(model.state_dict())


def test_last_as_a_link_is_followed_and_removed_as_a_link(tmp_path: Path) -> None:
    fit(tmp_path, fresh(), steps=3, save_last="link")
    last = tmp_path / "last.ckpt"
    assert last.is_symlink() and TensorkeepCheckpointIO().load_checkpoint(last)["global_step"] == 3
    TensorkeepCheckpointIO().remove_checkpoint(last)
    assert not last.is_symlink() and len(list(tmp_path.glob("*step=3.ckpt"))) == 1


def test_a_checkpoint_comes_back_as_lightning_made_it(whole: tuple[Path, Net], tmp_path: Path) -> None:
    (saved,) = whole[0].glob("*step=6.ckpt")
    loaded = TensorkeepCheckpointIO().load_checkpoint(saved)
    torch.save(loaded, tmp_path / "same.pt")
    again = torch.load(tmp_path / "same.pt", weights_only=False)
    assert same(loaded, again) and type(loaded["state_dict"]) is OrderedDict
    assert type(loaded["lr_schedulers"][0]["milestones"]) is Counter
    assert type(loaded["optimizer_states"][0]["param_groups"][0]["betas"]) is tuple
    assert set(loaded["optimizer_states"][0]["state"]) == set(range(6))  # keys stay numbers
    assert loaded["hyper_parameters"] == {"width": 8}


def test_weights_with_nan_are_refused_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    io, path = TensorkeepCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(2)}, "global_step": 1}, path)
    with pytest.raises(TensorkeepError, match="NaN or Inf") as caught:
        io.save_checkpoint({"state_dict": {"w": torch.tensor([1.0, float("inf")])}, "global_step": 2}, path)
    assert caught.value.code == "V01" and "tensorkeep-tmp" not in str(caught.value)
    assert io.load_checkpoint(path)["global_step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize("value", [Colour.RED, object(), lambda x: x, torch.nn.Linear(1, 1), 1j])
def test_what_cannot_be_kept_without_pickle_is_named_by_its_keys(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TensorkeepError, match=r"callbacks\.mine\.0\.kind is a "):
        TensorkeepCheckpointIO().save_checkpoint({"callbacks": {"mine": [{"kind": value}]}}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_save_left_goes_with_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / f".{'epoch=1-step=9.ckpt'}.0123abcd.tensorkeep-tmp"
    other = tmp_path / ".model.safetensors.0123abcd.tensorkeep-tmp"
    for path in (left, other):
        path.mkdir()
    TensorkeepCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(1)}}, tmp_path / "a.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "a.ckpt"]


def test_what_refers_to_itself_is_an_error(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TensorkeepError, match="refers to itself"):
        TensorkeepCheckpointIO().save_checkpoint({"loop": loop}, tmp_path / "a.ckpt")


def test_a_checkpoint_of_lightnings_own_and_one_that_is_not_there_say_so(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "old.ckpt")
    with pytest.raises(TensorkeepError, match="a file of Lightning's own"):
        TensorkeepCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(FileNotFoundError):
        TensorkeepCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("place", ["meta", {"cpu": "meta"}, lambda storage, location: storage, None])
def test_map_location_is_what_torch_load_takes(place: Any, tmp_path: Path) -> None:
    io = TensorkeepCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, tmp_path / "a.ckpt")
    found = io.load_checkpoint(tmp_path / "a.ckpt", map_location=place)["state_dict"]["w"].device.type
    assert found == ("cpu" if place is None or callable(place) else "meta")


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    io, shared = TensorkeepCheckpointIO(), torch.randn(3, 2)
    io.save_checkpoint({"state_dict": {"a": shared, "b": shared, "c": shared.T}}, tmp_path / "a.ckpt")
    back = io.load_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert back["a"] is back["b"] and torch.equal(back["c"], shared.T)
    assert set(tensorkeep.read(tmp_path / "a.ckpt")) == {"a", "c"}


# -- any nested plain value ---------------------------------------------------------------------------------------

FLOATS = st.floats(allow_nan=True)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | FLOATS
    | st.text()
    | st.binary(max_size=9)
    | st.sampled_from(
        [torch.float32, torch.bfloat16, torch.Size([2, 3]), torch.device("cuda:1"), Path("a/b"), float]
    ).filter(lambda v: v is not float)
)
KEYS = st.text(max_size=4) | st.integers() | st.booleans() | st.sampled_from(["$tensor", "$dict", "a/b", (1, "x")])


def tensors() -> st.SearchStrategy[torch.Tensor]:
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64])
    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(lambda d, s: torch.arange(int(torch.Size(s).numel())).reshape(s).to(d), dtypes, shapes)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mapping = st.dictionaries(KEYS, inner, max_size=3)
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | mapping
        | mapping.map(OrderedDict)
        | mapping.map(lambda d: defaultdict(list, d))
        | st.frozensets(st.integers(), max_size=3)
        | st.sets(st.text(max_size=2), max_size=3)
        | st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter)
    )


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        keys = list(one) == list(other) and [type(k) for k in one] == [type(k) for k in other]
        factory = getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
        return keys and factory and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other))
    return bool(one == other) or repr(one) == repr(other) == "nan"


@settings(max_examples=150, deadline=None)
@given(st.recursive(SCALARS | tensors(), nested, max_leaves=12))
def test_any_nested_plain_value_comes_back_as_it_was(value: Any) -> None:
    encoder = Encoder("state_dict")
    document = encoder.document({"state": value})
    data = encoded({"step": 0, "tree": document})
    back = decode_document(parse_json(data, "here")["tree"], encoder.tensors, "here")
    assert same(back, {"state": value})


@pytest.mark.parametrize(
    "bad",
    [
        {"$eval": "1"},
        {"$tensor": ["rest", "none"]},
        {"$dtype": "load"},
        {"$defaultdict": ["eval", []]},
        {"$dict": [1]},
        {"$path": 3},
        {"$bytes": "%"},
    ],
)
def test_a_document_that_none_wrote_is_one_error(bad: Any) -> None:
    with pytest.raises(TensorkeepError) as caught:
        decode_document({"x": bad}, {"model": {}, "rest": {}}, "here")
    assert caught.value.code == "F07"
