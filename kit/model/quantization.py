"""A base model in 4 bits, beside which an adapter trains (QLoRA, arXiv:2305.14314)."""

import importlib.util

import torch

from kit.errors import UserError


def check_quantization(load_in_4bit: bool, key: str = "model.load_in_4bit") -> None:
    """Check that this machine can hold a model in 4 bits, as QLoRA does.

    Raises:
        UserError: it has no CUDA device, or bitsandbytes is not installed.
    """
    if not load_in_4bit:
        return
    missing = [] if torch.cuda.is_available() else ["a CUDA device, which is not there"]
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes, which is not installed (pip install bitsandbytes)")
    if missing:
        raise UserError(f"{key}: 4-bit weights need {' and '.join(missing)}; without the key the adapter is plain LoRA")
