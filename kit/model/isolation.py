"""A probe for leaks between packed documents, run on the very model that is about to be trained."""

import torch
from transformers import PreTrainedModel

from kit.errors import UserError

# Two rows of packed documents with borders at different places, by the lengths of the documents.
_ROWS = ((8, 8), (3, 6, 7))
# Given another text, they change no logits but their own.
_CHANGED = ((0, 0), (1, 1))


@torch.no_grad()
def check_isolation(model: PreTrainedModel, vocab_size: int) -> torch.Tensor:
    """Check that packed documents do not see those before them, in the layout that training uses.

    In a batch of two rows the first document of one and the second of the other get another text; the logits of all
    others must stay equal but for rounding. Several architectures ignore restarting positions (OPT, BLOOM), and
    flash-attention looks at them in a batch of one row alone.

    Returns:
        The logits of the batch: (rows, positions, vocabulary).

    Raises:
        UserError: the logits differ, or are not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    input_ids, other = torch.randint(vocab_size, (2, len(_ROWS), sum(_ROWS[0])), generator=generator)
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in _ROWS])
    changed = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, document in _CHANGED:
        begin = sum(_ROWS[row][:document])
        changed[row, begin : begin + _ROWS[row][document]] = True
    was_training = model.training
    model.eval()
    try:
        one, two = (
            model(input_ids=ids.to(device), position_ids=position_ids.to(device), use_cache=False).logits
            for ids in (input_ids, torch.where(changed, other, input_ids))
        )
    except TypeError:
        one = None  # a forward without `position_ids`
    finally:
        model.train(was_training)
    if one is not None and not all(logits.isfinite().all() for logits in (one, two)):
        raise UserError(f"{type(model).__name__} gives logits that are not finite: its weights hold NaN or infinity")
    # A mixture of experts batches tokens by expert, which alone changes rounding; a leak is orders of magnitude larger.
    if one is None or (one - two)[~changed].abs().max() > 1e-5 * one.abs().max():
        raise UserError(
            f"{type(model).__name__} lets packed documents see each other; set `data.packing: false`, which gives each "
            f"document a row of its own"
        )
    return one
