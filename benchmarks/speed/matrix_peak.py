"""The rate of a 2,048³ matrix product, in FLOP/s: the median of many, in each precision."""

import statistics
import time

import torch

from benchmarks.speed.clock import answer, read_request

SIZE, WARMUP, REPEATS, SECONDS = 2048, 3, 200, 3.0


def rate(dtype: torch.dtype, device: str) -> float:
    """Return the median rate over `REPEATS` products, or over those of `SECONDS`."""
    left, right = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times: list[float] = []
    while len(times) < WARMUP + REPEATS and (len(times) < 2 * WARMUP or sum(times) < SECONDS):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * SIZE**3 / statistics.median(times[WARMUP:])


if __name__ == "__main__":
    asked = read_request()
    device = "cpu" if asked["cpu"] else "cuda"
    answer(asked, bf16=rate(torch.bfloat16, device), fp32=rate(torch.float32, device))
