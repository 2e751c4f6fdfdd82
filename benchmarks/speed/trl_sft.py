"""TRL's SFTTrainer with packing, with its defaults or with settings that are given."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.speed.clock import Clock, read_request

if __name__ == "__main__":
    asked = read_request()
    config = SFTConfig(
        output_dir="run",
        max_steps=asked["stop_after"],
        per_device_train_batch_size=asked["batch"],
        max_length=asked["block"],
        packing=True,
        bf16=asked["bf16"],
        use_cpu=asked["cpu"],
        save_strategy="no",
        report_to="none",
        **asked.get("arguments", {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(asked["model"]),
        args=config,
        train_dataset=load_dataset("json", data_files=asked["documents"])["train"],
        processing_class=tokenizer,
    )
    rows = trainer.train_dataset
    tokens = sum(map(len, rows["input_ids"]))
    # The first token of each piece of a packed row, or of the row, is never predicted.
    pieces = sum(map(len, rows["seq_lengths"])) if "seq_lengths" in rows.column_names else len(rows)
    Clock(asked, asked["batch"] * (tokens - pieces) / len(rows))
    trainer.train()
