"""How many processes a run has, and whether everybody agrees on it."""

import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from kit.console import is_local_main_process, is_main_process
from kit.errors import UserError

T = TypeVar("T")
_LAUNCHER = re.compile(r"accelerate(\S*\s+|-|\.commands\.|/commands/)launch|torchrun|torch[./]distributed[./]run\b")


def launcher() -> psutil.Process | None:
    """Return the launcher that started this process, or None: a plain start, or a launcher that is gone."""
    try:
        parent = psutil.Process().parent()
        return parent if parent and _LAUNCHER.search(" ".join(parent.cmdline()[:6])) else None
    except psutil.Error:
        return None


def announced_processes() -> tuple[int, str]:
    """Return how many processes the launcher announced, and where that was read.

    torchrun and `accelerate launch` set WORLD_SIZE. Where accelerate starts a single process although its command or
    configuration file asks for more (`--cpu --num_processes 2`, `distributed_type: MULTI_CPU`), only the launcher's
    command line, that of the parent process, still tells.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "WORLD_SIZE"
    parent = launcher()
    if parent is None:
        return 1, "a plain start"
    command = parent.cmdline()
    if (number := _option(command, "--num_processes")) is not None:
        return int(number), "--num_processes of accelerate launch"
    if (path := _option(command, "--config_file")) is not None:
        return _processes_of(path)
    return _processes_of(default_config_file) if Path(default_config_file).is_file() else (1, "accelerate launch")


def _processes_of(path: str) -> tuple[int, str]:
    with open(path, encoding="utf-8") as file:
        return int((yaml.safe_load(file) or {}).get("num_processes", 1)), path


def _option(command: list[str], name: str) -> str | None:
    for word, following in zip(command, [*command[1:], None], strict=True):
        given, equals, value = word.partition("=")
        if given.replace("-", "_") == name.replace("-", "_"):  # accelerate takes `--num-processes` too
            return value if equals else following
    return None


def check_topology(args: TrainingArguments) -> None:
    """Refuse a run whose processes do not know of each other, or whose single process would drive several GPUs.

    Raises:
        UserError: the number of processes announced differs from accelerate's.
    """
    announced, where = announced_processes()
    if announced != args.world_size:
        raise UserError(
            f"{where} announces {announced} processes, accelerate has {args.world_size}: each would train alone. "
            f"On CPUs launch with `make train LAUNCH=cpu_2proc`, or a file of `distributed_type: MULTI_GPU`"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs, which Trainer would drive with torch.nn.DataParallel; launch one "
            f"process per GPU (`accelerate launch`), or choose one with CUDA_VISIBLE_DEVICES"
        )


def describe(args: TrainingArguments) -> dict[str, object]:
    """Return devices and processes as they stand in the manifest; called on all processes."""
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    places = [(platform.node(), device)]
    if dist.is_initialized():
        places = [("", "")] * args.world_size
        dist.all_gather_object(places, (platform.node(), device))
    parent = launcher()
    return {
        "processes": args.world_size,
        "machines": len({machine for machine, _ in places}),
        "devices": dict(Counter(name for _, name in places)),
        "launcher": parent and ("accelerate" if "accelerate" in " ".join(parent.cmdline()[:6]) else "torchrun"),
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "global_batch_size": args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "device": device,
        "threads_per_process": torch.get_num_threads(),
        "distributed_type": args.distributed_state.distributed_type.value,
    }


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_main_process(make: Callable[[], T]) -> T:
    """Call `make` on the main process and return, on every process, what it returned there.

    Raises:
        UserError: `make` raised one; every process raises it, so that none is left waiting.
    """
    if not dist.is_initialized():
        return make()
    value, error = _attempt(make) if is_main_process() else (None, None)
    value, error = broadcast_object_list([value, error])
    return _or_raise(value, error)


def local_main_process_first(make: Callable[[], T]) -> T:
    """Call `make` on the first process of each machine, then on the others, and return what it returned on each.

    Preparing a corpus may take hours, so the others wait in a group of their own: the default group would give up after
    `ddp_timeout`.

    Raises:
        UserError: `make` raised one on a first process; every process raises it.
    """
    if not dist.is_initialized():
        return make()
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    value, error = _attempt(make) if is_local_main_process() else (None, None)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=patient)
    _or_raise(None, next(filter(None, errors), None))
    return value if is_local_main_process() else make()


def _attempt(make: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return make(), None
    except UserError as error:
        return None, str(error)


def _or_raise(value: T, error: str | None) -> T:
    if error is not None:
        raise UserError(error)
    return value


def check_agreement(what: str, *values: str) -> None:
    """Check that all processes have come to the same `values`.

    Raises:
        UserError: they have not: a file or a branch changed between one process and the next, or machines differ.
    """
    if not dist.is_initialized():
        return
    of_all: list[tuple[str, ...] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, values)
    differing = [rank for rank, value in enumerate(of_all) if value != of_all[0]]
    if differing:
        raise UserError(
            f"the processes do not have {what}: process {differing[0]} has another than process 0; did a file or a "
            f"branch change in between, or do the machines hold different files? Start again once they are at rest"
        )


def any_process(flag: bool, device: torch.device) -> bool:
    """Return, on every process, whether `flag` is set on at least one."""
    [found] = on_any_process([flag], device)
    return found


def on_any_process(flags: Sequence[bool | torch.Tensor], device: torch.device) -> list[bool]:
    """Return, on every process, which of `flags` are set on at least one; one exchange and one wait for the device."""
    values = torch.stack([torch.as_tensor(flag, device=device).int() for flag in flags])
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, on every process."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
