"""Which attention kernel packed rows train with: on GPUs one that needs no mask of T × T to keep documents apart.

Whatever is measured, sampled, saved or loaded again goes through the kernel that the model was loaded with, as a rule
SDPA: a hook puts another in place for packed calls alone. Without a GPU there is nothing to choose: SDPA, which needs a
mask only for batches in which a row holds several pieces (transformers sees that from `position_ids`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

from kit.console import say, warn
from kit.errors import UserError
from kit.model.isolation import check_isolation

# The fastest first.
_FLASH = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
_FLEX = "flex_attention"
_KERNELS = "_attention_kernels"  # attribute: what packed calls of a model go through, and what all others do
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_LEAST_HEAD_SIZE = 16  # of torch's FlexAttention on CUDA
# Of the logits' norm: bf16 alone makes less than a tenth of it, a mask or scale gone wrong far more.
_TOLERANCE = 0.1


@dataclass(frozen=True)
class Circumstances:
    """What decides whether a kernel can be used.

    Attributes:
        architecture: name of the model's class.
        device: type of the device.
        half: whether training computes in bf16 or fp16.
        installed: kernels that torch or an installed package has.
        supported: kernels that transformers has for the architecture.
        dropout: of attention probabilities.
        head_size: channels of a head.
    """

    architecture: str
    device: str = "cuda"
    half: bool = True
    installed: frozenset[str] = field(default_factory=lambda: frozenset({*_FLASH, _FLEX}))
    supported: frozenset[str] = field(default_factory=lambda: frozenset({*_FLASH, _FLEX}))
    dropout: float = 0.0
    head_size: int = 64


def why_not(kernel: str, given: Circumstances) -> str | None:
    """Return why a kernel cannot train packed rows, in words; None where nothing speaks against it."""
    flash = kernel in _FLASH
    if given.device != "cuda":
        return f"needs a CUDA device, and this is `{given.device}`"
    if kernel not in given.installed:
        return "is not installed"
    if kernel not in given.supported:
        return f"transformers has it not for {given.architecture}"
    if flash and not given.half:
        return "computes in bf16 or fp16 alone, and this run trains in fp32"
    if given.dropout and kernel != "flash_attention_2":
        return f"has no attention dropout, and this model has {given.dropout:g}"
    if kernel == _FLEX and given.head_size < _LEAST_HEAD_SIZE:
        return f"needs heads of at least {_LEAST_HEAD_SIZE} channels, and these have {given.head_size}"
    return None


def rank_kernels(wanted: str | None, given: Circumstances) -> tuple[list[str], dict[str, str]]:
    """Return the kernels to try in their order, and why each of the others is out.

    Args:
        wanted: what the recipe names; None leaves it open.
        given: the circumstances.

    Raises:
        UserError: the recipe names one that cannot be used.
    """
    if wanted in ("eager", "sdpa") or (wanted is None and given.device != "cuda"):
        return [], {}
    refused = {kernel: reason for kernel in (*_FLASH, _FLEX) if (reason := why_not(kernel, given))}
    if wanted is None:
        return [kernel for kernel in (*_FLASH, _FLEX) if kernel not in refused], refused
    if wanted in refused:
        raise UserError(f"model.attn_implementation: {wanted} {refused[wanted]}; leave the key out")
    return [wanted], {}


def circumstances(model: PreTrainedModel, args: TrainingArguments) -> Circumstances:
    """Return what is the case for a model that trains with some arguments."""
    config = model.config.get_text_config()
    installed = {kernel for kernel, available in _FLASH.items() if available()}
    supported = set(_FLASH) if model._supports_flash_attn else set()
    heads, width, size = (getattr(config, n, None) for n in ("num_attention_heads", "hidden_size", "head_dim"))
    if not size:  # where the configuration does not tell, the trial will
        size = width // heads if isinstance(heads, int) and isinstance(width, int) else _LEAST_HEAD_SIZE
    dropouts = [getattr(config, name, None) for name in _DROPOUTS]
    return Circumstances(
        architecture=type(model).__name__,
        device=args.device.type,
        half=args.bf16 or args.fp16 or model.dtype in (torch.bfloat16, torch.float16),
        installed=frozenset(installed | ({_FLEX} if is_torch_flex_attn_available() else set())),
        supported=frozenset(supported | ({_FLEX} if model._supports_flex_attn else set())),
        dropout=max([0.0, *(dropout for dropout in dropouts if isinstance(dropout, float))]),
        head_size=size,
    )


def settle_attention(model: PreTrainedModel, wanted: str | None, args: TrainingArguments, vocab_size: int) -> None:
    """Choose the kernel that packed rows train with, try it out, put it in place and say which it is and why.

    Args:
        model: loaded with the kernel for all else; a hook is put on it.
        wanted: `model.attn_implementation`.
        args: of the run.
        vocab_size: ids that the trial may draw from.

    Raises:
        UserError: the recipe names a kernel that cannot be used, lets documents see each other or computes otherwise.
    """
    kernels, refused = rank_kernels(wanted, circumstances(model, args))
    if kernels and model.device.type != args.device.type:
        # In shards: it never is whole on a device before training.
        if wanted:
            warn(f"attention: {wanted}, untried, since the model is not whole on a device: watch that the loss falls")
            return use_kernel(model, wanted)
        refused |= dict.fromkeys(kernels, "cannot be tried out where a model is not on one device")
        kernels = []
    otherwise = model.config._attn_implementation
    for kernel in kernels:
        reason = _try(model, kernel, args, vocab_size)
        if reason is None:
            return say(f"attention: {kernel} for packed rows, without a mask; {otherwise} for all else")
        if wanted:
            raise UserError(f"model.attn_implementation: {wanted} {reason}; leave the key out")
        refused[kernel] = reason
    if refused:
        reasons = "; ".join(f"{kernel} {reason}" for kernel, reason in refused.items())
        say(f"attention: {otherwise}, with a mask where a row holds several pieces: {reasons}")


def use_kernel(model: PreTrainedModel, kernel: str) -> None:
    """Let packed calls of a model go through a kernel, and all others through the one that it was loaded with."""
    if _KERNELS not in vars(model):
        model.register_forward_pre_hook(_choose, with_kwargs=True)
    setattr(model, _KERNELS, (kernel, loaded_kernel(model)))


def packed_kernel(model: PreTrainedModel) -> str:
    """Return the name of the kernel that packed calls of a model go through."""
    return vars(model).get(_KERNELS, (model.config._attn_implementation,))[0]


def loaded_kernel(model: PreTrainedModel) -> str:
    """Return the name of the kernel that all other calls go through."""
    return vars(model).get(_KERNELS, (model.config._attn_implementation,))[-1]


def document_borders(position_ids: torch.Tensor) -> dict[str, Any]:
    """Return what flash-attention's kernels for rows of several documents have to know.

    transformers itself works it out only for batches of one row, and lets documents of larger ones see each other.

    Args:
        position_ids: int64 (rows, positions), restarting with each piece of a document.

    Returns:
        `cu_seq_lens_q`, `cu_seq_lens_k`: int32 (pieces + 1,), where each piece begins in the rows one after another;
        `max_length_q`, `max_length_k`: positions of the longest piece.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    borders = nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=position_ids.numel()).int()
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def _choose(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the kernel of a call in place, before it."""
    position_ids = kwargs.get("position_ids")
    # The conditions under which transformers tells packed documents apart.
    packed = position_ids is not None and kwargs.get("attention_mask") is None and kwargs.get("use_cache") is False
    kernel = packed_kernel(model) if packed else loaded_kernel(model)
    # Stays until the next call: what activation checkpointing computes again in the backward pass needs it too.
    if model.config._attn_implementation != kernel:
        model.config._attn_implementation = kernel
    return args, {**kwargs, **(document_borders(position_ids) if packed and kernel in _FLASH else {})}


def _try(model: PreTrainedModel, kernel: str, args: TrainingArguments, vocab_size: int) -> str | None:
    """Put a kernel in place if it isolates packed documents and agrees with the present one; else say why not."""
    before, reason = loaded_kernel(model), None
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
        try:
            expected = check_isolation(model, vocab_size)
            use_kernel(model, kernel)
            difference = (check_isolation(model, vocab_size) - expected).norm() / expected.norm()
            if difference > _TOLERANCE:
                reason = f"gives other logits here than {before}, by {difference.item():.0%}"
        except UserError as error:
            reason = f"cannot be used here: {error}"
        except Exception as error:  # each kernel fails in its own way on what it was not built for
            reason = f"fails here: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
    if reason:
        use_kernel(model, before)
    model.config._attn_implementation = before
    return reason
