"""Names of `TrainingArguments` that a recipe cannot give: those the kit decides itself, and those of the past.

Verified against transformers 4.40 to 5.23 (dataclass fields and MIGRATION_GUIDE_V5.md).
"""

_OWN_EVALUATION = "the kit's own exact evaluation replaces the Trainer's loop; remove it, see `evaluation`"
_FOR_SCRIPTS = "it is for scripts that choose what to do; `kit train` trains, and evaluates as `eval_strategy` says"
_NO_HUB = "pushing to the Hub is not part of the kit; use `hf upload` on the run's `model` folder"
_BLOCKS = (
    "the kit shuffles its rows itself, anew each epoch; remove it, and see `data.packing`, and of a classifier "
    "`data.group_by_length`"
)

REFUSED = {
    "output_dir": "the run directory has its own key; write `run.output_dir`",
    "run_name": "the name of a run is the stem of its recipe file; rename the file",
    "resume_from_checkpoint": "write `run.resume`: `auto`, `must`, `never` or the path of a checkpoint",
    "hub_token": "a recipe holds no secrets; set HF_TOKEN in the environment",
    "do_train": _FOR_SCRIPTS,
    "do_eval": _FOR_SCRIPTS,
    "do_predict": _FOR_SCRIPTS,
    "remove_unused_columns": "the kit builds its batches itself, without columns to remove; remove it",
    "label_names": "the kit's batches always hold their labels in `labels`; remove it",
    "enable_jit_checkpoint": "the kit itself saves a checkpoint on SIGTERM; remove it",
    "save_only_model": "such a checkpoint cannot be resumed; remove it, and limit disk use with `save_total_limit`",
    "auto_find_batch_size": (
        "processes would not agree on a size, and it changes the run unasked; set `per_device_train_batch_size` "
        "and `gradient_accumulation_steps`"
    ),
    "logging_nan_inf_filter": "it would hide a loss that is not a number, which the kit always reports; remove it",
    "ignore_data_skip": "a resumed run would train on the same data again; remove it",
    "local_rank": "the launcher sets it; start with `accelerate launch` or torchrun",
    "dataloader_drop_last": "it would drop tokens; remove it, the kit trains on the last batch too",
    "use_cache": "packed documents would leak into each other; the kit keeps the cache off in training",
    "average_tokens_across_devices": "when false the loss is wrong with several processes; the kit keeps it on",
    "train_sampling_strategy": _BLOCKS,
    "length_column_name": _BLOCKS,
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "eval_accumulation_steps",
            "batch_eval_metrics",
            "include_for_metrics",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "bf16_full_eval",
            "fp16_full_eval",
        ),
        _OWN_EVALUATION,
    ),
    "disable_tqdm": "the kit shows progress on a terminal, and plain lines elsewhere; remove it",
    "push_to_hub": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_always_push": _NO_HUB,
    "hub_revision": _NO_HUB,
    "restore_callback_states_from_checkpoint": "the kit restores its callbacks itself on `run.resume`; remove it",
    "project": "it is for trackio only; for Weights & Biases write `tracking.wandb.project`",
    "trackio_space_id": "publishing with trackio is not part of the kit; remove it",
    "trackio_bucket_id": "publishing with trackio is not part of the kit; remove it",
    "trackio_static_space_id": "publishing with trackio is not part of the kit; remove it",
    "eval_on_start": "the scorecard's `before` is measured before every run; remove it",
    "accelerator_config": "the kit shares its batches out to the processes itself; remove it",
    "parallelism_config": "it is an object, which YAML cannot hold; give an accelerate configuration to the launcher",
}
"""Names that the kit does not take, with the reason and what to do instead."""

REMOVED = {
    "warmup_ratio": "write `warmup_steps`, which below 1 is a share of the training steps",
    "evaluation_strategy": "write `eval_strategy`",
    "evaluate_during_training": "write `eval_strategy: steps`",
    "overwrite_output_dir": "write `run.resume: never`, which moves an earlier run aside",
    "per_gpu_train_batch_size": "write `per_device_train_batch_size`",
    "per_gpu_eval_batch_size": "write `per_device_eval_batch_size`",
    "group_by_length": f"its successor is `train_sampling_strategy`, but {_BLOCKS}",
    "no_cuda": "write `use_cpu`",
    "use_mps_device": "MPS is used where it is found; remove it, or write `use_cpu: true`",
    "xpu_backend": "write `ddp_backend`",
    "use_ipex": "Intel's extension is no longer supported; remove it",
    "jit_mode_eval": "write `torch_compile`",
    "torchdynamo": "write `torch_compile_backend`",
    "fp16_opt_level": "Apex is no longer supported; write `fp16: true` or `bf16: true`",
    "fp16_backend": "mixed precision is always torch's own; remove it",
    "half_precision_backend": "mixed precision is always torch's own; remove it",
    "adafactor": "write `optim: adafactor`",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "save_safetensors": "weights are always saved as safetensors; remove it",
    "include_tokens_per_second": "write `include_num_input_tokens_seen`",
    "include_inputs_for_metrics": _OWN_EVALUATION,
    "use_legacy_prediction_loop": _OWN_EVALUATION,
    "past_index": "models that need it are no longer supported; remove it",
    "fsdp_min_num_params": "write `fsdp_config: {min_num_params: …}`",
    "fsdp_transformer_layer_cls_to_wrap": "write `fsdp_config: {transformer_layer_cls_to_wrap: […]}`",
    "sharded_ddp": "fairscale is no longer supported; write `fsdp`",
    "dispatch_batches": "the kit shares its batches out to the processes itself; remove it",
    "split_batches": "the kit shares its batches out to the processes itself; remove it",
    "tpu_num_cores": "set TPU_NUM_CORES in the environment",
    "tpu_metrics_debug": "write `debug: tpu_metrics_debug`",
    "ray_scope": "set RAY_SCOPE in the environment",
    "mp_parameters": "SageMaker's model parallelism is no longer supported; remove it",
    "n_gpu": "the launcher decides on the number of processes; remove it",
    "_n_gpu": "the launcher decides on the number of processes; remove it",
    "push_to_hub_token": "a recipe holds no secrets; set HF_TOKEN in the environment",
    "push_to_hub_model_id": _NO_HUB,
    "push_to_hub_organization": _NO_HUB,
    "tokenizer": "it belongs to the model; write `model.tokenizer`",
    "processing_class": "it belongs to the model; write `model.tokenizer`",
}
"""Names that earlier versions of transformers had, with their successors."""

ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Newer to older name of one setting: a recipe may give either, whichever is installed."""
