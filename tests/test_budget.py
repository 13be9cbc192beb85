"""What an untrusted file may cost: memory and steps are counted, honest giants stay far below the limits."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.conversion.architecture import expected
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats._dcp_places import RECORDS
from tensorkeep.formats._gguf_tokenizer import merges_from_scores
from tensorkeep.formats.config_types import believed, odd_fields
from tensorkeep.formats.dcp import DCP_GLOBALS, metadata
from tensorkeep.formats.view import read
from tensorkeep.storage.budget import Budget, check_config, read_small
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.pickles import parse
from tensorkeep.storage.yaml_documents import parse_yaml
from tests.counting import calls_at_most
from tests.helpers import refused
from tests.hostile_texts import RECIPES


def _pickle(body: bytes) -> Any:
    return parse(b"\x80\x02" + body + b".", ("builtins.set",), "x.pth")[0]


class _Clock:
    """Processor time that passes a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_budget_ends_by_memory_or_by_the_clock_and_grows_with_the_file() -> None:
    small, large = Budget(1000, "a", clock=_Clock()), Budget(10_000_000, "b", clock=_Clock())
    assert large.memory > small.memory and large.seconds == 10 * small.seconds
    small.spend(steps=4 * 1024)
    with refused("F07", "more time than a file of 1000 bytes may"):
        for _ in range(100):
            small.spend(steps=1024)
    large.spend(100_000_000)
    with refused("F07", "more memory"):
        large.spend(1_000_000_000)


def test_a_dict_keyed_by_one_long_tuple_again_and_again_is_refused() -> None:
    with refused("F02", "a dict key of type tuple"):
        _pickle(b"}q\x00(" + b"K\x01" * 5000 + b"tq\x010h\x00" + b"h\x01Ns" * 100)
    with calls_at_most(200_000), refused("F02"):
        _pickle(b"}(" + b"(" + b"K\x01" * 65 + b"tNu")
    assert _pickle(b"}(K\x01K\x02\x86Nu") == {(1, 2): None}


def test_keys_of_one_hash_are_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    prime = (1 << 61) - 1
    keys = b"".join(b"\x8a" + bytes([16]) + (prime * (i + 1)).to_bytes(16, "little") + b"N" for i in range(3000))
    monkeypatch.setattr(Budget, "__init__", _ticking)
    with refused("F07", "more time"):
        _pickle(b"}(" + keys + b"u")


def _ticking(self: Budget, size: int, where: object) -> None:
    self.size, self.where, self._clock = size, where, _Clock()
    self.memory, self.seconds, self._until, self._steps = 1 << 30, 5.0, 6.0, 0


@pytest.mark.parametrize("opcode", [b"\x8f", b"}", b"]", b"N\x85"])
def test_a_pickle_of_too_many_objects_is_refused(opcode: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorkeep.storage.budget._MEMORY", 1 << 20)
    with refused("F07", "more memory than a file of"):
        _pickle(opcode * 100_000)
    monkeypatch.undo()
    _pickle(opcode * 1000)


def test_an_empty_set_takes_no_list_and_no_dict() -> None:
    made = _pickle(b"\x8f")
    assert made.items is None and made.entries is None


def test_honest_giants_stay_far_below_the_limits() -> None:
    names = [f"model.layers.{i // 9}.mlp.experts.{i % 9}.up_proj.weight" for i in range(100_000)]
    plain = pickle.dumps({name: ("F32", (4096, 4096)) for name in names}, 2)
    header = json.dumps({n: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} for n in names}).encode()
    tensors = [SinkTensor(n, "F32", (2,)) for n in names[:20_000]]
    chunks = metadata(tensors, {t.name: {(0,): ("__0_0.distcp", 8 * i, 8)} for i, t in enumerate(tensors)}, None)
    for data, parsed in (
        (plain, lambda: parse(plain, (), "x")),
        (header, lambda: parse_json(header, "x")),
        (chunks, lambda: parse(chunks, DCP_GLOBALS, "x", records=RECORDS)),
    ):
        spent = []
        watched = Budget.spend

        def spend(self: Budget, memory: int = 0, steps: int = 1, watched: Any = watched, spent: Any = spent) -> None:
            watched(self, memory, steps)
            spent.append(self.memory)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Budget, "spend", spend)
            parsed()
        assert min(spent) > 0.5 * Budget(len(data), "x").memory


@pytest.mark.parametrize("name", ["merges", "aliases", "itself", "deep", "chain", "base sixty", "digits", "large"])
def test_yaml_that_stands_for_too_much_is_refused_before_it_is_built(name: str) -> None:
    with calls_at_most(3_000_000), pytest.raises(TensorkeepError) as error:
        parse_yaml(RECIPES[name](), "recipe.yaml")
    assert error.value.where == "recipe.yaml" and len(error.value.line) < 500


@pytest.mark.parametrize("name", ["code", "odd tags", "odd date", "list as a key", "not UTF-8", "nul"])
def test_odd_yaml_is_one_error(name: str) -> None:
    with refused(None, "cannot be read as YAML"):
        parse_yaml(RECIPES[name](), "recipe.yaml")


def test_aliases_and_merges_of_an_honest_recipe_are_read() -> None:
    text = "a: &a {lr: 1.0, wd: 2}\nb: {<<: *a, lr: 3}\nc: [*a, *a]\n"
    assert parse_yaml(text, "x")["b"] == {"lr": 3, "wd": 2} and parse_yaml(text, "x")["c"][1]["lr"] == 1.0


def test_a_file_is_measured_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(6 << 30)
    with refused(None, "the most read of such a file"):
        read_small(path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with refused(None, "the most read of such a file"):
        read(tmp_path)


def test_json_of_more_values_than_its_size_allows_is_refused() -> None:
    with refused("F07", "more memory"):
        parse_json(b"[" + b"{}," * 5_000_000 + b"{}]", "x.json")
    assert parse_json(b'{"a": [1, 2, {}]}', "x.json") == {"a": [1, 2, {}]}


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 10**5},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"num_hidden_layers": 94, "num_experts": 10**9},
        {"num_hidden_layers": 94, "n_routed_experts": 10**5},
        {"max_position_embeddings": 10**12},
        {"head_dim": 10**9},
        {"qk_rope_head_dim": 10**6},
    ],
)
def test_a_config_of_a_size_that_nobody_has_is_refused(config: dict[str, Any]) -> None:
    with refused("C01", "the most believed is"):
        check_config(config, "config.json")


def test_a_config_may_not_ask_for_many_times_what_is_stored() -> None:
    config = {"hidden_size": 4096, "vocab_size": 32_000, "num_hidden_layers": 32, "intermediate_size": 11_008}
    check_config(config, "config.json", stored=7 << 30)
    check_config(config, "config.json")
    with refused("C01", "asks for some"):
        check_config(config, "config.json", stored=1 << 20)


def test_the_largest_models_known_are_believed() -> None:
    check_config({"num_hidden_layers": 61, "n_routed_experts": 384, "vocab_size": 163_840, "hidden_size": 7168}, "kimi")
    check_config({"num_hidden_layers": 126, "hidden_size": 16_384, "intermediate_size": 53_248}, "405B", 800 << 30)
    check_config({"max_position_embeddings": 10_485_760, "id2label": {0: "a"}}, "llama 4")


def test_no_table_is_made_for_a_config_of_a_billion_layers() -> None:
    small = {"model_type": "qwen3_moe", "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10}
    small |= {"num_attention_heads": 2, "num_experts": 4, "num_hidden_layers": 2}
    assert expected(small) is not None
    with calls_at_most(1000):
        assert expected({**small, "num_hidden_layers": 10**9}) is None
        assert expected({**small, "num_experts": 10**9}) is None


def test_fields_of_a_wrong_type_are_left_out_and_said() -> None:
    config = {"model_type": ["llama"], "num_hidden_layers": "two", "rope_parameters": [], "tie_word_embeddings": "no"}
    config |= {"text_config": {"vocab_size": 1.5}, "intermediate_size": [8, 16], "head_dim": None, "other": "kept"}
    assert believed(config) == {"text_config": {}, "head_dim": None, "other": "kept"}
    odd = {name for name, _, _ in odd_fields(config)}
    wrong = {"model_type", "num_hidden_layers", "rope_parameters", "tie_word_embeddings", "text_config.vocab_size"}
    assert odd == wrong  # a number for each layer is not wrong


def test_tokens_that_begin_with_each_other_make_no_endless_merges() -> None:
    tokens = ["a" * (i + 1) for i in range(1024)]
    with calls_at_most(5_000_000), refused(None, "letters of tokens make more than"):
        merges_from_scores(tokens, [0.0] * 1024, [1] * 1024)
    assert merges_from_scores(["a", "b", "ab"], [0, -1, -2], [1, 1, 1]) == [["a", "b"]]
