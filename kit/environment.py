"""`kit env`: what a run would find on this machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from kit.console import table
from kit.model.precision import has_accelerator, supports_bf16
from kit.training.run_directory import PACKAGES


def print_environment() -> None:
    """Print versions, devices and threads; no variables' values, no paths, no names."""
    rows = [["python", platform.python_version()], ["platform", platform.platform()]]
    rows += [[package, _version(package)] for package in ("domain-adaptation-kit", *PACKAGES)]
    rows += [["CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}"]]
    rows += [["CPU", torch.backends.cpu.get_cpu_capability()]]
    accelerator = torch.accelerator.current_accelerator() if has_accelerator() else None
    rows += [["accelerators", f"{torch.accelerator.device_count()} × {accelerator}" if accelerator else "none"]]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append([f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"])
    good, reason = supports_bf16()
    rows.append(["precision `auto`", f"{'bf16' if good else 'fp32'}: {reason}"])
    table("Environment", ["what", "found"], rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
