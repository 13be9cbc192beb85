"""`tensorkeep generate` writes what the checkpoint's weights give, whatever its format, adapter or quantization."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensorkeep import cli
from tensorkeep.adapters.files import save_adapter
from tensorkeep.adapters.lora import add_lora
from tensorkeep.adapters.merging import base_digests
from tensorkeep.commands.generate import _decode_once
from tensorkeep.errors import TensorkeepError, visible
from tensorkeep.formats.view import read
from tensorkeep.language.export import exported
from tensorkeep.language.generation import TextStream, generate, prompt_ids
from tensorkeep.language.job import build, loop_of
from tensorkeep.language.recipe_text import language_recipe
from tensorkeep.output import Output
from tensorkeep.quantization.modules import quantize_, quantized_layers
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.loop import fit
from tests.helpers import refused, to
from tests.language_files import conversations, model, save_model, tokenizer

PROMPT = "Where is the fox?"


def told(capsys: Any, *words: str) -> dict[str, Any]:
    """The document of `tensorkeep generate ... --json`."""
    code = cli.main(["generate", *words, "--prompt", PROMPT, "--max-tokens", "12", "--device", "cpu", "--json"])
    out, error = capsys.readouterr()
    assert code == 0, error
    found: dict[str, Any] = json.loads(out)
    return found


def by_hand(live: nn.Module, raw: bool = False, count: int = 12) -> list[int]:
    """Greedy decoding, one whole forward a token: no cache, no transformers' generate."""
    ids = prompt_ids(tokenizer(), PROMPT, raw)
    first = len(ids)
    with torch.no_grad():
        while len(ids) < first + count:
            ids.append(int(live(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
    return ids[first:]


def trained(live: nn.Module, seed: int = 1) -> nn.Module:
    """Make LoRA layers whose update is large enough to change the text."""
    add_lora(live, ["q_proj", "down_proj"], r=4, alpha=8, rank_pattern={"layers.1.mlp.down_proj": 2})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return live


@pytest.mark.parametrize("raw", [False, True])
def test_greedy_text_is_that_of_one_forward_a_token(tmp_path: Path, capsys: Any, raw: bool) -> None:
    found = told(capsys, str(save_model(tmp_path / "m")), *(["--raw"] if raw else []))
    assert found["ids"] == by_hand(model(), raw) and found["tokens"] == len(found["ids"])
    assert found["text"] == tokenizer().decode(found["ids"], skip_special_tokens=True)
    assert found["prompt"] == PROMPT and found["seconds"] > 0 and found["tokens_per_second"] > 0


@pytest.mark.parametrize("form", ["dcp", "pth"])
def test_every_format_says_the_same(tmp_path: Path, capsys: Any, form: str) -> None:
    hf = save_model(tmp_path / "m")
    out = tmp_path / "dcp"
    if form == "pth":  # config and tokenizer lie beside the file
        shutil.copytree(hf, tmp_path / "pth", ignore=shutil.ignore_patterns("*.safetensors"))
        out = tmp_path / "pth" / "m.pth"
    to(hf, out, form)
    assert told(capsys, str(out))["ids"] == told(capsys, str(hf))["ids"]


def test_the_text_is_streamed_and_whole(tmp_path: Path, capsys: Any) -> None:
    hf = save_model(tmp_path / "m")
    document = told(capsys, str(hf))
    assert cli.main(["generate", str(hf), "--prompt", PROMPT, "--max-tokens", "12", "--device", "cpu", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out.rstrip("\n") == visible(document["text"]).rstrip("\n")
    pieces: list[str] = []
    made = generate(model().eval(), tokenizer(), PROMPT, 12, write=pieces.append)
    assert "".join(pieces) == made.text == document["text"] and len([p for p in pieces if p]) > 3


def test_half_a_character_waits_for_its_other_half() -> None:
    words, pieces = tokenizer(), []
    ids = words("é – ü")["input_ids"]
    stream = TextStream(words, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for i in ids:
        stream.put(torch.tensor([i]))
    stream.end()
    assert "".join(pieces) == "é – ü" and not any("\ufffd" in piece for piece in pieces) and len(ids) > 5


def test_text_of_a_model_is_no_control_sequence() -> None:
    assert visible("a\x1b[2Jb\ncd\u202e") == "a\\x1b[2Jb\ncd\\u202e"


def test_sampling_follows_its_seed_and_leaves_the_process_alone() -> None:
    live, words = model().eval(), tokenizer()
    before = torch.get_rng_state()
    texts = [generate(live, words, PROMPT, 12, temperature=1.5, seed=seed).ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and torch.equal(before, torch.get_rng_state())


def test_it_says_what_stopped_it(tmp_path: Path) -> None:
    live, words = model().eval(), tokenizer()
    made = generate(live, words, PROMPT, 3)
    assert (made.stopped_by, len(made.ids)) == ("length", 3)
    settings, first = live.generation_config, made.ids[0]
    live.generation_config.eos_token_id = [first]
    assert generate(live, words, PROMPT, 3).stopped_by == "end" and live.generation_config is settings
    short = model(max_position_embeddings=len(prompt_ids(words, PROMPT)) + 2).eval()
    made = generate(short, words, PROMPT, 9)
    assert (made.stopped_by, len(made.ids)) == ("context", 2)
    with refused(None, "the model's rows hold"):
        generate(short, words, PROMPT * 4)
    with refused(None, "max_tokens 0"):
        generate(live, words, PROMPT, 0)


def test_quantized_as_said(tmp_path: Path, capsys: Any) -> None:
    hf, live = save_model(tmp_path / "m"), model().requires_grad_(False)
    quantize_(live, "nf4")
    found = told(capsys, str(hf), "--quantize-backbone", "nf4")
    assert found["ids"] == by_hand(live.eval()) and found["quantize_backbone"] == "nf4"


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_an_adapter_of_ours_is_heard_on_its_base_alone(tmp_path: Path, capsys: Any, kind: Any) -> None:
    hf, live = save_model(tmp_path / "m"), model().requires_grad_(False)
    if kind is not None:
        quantize_(live, kind)
    save_adapter(trained(live), tmp_path / "a", base_digests(read(hf))[0])
    words = ["--adapter", str(tmp_path / "a"), *(["--quantize-backbone", kind] if kind else [])]
    found = told(capsys, str(hf), *words)
    assert found["ids"] == by_hand(live.eval()) != told(capsys, str(hf))["ids"]
    other = save_model(tmp_path / "other")
    weights = {n: t + 0.01 for n, t in ((n, read(other).tensor(n)) for n in read(other))}
    from safetensors.torch import save_file

    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["generate", str(other), "--prompt", PROMPT, *words]) == 2
    error = capsys.readouterr().err
    assert "A04" in error and base_digests(read(hf))[0] in error and base_digests(read(other))[0] in error
    told(capsys, str(other), *words, "--allow-other-base")
    if kind is not None:
        assert cli.main(["generate", str(hf), "--prompt", PROMPT, *words[:2]]) == 2  # its base was quantized
        assert "A04" in capsys.readouterr().err


def test_codes_that_were_decoded_once_compute_the_same_bits() -> None:
    live, ids = model().requires_grad_(False).eval(), torch.tensor([[5, 6, 7]])
    quantize_(live, "nf4")
    trained(live)
    with torch.no_grad():
        before = live(ids).logits
        _decode_once(live)
        assert torch.equal(before, live(ids).logits) and not quantized_layers(live)


def test_a_peft_folder_is_heard_as_peft_runs_it(tmp_path: Path, capsys: Any) -> None:
    peft = pytest.importorskip("peft")
    hf = save_model(tmp_path / "m")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    live = peft.get_peft_model(model(tie_word_embeddings=False), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    live.save_pretrained(tmp_path / "a")
    hf = save_model(tmp_path / "untied", tie_word_embeddings=False)
    assert told(capsys, str(hf), "--adapter", str(tmp_path / "a"))["ids"] == by_hand(live.eval())


def run_of(tmp_path: Path, **training: Any) -> tuple[Path, Path]:
    """A short QLoRA run under an average; the run and its base."""
    base = save_model(tmp_path / "base", max_position_embeddings=256)
    conversations(tmp_path / "c.jsonl")
    document = {
        "model": str(base),
        "objective": "sft",
        "adapter": {"lora_r": 4},
        "optimizer": {"lr": 0.2},
        "data": {"files": [str(tmp_path / "c.jsonl")], "length": 64},
        "training": {"updates": 4, "batch_size": 4, "ema": 0.5, "quantize_backbone": "nf4", **training},
    }
    recipe = language_recipe(document)
    job = build(recipe, tmp_path / "run", World())
    fit(job, tmp_path / "run", loop_of(recipe, len(job.data)), say=Output(quiet=True))
    return tmp_path / "run", base


def test_a_run_is_heard_under_its_adapter_and_its_average(tmp_path: Path, capsys: Any) -> None:
    run, base = run_of(tmp_path)
    averaged, plain = told(capsys, str(run)), told(capsys, str(run), "--no-ema")
    assert (averaged["ema"], plain["ema"], averaged["step"], averaged["quantize_backbone"]) == (True, False, 4, "nf4")
    for heard, ema in ((averaged, True), (plain, False)):
        folder = exported(run, tmp_path / f"adapter-{ema}", ema=ema)
        words = ["--adapter", str(folder), "--quantize-backbone", "nf4"]
        assert told(capsys, str(base), *words)["ids"] == heard["ids"]
    assert cli.main(["generate", str(run), "--prompt", PROMPT, "--quantize-backbone", "int8"]) == 2
    assert "a run says itself" in capsys.readouterr().err


def test_what_cannot_speak_says_why(tmp_path: Path, capsys: Any) -> None:
    hf = save_model(tmp_path / "m")
    save_adapter(trained(model()), tmp_path / "a")
    cases = [
        ([str(tmp_path / "a")], "is an adapter and needs its base"),
        ([str(hf), "--adapter", str(hf)], "is no adapter folder"),
        ([str(tmp_path / "nothing")], "nothing"),
    ]
    for words, said in cases:
        assert cli.main(["generate", *words, "--prompt", PROMPT]) == 2
        assert said in capsys.readouterr().err
    for file in hf.glob("*token*"):
        file.unlink()
    assert cli.main(["generate", str(hf), "--prompt", PROMPT]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_an_empty_prompt_begins_a_text_or_is_refused() -> None:
    words = tokenizer(None)
    assert prompt_ids(words, "", bos=7) == [words.bos_token_id if words.bos_token_id is not None else 7]
    words.bos_token = None
    with pytest.raises(TensorkeepError, match="no token begins a text"):
        prompt_ids(words, "")


def test_an_average_is_put_on_for_the_text_alone() -> None:
    live = model().requires_grad_(True).eval()
    ema = Ema(live)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(0.5)
    before = [p.clone() for p in live.parameters()]
    with ema.applied(live):
        heard = generate(live, tokenizer(), PROMPT, 8).ids
    assert heard == by_hand(model().eval(), count=8)
    assert all(torch.equal(a, b) for a, b in zip(before, live.parameters()))
