"""litgpt's pretraining loop on the shape of its own that comes nearest to GPT-2's.

It has no learned positions: rotary ones stand in their place. All matrices are of GPT-2's sizes, the head is tied.
Its loop compiles the model and takes one stream of tokens in rows, as its own data modules do.
"""

import json
from pathlib import Path

import numpy as np
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import setup
from torch.utils.data import DataLoader

from benchmarks.speed.clock import Clock, read_request


class Stream(DataModule):
    """Rows of a stream of tokens, each with the one token more that it predicts."""

    def __init__(self, path: str, block: int, batch: int) -> None:
        """Cut an array file into rows."""
        super().__init__()
        stream = np.load(path, mmap_mode="r")
        self.rows = [torch.from_numpy(stream[i : i + block + 1]) for i in range(0, len(stream) - block, block)]
        self.batch = batch

    def connect(self, **kwargs: object) -> None:
        """Take nothing: all is known."""

    def train_dataloader(self) -> DataLoader:
        """Return shuffled rows."""
        return DataLoader(self.rows, self.batch, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return a batch, since the loop asks for one before it begins."""
        return DataLoader(self.rows[: self.batch], self.batch)


if __name__ == "__main__":
    asked = read_request()
    shape = json.loads((Path(asked["model"]) / "config.json").read_text())
    batch, block = asked["batch"], asked["block"]
    config = Config(
        name="gpt2-shape",
        block_size=block,
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        intermediate_size=4 * shape["n_embd"],
        parallel_residual=False,
        attn_bias=True,
        bias=True,
        rotary_percentage=1.0,
        gelu_approximate="tanh",
    )
    Clock(asked, batch * block)
    setup(
        "gpt2-shape",
        model_config=config,
        out_dir=Path("run"),
        precision="bf16-mixed" if asked["bf16"] else "32-true",
        data=Stream(asked["tokens"], block, batch),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=batch,
            micro_batch_size=batch,
            max_tokens=(asked["stop_after"] + 1) * batch * block,
            max_seq_length=block,
            max_norm=1.0,
            lr_warmup_steps=1,
            tie_embeddings=True,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        devices=1,
        logger_name="csv",
    )
