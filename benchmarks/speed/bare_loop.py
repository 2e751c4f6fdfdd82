"""A loop without any library around it: forward, backward and fused AdamW on blocks of the corpus. A bound."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.speed.clock import Clock, read_request

if __name__ == "__main__":
    asked = read_request()
    batch, block, device = asked["batch"], asked["block"], "cpu" if asked["cpu"] else "cuda"
    stream = np.load(asked["tokens"], mmap_mode="r")
    model = AutoModelForCausalLM.from_pretrained(asked["model"]).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    random = np.random.default_rng(0)
    Clock(asked, batch * (block - 1))
    while True:  # the clock ends it
        starts = random.integers(0, len(stream) - block, batch)
        ids = torch.from_numpy(np.stack([stream[start : start + block] for start in starts])).to(device).long()
        with torch.autocast(device, torch.bfloat16, enabled=asked["bf16"]):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
