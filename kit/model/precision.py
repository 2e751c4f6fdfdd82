"""In which precision matrices are multiplied, where a recipe leaves that open."""

import platform

import torch


def has_accelerator() -> bool:
    """Tell whether there is any device but the CPU."""
    return torch.accelerator.is_available()


def supports_bf16(use_cpu: bool = False) -> tuple[bool, str]:
    """Tell whether the hardware (or its CPU alone) multiplies bfloat16 matrices well, and by what that was recognised.

    fp16 is never chosen: CPUs multiply it a hundred times slower than fp32, and GPUs that have it well have bf16 too.
    """
    if torch.cuda.is_available() and not use_cpu:
        good = torch.cuda.is_bf16_supported(including_emulation=False)
        return good, f"{torch.cuda.get_device_name()} {'has' if good else 'lacks'} bf16 matrix units"
    if has_accelerator() and not use_cpu:
        return False, f"bf16 is not known to be fast on {torch.accelerator.current_accelerator()}"
    capabilities = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() in ("aarch64", "arm64"):
        # What torch itself asks before it passes a bf16 product on to oneDNN; without oneDNN (macOS) it is slow.
        good = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return good, f"the CPU {'has' if good else 'or this build of torch lacks'} Arm's BF16 matrix products"
    for check, unit in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512_BF16")):
        if getattr(torch.cpu, check, lambda: False)():
            return True, f"the CPU has {unit}"
    return False, f"the CPU ({capabilities}) has neither AMX nor AVX512_BF16"
