"""A probe for leaks between packed documents, run on the very model that is about to be trained."""

import torch
from transformers import PreTrainedModel

from kit.errors import UserError


@torch.no_grad()
def check_isolation(model: PreTrainedModel, vocab_size: int) -> None:
    """Check that a packed document does not see the one before it.

    Two documents share a row, once with one text and once with another in the first place; the second one's logits
    must be equal but for rounding. Several architectures ignore restarting positions (OPT, BLOOM).

    Raises:
        UserError: the logits differ, or are not finite.
    """
    half = 8
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocab_size, (3, 1, half), generator=generator)
    position_ids = torch.arange(half).repeat(2)[None].to(device)
    was_training = model.training
    model.eval()
    try:
        logits = [
            model(
                input_ids=torch.cat([text, second], dim=1).to(device), position_ids=position_ids, use_cache=False
            ).logits[:, half:]
            for text in (first, other)
        ]
    except TypeError:
        logits = None  # a forward without `position_ids`
    finally:
        model.train(was_training)
    if logits is not None and not all(part.isfinite().all() for part in logits):
        raise UserError(f"{type(model).__name__} gives logits that are not finite: its weights hold NaN or infinity")
    # A mixture of experts batches tokens by expert, which alone changes rounding; a leak is orders of magnitude larger.
    if logits is None or (logits[0] - logits[1]).abs().max() > 1e-5 * logits[0].abs().max():
        raise UserError(
            f"{type(model).__name__} lets packed documents see each other; set `data.packing: false`, which gives each "
            f"document a row of its own"
        )
