"""How fast the kit is, side by side with others in one run on one machine.

    python -m benchmarks.speed [--device cuda] [--only NAME …] [--rounds N] [--steps N]

Parts: `preparing`, `spam`, and the rows of the causal-LM table (`kit`, `run_clm`, …, with `peak`, the matrix product)
on a CPU; on a GPU those rows, `frozen_prefix` and `xl`. What a call measures replaces that part in the file of results;
other parts stay. Every measurement has a process of its own. Docs: docs/performance.md.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.preparation import describe_hardware
from benchmarks.speed import causal_lm, frozen_prefix, preparing, report, spam
from benchmarks.speed.children import ROOT, Failed
from benchmarks.speed.environments import python_of
from benchmarks.speed.material import Material, given_or_shared, model_folder, prepare
from benchmarks.speed.methods import CPU, GPU, XL
from kit.model.precision import supports_bf16

RESULTS = ROOT / "benchmarks/results"
SMOKE = {"rounds": 1, "warmup": 1, "steps": 2, "batch": 2, "block": 64, "shape": "tiny", "positions": 256}


def main() -> None:
    """Measure what is asked for, write it and print its tables."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the children
    if options.write_docs:
        report.write_page(RESULTS)
        return
    for folder in (options.work, options.output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    result = json.loads(options.output.read_text()) if options.output.is_file() else {}
    corpus = given_or_shared(options.corpus, "python_docs/corpus.txt")
    tokenizer = given_or_shared(options.tokenizer, "gpt2_bpe")
    material = prepare(options.work, corpus, tokenizer, options.smoke)
    make_ready(options, material)
    try:
        for part, section in measured(options, material, corpus):
            result[part] = section | {"hardware": describe_machine(options.device)}
            options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"\n{options.output}: {(time.monotonic() - options.began) / 60:.1f} minutes\n")
    print(report.tables(result, options.device))


def make_ready(options: argparse.Namespace, material: Material) -> None:
    """Install the peers and write the models, which is no part of the time that is allowed."""
    methods = CPU if options.device == "cpu" else GPU
    for name in sorted({method.environment for name, method in methods.items() if name in options.only}):
        with contextlib.suppress(Failed):  # its rows will say why
            python_of(name, options.peers_env)
    for dropout in (False, True):
        model_folder(options.work, material, options.shape, options.positions, dropout)
    options.began = time.monotonic()
    options.deadline = options.began + 60 * options.minutes


def measured(
    options: argparse.Namespace, material: Material, corpus: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parts that are asked for, with their sections, as they come."""
    rows = CPU if options.device == "cpu" else GPU
    only = options.only
    if "preparing" in only:
        print("preparing", flush=True)
        novels = given_or_shared(None, "novels/novels_10MB.txt")
        yield "preparing", preparing.measure(options, material, [path for path in (novels, corpus) if path])
    if "spam" in only:
        print("spam", flush=True)
        yield "spam", spam.measure(options, material, given_or_shared(options.sms, "sms_spam/SMSSpamCollection"))
    if "frozen_prefix" in only:
        print("frozen_prefix", flush=True)
        yield "frozen_prefix", frozen_prefix.measure(options, material)
    if names := [name for name in (causal_lm.PEAK, *rows) if name in only]:
        print(f"causal_lm: {', '.join(names)}", flush=True)
        yield "causal_lm", causal_lm.measure(options, material, options.shape, rows, names)
    if "xl" in only:
        print("xl", flush=True)
        shape = "tiny" if options.smoke else "gpt2-xl"
        few = argparse.Namespace(**vars(options) | {"warmup": 2, "steps": 8})  # its steps are long and even
        yield "xl", causal_lm.measure(few, material, shape, XL, [causal_lm.PEAK, *XL])


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="parts or rows, by commas; default: all")
    parser.add_argument("--corpus", type=Path, help="text; documents between two blank lines")
    parser.add_argument("--tokenizer", type=Path, help="folder; default: GPT-2's, else one is trained on the corpus")
    parser.add_argument("--sms", type=Path, help="the file SMSSpamCollection")
    parser.add_argument("--peers-env", type=Path, default=Path("runs/speed/peers"), help="environments of the peers")
    parser.add_argument("--work", type=Path, default=Path("runs/speed"), help="what is made for the measurements")
    parser.add_argument("--rounds", type=int, default=3, help="of all methods by turns")
    parser.add_argument("--warmup", type=int, help="steps before those that are timed; default: 1, on a GPU 10")
    parser.add_argument("--steps", type=int, help="that are timed; default: 2, on a GPU 30")
    parser.add_argument("--batch", type=int, help="rows of a step; default: 4, on a GPU 16")
    parser.add_argument("--block", type=int, help="positions of a row; default: 512, on a GPU 1024")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--minutes",
        type=float,
        help="no further round of causal-LM rows begins that would not end by then; default: 20, on a GPU 10",
    )
    parser.add_argument("--spam-twice", action="store_true", help="the recipe also without its zero-shot baseline")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/speed.json, on a GPU speed-gpu.json")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does everything run?")
    parser.add_argument("--write-docs", action="store_true", help="only write the tables of docs/performance.md")
    options = parser.parse_args()
    return complete(parser, options)


def complete(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what follows from the device and from `--smoke`."""
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available() and not options.write_docs:
        parser.error("--device cuda: there is none")
    usual = (
        {"warmup": 10, "steps": 30, "batch": 16, "block": 1024, "minutes": 10.0}
        if on_gpu
        else {"warmup": 1, "steps": 2, "batch": 4}
    )
    usual = {"block": 512, "minutes": 20.0, "shape": "gpt2", "positions": 1024, **usual}
    usual |= {"guide_steps": 30, "spam_overrides": [], "most_characters": None, "frozen_rows": 640}
    if options.smoke:
        usual |= SMOKE | {"guide_steps": 2, "spam_overrides": ["training.num_train_epochs=1"], "frozen_rows": 80}
        usual |= {"most_characters": 200_000}
        options.rounds = 1
        options.work = options.work / "smoke"
    for name, value in usual.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    options.work, options.peers_env = options.work.absolute(), options.peers_env.absolute()
    name = "speed-gpu.json" if on_gpu else "speed.json"
    options.output = options.output or (options.work / name if options.smoke else RESULTS / name)
    if min(options.rounds, options.warmup, options.steps) < 1:
        parser.error("--rounds, --warmup and --steps: at least 1; a step is timed from the end of the one before")
    parts = ("xl", "frozen_prefix") if on_gpu else ("preparing", "spam")
    options.only = options.only.split(",") if options.only else [causal_lm.PEAK, *(GPU if on_gpu else CPU), *parts]
    known = {causal_lm.PEAK, "preparing", "spam", "frozen_prefix", "xl", *(GPU if on_gpu else CPU)}
    if unknown := set(options.only) - known:
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected {', '.join(sorted(known))}")
    if set(options.only) & set(GPU if on_gpu else CPU) and "kit" not in options.only:
        options.only.append("kit")  # ratios are of one run
    options.bf16 = supports_bf16(use_cpu=not on_gpu)[0]
    return options


def describe_machine(device: str) -> dict[str, Any]:
    """Return processor, cores, memory, system and, where it is used, GPU."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {**describe_hardware(), "system": platform.system(), **gpu}


if __name__ == "__main__":
    main()
