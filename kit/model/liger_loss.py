"""Liger Kernel's cross-entropy of a head that is one matrix: taken on GPUs where it is faster than the kit's own."""

import math
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from kit.console import say

_REPEATS = 5
_DEVICE = "cuda"  # Triton's
_CAP, _CHOSEN = "_cap_of_plain_head", "_takes_liger"  # attributes of the model

Loss = Callable[[torch.Tensor], torch.Tensor]


def note_head(model: PreTrainedModel, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    """Note whether a model's logits are a matrix times the hidden states, capped at most, which is what Liger computes.

    Args:
        model: the model.
        hidden: some last hidden states (positions, width).
        logits: of them, as the model computes them (positions, vocabulary).
    """
    head, cap = model.get_output_embeddings(), getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    vars(model)[_CAP] = math.nan  # neither
    if type(head) is nn.Linear and hidden.dtype == head.weight.dtype:
        plain = F.linear(hidden, head.weight, head.bias)
        plain = plain if cap is None else torch.tanh(plain / cap) * cap
        if torch.allclose(plain, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max())):
            vars(model)[_CAP] = cap


def liger_loss(model: PreTrainedModel, targets: torch.Tensor, smoothing: float) -> Loss | None:
    """Return Liger's function from hidden states (positions, width) to the sum of the losses, where there can be one.

    An adapter or rows that train alone are no part of it: then there is none.
    """
    head, cap = model.get_output_embeddings(), vars(model).get(_CAP, math.nan)
    fits = type(head) is nn.Linear and not head._forward_hooks and (cap is None or not math.isnan(cap))
    if targets.device.type != _DEVICE or not fits or vars(model).get(_CHOSEN) is False or not find_spec("liger_kernel"):
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return liger_fused_linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, label_smoothing=smoothing, reduction="sum", softcap=cap
        )

    return loss


def faster(model: PreTrainedModel, own: Loss, ligers: Loss | None, hidden: torch.Tensor) -> Loss:
    """Return the faster of two ways to the same loss, measured on the first batch, with a word of the times."""
    if ligers is None:
        return own
    if _CHOSEN not in vars(model):
        mine, other = _measure(model, own, hidden), _measure(model, ligers, hidden)
        equal = math.isclose(mine[0], other[0], rel_tol=1e-2)
        vars(model)[_CHOSEN] = equal and other[1] < mine[1]
        found = f"{other[1] * 1e3:.1f} ms against {mine[1] * 1e3:.1f} ms of the kit's own"
        found += "" if equal else f", but it gives {other[0]:,.1f} nats for {mine[0]:,.1f}"
        say(f"loss: {'Liger Kernel' if vars(model)[_CHOSEN] else 'the kit'}'s ({found})")
    return ligers if vars(model)[_CHOSEN] else own


def _measure(model: PreTrainedModel, loss: Loss, hidden: torch.Tensor) -> tuple[float, float]:
    """Return the loss, and the seconds that it takes forward and backward: median, after a first time."""
    seconds = []
    for _ in range(_REPEATS + 1):
        given = hidden.detach().requires_grad_()
        torch.accelerator.synchronize()
        began = time.perf_counter()
        value = loss(given)
        wanted = [given, *(p for p in model.get_output_embeddings().parameters() if p.requires_grad)]
        torch.autograd.grad(value, wanted)
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return value.item(), statistics.median(seconds[1:])
