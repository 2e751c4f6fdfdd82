"""The rows of new tokens train alone, in matrices of which all else stays frozen.

The rows are a parameter that shares its memory with the frozen matrix. So the matrix always holds the truth: what
evaluates, generates or saves sees the plain model, nothing is copied, and the optimizer knows of the rows only. Forward
hooks put functions into autograd's graph that change no value and work out the rows' gradient; the whole matrix's is
never computed. The common ways fall short: a hook that zeroes the gradient of old rows keeps an optimizer state for the
whole matrix, and weight decay moves the old rows; peft's trainable tokens copy the matrix in each forward pass, drop
the bias of a head, and rename modules.

Where parameters are cut into shards, nothing can share memory: there the rows are set apart, and the forward passes of
training put them in their places, until `put_back` writes them into the matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from kit.errors import UserError
from kit.model.shards import whole as unsharded
from kit.model.shards import write, write_rows

_ROWS, _BIAS = "new_rows", "new_bias"  # parameters of the input embedding and of the head
_WAY_OUT = "`embeddings: true` and `head: true` in its place train the whole matrices, which works there"


def train_new_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Freeze the input and output embeddings but for the rows, and the head's biases, of some ids.

    Other parameters are left as they are. To be called once the model is on its device, and after peft has put its
    layers in, which freezes whatever it does not know; the optimizer comes after it.

    Args:
        model: the model; with adapters of peft, the model that they are in.
        ids: of the new tokens, without gaps.

    Raises:
        RuntimeError: the ids have gaps, reach beyond the matrix, or rows of this model train already.
        UserError: this architecture computes its embeddings or logits in a way of its own.
    """
    ids = _as_range(ids)
    inputs, head = _plain(model.get_input_embeddings()), _plain(model.get_output_embeddings())
    if not isinstance(inputs, nn.Embedding) or not (
        type(inputs).forward is nn.Embedding.forward or hasattr(inputs, "embed_scale")
    ):
        raise _not_understood(model, inputs)
    if head is not None and (type(head).forward is not nn.Linear.forward or not head.weight.is_floating_point()):
        raise _not_understood(model, head)
    if new_row_ids(model) is not None or ids.stop > len(inputs.weight):
        raise RuntimeError(f"new rows {ids} of {len(inputs.weight)}: out of range, or some train already")
    _attach(inputs, _ROWS, inputs.weight, ids)
    inputs.register_forward_hook(_after_embedding)
    if head is None:
        return
    if head.weight is inputs.weight:  # tied: one parameter, which sums the gradients of its two uses
        head.new_row_ids = ids
        head.register_parameter(_ROWS, inputs.new_rows)
        _hide(head)
    else:
        _attach(head, _ROWS, head.weight, ids)
    if head.bias is not None:
        _attach(head, _BIAS, head.bias, ids)
    head.register_forward_hook(_after_head)


def set_apart(model: nn.Module) -> None:
    """Give the rows that train alone memory of their own, before the model's parameters are cut into shards."""
    for module in _owners(model):
        module.rows_are_apart = True
        for _, part in _wholes_and_parts(module):
            part.data = part.data.clone()


def put_back(model: nn.Module) -> None:
    """Write rows that are apart into their matrices, which all but training reads; called on all processes."""
    for module in _owners(model):
        for matrix, part in _wholes_and_parts(module) if _are_apart(module) else ():
            write_rows(matrix, torch.tensor(module.new_row_ids), unsharded(part))


def take_out(model: nn.Module) -> None:
    """Let the rows be those of their matrices, which were loaded; called on all processes."""
    for module in _owners(model):
        for matrix, part in _wholes_and_parts(module):
            if _are_apart(module):
                write(part, _rows(unsharded(matrix), module.new_row_ids))
            else:
                part.data = _rows(matrix, module.new_row_ids)  # should the part have lain elsewhere


def _owners(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _ROWS in module._parameters]


def _are_apart(module: nn.Module) -> bool:
    return getattr(module, "rows_are_apart", False)


def new_row_ids(model: nn.Module) -> range | None:
    """Return the ids whose rows `train_new_rows` made trainable; None if it was not called."""
    return next((module.new_row_ids for module in _owners(model)), None)


def is_new_rows(name: str) -> bool:
    """Return whether a parameter of this name is a part of another one that trains alone."""
    return name.rpartition(".")[2] in (_ROWS, _BIAS)


def _as_range(ids: Sequence[int]) -> range:
    ordered = sorted(set(ids))
    if not ordered or ordered[-1] - ordered[0] + 1 != len(ordered):
        raise RuntimeError(f"ids of new tokens: {len(ordered)} with gaps between them, or none")
    return range(ordered[0], ordered[-1] + 1)


def _plain(module: nn.Module | None) -> nn.Module | None:
    """Return the module that an adapter of peft was put around, or the module itself."""
    return getattr(module, "base_layer", module)


def _not_understood(model: nn.Module, module: nn.Module | None) -> UserError:
    return UserError(
        f"freezing.trainable.new_tokens: {type(model).__name__} has embeddings of its own kind "
        f"({type(module).__name__}), whose rows cannot train alone; {_WAY_OUT}"
    )


def _attach(module: nn.Module, name: str, whole: nn.Parameter, ids: range) -> None:
    whole.requires_grad_(False)
    module.new_row_ids = ids
    module.register_parameter(name, nn.Parameter(_rows(whole, ids)))
    if name == _ROWS:
        _hide(module)


def _hide(module: nn.Module) -> None:
    """Keep the parts out of saved models, where they would stand twice, and from being missed in loaded ones."""
    module.register_state_dict_post_hook(_leave_out)
    module.register_load_state_dict_post_hook(_after_load)


def _leave_out(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    for name in (_ROWS, _BIAS):
        state.pop(prefix + name, None)


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not is_new_rows(name)]
    for whole, part in _wholes_and_parts(module) if not _are_apart(module) else ():
        part.data = _rows(whole, module.new_row_ids)  # what was loaded, should the part have lain elsewhere


def _wholes_and_parts(module: nn.Module) -> list[tuple[torch.Tensor, nn.Parameter]]:
    pairs = (module.weight, module.new_rows), (getattr(module, "bias", None), _bias(module))
    return [(whole, part) for whole, part in pairs if part is not None]


def _rows(whole: torch.Tensor, ids: range) -> torch.Tensor:
    return whole.data[ids.start : ids.stop]


def _trains(module: nn.Module) -> bool:
    """Return whether a gradient is asked for, and make sure that what it would move is the matrix's memory."""
    if module.training and not torch.compiler.is_compiling():
        for whole, part in _wholes_and_parts(module):
            if not _is_part(whole, part, module.new_row_ids.start):
                _share_again(whole, part, module.new_row_ids)
    return torch.is_grad_enabled() and (module.new_rows.requires_grad or getattr(_bias(module), "requires_grad", False))


def _share_again(whole: torch.Tensor, part: nn.Parameter, ids: range) -> None:
    """Let a part lie in its matrix's memory again: moving, casting or copying a model takes the two apart."""
    rows = _rows(whole, ids)
    if part.device != rows.device or part.dtype != rows.dtype or not torch.equal(part, rows):
        raise RuntimeError(
            "the rows of new tokens have trained apart from their matrix: the model was sharded, or loaded with "
            "`assign=True`, after `train_new_rows`"
        )
    part.data = rows


def _bias(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get(_BIAS)


def _is_part(whole: torch.Tensor, part: torch.Tensor, first: int) -> bool:
    # Not `data_ptr`, which the tensors without data that memory is estimated with do not have.
    same_memory = part.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return same_memory and part.storage_offset() == whole.storage_offset() + first * whole.stride(0)


def _after_embedding(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    scale = getattr(module, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):
        scale = scale.to(module.weight.dtype)  # as Gemma's forward pass rounds it
    if _are_apart(module):
        return _with_rows(module, args[0], output, scale) if module.training else None
    if not _trains(module):
        return None
    return _EmbeddedRows.apply(output, module.new_rows, args[0], module.new_row_ids, module.padding_idx, scale)


def _with_rows(module: nn.Module, ids: torch.Tensor, output: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Return embeddings in which those of new ids are rows that are apart."""
    first, number = module.new_row_ids.start, len(module.new_row_ids)
    padding = None if module.padding_idx is None else module.padding_idx - first
    places = (ids - first).clamp(0, number - 1)
    rows = F.embedding(places, module.new_rows, padding if padding in range(number) else None) * scale
    return torch.where(((ids >= first) & (ids < module.new_row_ids.stop)).unsqueeze(-1), rows, output)


def _after_head(module: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor | None:
    if _are_apart(module):
        if module.training:  # in place: logits are what takes most memory
            logits[..., module.new_row_ids.start : module.new_row_ids.stop] = F.linear(
                args[0], module.new_rows, _bias(module)
            )
        return None
    if not _trains(module):
        return None
    return _ProjectedRows.apply(logits, args[0], module.new_rows, _bias(module), module.new_row_ids)


class _EmbeddedRows(torch.autograd.Function):
    """Embeddings (…, width) of ids (…), unchanged; the new rows (k × width) get the gradients where they stand.

    A batch without new ids gives them a gradient of zeros, as DistributedDataParallel expects of each parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        rows: torch.Tensor,
        ids: torch.Tensor,
        of_rows: range,
        padding_idx: int | None,
        scale: float | torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.of_rows, ctx.padding_idx, ctx.scale, ctx.dtype = of_rows, padding_idx, scale, rows.dtype
        return output.detach()  # the same memory; of `output` itself autograd would forbid changes in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        first, number = ctx.of_rows.start, len(ctx.of_rows)
        new = (ids >= first) & (ids < ctx.of_rows.stop)
        if ctx.padding_idx is not None:  # `nn.Embedding` gives it no gradient
            new &= ids != ctx.padding_idx
        # The kernel skips a row that is named as padding: here all old ones. It needs no count of the new ids, for
        # which a GPU would have to wait, and is as deterministic as the whole matrix's gradient.
        places = torch.where(new, ids - first, number)
        summed = grad.to(torch.promote_types(grad.dtype, torch.float32))
        summed = torch.ops.aten.embedding_dense_backward(summed, places, number + 1, number, False)[:number]
        return (grad if ctx.needs_input_grad[0] else None), (summed * ctx.scale).to(ctx.dtype), None, None, None, None


class _ProjectedRows(torch.autograd.Function):
    """Logits (…, rows) of hidden states (…, width), unchanged; the new rows and biases get the gradients they cause."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        of_rows: range,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden.to(logits.dtype))  # under autocast the precision that the product was taken in
        ctx.of_rows, ctx.dtype = of_rows, rows.dtype
        return logits.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        columns = grad[..., ctx.of_rows.start : ctx.of_rows.stop].reshape(-1, len(ctx.of_rows))
        of_rows = of_bias = None
        if ctx.needs_input_grad[2]:
            of_rows = (columns.T @ hidden.reshape(-1, hidden.shape[-1])).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = columns.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.dtype)
        return (grad if ctx.needs_input_grad[0] else None), None, of_rows, of_bias, None
