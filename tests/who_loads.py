"""Which real program loads which of our sinks: small models of several kinds, our sinks, and the loaders themselves.

A row is a sink: how `convert` is called, and what then loads it. The loaders are the programs' own, and give what they
have to say: nothing where all is well.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
SOURCES = ("llama", "llama tied", "qwen2", "qwen3", "qwen3 tied", "qwen3 moe", "qwen2.5 vl", "llama nf4", "llama int8")


class Source(NamedTuple):
    """A model as its own library saved it.

    Args:
        folder: the hf folder.
        fresh: makes the model anew, with other values.
        state: its state dict in memory.
    """

    folder: Path
    fresh: Callable[[], nn.Module]
    state: dict[str, Tensor]


def made(name: str, folder: Path) -> Source:
    """Build, save and return one source."""
    import transformers as tf

    torch.manual_seed(len(name))
    if name in ("llama nf4", "llama int8"):
        return _quantized(name, folder)
    config = {
        "llama": lambda: tf.LlamaConfig(**SIZES),
        "llama tied": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
        "qwen2": lambda: tf.Qwen2Config(**SIZES),
        "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=16),
        "qwen3 tied": lambda: tf.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
        "qwen3 moe": lambda: tf.Qwen3MoeConfig(
            **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "qwen2.5 vl": lambda: tf.Qwen2_5_VLConfig(
            text_config={
                **SIZES,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 64,
            },
            image_token_id=90,
            video_token_id=91,
            vision_start_token_id=92,
            vision_end_token_id=93,
        ),
    }[name]()
    kind = tf.Qwen2_5_VLForConditionalGeneration if name == "qwen2.5 vl" else None

    def fresh() -> nn.Module:
        again = copy.deepcopy(config)
        model: nn.Module = kind(again) if kind else tf.AutoModelForCausalLM.from_config(again)
        return model.to(torch.bfloat16)

    model = fresh()
    model.save_pretrained(folder)
    return Source(folder, fresh, _values(model))


def _quantized(name: str, folder: Path) -> Source:
    """A llama whose linears bitsandbytes has quantized."""
    import transformers as tf

    plain = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).to(torch.bfloat16)
    plain.save_pretrained(folder / "plain")
    options = {"load_in_8bit": True} if name == "llama int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    settings = tf.BitsAndBytesConfig(**options)
    model = tf.LlamaForCausalLM.from_pretrained(folder / "plain", quantization_config=settings, device_map={"": "cpu"})
    model.save_pretrained(folder / "codes")
    return Source(folder / "codes", lambda: model, _values(model))


def _values(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what bitsandbytes keeps of the last forward."""
    return {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def complaints(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names that one of two state dicts lacks, or whose bits differ."""
    odd = sorted(found.keys() ^ wanted.keys())
    return odd + [n for n in wanted if n in found and not torch.equal(found[n], wanted[n])]


# -- loaders: each says what is wrong ----------------------------------------------------------------------------------


def by_from_pretrained(sink: Path, source: Source) -> list[str]:
    """transformers' own loader of a folder, with its report."""
    kind = type(source.fresh())
    model, report = kind.from_pretrained(sink, output_loading_info=True, device_map={"": "cpu"})
    return [f"{what}: {names}" for what, names in report.items() if names] + complaints(_values(model), source.state)


def by_load_state_dict(sink: Path, source: Source, root: str | None = None) -> list[str]:
    """`torch.load` and a strict `load_state_dict`."""
    state = torch.load(sink, weights_only=True)
    model = source.fresh()
    model.load_state_dict(state[root] if root else state, strict=True)
    return complaints(dict(model.state_dict()), source.state)


def by_dcp(sink: Path, source: Source, root: str | None = None) -> list[str]:
    """`torch.distributed.checkpoint.load` into a live model's state dict, strict about each of its keys."""
    import torch.distributed.checkpoint as dcp

    model = source.fresh()
    state = model.state_dict()
    dcp.load({root: state} if root else state, checkpoint_id=str(sink), no_dist=True)
    model.load_state_dict(state)
    held = dcp.FileSystemReader(sink).read_metadata().state_dict_metadata
    names = {n.removeprefix(f"{root}.") if root else n for n in held}
    return sorted(names ^ state.keys()) + complaints(dict(model.state_dict()), source.state)


def by_minimind(sink: Path, source: Source) -> list[str]:
    """A strict load into MiniMind's model."""
    from tests.parity.minimind_model import MiniMind, config_of

    state = torch.load(sink, weights_only=True)
    known = json.loads((source.folder / "config.json").read_text())
    model = MiniMind(config_of(known, {n: tuple(t.shape) for n, t in state.items()})).to(torch.bfloat16)
    model.load_state_dict(state, strict=True)
    wanted = _file(source)
    return complaints(dict(model.state_dict()), {"lm_head.weight": wanted["model.embed_tokens.weight"]} | wanted)


def _file(source: Source) -> dict[str, Tensor]:
    """The tensors of the source's own files."""
    from safetensors.torch import load_file

    return {n: t for path in sorted(source.folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def by_safetensors(sink: Path, source: Source) -> list[str]:
    """The safetensors library alone; the names are those of the hf folder."""
    from safetensors.torch import load_file

    return complaints(load_file(sink), _file(source))


class Row(NamedTuple):
    """One kind of sink.

    Args:
        words: the options of `convert`.
        name: of the file or folder.
        program: what loads it, as the table's column says.
        loads: the loader.
        undeclared: the options that write the same sink without naming the program; None where they are the same.
    """

    words: str
    name: str
    program: str
    loads: Callable[[Path, Source], list[str]]
    undeclared: str | None = None


ROWS = [
    Row("--to hf --for transformers", "out", "transformers", by_from_pretrained, "--to hf"),
    Row(
        "--to hf --for transformers --shard-size 40kB",
        "out",
        "transformers",
        by_from_pretrained,
        "--to hf --shard-size 40kB",
    ),
    Row("--to hf", "model.safetensors", "safetensors", by_safetensors),
    Row("--to pth --for transformers", "model.pth", "torch", by_load_state_dict, "--to pth"),
    Row(
        "--to pth --for transformers --root model",
        "model.pth",
        "torch",
        lambda sink, source: by_load_state_dict(sink, source, "model"),
        "--to pth --root model",
    ),
    Row("--to dcp --for transformers", "out", "torch", by_dcp, "--to dcp"),
    Row("--to dcp --for flame", "out", "torch", by_dcp, "--to dcp"),
    Row(
        "--to dcp --for flame --root model",
        "out",
        "torch",
        lambda sink, source: by_dcp(sink, source, "model"),
        "--to dcp --root model",
    ),
    Row("--to pth --for minimind", "full_sft_64.pth", "minimind", by_minimind, "--to pth --naming minimind"),
]


def tried(row: Row, sink: Path, source: Source) -> list[str]:
    """What the program says of a sink; its error where it raises."""
    try:
        return row.loads(sink, source)
    except BaseException as error:  # torch.distributed's CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return [f"{type(error).__name__}: {str(error)[:200]}"]


# -- adapters ----------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "two projections": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "ranks by pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "a head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norms saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "all linears": {"target_modules": "all-linear"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "biases": {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    "an expression": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
}


def adapter(options: dict[str, Any], source: Source, folder: Path) -> dict[str, Tensor]:
    """An adapter as PEFT saves it, on a source's model; its tensors."""
    import peft

    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(source.fresh(), config)
    model.save_pretrained(folder)
    return dict(peft.get_peft_model_state_dict(model))


def by_peft(sink: Path, source: Source, wanted: dict[str, Tensor]) -> list[str]:
    """PEFT's own loader, on the model itself; what it warns of counts."""
    import peft

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(source.fresh(), sink)
    said = [str(w.message)[:200] for w in warned if "adapter" in str(w.message)]
    return said + complaints(dict(peft.get_peft_model_state_dict(model)), wanted)
