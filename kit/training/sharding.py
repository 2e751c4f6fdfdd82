"""Training with parameters in shards: FSDP2 and DeepSpeed's ZeRO; what of a recipe goes there, and what does not."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from kit.errors import UserError
from kit.recipe.models import Recipe
from kit.training.parameter_groups import check_takes_groups

_OPTIMIZER = "optimizer_{rank}.pt"


def sharding_of(values: Mapping[str, Any]) -> str | None:
    """Return what the launch file or the recipe shards parameters with: `FSDP`, `DeepSpeed` or None.

    Args:
        values: the recipe's `training`.
    """
    for name in ("FSDP", "DeepSpeed"):
        if values.get(name.lower()) or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            return name
    return None


def is_sharded(args: TrainingArguments) -> bool:
    """Return whether a run's parameters are in shards, or its optimizer's state is."""
    return sharding_of(vars(args)) is not None


def describe_sharding(args: TrainingArguments) -> str | None:
    """Return in which way a run's checkpoints are laid out: those of another way cannot be gone on with."""
    name = sharding_of(vars(args))
    return f"ZeRO-{args.deepspeed_plugin.zero_stage}" if name == "DeepSpeed" else name


def check_not_ignored(values: Mapping[str, Any]) -> None:
    """Check that a run on CPUs asks for no shards.

    Raises:
        UserError: it does.
    """
    if sharding_of(values):
        raise UserError("FSDP and DeepSpeed are ignored on CPUs: the run would be plain DDP; leave them out")


def check_sharding(recipe: Recipe, args: TrainingArguments) -> None:
    """Check that what a recipe asks for goes together with parameters in shards.

    Raises:
        UserError: it does not, or has not been tried.
    """
    name = sharding_of(vars(args))
    if name is None:
        return
    if "LOCAL_RANK" not in os.environ:
        raise UserError(f"{name} is ignored in a process that no launcher started: use `accelerate launch`")
    refused = {
        "model.load_in_4bit": (recipe.model.load_in_4bit, "weights in 4 bits cannot be cut into shards"),
        "training.optim": (_chooses_parameters(args), "this optimizer takes whole parameters, and its own choice"),
        "training.torch_compile": (args.torch_compile, "a compiled model has other names, which nobody has tried"),
        "training.save_only_model": (args.save_only_model, "Trainer refuses it there"),
    }
    if name == "DeepSpeed":
        refused |= _refused_by_deepspeed(recipe, args)
    else:
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        refused |= {
            "fsdp_version: 1": (plugin.fsdp_version == 1, "expected 2"),
            "fsdp_activation_checkpointing": (
                plugin.activation_checkpointing,
                "it renames modules; `training.gradient_checkpointing: true` in the recipe does the same",
            ),
            "fsdp_cpu_ram_efficient_loading": (
                plugin.cpu_ram_efficient_loading,
                "only one process would have the weights that tokens are added to and figures are taken of",
            ),
        }
    for key, (found, reason) in refused.items():
        if found:
            raise UserError(f"{key}: not with {name}: {reason}")


def _refused_by_deepspeed(recipe: Recipe, args: TrainingArguments) -> dict[str, tuple[bool, str]]:
    config = args.deepspeed_plugin.deepspeed_config
    of_zero = config["zero_optimization"]
    offloads = {(of_zero.get(f"offload_{what}") or {}).get("device") for what in ("optimizer", "param")}
    reason = "it would take the place of the recipe's; leave it out of DeepSpeed's configuration"
    return {
        "zero_stage": (of_zero["stage"] not in (2, 3), "expected 2 or 3"),
        "offload": (bool(offloads - {"none", None}), "it brings an optimizer of its own; `fsdp2_offload` does it"),
        "model.dtype": (recipe.model.dtype != "float32", "what trains is float32 there; expected float32, or FSDP2"),
        "training.fp16": (args.fp16, "it would hold the weights themselves in 16 bits; expected `bf16`"),
        **{section: (section in config, reason) for section in ("optimizer", "scheduler")},
    }


def _chooses_parameters(args: TrainingArguments) -> bool:
    try:
        check_takes_groups(*Trainer.get_optimizer_cls_and_kwargs(args))
    except UserError:
        return True
    return False


def prepare_sharding(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Mend how accelerate is about to shard a model.

    With DeepSpeed `bf16` would turn the weights into 16 bits, also those that are measured and saved; autocast leaves
    them as they are, as it does without shards. With FSDP2:

    - Of BERT's kind it shards the embeddings as a part of what they are in, and again by themselves, which fails; and
      it fails of models that name kinds of blocks which they do not have.
    - Where layers compute in 16 bits, it sums gradients in 16 bits too, and rounds what the model returns.
    """
    if accelerator.state.deepspeed_plugin:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if config.pop("bf16", {}).get("enabled"):
            # For the modules that it names DeepSpeed would also round what it sums and gathers.
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            config["torch_autocast"] = autocast
        load_whole()
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    embeddings = model.get_input_embeddings()
    around = {type(m).__name__ for m in model.modules() if m is not embeddings and embeddings in m.modules()}
    blocks = {type(m).__name__ for m in model.modules()} - around
    named = plugin.transformer_cls_names_to_wrap or model._no_split_modules or ()
    plugin.transformer_cls_names_to_wrap = [name for name in named if name in blocks]
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
        )


def load_whole() -> None:
    """Let models be loaded whole on each process; transformers would cut them up as it loads them where ZeRO-3 is used.

    Tokens are added to them before, figures taken, and adapters put in, and the first process alone loads what was
    saved. To be called after whatever announces ZeRO-3 to transformers: `TrainingArguments` and Trainer.
    """
    unset_hf_deepspeed_config()


def step_only_what_trains(zero: Any) -> None:
    """Let the optimizer of ZeRO pass over groups of which no parameter requires a gradient.

    A group is one flat tensor, with zeros for the gradients that there are not: weight decay, and the momentum of an
    earlier phase, would move what is frozen. So `make_groups` has a group for each set of phases.

    Args:
        zero: `optimizer` of DeepSpeed's engine, stage 2 or 3. It has no function for this: its lists of each group's
            parameters (`bit16_groups`, `fp16_groups`), the flat tensors (`single_partition_of_fp32_groups`,
            `fp32_partitioned_groups_flat`), and `_optimizer_step`, which steps one group.
    """
    stage_2 = hasattr(zero, "bit16_groups")
    groups = zero.bit16_groups if stage_2 else zero.fp16_groups
    flat = zero.single_partition_of_fp32_groups if stage_2 else zero.fp32_partitioned_groups_flat
    step = zero._optimizer_step

    def step_if_it_trains(number: int) -> None:
        if not any(parameter.requires_grad for parameter in groups[number]):
            flat[number].grad = None  # which torch's optimizers pass over
        step(number)

    zero._optimizer_step = step_if_it_trains


# ---- An optimizer whose state is in shards: each process saves its own


def save_optimizer(optimizer: torch.optim.Optimizer, folder: str | Path, rank: int) -> None:
    """Save what this process holds of an optimizer's state.

    accelerate gathers it on one process, which of a model of 70B parameters takes 560 GB, and gives a state to
    parameters that have had no step yet, such as those of a later phase.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)  # this may be the first process to get here
    torch.save(optimizer.state_dict(), Path(folder) / _OPTIMIZER.format(rank=rank))


def load_optimizer(optimizer: torch.optim.Optimizer, folder: str | Path, rank: int) -> None:
    """Load what `save_optimizer` saved on this process, which is one of as many as there were then."""
    state = torch.load(Path(folder) / _OPTIMIZER.format(rank=rank), weights_only=True)
    mesh = next(parameter for group in optimizer.param_groups for parameter in group["params"]).device_mesh

    def here(shard: DTensor) -> DTensor:  # on this run's processes, not on a description of the earlier run's
        return DTensor.from_local(
            shard.to_local(), mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
        )

    optimizer.load_state_dict(tree_map_only(DTensor, here, state))
