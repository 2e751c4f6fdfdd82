"""Packed documents do not see each other: changing one leaves the logits of the next bit-equal, in both modes."""

import numpy as np
import pytest
import torch

from kit.data.blocks import CollateRows, TokenRows, TrainPart
from kit.data.packing import lay_out
from kit.data.store import open_store
from kit.errors import UserError
from kit.model.chunked_loss import compute_whole_logits, give_losses
from kit.model.isolation import check_isolation
from kit.tasks import causal_lm
from tests.material import ARCHITECTURES, make_model

SECOND = [7, 8, 9, 10, 11, 12, 13]
VOCAB = 320


def packed_batch(tmp_path, first):
    """Return a batch of one packed row, made by the kit's own store, rows and collator: documents `first`, SECOND."""
    encoded = {"first": first, "second": SECOND}
    store = open_store(
        tmp_path, "two documents", str(first), "tokenizer", lambda: encoded, lambda texts: [encoded[t] for t in texts],
        eos_token_id=0, vocab_size=VOCAB,
    )  # fmt: skip
    documents = np.arange(2)
    layout = lay_out(store.lengths(documents), 32, True)
    part = TrainPart(store, documents, layout, np.arange(1), 32)
    rows = TokenRows([part], packing=True, context_token_id=0, pad_token_id=0)
    return CollateRows(packing=True, pad_token_id=0)([rows[0]])


def logits_of_loss(model, batch):
    """Return the logits that the training loss is computed from."""
    from transformers import TrainingArguments

    seen = []
    give_losses(model)
    compute_whole_logits(model)  # in one call of the head
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    causal_lm.loss_sum(model, batch, TrainingArguments(use_cpu=True))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache in config", "no cache in config"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_document_does_not_see_the_first(tmp_path, architecture, training, use_cache):
    model = make_model(architecture, VOCAB).train(training)
    # The default of most configurations, with which a bare call of the model does leak.
    model.config.use_cache = use_cache
    first, changed = [20, 21, 22, 23, 24], [30, 31, 32, 33, 34]
    one, other = (packed_batch(tmp_path, text) for text in (first, changed))
    assert torch.equal(one["position_ids"][0], torch.tensor([*range(6), *range(26)]))
    begin, end = len(first) + 1, len(first) + 1 + len(SECOND) + 1
    before, after = logits_of_loss(model, one), logits_of_loss(model, other)
    assert not torch.equal(before[:, :begin], after[:, :begin])
    assert torch.equal(before[:, begin:end], after[:, begin:end])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_document_gets_the_logits_that_it_has_alone(tmp_path, architecture):
    model = make_model(architecture, VOCAB).double().eval()
    packed = logits_of_loss(model, packed_batch(tmp_path, [20, 21, 22]))[0, 4 : 4 + len(SECOND) + 1]
    alone = model(torch.tensor([[0, *SECOND]]), use_cache=False).logits[0]
    assert torch.allclose(packed, alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mutation_a_mask_of_ones_leaks(tmp_path, architecture):
    """The bug of most packers: with any 2D mask transformers no longer tells documents apart."""
    model = make_model(architecture, VOCAB)
    batches = [packed_batch(tmp_path, text) for text in ([20, 21, 22], [30, 31, 32])]
    masked = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    one, other = (logits_of_loss(model, batch) for batch in masked)
    assert not torch.equal(one[:, 4:12], other[:, 4:12])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probe_passes_what_isolates(architecture):
    model = make_model(architecture, VOCAB).train()
    check_isolation(model, VOCAB)
    assert model.training


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_probe_refuses_what_leaks(name):
    from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

    opt = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    if name == "opt":
        model = OPTForCausalLM(OPTConfig(**opt, vocab_size=VOCAB))
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"data.packing: false"):
        check_isolation(model, VOCAB)


def test_probe_refuses_weights_that_are_not_finite():
    """A comparison with NaN is never true: such a model passed for one that isolates."""
    model = make_model("llama", VOCAB)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"logits that are not finite: its weights hold NaN or infinity"):
        check_isolation(model, VOCAB)
