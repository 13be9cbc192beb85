"""Write the folders of training programs for tests: by the program itself where it is installed, else by its layout.

`REAL` names those that the program's own code writes here. The others follow the program's file names and keys, which
the docstrings say; their tensors are torch's own files.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

State = dict[str, torch.Tensor]


def half(state: State) -> State:
    return OrderedDict((k, v.bfloat16()) for k, v in state.items())


def trainer_files(folder: Path, step: int = 4, ranks: int = 2) -> None:
    """What transformers' Trainer keeps beside the weights."""
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    for rank in range(ranks):
        torch.save({"cpu": torch.get_rng_state()}, folder / f"rng_state_{rank}.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0, "log_history": []}))


def config_of(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())


# -- torch.save and DCP ---------------------------------------------------------------------------------------------


def bin_shards(top: Path, model: Path, state: State) -> Path:
    """`pytorch_model-0000N-of-0000M.bin` and their index, as transformers 4 wrote them."""
    config_of(model, top)
    names, places = list(state), {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        torch.save({k: state[k] for k in names[i::3]}, top / file)
        places.update(dict.fromkeys(names[i::3], file))
    (top / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return top


def trainer_fsdp(top: Path, model: Path, state: State) -> Path:
    """The output folder of a Trainer under FSDP: DCP in `pytorch_model_fsdp_0` and `optimizer_0` of `checkpoint-N`."""
    for step, factor in ((2, 0.0), (10, 1.0)):
        folder = top / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        held = {k: v * factor for k, v in state.items()}
        dcp.save({"model": held}, checkpoint_id=str(folder / "pytorch_model_fsdp_0"))
        moments = {"state": {k: {"exp_avg": v * 0} for k, v in state.items()}}
        dcp.save({"optimizer": moments}, checkpoint_id=str(folder / "optimizer_0"))
        trainer_files(folder, step)
        (folder / "optimizer.pt").unlink()
    config_of(model, top)
    return top


def accelerate_state(top: Path, model: Path, state: State) -> Path:
    """accelerate's own `save_state` of a prepared model, optimizer and schedule."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
    prepared = Accelerator(cpu=True)
    network, optimizer = prepared.prepare(network, optimizer)
    prepared.backward(network(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss)
    optimizer.step()
    prepared.save_state(str(top / "checkpoint_0"))
    config_of(model, top)
    return top


def olmo_core(top: Path, model: Path, state: State) -> Path:
    """OLMo-core's `stepN`: DCP in `model_and_optim`, `train/rankN.pt`, and a config that is not transformers'."""
    folder = top / "step100"
    (folder / "train").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": {"d_model": 32}, "dataset": {}}))
    (folder / ".metadata.json").write_text(json.dumps({"version": "1"}))
    torch.save({"step": 100}, folder / "train" / "rank0.pt")
    held = {f"model.{k}": v for k, v in state.items()} | {f"optim.exp_avg.{k}": v * 0 for k, v in state.items()}
    dcp.save(held, checkpoint_id=str(folder / "model_and_optim"))
    return folder


def nemo(top: Path, model: Path, state: State) -> Path:
    """NeMo 2: torch_dist (DCP) in `weights`, the model's description in `context`."""
    (top / "context").mkdir(parents=True)
    (top / "context" / "model.yaml").write_text("a: 1\n")
    dcp.save({f"module.{k}": v for k, v in state.items()}, checkpoint_id=str(top / "weights"))
    torch.save({"iteration": 5}, top / "weights" / "common.pt")
    (top / "weights" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return top


def megatron_dist(top: Path, model: Path, state: State) -> Path:
    """Megatron-LM's torch_dist: `iter_0000005` with DCP, `common.pt` and `metadata.json`; a file that names it."""
    for step, factor in ((5, 1.0), (10, 0.0)):
        folder = top / f"iter_{step:07d}"
        dcp.save({k: v * factor for k, v in state.items()}, checkpoint_id=str(folder))
        torch.save({"args": Namespace(num_layers=2), "iteration": step}, folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (top / "latest_checkpointed_iteration.txt").write_text("5")
    return top


# -- DeepSpeed ------------------------------------------------------------------------------------------------------


@contextmanager
def deepspeed_classes() -> Iterator[tuple[Any, Any]]:
    """Stand-ins of the two classes that DeepSpeed pickles beside the tensors: a loss scaler and an enum of stages."""
    import enum

    names = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.config")
    modules = {n: types.ModuleType(n) for n in (*names, "deepspeed.runtime.fp16", "deepspeed.runtime.fp16.loss_scaler")}
    scaler = type("LossScaler", (), {"__module__": "deepspeed.runtime.fp16.loss_scaler"})
    stage = enum.IntEnum("ZeroStageEnum", {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3})
    stage.__module__ = "deepspeed.runtime.zero.config"
    modules["deepspeed.runtime.fp16.loss_scaler"].LossScaler = scaler  # type: ignore[attr-defined]
    modules["deepspeed.runtime.zero.config"].ZeroStageEnum = stage  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield scaler(), stage
    finally:
        for name in modules:
            del sys.modules[name]


def zero(top: Path, model: Path, state: State, stage: int = 2, ranks: int = 3, tag: str = "global_step7") -> Path:
    """DeepSpeed's `save_checkpoint`: keys and flat vectors as `zero_to_fp32.py` reads them.

    Two groups of parameters, one frozen parameter, one shared name, a buffer, moments of Adam.
    """
    config_of(model, top)
    step = top / tag
    step.mkdir()
    (top / "latest").write_text(tag)
    (top / "zero_to_fp32.py").write_text("# joins the ranks\n")
    frozen = "model.norm.weight"
    names = [n for n in state if n != frozen]
    groups = [names[::2], names[1::2]]
    common = {
        "buffer_names": ["rotary.inv_freq"],
        "param_shapes": [OrderedDict((n, state[n].shape) for n in group) for group in groups],
        "frozen_param_shapes": OrderedDict({frozen: state[frozen].shape}),
        "shared_params": {"alias.weight": names[0]},
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "global_steps": 7,
        "global_samples": 28,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": "0.17.0",
    }
    module = {**(half(state) if stage < 3 else {n: torch.empty(0) for n in state}), "rotary.inv_freq": torch.rand(4)}
    with deepspeed_classes() as (scaler, stages):
        for rank in range(ranks) if stage == 3 else (0,):
            flat = state[frozen].flatten()
            part = flat.chunk(ranks)[rank].clone() if stage == 3 else state[frozen]
            file = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            held = {"module": module, "frozen_param_fragments": {frozen: part}, **common}
            torch.save(held, step / f"{file}_model_states.pt")
        for rank in range(ranks):
            vectors = [_part([state[n] for n in group], stage, rank, ranks) for group in groups]
            moments = {i: {"exp_avg": v * 2, "exp_avg_sq": v * v, "step": 7} for i, v in enumerate(vectors)}
            base = {"state": moments, "param_groups": []}
            saved: dict[str, Any] = {"loss_scaler": scaler, "zero_stage": stages(stage), "partition_count": ranks}
            if stage == 3:
                saved |= {"fp32_flat_groups": vectors, "optimizer_state_dict": base}
            else:
                saved |= {"single_partition_of_fp32_groups": vectors, "base_optimizer_state": base}
                saved["partition_count"] = [ranks] * 2
            file = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": saved, "ds_config": {}, "ds_version": "0.17.0"}, step / file)
    return top


def _part(tensors: list[torch.Tensor], stage: int, rank: int, ranks: int) -> torch.Tensor:
    """One rank's flat vector of a group of parameters."""
    if stage < 3:
        flat = torch.cat([t.flatten() for t in tensors])
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % (2 * ranks))])
        return flat.chunk(ranks)[rank].clone()
    pieces = []
    for tensor in tensors:
        flat = tensor.flatten()
        size = math.ceil(len(flat) / ranks)
        pieces.append(torch.cat([flat, flat.new_zeros(size * ranks - len(flat))])[rank * size : (rank + 1) * size])
    return torch.cat(pieces)


def universal(top: Path, model: Path, state: State) -> Path:
    """DeepSpeed's `ds_to_universal.py`: a folder for each parameter below `zero`, a file for each state."""
    config_of(model, top)
    folder = top / "global_step7_universal"
    for name, tensor in state.items():
        place = folder / "zero" / name
        place.mkdir(parents=True)
        for what, value in (("fp32", tensor), ("exp_avg", tensor * 2), ("exp_avg_sq", tensor * 3)):
            torch.save({"param": value, "cat_dim": 0}, place / f"{what}.pt")
        torch.save(torch.tensor(7.0), place / "step.pt")
    torch.save({"module": half(state)}, folder / "mp_rank_00_model_states.pt")
    (top / "latest_universal").write_text(folder.name)
    return top


def lightning_zero(top: Path, model: Path, state: State) -> Path:
    """Lightning under DeepSpeed: `epoch=0-step=7.ckpt/checkpoint`, names below `_forward_module.`."""
    inner = top / "checkpoints" / "epoch=0-step=7.ckpt"
    wrapped = {f"_forward_module.{k}": v for k, v in state.items()}
    inner.mkdir(parents=True)
    config_of(model, top)
    (inner / "checkpoint").mkdir()
    torch.save({"module": wrapped, "ds_config": {}, "global_steps": 7}, inner / "checkpoint/mp_rank_00_model_states.pt")
    (inner / "latest").write_text("checkpoint")
    return top


# -- a file for each rank -------------------------------------------------------------------------------------------


def distributed(tensor: torch.Tensor, mesh: Any, rank: int, ranks: int) -> Any:
    """torch's own DTensor of one rank, cut along dimension 0."""
    from torch.distributed.tensor import DTensor, Shard

    size = math.ceil(tensor.shape[0] / ranks)
    local = tensor[min(rank * size, tensor.shape[0]) : min((rank + 1) * size, tensor.shape[0])].clone()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def on_each_rank(ranks: int, write: Callable[[int, Any], None]) -> None:
    """Call `write(rank, mesh)` as every rank of a made-up group of processes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            write(rank, init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",)))
        finally:
            dist.destroy_process_group()


def verl(top: Path, model: Path, state: State) -> Path:
    """verl's FSDP workers: `global_step_N/actor/model_world_size_W_rank_R.pt` of DTensors, `huggingface` beside."""
    ranks, actor = 3, top / "global_step_8" / "actor"
    config_of(model, actor / "huggingface")

    def write(rank: int, mesh: Any) -> None:
        held = {k: distributed(v, mesh, rank, ranks) for k, v in state.items()}
        torch.save(held, actor / f"model_world_size_{ranks}_rank_{rank}.pt")
        moments = {"state": {k: {"exp_avg": v} for k, v in held.items()}, "param_groups": []}
        torch.save(moments, actor / f"optim_world_size_{ranks}_rank_{rank}.pt")
        torch.save({"rng": {"cpu": torch.get_rng_state()}}, actor / f"extra_state_world_size_{ranks}_rank_{rank}.pt")

    on_each_rank(ranks, write)
    (top / "latest_checkpointed_iteration.txt").write_text("8")
    return top


def torch_checkpointing(top: Path, model: Path, state: State) -> Path:
    """`torch_checkpointing` 0.1: an item and a rank in each `<item>_<rank>.pt`, and `metadata.pkl`."""
    ranks, folder = 2, top / "step-3"
    folder.mkdir(parents=True)

    def write(rank: int, mesh: Any) -> None:
        held = {k: distributed(v, mesh, rank, ranks) for k, v in state.items()}
        torch.save(held, folder / f"model_{rank}.pt")
        torch.save({"state": {k: {"exp_avg": v} for k, v in held.items()}}, folder / f"optimizer_{rank}.pt")
        torch.save(3, folder / f"step_{rank}.pt")

    on_each_rank(ranks, write)
    (folder / "metadata.pkl").write_bytes(pickle.dumps({"metadata": {"model": {}, "optimizer": {}}}))
    config_of(model, top)
    return top


# -- Megatron-LM ----------------------------------------------------------------------------------------------------


def megatron_state(layers: int = 4) -> State:
    """A whole model under Megatron core's names: gated, grouped queries, an untied head."""
    made = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made)

    state = {"embedding.word_embeddings.weight": draw(12, 8)}
    for i in range(layers):
        at = f"decoder.layers.{i}"
        state[f"{at}.self_attention.linear_qkv.weight"] = draw(16, 8)
        state[f"{at}.self_attention.linear_qkv.bias"] = draw(16)
        state[f"{at}.self_attention.linear_qkv.layer_norm_weight"] = draw(8)
        state[f"{at}.self_attention.linear_proj.weight"] = draw(8, 8)
        state[f"{at}.self_attention.linear_proj.bias"] = draw(8)
        state[f"{at}.mlp.linear_fc1.weight"] = draw(24, 8)
        state[f"{at}.mlp.linear_fc2.weight"] = draw(8, 12)
    return state | {"decoder.final_layernorm.weight": draw(8), "output_layer.weight": draw(12, 8)}


def megatron(top: Path, tp: int = 2, pp: int = 2, **arguments: Any) -> Path:
    """`iter_0000009/mp_rank_TT_PPP/model_optim_rng.pt`: parts as Megatron's parallel layers keep them."""
    whole, layers = megatron_state(), 4
    told = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "num_layers": layers, "swiglu": True}
    for rank in range(tp):
        for stage in range(pp):
            first, last = stage * layers // pp, (stage + 1) * layers // pp
            held = {}
            for name, tensor in whole.items():
                parts = name.split(".")
                if parts[1] == "layers":
                    if not first <= int(parts[2]) < last:
                        continue
                    name = ".".join([*parts[:2], str(int(parts[2]) - first), *parts[3:]])
                elif ("embedding" in name) != (stage == 0) and pp > 1:
                    continue
                held[name] = _megatron_part(name, tensor, rank, tp)
            folder = top / "iter_0000009" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            saved = {
                "args": Namespace(**{**told, **arguments}),
                "checkpoint_version": 3.0,
                "iteration": 9,
                "model": held,
            }
            torch.save(saved, folder / "model_optim_rng.pt")
    (top / "latest_checkpointed_iteration.txt").write_text("9")
    return top


def _megatron_part(name: str, tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    if "linear_fc1" in name:
        return torch.cat([part.chunk(tp)[rank] for part in tensor.chunk(2)]).clone()
    if "linear_qkv.layer_norm" in name or "norm" in name or name.endswith("proj.bias"):
        return tensor
    return tensor.chunk(tp, 1 if "linear_proj" in name or "linear_fc2" in name else 0)[rank].clone()


LAYOUTS: dict[str, Callable[[Path, Path, State], Path]] = {
    "bin shards": bin_shards,
    "Trainer under FSDP": trainer_fsdp,
    "accelerate save_state": accelerate_state,
    "OLMo-core": olmo_core,
    "NeMo": nemo,
    "Megatron torch_dist": megatron_dist,
    "ZeRO-1": lambda top, model, state: zero(top, model, state, 1, 2),
    "ZeRO-2": zero,
    "ZeRO-3": lambda top, model, state: zero(top, model, state, 3, 3),
    "accelerate under DeepSpeed": lambda top, model, state: zero(top, model, state, 2, 2, "pytorch_model"),
    "DeepSpeed universal": universal,
    "Lightning under DeepSpeed": lightning_zero,
    "verl": verl,
    "torch_checkpointing": torch_checkpointing,
}
REAL = ("accelerate save_state",)
