"""The figures of a causal LM in their most naive form, sharing no code with the kit: what the kit is checked against.

    python tests/evaluation/golden.py MODEL_FOLDER TEXT_FILE BLOCK_SIZE

One window at a time, one row in a batch, no padding: nothing here can depend on how rows are put together.
`golden.json` holds what this script gave for two pretrained models on `golden_text.txt`.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEPARATOR = "\n\n\n"


def read_documents(path, separator=SEPARATOR):
    """Return the documents of a file, without the newlines around each."""
    return [part.strip("\n") for part in Path(path).read_bytes().decode("utf-8").split(separator) if part.strip("\n")]


def load(folder):
    """Return the model in fp32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def cut(sequence, block_size):
    """Cut context token + targets into windows of at most `block_size` targets; one token is shared between two."""
    return [sequence[start : start + block_size + 1] for start in range(0, len(sequence) - 1, block_size)]


@torch.no_grad()
def score(model, tokenizer, documents, block_size, cut=cut):
    """Return, per document, (-ln p, is the most probable token) of each of its tokens and, last, of its EOS."""
    context = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    scores = []
    for document in documents:
        tokens = tokenizer(document, add_special_tokens=False)["input_ids"]
        pairs = []
        for window in cut([context, *tokens, tokenizer.eos_token_id], block_size):
            logits = model(torch.tensor([window[:-1]])).logits[0].double()
            nats = -logits.log_softmax(-1)[range(len(window) - 1), window[1:]]
            hits = logits.argmax(-1) == torch.tensor(window[1:])
            pairs += zip(nats.tolist(), hits.tolist(), strict=True)
        scores.append(pairs)
    return scores


def figures(documents, scores):
    """Return the figures: EOS, the last score of each document, apart from all others."""
    scored = [pair for pairs in scores for pair in pairs[:-1]]
    total, tokens = math.fsum(nats for nats, _ in scored), len(scored)
    size = sum(len(document.encode("utf-8")) for document in documents)
    return {
        "bits_per_byte": total / math.log(2) / size,
        "nats_per_token": total / tokens,
        "perplexity": math.exp(total / tokens),
        "token_accuracy": sum(hit for _, hit in scored) / tokens,
        "eos_nats": math.fsum(pairs[-1][0] for pairs in scores) / len(documents),
        "tokens": tokens,
        "bytes": size,
        "documents": len(documents),
    }


def measure(folder, text, block_size, separator=SEPARATOR):
    """Return the figures of the model in a folder on a text file."""
    documents = read_documents(text, separator)
    return figures(documents, score(*load(folder), documents, block_size))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Naive figures of a causal LM on a text file, as JSON.")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("block_size", type=int)
    parser.add_argument("--separator", default=SEPARATOR)
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.text, given.block_size, given.separator), indent=2))
