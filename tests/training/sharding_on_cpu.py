"""What makes accelerate shard parameters on CPUs, where it would ignore FSDP; for tests alone."""

import os

FSDP2 = {  # what `accelerate launch` sets of accelerate_configs/fsdp2.yaml
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def fsdp2_on_cpu():
    """Let accelerate believe that two gloo processes are what it shards over."""
    os.environ.update(FSDP2)
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from kit.training import arguments

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
    arguments.check_not_ignored = lambda on_cpu: None
