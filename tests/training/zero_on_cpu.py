"""What makes accelerate take DeepSpeed on CPUs, where it would ignore it; for tests alone."""

import os

ZERO = {  # what `accelerate launch` sets of accelerate_configs/zero2.yaml and zero3.yaml
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}


def zero2_on_cpu():
    """Let accelerate shard gradients and optimizer over gloo processes."""
    _enable(2)


def zero3_on_cpu():
    """Let accelerate shard parameters too."""
    _enable(3)


def _enable(stage):
    os.environ.update(ZERO, ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage), DS_ACCELERATOR="cpu")
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = str(stage == 3).lower()
    import deepspeed
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    from kit.training import arguments

    start_processes, start, configure = PartialState.__init__, AcceleratorState.__init__, DeepSpeedPlugin.__post_init__

    def with_gloo(self, cpu=False, **kwargs):
        is_first = not self._shared_state
        kwargs.pop("_from_accelerator", None)
        start_processes(self, True, **kwargs)
        if is_first:
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
            self.distributed_type = DistributedType.DEEPSPEED

    def with_deepspeed(self, mixed_precision=None, cpu=False, *args, **kwargs):
        start(self, mixed_precision, False, *args, **kwargs)  # of `cpu` it would take DDP

    def with_small_shards(self):
        configure(self)
        if stage == 3:  # whatever has fewer than 100,000 values stays whole otherwise: a tiny model's every tensor
            self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    PartialState.__init__, AcceleratorState.__init__ = with_gloo, with_deepspeed
    DeepSpeedPlugin.__post_init__ = with_small_shards
    arguments.check_not_ignored = lambda values: None
