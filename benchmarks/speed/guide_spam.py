"""The loop of a guide that fine-tunes GPT-2 124M to tell spam from ham, as a plain script.

As many ham as spam (seed 123), 70/10/20, every message padded to the longest, fp32, no dropout; the last block, the
final norm and a head with two outputs train, the logits are those of the last position; AdamW 5e-5 with weight decay
0.1, batches of 8. Every 50 steps, and at step 0, the loss on 5 batches of the training and 5 of the validation rows;
after each epoch the accuracy on as many; at the end the accuracy on all training, validation and test rows.

A part of an epoch and an evaluation of more batches are timed; `spam.scale` makes the whole loop of them.
"""

import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speed.clock import answer, read_request

BATCH, TIMED_EVAL_BATCHES = 8, 10  # of each part, where the loop has 5: less by chance


def read_rows(path: str) -> list[tuple[str, int]]:
    """Return texts with their class, as many ham as spam, shuffled."""
    rows = [line.split("\t", 1) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    spam = [text for label, text in rows if label == "spam"]
    draw = random.Random(123)
    ham = draw.sample([text for label, text in rows if label == "ham"], len(spam))
    labeled = [(text, 1) for text in spam] + [(text, 0) for text in ham]
    draw.shuffle(labeled)
    return labeled


def encode(rows: list[tuple[str, int]], tokenizer: Any, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, padded to the longest with EOS, and classes."""
    ids = [tokenizer(text)["input_ids"][:most] for text, _ in rows]
    longest = max(map(len, ids))
    padded = [each + [tokenizer.eos_token_id] * (longest - len(each)) for each in ids]
    return torch.tensor(padded), torch.tensor([label for _, label in rows])


def batches(ids: torch.Tensor, labels: torch.Tensor, count: int | None = None) -> list[tuple]:
    """Return the first `count` batches, or all."""
    return list(zip(ids.split(BATCH), labels.split(BATCH), strict=True))[:count]


def make_model(folder: str) -> torch.nn.Module:
    """Return the model with a head of two outputs, of which the last block, the final norm and the head train."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.requires_grad_(False)
    model.lm_head = torch.nn.Linear(model.config.n_embd, 2)
    model.transformer.h[-1].requires_grad_(True)
    model.transformer.ln_f.requires_grad_(True)
    return model


def last_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the last position."""
    return model(input_ids=ids, use_cache=False).logits[:, -1, :]


@torch.no_grad()
def evaluate(model: torch.nn.Module, *parts: list[tuple]) -> float:
    """Return the seconds that the mean losses over these batches take."""
    began = time.perf_counter()
    model.eval()
    for part in parts:
        _ = sum(torch.nn.functional.cross_entropy(last_logits(model, x), y).item() for x, y in part) / len(part)
    model.train()
    return time.perf_counter() - began


def main() -> None:
    """Time the parts of the loop."""
    asked = read_request()
    torch.manual_seed(123)
    tokenizer, model = AutoTokenizer.from_pretrained(asked["model"]), make_model(asked["model"])
    rows = read_rows(asked["sms"])
    ids, labels = encode(rows, tokenizer, model.config.n_positions)
    train, validation = (round(len(rows) * share) for share in (0.7, 0.8))
    order = torch.randperm(train)
    steps = batches(ids[:train][order], labels[:train][order])[: train // BATCH]  # the last, smaller one is left out
    setup_s = time.monotonic() - asked["started"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
    timed = steps[: 1 + asked["steps"]]
    model.train()
    for number, (inputs, targets) in enumerate(timed):
        if number == 1:  # the first one warms up
            began = time.perf_counter()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(last_logits(model, inputs), targets)
        loss.backward()
        optimizer.step()
        loss.item()
    seconds_of_steps = time.perf_counter() - began
    sizes = {"train": train, "validation": validation - train, "test": len(rows) - validation}
    few = [batches(ids[a:b], labels[a:b], TIMED_EVAL_BATCHES) for a, b in ((0, train), (train, validation))]
    answer(
        asked,
        setup_s=setup_s,
        steps_timed=len(timed) - 1,
        steps_per_epoch=len(steps),
        seconds_of_steps=seconds_of_steps,
        evaluation_s=evaluate(model, *few),
        evaluation_batches=sum(map(len, few)),
        batches={part: -(-size // BATCH) for part, size in sizes.items()},
        length=ids.shape[1],
    )


if __name__ == "__main__":
    main()
