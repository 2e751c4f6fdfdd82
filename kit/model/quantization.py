"""A base model whose linear layers are held in 4 bits, beside which an adapter trains (QLoRA, arXiv:2305.14314)."""

import importlib.util
import math

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kit.errors import UserError


def check_quantization(load_in_4bit: bool, key: str = "model.load_in_4bit") -> None:
    """Check that this machine can hold a model in 4 bits.

    Raises:
        UserError: it has no CUDA device, or bitsandbytes is not installed.
    """
    if not load_in_4bit:
        return
    missing = [] if _has_device() else ["a CUDA device (there is none)"]
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes (not installed: pip install bitsandbytes)")
    if missing:
        raise UserError(f"{key}: 4-bit weights need {' and '.join(missing)}; without the key the adapter is plain LoRA")


def _has_device() -> bool:
    return torch.cuda.is_available()


def quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how weights are held in 4 bits: NF4, with the scales of the blocks quantised again, as in the paper.

    They are multiplied in the type that the model's other weights have: with another one bitsandbytes casts biases in
    place, which are frozen.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights for CPUs with AVX512-BF16 in the first evaluation.

    It rounds them further, in place, and computes with kernels that have no gradient: what is trained after an
    evaluation would be wrong. To be called before any forward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def copy_dequantized(quantized: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Give a plain model the weights that a quantised one computes with, in place.

    `dequantize` of transformers leaves linear layers in the place of GPT-2's Conv1D, which then load wrongly.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, module in quantized.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        ours, weight = plain.get_submodule(name), dequantize_4bit(module.weight.data, state)
        weight = weight.T if isinstance(ours, Conv1D) else weight
        ours.weight.copy_(weight.reshape(ours.weight.shape))


def number_of_values(parameter: nn.Parameter) -> int:
    """Return how many values a parameter has; of one in 4 bits two share a byte, and ZeRO-3 leaves an empty one."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else getattr(parameter, "ds_numel", parameter.numel())
