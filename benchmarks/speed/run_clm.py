"""The method of transformers' examples/pytorch/language-modeling/run_clm.py, as a plain script.

Lines are tokenised, concatenated without anything between them and cut into blocks, and Trainer does the rest: the
default collator, the model's own loss, the arguments that its users give.
"""

from itertools import chain
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from benchmarks.speed.clock import Clock, read_request


def make_blocks(asked: dict[str, Any]) -> Any:
    """Return the corpus as blocks."""
    tokenizer, block = AutoTokenizer.from_pretrained(asked["model"]), asked["block"]
    raw = load_dataset("text", data_files={"train": asked["corpus"]}, keep_linebreaks=True)["train"]
    tokenized = raw.map(lambda examples: tokenizer(examples["text"]), batched=True, remove_columns=["text"])

    def group_texts(examples: dict[str, list]) -> dict[str, list]:
        joined = {name: list(chain(*rows)) for name, rows in examples.items()}
        total = len(joined["input_ids"]) // block * block
        cut = {name: [ids[i : i + block] for i in range(0, total, block)] for name, ids in joined.items()}
        return cut | {"labels": cut["input_ids"].copy()}

    return tokenized.map(group_texts, batched=True)


def training_arguments(asked: dict[str, Any]) -> TrainingArguments:
    """Return the arguments of scripts that train with Trainer."""
    return TrainingArguments(
        output_dir="run",
        max_steps=asked["stop_after"],
        per_device_train_batch_size=asked["batch"],
        bf16=asked["bf16"],
        use_cpu=asked["cpu"],
        save_strategy="no",
        report_to="none",
        **asked.get("arguments", {}),
    )


if __name__ == "__main__":
    asked = read_request()
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(asked["model"]),
        args=training_arguments(asked),
        train_dataset=make_blocks(asked),
        data_collator=default_data_collator,
    )
    # The model shifts: the first token of a block is never predicted.
    Clock(asked, asked["batch"] * (asked["block"] - 1))
    trainer.train()
