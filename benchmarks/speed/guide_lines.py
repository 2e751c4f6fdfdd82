"""The loop of common tutorials: each line of the corpus padded or truncated to the block, pad = EOS, Trainer.

Blank lines are left out, which such tutorials do not always do: they would be rows of padding alone.
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer

from benchmarks.speed.clock import Clock, read_request
from benchmarks.speed.run_clm import training_arguments

if __name__ == "__main__":
    asked = read_request()
    block = asked["block"]
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    tokenizer.pad_token = tokenizer.eos_token

    raw = load_dataset("text", data_files={"train": asked["corpus"]})["train"]
    lines = raw.filter(lambda texts: [bool(text.strip()) for text in texts], batched=True, input_columns="text")
    rows = lines.map(
        lambda examples: tokenizer(examples["text"], truncation=True, padding="max_length", max_length=block),
        batched=True,
        remove_columns=["text"],
    )
    counts = rows.map(
        lambda masks: {"labels": [max(sum(mask) - 1, 0) for mask in masks]},
        batched=True,
        input_columns="attention_mask",
        remove_columns=rows.column_names,
    )["labels"]
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(asked["model"]),
        args=training_arguments(asked),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    # Steps cost the same whatever the lines hold; which lines they hold is chance, so the mean over all of them counts.
    Clock(asked, asked["batch"] * sum(counts) / len(counts))
    trainer.train()
