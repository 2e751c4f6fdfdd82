"""How true the formulas of docs/scaling.md are: against `kit check`'s count, and against processes that train.

    python benchmarks/scaling.py

Counts what autograd keeps of real architectures built without weights, at 1,024 tokens, and trains a small GPT-2 in
processes of its own. Writes benchmarks/results/scaling.json.
"""

import argparse
import multiprocessing
import resource
import tempfile
from typing import Any

import psutil
import torch
import torch.distributed as dist
from comparison import ROOT, describe_setting, write_result
from peft import LoraConfig, get_peft_model
from scaling_formulas import BLOCKS, GB, MODELS, RANK, STRATEGIES, Shape, Strategy, shape_of, training_memory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from kit.model.chunked_loss import give_losses
from kit.tasks import causal_lm
from kit.training.memory import estimate_memory

LENGTH = 1024
ON_ONE = [strategy for strategy in STRATEGIES if strategy.gpus == 1 and strategy.weights >= 2]
# Trained for real: activations, logits and weights of about the same size, and seconds a step on a CPU.
SMALL = {"model_type": "gpt2", "n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 8192}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def build(config: dict[str, Any], strategy: Strategy, device: str = "meta") -> PreTrainedModel:
    """Return a causal LM whose parameters train as the strategy says."""
    config = AutoConfig.for_model(**config)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        dtype = torch.bfloat16 if strategy.weights == 2 else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if strategy.trains == "lora":
            targets = ["c_attn", "c_proj", "c_fc"] if config.model_type == "gpt2" else "all-linear"
            get_peft_model(model, LoraConfig(r=RANK, target_modules=targets, fan_in_fan_out=targets != "all-linear"))
    if strategy.trains == "last blocks":
        model.requires_grad_(False)
        decoder = model.get_decoder() if config.model_type != "gpt2" else model.transformer
        blocks, norm = (decoder.h, decoder.ln_f) if config.model_type == "gpt2" else (decoder.layers, decoder.norm)
        for module in (*blocks[-BLOCKS:], norm):
            module.requires_grad_(True)
    sizes = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "vocab_size"), 8)
    tiny = AutoConfig.for_model(config.model_type, **sizes, num_hidden_layers=1, bos_token_id=0, eos_token_id=0)
    like = AutoModelForCausalLM.from_config(tiny)
    give_losses(like)  # a model without data cannot be tried out
    give_losses(model, like)
    return model


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return rows of two documents each."""
    positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)]).repeat(rows, 1)
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "shift_labels": ids, "position_ids": positions}


def counted(model: PreTrainedModel, strategy: Strategy, rows: int, length: int) -> dict[str, float]:
    """Return the kit's own estimate, by use."""
    args = TrainingArguments(
        output_dir="unused", use_cpu=True, bf16=True, gradient_checkpointing=strategy.checkpointing, report_to="none"
    )
    return estimate_memory(model, args, causal_lm, batch_of(rows, length))


def expected(shape: Shape, strategy: Strategy, rows: int, length: int) -> dict[str, float]:
    """Return what the formulas say under the names, and with the omissions, of the kit's estimate."""
    parts = training_memory(shape, strategy, rows, length)
    tokens = rows * length
    head = 2 * shape.head if not strategy.computes_in_bf16 else 0
    # Of casts, a checkpointed block keeps none: they stand in autocast's cache, which the estimate does not see.
    casts = head if strategy.checkpointing else parts["casts"]
    # The cosines and sines of positions, which all blocks share.
    rotary = (
        0
        if shape.family == "gpt2" or strategy.checkpointing
        else (4 if strategy.weights == 2 else 8) * shape.d * tokens
    )
    return {
        "weights": parts["weights"],
        "gradients": parts["gradients"],
        "optimizer (adamw_torch_fused)": parts["optimizer"],
        "activations": parts["activations"] + casts + rotary,
        "logits": parts["logits"],
    }


# ---- Processes that train


def train(strategy: Strategy, rows: int) -> int:
    """Train a step of one micro-batch and one of two; return the memory that this process took for it, in bytes."""
    torch.set_num_threads(1)
    _steps(SMALL | {"n_embd": 32}, strategy, 1)  # what libraries take once
    before = psutil.Process().memory_info().rss
    _steps(SMALL, strategy, rows)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _steps(config: dict[str, Any], strategy: Strategy, rows: int) -> None:
    model = build(config, strategy, "cpu").train()
    if strategy.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    args = TrainingArguments(output_dir="unused", use_cpu=True, bf16=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = causal_lm.loss_sum(model, batch_of(rows, LENGTH), args)
        loss.backward()
        if step != 1:  # accumulated
            optimizer.step()
            optimizer.zero_grad()


def shard(rank: int, world_size: int, meeting: str) -> dict[str, int]:
    """Train a step as accelerate shards with FSDP2 and return what this process holds, in bytes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    model = build(SMALL, STRATEGIES[0], "cpu")
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)}
    mesh = init_device_mesh("cpu", (world_size,))
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh, **policy)
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model.set_requires_gradient_sync(False)  # what accumulating does in every micro-batch but the last
    causal_lm.loss_sum(model, batch_of(1, 64), args).backward()
    parameters = [
        parameter
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params
    ]
    whole = sum(
        each.unsharded_accumulated_grad_data.nbytes
        if each.unsharded_accumulated_grad is not None
        else each._unsharded_param.grad.nbytes
        for each in parameters
    )
    model.set_requires_gradient_sync(True)
    causal_lm.loss_sum(model, batch_of(1, 64), args).backward()
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, DTensor)]
    held = sum(tensor.to_local().nbytes for tensor in tensors)
    dist.destroy_process_group()
    return {"gradients while accumulating": whole, "weights, gradients, optimizer": held}


def main() -> None:
    """Compare, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/scaling.json"))
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch that is trained on")
    parser.add_argument(
        "--models", nargs="*", default=["GPT-2", "GPT-2 XL", "Llama-3-8B", "Qwen3-14B"], choices=list(MODELS)
    )
    options = parser.parse_args()
    small, trained, counts = shape_of(SMALL), {}, {}
    processes = multiprocessing.get_context("fork")
    for strategy in ON_ONE:
        parts = training_memory(small, strategy, options.rows, LENGTH)
        with processes.Pool(1) as pool:
            measured = pool.apply(train, (strategy, options.rows))
        trained[strategy.name] = {"formula": sum(parts.values()), "measured": measured, **parts}
        share = sum(parts.values()) / measured
        print(f"{strategy.name}: {measured / GB:.2f} GB, of which the formula says {share:.0%}", flush=True)
    with tempfile.TemporaryDirectory() as folder, processes.Pool(2) as pool:
        sharded = pool.starmap(shard, [(rank, 2, f"{folder}/store") for rank in range(2)], chunksize=1)
    print(f"FSDP2 on two processes, {small.parameters:,} parameters: {sharded}", flush=True)
    for name in options.models:
        config = MODELS[name]
        counts[name] = {"parameters": build(config, STRATEGIES[0]).num_parameters()}
        for strategy in ON_ONE:
            theirs = counted(build(config, strategy), strategy, 1, LENGTH)
            ours = expected(shape_of(name), strategy, 1, LENGTH)
            counts[name][strategy.name] = {use: [ours[use], theirs[use]] for use in ours}
        worst = max(abs(a / b - 1) for of in counts[name].values() if isinstance(of, dict) for a, b in of.values())
        print(f"{name}: formula and count differ by up to {worst:.2%}", flush=True)
    options.corpus, options.base = None, "none"
    setting = {key: value for key, value in describe_setting(options).items() if key not in ("corpus", "base")}
    sharded = {"parameters": small.parameters, "processes": sharded}
    result = {"trained": trained, "sharded": sharded, "counted: formula, kit.training.memory": counts}
    write_result(options, {**setting, **result})


if __name__ == "__main__":
    main()
