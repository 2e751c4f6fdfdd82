"""The cross-entropy of a causal LM in chunks of positions: the logits of a whole batch never exist.

The logits of GPT-2 for four rows of 1,024 tokens take 0.8 GB in float32, and their gradient as much again. Here a chunk
of the last hidden states goes through the model's head, and its loss and gradient are worked out at once, before the
next chunk takes its room (the way of Liger Kernel, Hsu et al. 2024). It lives in the model's `forward`, so that what
wraps the model (DDP, autocast) does its part; and a chunk goes through the model's own `forward`, in which it
stands for what the base model would return, so that adapters, frozen or tied matrices, rows that train alone, biases
and what an architecture does to its logits (soft-capping, scaling) are all in it.
"""

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kit.console import say
from kit.model.liger_loss import faster, liger_loss, note_head

_IGNORED = -100  # of torch's cross-entropy
_CHUNK_BYTES = 2**26  # of a chunk's logits in float32: 333 positions of GPT-2's vocabulary
_BASE = "_losses_from"  # attribute: the module whose output the head takes


@dataclass
class TokenLosses(ModelOutput):
    """What `forward` returns when it is given `shift_labels`.

    Attributes:
        loss: sum of -ln p over the label positions, in nats: scalar, with gradient where one is asked for.
        nats: -ln p of each position, 0 where there is no label: (rows, positions); without gradient alone.
        correct: whether the most probable token is the label: bool (rows, positions); without gradient alone.
    """

    loss: torch.Tensor | None = None
    nats: torch.Tensor | None = None
    correct: torch.Tensor | None = None


def give_losses(model: PreTrainedModel, like: PreTrainedModel | None = None) -> None:
    """Let a causal LM's `forward` take `shift_labels` and return `TokenLosses`, computed in chunks.

    Args:
        model: the model; its `forward` is patched, on the instance. Without `shift_labels` it does what it did.
        like: a model of the same architecture that was given them; where None, the model itself is tried out on a few
            tokens, and where its head cannot be told from the rest, whole logits are computed, with a word of why.
    """
    model.__dict__[_BASE] = _find_base(model) if like is None else like.__dict__[_BASE]

    @functools.wraps(type(model).forward)  # keeps the signature that Trainer looks at
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    model.forward = MethodType(forward, model)  # bound: copies of the model take it with them


def gives_losses(model: nn.Module) -> bool:
    """Return whether a model takes `shift_labels`."""
    return _BASE in vars(model)


def count_logits_at_once(model: PreTrainedModel, positions: int) -> int:
    """Return how many logits of a micro-batch of so many positions exist at a time."""
    vocab_size = model.config.get_text_config().vocab_size
    return vocab_size * (min(positions, _positions(vocab_size)) if vars(model).get(_BASE) else positions)


def compute_whole_logits(model: PreTrainedModel) -> None:
    """Let a model compute whole logits for the losses that it gives, if it gives any.

    As where its parameters are in shards: the head's matrix may be there only while the head is called, and processes
    whose batches have other lengths would gather it for other numbers of chunks.
    """
    if gives_losses(model):
        model.__dict__[_BASE] = None


def _forward(
    self: PreTrainedModel,
    *args: Any,
    shift_labels: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> Any:
    if shift_labels is None:
        return type(self).forward(self, *args, **kwargs)
    if self.__dict__[_BASE] is None:
        logits = type(self).forward(self, *args, **kwargs).logits
        return _losses(self, lambda part: part, logits, shift_labels, label_smoothing, shift_labels.numel())
    outputs = self.get_submodule(self.__dict__[_BASE])(*args, **kwargs)
    hidden = outputs.last_hidden_state
    head = functools.partial(_logits, self, type(outputs))
    most = _positions(self.config.get_text_config().vocab_size)
    return _losses(self, head, hidden, shift_labels, label_smoothing, most)


def _positions(vocab_size: int) -> int:
    """Return how many positions a chunk has at most."""
    return max(1, _CHUNK_BYTES // (4 * vocab_size))


class _Given(nn.Module):
    """Stands for a base model that has returned its output already."""

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.output


def _logits(model: PreTrainedModel, output_class: type[ModelOutput], hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits of last hidden states (positions, width) as the model's own `forward` computes them."""
    path, _, name = model.__dict__[_BASE].rpartition(".")
    modules = model.get_submodule(path)._modules
    base = modules[name]
    modules[name] = _Given(output_class(last_hidden_state=hidden[None]))
    try:
        return type(model).forward(model, use_cache=False).logits[0]
    finally:
        modules[name] = base


# Its loop and its own backward pass are beyond what torch.compile can trace; the base model is compiled without it.
@torch.compiler.disable
def _losses(
    model: PreTrainedModel, head: Any, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float, most: int
) -> TokenLosses:
    """Return the losses of hidden states (rows, positions, width), at most so many positions at a time."""
    shape, hidden, targets = targets.shape, hidden.flatten(0, 1), targets.flatten().to(hidden.device)
    size = -(-len(targets) // -(-len(targets) // most))  # chunks of one size
    if not torch.is_grad_enabled():
        parts = [_score(head(h), t, smoothing) for h, t in zip(hidden.split(size), targets.split(size), strict=True)]
        nats, correct = (torch.cat(part).view(shape) for part in zip(*parts, strict=True))
        return TokenLosses(nats.sum(), nats, correct)
    # With float16's loss scale the gradient has to be scaled before it is rounded, which is known in the backward pass.
    later = torch.is_autocast_enabled(hidden.device.type) and torch.get_autocast_dtype(hidden.device.type) is torch.half

    def own(hidden: torch.Tensor) -> torch.Tensor:
        parameters = _parameters(head(hidden[:1].detach()))
        return _ChunkedLoss.apply(head, targets, smoothing, size, later, hidden, *parameters)

    ligers = None if later or model.__dict__[_BASE] is None else liger_loss(model, targets, smoothing)
    return TokenLosses(faster(model, own, ligers, hidden)(hidden))


def _parameters(tensor: torch.Tensor) -> dict[nn.Parameter, list[nn.Parameter | GradientEdge]]:
    """Return the parameters that a gradient of a tensor goes to, and with respect to what it is to be asked for.

    Of a matrix that autocast has cast that is the cast one: its gradient takes half the memory, and is summed in the
    parameter's precision all the same.
    """
    seen, nodes, casts, owners = set(), [tensor.grad_fn], {}, {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if hasattr(following, "variable"):
                owners.setdefault(following.variable, []).append(node)
            nodes.append(following)
    for parameter, users in owners.items():
        cast = all(node.name().startswith("ToCopyBackward") for node in users)
        casts[parameter] = [GradientEdge(node, 0) for node in users] if cast else [parameter]
    return casts


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the losses of hidden states (positions, width), whose gradient is formed on the way."""

    @staticmethod
    def forward(
        ctx: Any, head: Any, targets: torch.Tensor, smoothing: float, size: int, later: bool, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.chunks = functools.partial(_chunks, head, targets, smoothing, size, inputs, ctx.needs_input_grad[5:])
        loss, gradients = ctx.chunks(None if later else 1.0)
        ctx.autocast = torch.get_autocast_dtype(targets.device.type) if later else None
        ctx.gradients = None if later else gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            with torch.autocast(scale.device.type, ctx.autocast):
                _, gradients = ctx.chunks(scale)
        else:
            gradients = [g if g is None else g.mul_(scale) for g in ctx.gradients]
        del ctx.gradients, ctx.chunks  # what was scaled in place is not there for a second time
        return (None, None, None, None, None, *gradients)


def _chunks(
    head: Any,
    targets: torch.Tensor,
    smoothing: float,
    size: int,
    inputs: tuple[torch.Tensor, ...],
    wanted: tuple[bool, ...],
    scale: torch.Tensor | float | None,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the sum of the losses, and its gradient with respect to the inputs, times `scale` where it is not None.

    Args:
        head: returns the logits of some hidden states.
        targets: int64 (positions,).
        smoothing: of labels.
        size: positions of a chunk.
        inputs: the hidden states (positions, width), then parameters of the head.
        wanted: of which inputs the gradient is asked for.
        scale: of the gradient; None for none.
    """
    scale = scale if any(wanted) else None
    hidden, *parameters = (tensor.detach() if index == 0 else tensor for index, tensor in enumerate(inputs))
    of_hidden = torch.empty_like(hidden) if wanted[0] and scale is not None else None
    wanted = [want and scale is not None for want in wanted]
    # In float32 at least: many small terms, each rounded to bfloat16, would not add up.
    sums = [
        torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if want else None
        for p, want in zip(parameters, wanted[1:], strict=True)
    ]
    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for start in range(0, len(hidden), size):
        part = hidden[start : start + size].requires_grad_(wanted[0])
        with torch.set_grad_enabled(scale is not None):
            logits = head(part)
        loss, gradient = _differentiate(logits.detach(), targets[start : start + size], smoothing, scale)
        total += loss
        if gradient is None:
            continue
        used = _parameters(logits)
        asked = [(sums[index], each) for index, p in enumerate(parameters) for each in used.get(p, ())]
        given = [part] if wanted[0] else []
        found = torch.autograd.grad(logits, [*given, *(each for _, each in asked)], gradient, allow_unused=True)
        del logits, gradient
        if wanted[0]:
            of_hidden[start : start + size], *found = found
        for (total_of, _), of_chunk in zip(asked, found, strict=True):
            if of_chunk is not None:
                total_of += of_chunk
    of_parameters = (s if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))
    return total, [of_hidden, *of_parameters]


def _differentiate(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, scale: torch.Tensor | float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the sum of the losses of logits (positions, vocabulary), and its gradient times `scale`, if not None."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    nats, labels, ignored = _cross_entropy(log_p, targets, smoothing)
    if scale is None:
        return nats.sum(), None
    # softmax - labels, in the memory of the logarithms
    gradient = log_p.exp_()
    gradient.scatter_add_(-1, labels, torch.full_like(labels, smoothing - 1, dtype=gradient.dtype))
    if smoothing:
        gradient -= smoothing / gradient.shape[-1]
    if _may_have_any(ignored):
        gradient.masked_fill_(ignored[:, None], 0.0)
    if not isinstance(scale, float):
        gradient *= scale
    return nats.sum(), gradient.to(logits.dtype)


def _may_have_any(flags: torch.Tensor) -> bool:
    # Only where it costs nothing to know: a GPU would have to be waited for, and a FakeTensor has no data.
    return flags.device.type != "cpu" or isinstance(flags, FakeTensor) or bool(flags.any())


def _cross_entropy(
    log_p: torch.Tensor, targets: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return nats (positions,), the labels as indices (positions, 1), and which positions have none (positions,)."""
    ignored = targets == _IGNORED
    labels = targets.clamp(min=0)[:, None]
    nats = -log_p.gather(-1, labels)[:, 0]
    if smoothing:
        nats = (1 - smoothing) * nats - smoothing * log_p.mean(-1)
    return nats.masked_fill(ignored, 0.0), labels, ignored


def _score(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nats and whether the most probable token is right, of logits (positions, vocabulary)."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return _cross_entropy(log_p, targets, smoothing)[0], logits.argmax(-1).eq(targets)


def _rounding(logits: torch.Tensor) -> float:
    """Return by how much the largest logit may differ where it is summed in another order."""
    return max(1e-5, 4 * torch.finfo(logits.dtype).eps) * logits.abs().max().item()


@torch.no_grad()
def _find_base(model: PreTrainedModel) -> str | None:
    """Return the name of the module whose output the head takes, proven on a few tokens; None with a word of why."""
    device = next(model.parameters()).device
    input_ids = torch.arange(4, device=device).remainder(model.config.get_text_config().vocab_size)[None]
    called: list[tuple[nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: called.append((module, output)))
        for module in model.modules()
        if module is not model
    ]
    was_training = model.training
    model.eval()
    try:
        whole = type(model).forward(model, input_ids=input_ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        names = {module: name for name, module in model.named_modules()}
        # The last of those that return hidden states: the base model, or what it is a shell of (OPT's decoder).
        found = [
            (module, output) for module, output in called if getattr(output, "last_hidden_state", None) is not None
        ]
        base, output = found[-1]
        model.__dict__[_BASE] = names[base]
        again = torch.cat([_logits(model, type(output), part) for part in output.last_hidden_state[0].split(3)])
        if not torch.allclose(again, whole[0], rtol=1e-4, atol=_rounding(whole)):
            raise ValueError("its logits depend on more than the last hidden states")
        note_head(model, output.last_hidden_state[0], again)
    except Exception as error:  # each architecture fails in its own way
        reason = " ".join(f"{error}".split()) or type(error).__name__
        say(f"loss: whole logits, as {type(model).__name__} has no head to be called in chunks ({reason[:200]})")
        return None
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return names[base]
