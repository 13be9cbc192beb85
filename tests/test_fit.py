"""An hf folder is what its config asks for: what transformers would miss, not expect or not fit is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tensorkeep.cli import main
from tensorkeep.conversion.fit import Offer, by_table
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.verification import verify
from tensorkeep.formats.view import read
from tensorkeep.storage.record import FROM_TORCH
from tests.checkpoints import hf_tensors, write_model
from tests.helpers import refused, to, with_config

transformers = pytest.importorskip("transformers")
Tensors = dict[str, torch.Tensor]
SHARED = {"Llama": {}, "Qwen3": {"head_dim": 16, "tie_word_embeddings": True}, "Mixtral": {"num_local_experts": 4}}


def says(folder: Path) -> dict[str, list[str]]:
    """What transformers reports of a folder that it loads."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return {k: sorted(map(str, v)) for k, v in info.items() if v}


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


@pytest.fixture(params=SHARED)
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_model(tmp_path / "base", request.param, **SHARED[request.param])
    return tmp_path / "base"


WRAPPED: dict[str, Callable[[Tensors], Any]] = {
    "as it is": lambda t: t,
    "a trainer's dict": lambda t: {"state_dict": {f"model.{n}": v for n, v in t.items()}, "epoch": 3},
    "two wrappers": lambda t: {f"net.backbone.{n}": v for n, v in t.items()},
    "state beside": lambda t: {
        "state_dict": {f"model.{n}": v for n, v in t.items()},
        "callbacks": {"best": {"score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    },
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_model_is_written_under_the_names_that_transformers_asks_for(
    base: Path, how: str, tmp_path: Path
) -> None:
    tensors = hf_tensors(base)
    path = saved(tmp_path / "x.pt", WRAPPED[how](tensors))
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "hf", "--config", str(base), "--quiet"]) == 0
    assert says(tmp_path / "out") == {}
    written = hf_tensors(tmp_path / "out")
    assert written.keys() == tensors.keys() and all(torch.equal(written[n], tensors[n]) for n in tensors)


def halves(tensors: Tensors) -> Tensors:
    return {n: t.chunk(2, 0)[0].clone() if t.ndim == 2 else t for n, t in tensors.items()}


def stacked(tensors: Tensors) -> Tensors:
    out = dict(tensors)
    for name in [n for n in tensors if ".q_proj." in n]:
        out[name.replace("q_proj", "qkv_proj")] = torch.cat(
            [out.pop(name.replace("q_proj", f"{w}_proj")) for w in "qkv"]
        )
    return out


def elsewhere(tensors: Tensors) -> Tensors:
    words = (("self_attn.q_proj", "attn.q"), ("model.layers", "transformer.h"), ("input_layernorm", "norm_1"))
    out = {}
    for name, tensor in tensors.items():
        for ours, theirs in words:
            name = name.replace(ours, theirs)
        out[name] = tensor
    return out


FAULTS: dict[str, tuple[Callable[[Tensors], Any], str, tuple[str, ...]]] = {
    "a shard of two": (halves, "S01", ("one of 2 shards", "gather")),
    "fused": (stacked, "K01", ("qkv_proj", "order")),
    "foreign names": (elsewhere, "K0", ("LitGPT",)),
    "one left out": (
        lambda t: {n: v for n, v in t.items() if "1.input_layernorm" not in n},
        "K01",
        ("1.input_layernorm",),
    ),
    "a metric": (lambda t: {**t, "accuracy.total": torch.zeros(1)}, "K02", ("--drop 'accuracy.total'",)),
    "a value head": (
        lambda t: {**{f"pretrained_model.{n}": v for n, v in t.items()}, "v_head.summary.weight": torch.zeros(1, 32)},
        "K02",
        ("--drop 'v_head.summary.weight'",),
    ),
    "one in each of many layers": (
        lambda t: {**t, **{f"model.layers.{i}.probe.{w}": torch.zeros(1) for i in range(20) for w in ("a", "b")}},
        "K02",
        ("--drop 'probe'\n",),
    ),
    "nothing gathered": (lambda t: {n: torch.empty(0) for n in t}, "K05", ("ZeRO-3", "zero_to_fp32")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_loader_would_take_is_refused_and_named(
    base: Path, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, code, words = FAULTS[fault]
    path = saved(tmp_path / "x.pt", change(hf_tensors(base)))
    line = ["convert", str(path), str(tmp_path / "out"), "--to", "hf", "--config", str(base)]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert code in said and all(w in said for w in words) and not (tmp_path / "out").exists()
    if "--drop" in said:  # the hint is a command that works
        drop = said.partition("--drop '")[2].partition("'")[0]
        assert main([*line, "--drop", drop]) == 0 and says(tmp_path / "out") == {}


def test_a_model_that_no_table_knows_is_judged_by_transformers_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.checkpoints import TINY

    config = transformers.GPTNeoXConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"})
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    tensors = hf_tensors(tmp_path / "base")
    assert by_table(config.to_dict(), {n: Offer("F32", tuple(t.shape)) for n, t in tensors.items()}) is None
    path = saved(tmp_path / "x.pt", {f"wrapped.{n}": t for n, t in tensors.items()})
    line = ["convert", str(path), "--to", "hf", "--config", str(tmp_path / "base")]
    assert main([*line[:2], str(tmp_path / "out"), *line[2:]]) == 0 and says(tmp_path / "out") == {}
    gone = next(n for n in tensors if n.endswith("dense.weight"))
    saved(path, {n: t for n, t in tensors.items() if n != gone})
    capsys.readouterr()
    assert main([*line[:2], str(tmp_path / "no"), *line[2:]]) == 2 and gone in capsys.readouterr().err


@pytest.mark.parametrize("kind", SHARED)
def test_the_table_and_transformers_say_the_same(tmp_path: Path, kind: str) -> None:
    from tensorkeep.models.loader import by_transformers

    write_model(tmp_path / "base", kind, **SHARED[kind])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    tensors = hf_tensors(tmp_path / "base")
    offers = {n: Offer(FROM_TORCH[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in tensors.items()}
    name = "model.layers.1.self_attn.o_proj.weight"
    changed = [
        offers,
        {n: o for n, o in offers.items() if n != name},
        offers | {"odd.weight": Offer("F32", (2,))},
        offers | {name: offers[name]._replace(shape=(16, 32))},
    ]
    for given in changed:
        ours, theirs = by_table(config, given), by_transformers(config, given)
        assert ours is not None and theirs is not None
        assert (ours.missing, ours.unexpected, ours.mismatched) == (
            theirs.missing,
            theirs.unexpected,
            theirs.mismatched,
        )


def test_a_config_of_too_many_layers_is_not_built(tmp_path: Path) -> None:
    from tensorkeep.models.loader import by_transformers

    huge = {"model_type": "gpt_neox", "num_hidden_layers": 10**9, "hidden_size": 32}
    assert by_transformers(huge, {"x": Offer("F32", (2,))}) is None


def test_codes_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "Llama")
    tensors = hf_tensors(tmp_path / "base")
    for name in [n for n in tensors if "_proj" in n]:
        tensors[name + "_scale_inv"] = torch.ones(1, 1)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    path = saved(tmp_path / "x.pt", tensors)
    with refused("Q01", "quantization_config", "--config"):
        make_plan([with_config(path, config)], "hf")


def test_quantized_weights_in_other_modules_than_the_model_s_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "Llama")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    packed = {n.replace("proj.weight", "proj.qweight"): t for n, t in hf_tensors(tmp_path / "base").items()}
    path = saved(tmp_path / "x.pt", packed)
    assert len(make_plan([with_config(path, config)], "hf").tensors) == len(packed)
    saved(path, {f"engine.{n}": t for n, t in packed.items()})
    with refused("K01", "model.embed_tokens.weight"):
        make_plan([with_config(path, config)], "hf")


def test_what_was_dropped_by_name_is_not_missed(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "Llama")
    plan = make_plan([read(tmp_path / "base")], "hf", drop=["lm_head.weight"])
    assert "lm_head.weight" not in {t.name for t in plan.tensors}
    with refused("K01", "lm_head.weight"):
        make_plan([read(write_without(tmp_path))], "hf")


def write_without(tmp_path: Path) -> Path:
    folder = tmp_path / "headless"
    write_model(folder, "Llama")
    tensors = {n: t for n, t in hf_tensors(folder).items() if n != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_verify_does_not_call_empty_tensors_complete(tmp_path: Path) -> None:
    save_file({f"layers.{i}.weight": torch.empty(0) for i in range(3)}, tmp_path / "x.safetensors")
    assert [f.code for f in verify(tmp_path / "x.safetensors")[0]] == ["K05"]
    save_file({"a": torch.empty(0), "b": torch.ones(2), "c": torch.ones(2)}, tmp_path / "y.safetensors")
    assert verify(tmp_path / "y.safetensors")[0] == []


# -- the header of safetensors ---------------------------------------------------------------------------------------


def header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_entries_of_the_header_go_along_or_are_named(tmp_path: Path) -> None:
    said = {"format": "pt", "a.weight": '{"_type": "Int4Tensor"}', "tensor_names": '["a.weight"]'}
    save_file({"a._weight_qdata": torch.zeros(4, 4)}, tmp_path / "x.safetensors", said)
    plan, _ = to(tmp_path / "x.safetensors", tmp_path / "out", "hf")
    assert header(tmp_path / "out" / "model.safetensors") == said and not plan.notes
    other, _ = to(tmp_path / "x.safetensors", tmp_path / "o.pth", "pth")
    assert [(n.code, set(n.names)) for n in other.notes] == [("K07", {"a.weight", "tensor_names"})]
