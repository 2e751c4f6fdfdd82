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
_SAME = 0.03  # of 16 bits' rounding
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
        if torch.allclose(
            plain, logits, rtol=1e-4, atol=max(1e-5, 4 * torch.finfo(logits.dtype).eps) * logits.abs().max().item()
        ):
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
    """Return the faster of two ways to the same loss and gradient, measured on the first batch and told.

    So on GPUs, for which no run is claimed to repeat another bit by bit, a run and its resumption may go two ways.
    """
    if ligers is None:
        return own
    if _CHOSEN not in vars(model):
        (mine, of_mine, seconds), (other, of_other, of_liger) = (
            _measure(model, each, hidden) for each in (own, ligers)
        )
        equal = math.isclose(mine, other, rel_tol=_SAME) and (of_mine - of_other).norm() <= _SAME * of_mine.norm()
        vars(model)[_CHOSEN] = bool(equal) and of_liger < seconds
        found = f"{of_liger * 1e3:.1f} ms against {seconds * 1e3:.1f} ms of the kit's own"
        found += "" if equal else f", but it gives {other:,.1f} nats for {mine:,.1f}, or another gradient"
        say(f"loss: {'Liger Kernel' if vars(model)[_CHOSEN] else 'the kit'}'s ({found})")
    return ligers if vars(model)[_CHOSEN] else own


def _measure(model: PreTrainedModel, loss: Loss, hidden: torch.Tensor) -> tuple[float, torch.Tensor, float]:
    """Return the loss, its gradient in the hidden states, and the seconds of both: median, after a first time."""
    seconds = []
    for _ in range(_REPEATS + 1):
        given = hidden.detach().requires_grad_()
        torch.accelerator.synchronize()
        began = time.perf_counter()
        value = loss(given)
        wanted = [given, *(p for p in model.get_output_embeddings().parameters() if p.requires_grad)]
        gradient = torch.autograd.grad(value, wanted)[0]
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return value.item(), gradient.float(), statistics.median(seconds[1:])
