"""Rows of the embeddings for tokens that were added: by id, never by tail slice, each begun as the recipe says."""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kit.model.vocabulary import Extension
from kit.recipe.vocabulary import Initialization

# Of transformers' `resize_token_embeddings(mean_resizing=True)`, after https://nlp.stanford.edu/~johnhew/vocab-expansion
_COVARIANCE_SCALE = 1e-9
_ROWS = 1 << 13  # of a matrix, in float64 at a time


def resize_and_initialise(
    model: PreTrainedModel,
    extension: Extension,
    tokenizer_size: int,
    initialize: Initialization,
    pad_to_multiple_of: int,
    seed: int,
) -> None:
    """Give each added token its row, by id, in the input and output embeddings and the head's bias.

    The matrices grow only where the largest id asks for it, then to a multiple of `pad_to_multiple_of`, and never
    shrink: rows that padding has left are used first. Old rows keep every bit. The seed alone decides what is drawn,
    and the global generators are left as they were.

    `tokenizer_size` is the largest id of the extended tokenizer, plus one. The rows of `extension` know their methods;
    `initialize` decides of rows that grow without a token: zero for `zeros`, else the mean.
    """
    sharing = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    rows_before = model.get_input_embeddings().weight.shape[0]
    needed = max([tokenizer_size, *(row.id + 1 for row in extension.rows)])
    with torch.random.fork_rng(), torch.no_grad():
        if needed > rows_before:
            model.resize_token_embeddings(needed, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
            _unshare(model, sharing)
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        old = np.setdiff1d(np.arange(min(extension.old_size, rows_before)), extension.holes)
        spare = set(range(rows_before, inputs.weight.shape[0])) - {row.id for row in extension.rows}
        spare_method = "zeros" if initialize == "zeros" else "mean"
        targets = [(number, spare_method, ()) for number in sorted(spare)]
        targets += [(row.id, row.method, row.pieces) for row in extension.rows]
        parameters = [(inputs, inputs.weight)]
        if outputs is not None and outputs.weight is not inputs.weight:
            parameters.append((outputs, outputs.weight))
        if getattr(outputs, "bias", None) is not None:
            parameters.append((None, outputs.bias))
        for number, (module, parameter) in enumerate(parameters):
            torch.manual_seed(seed + number)
            _fill(model, module, parameter, old, targets)


def _unshare(model: nn.Module, before: dict[str, int]) -> None:
    """Undo sharing that resizing began: an untied BERT would save one of its head's two biases, and load zeros."""
    first = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if before[first.setdefault(id(parameter), name)] != before[name]:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(parameter.detach().clone()))


def _fill(
    model: PreTrainedModel, module: nn.Module | None, parameter: nn.Parameter, old: np.ndarray, targets: list[tuple]
) -> None:
    """Write rows into a matrix (rows × width), or into a bias (rows; no module), each by its (id, method, pieces)."""
    samples = sum(method == "mean-covariance" for _, method, _ in targets)
    mean, noise = _moments(parameter.detach(), torch.from_numpy(old).to(parameter.device), samples)
    count = sum(method == "random" for _, method, _ in targets)
    fresh = torch.zeros(count, *parameter.shape[1:])
    if module is not None and count:
        width = parameter.shape[1]
        new = nn.Embedding(count, width) if isinstance(module, nn.Embedding) else nn.Linear(width, count, bias=False)
        model._init_weights(new)
        fresh = new.weight.detach()
    random_rows, noise_rows = iter(fresh), iter(noise)
    for number, method, pieces in targets:
        if method == "random":
            value = next(random_rows)
        elif method == "zeros":
            value = torch.zeros_like(mean)
        elif method == "mean-covariance":
            value = mean + next(noise_rows)
        elif method in ("subword-mean", "description") and pieces:
            value = parameter.detach()[list(pieces)].double().mean(0)
        else:
            value = mean
        parameter.data[number] = value.to(parameter.device, parameter.dtype)


def _moments(matrix: torch.Tensor, old: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of the old rows, and samples of noise with their covariance, scaled, in float64."""
    mean = sum(matrix[ids].double().sum(0) for ids in old.split(_ROWS)) / len(old)
    noise = torch.zeros(samples, *mean.shape, dtype=torch.float64, device=mean.device)
    for ids in old.split(_ROWS) if samples else ():
        # A weighted sum of centred rows has exactly their covariance, however few or dependent they are.
        weights = torch.randn(samples, len(ids), dtype=torch.float64).to(mean.device)
        noise += weights @ (matrix[ids].double() - mean)
    return mean, noise * (_COVARIANCE_SCALE / len(old)) ** 0.5
