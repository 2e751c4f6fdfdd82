"""GELU in one kernel where transformers spells it out in seven.

`gelu_new` of GPT-2, GPT-J, GPT-Neo and Phi is the tanh approximation of GELU as a formula of single operations, each of
which reads and writes what a layer computes, and keeps float32 copies for the backward pass: five times the memory of
the layer's input in a bfloat16 run. `torch.nn.functional.gelu(approximate="tanh")` is the same function.
"""

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation


class _Fused:
    """Computes a step of training in one kernel; all else, as what is measured, bit for bit as transformers does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            return F.gelu(input, approximate="tanh")
        return super().forward(input)


class _FusedNewGELU(_Fused, NewGELUActivation):
    pass


class _FusedFastGELU(_Fused, FastGELUActivation):
    pass


_FUSED = {NewGELUActivation: _FusedNewGELU, FastGELUActivation: _FusedFastGELU}


def fuse_activations(model: PreTrainedModel) -> None:
    """Let a model's steps of training go through the fused kernel, in place; what is saved of it stays the same."""
    for module in model.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
