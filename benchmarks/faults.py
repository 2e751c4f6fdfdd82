"""A run that is killed and started again, at every place where that could cost something: nothing is lost.

    python -m benchmarks.faults [--short]

Each case trains a tiny GPT-2 (dropout, accumulation, evaluations, the best model kept, W&B offline), is hit once, and
is started again with the same command until it is done. Then it is compared with a run that was left alone: weights,
scorecard, samples, history (but for speeds), what W&B holds, the rows of every micro-batch, the files in its folder.
Writes benchmarks/results/faults.json and the table of docs/resilience.md. `--short` hits one run of one process and one
of two in each part in turn, and writes nothing. Full disks need the right to mount a tmpfs.
"""

import argparse
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import psutil
import torch
import yaml
from safetensors.torch import load_file

from tests.harness import Fault, install_fault, run_kit
from tests.history import computed, read_history
from tests.material import documents
from tests.offline_wandb import read_runs
from tests.watched_kit import read_notes, watch_rows

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/faults.json"
PAGE = ROOT / "docs/resilience.md"
BEGIN, END = "<!-- kills: written by `make bench-faults` -->\n", "<!-- end of kills -->"
PARTS = ("prepare", "before", "step", "evaluation", "save", "rotation", "export")
MOST_STARTS = 4
DISK_BYTES = 64 << 20
KILL, TERM, FULL = signal.SIGKILL, signal.SIGTERM, None  # FULL: the disk is full from then on

TRAINING = {
    "num_train_epochs": 3, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "lr_scheduler_type": "cosine",
    "warmup_steps": 3, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4,
    "save_total_limit": 2, "load_best_model_at_end": True, "bf16": False,
}  # fmt: skip
_OF_KIT = "kit.training.trainer:KitTrainer."
# Functions that a run of every version passes through, by the part that they belong to.
STORE = "kit.data.store:_write_store"
BEFORE = "kit.evaluation.language_modeling:_score"
STEP = f"{_OF_KIT}training_step"
EVALUATION = f"{_OF_KIT}_poll"
OPTIMIZER_STATE = f"{_OF_KIT}_save_optimizer_and_scheduler"
MARKER = "kit.training.checkpointing:complete_checkpoint"
ROTATION = "kit.training.checkpointing:rotate_checkpoints"
EXPORT = "kit.stages:save_model"
RENAME = "os:replace"


@dataclass(frozen=True)
class Hit:
    """What befalls a run, and where.

    Attributes:
        part: of `PARTS`.
        where: in words.
        processes: of the run.
        target, call, path, rank, after: as of `tests.harness.Fault`.
        by: a signal, or `FULL`.
        damage: what else happens to the folder, as a power failure might: a function of this module.
    """

    part: str
    where: str
    processes: int
    by: int | None
    target: str
    call: int = 1
    path: str | None = None
    rank: int = 0
    after: bool = False
    damage: str | None = None

    @property
    def fault(self) -> Fault:
        """For the harness."""
        return Fault(self.target, self.call, self.by or 0, self.rank, self.path, self.after)


HITS = [
    Hit("prepare", "a token store is begun", 1, KILL, STORE),
    Hit("prepare", "a token store is begun", 1, TERM, STORE),
    Hit("prepare", "a token store is begun", 1, FULL, STORE),
    Hit("prepare", "a token store is whole but has no name", 1, KILL, RENAME, path="*/store/tokens/*"),
    Hit("prepare", "a token store has just got its name", 1, KILL, RENAME, path="*/store/tokens/*", after=True),
    Hit("prepare", "a token store is begun, the other process waits", 2, KILL, STORE),
    Hit("prepare", "a token store is begun, the other process waits", 2, TERM, STORE),
    Hit("before", "a batch is measured", 1, KILL, BEFORE, 2),
    Hit("before", "a batch is measured", 1, TERM, BEFORE, 2),
    Hit("before", "the figures have no name", 1, KILL, RENAME, path="*/store/before/*"),
    Hit("before", "a batch is measured", 2, KILL, BEFORE, rank=1),
    Hit("before", "a batch is measured", 2, TERM, BEFORE, rank=1),
    Hit("step", "the second micro-batch of a step", 1, KILL, STEP, 14),
    Hit("step", "the second micro-batch of a step", 1, TERM, STEP, 14),
    Hit("step", "the optimizer has moved, the schedule has not", 1, KILL, "torch.optim:AdamW.step", 7, after=True),
    Hit("step", "a line of metrics.jsonl is half written", 1, KILL,
        "kit.training.callbacks.metrics_log:MetricsLog.on_log", 3, after=True, damage="tear_metrics"),
    Hit("step", "W&B has begun, which is noted nowhere yet", 1, KILL, "wandb:init", after=True),
    Hit("step", "W&B has just got an entry", 1, KILL, "wandb.sdk.wandb_run:Run.log", 3, after=True),
    Hit("step", "the second micro-batch of a step", 2, KILL, STEP, 14, rank=1),
    Hit("step", "the second micro-batch of a step", 2, TERM, STEP, 14, rank=1),
    Hit("evaluation", "between two batches", 1, KILL, EVALUATION, 2),
    Hit("evaluation", "between two batches", 1, TERM, EVALUATION, 2),
    Hit("evaluation", "all is measured, nothing saved", 1, KILL, f"{_OF_KIT}evaluate", 2, after=True),
    Hit("evaluation", "between two batches", 2, KILL, EVALUATION, 2),
    Hit("evaluation", "between two batches", 2, TERM, EVALUATION, 2, rank=1),
    Hit("save", "between weights and optimizer", 1, KILL, OPTIMIZER_STATE, 2),
    Hit("save", "between weights and optimizer", 1, TERM, OPTIMIZER_STATE, 2),
    Hit("save", "between weights and optimizer", 1, FULL, OPTIMIZER_STATE, 2),
    Hit("save", "all files are there, the marker is not", 1, KILL, MARKER, 2),
    Hit("save", "the marker has no name", 1, KILL, RENAME, 2, path="*/checkpoint-*/complete.json"),
    Hit("save", "the newest checkpoint loses half of a file", 1, KILL, MARKER, 3, after=True, damage="truncate_newest"),
    Hit("save", "the second process is at its random numbers", 2, KILL, "torch:save", path="*/rng_state_1.pth",
        rank=1),
    Hit("save", "between weights and optimizer", 2, KILL, OPTIMIZER_STATE, 2),
    Hit("save", "between weights and optimizer", 2, TERM, OPTIMIZER_STATE, 2, rank=1),
    Hit("save", "between weights and optimizer", 2, FULL, OPTIMIZER_STATE, 2),
    Hit("rotation", "the new checkpoint is whole, the old one there", 1, KILL, ROTATION, 2),
    Hit("rotation", "the new checkpoint is whole, the old one there", 1, TERM, ROTATION, 2),
    Hit("rotation", "the last checkpoint is whole, the one before there", 1, KILL, ROTATION, 7),
    Hit("rotation", "half of the old checkpoint's files are gone", 1, KILL, "os:unlink", path="optimizer.pt",
        after=True),
    Hit("rotation", "the new checkpoint is whole, the old one there", 2, KILL, ROTATION, 2),
    Hit("rotation", "the new checkpoint is whole, the old one there", 2, TERM, ROTATION, 2, rank=0),
    Hit("export", "the last step is done, model/ is not begun", 1, KILL, EXPORT),
    Hit("export", "the last step is done, model/ is not begun", 1, FULL, EXPORT),
    Hit("export", "model/ has just got its name", 1, KILL, RENAME, path="*/run/model", after=True),
    Hit("export", "everything is there but the scorecard", 1, KILL, RENAME, path="*/scorecard.json"),
    Hit("export", "samples are drawn", 1, TERM, "kit.stages:Run.sample", 2),
    Hit("export", "the last step is done, model/ is not begun", 2, KILL, EXPORT),
    Hit("export", "everything is there but the scorecard", 2, TERM, RENAME, path="*/scorecard.json"),
]  # fmt: skip

# One run through all of them; each start gets as far as the next.
_IN_TURN = [
    ("prepare", KILL, Fault(STORE)),
    ("before", TERM, Fault(BEFORE)),
    ("step", KILL, Fault(STEP, 12)),  # behind the first checkpoint
    ("evaluation", TERM, Fault(EVALUATION, 1)),
    ("save", KILL, Fault(MARKER)),
    ("rotation", KILL, Fault(ROTATION)),
    ("export", KILL, Fault(EXPORT)),
]


def in_turn(processes: int) -> list[Hit]:
    """Return a hit in each part, for one run."""
    return [Hit(part, "", processes, by, fault.target, fault.call) for part, by, fault in _IN_TURN]


# ---- a run that is hit


class Runs:
    """Runs of one recipe in folders of their own, and those that were left alone to compare them with."""

    def __init__(self, work: Path) -> None:
        """Work in `work`."""
        self.work = work
        self.corpus = work / "corpus.txt"
        self.corpus.write_text("\n\n\n".join(documents(20, seed=3)), encoding="utf-8")
        self._undisturbed: dict[int, Path] = {}

    def undisturbed(self, processes: int) -> Path:
        """Return the folder of a run that nothing befell."""
        if processes not in self._undisturbed:
            folder = self.work / f"undisturbed-{processes}"
            folder.mkdir()
            codes = self._start(folder, processes, 1, None)
            if any(codes):
                raise RuntimeError(f"the run that is left alone ends with {codes}:\n{self._tail(folder)}")
            self._undisturbed[processes] = folder
        return self._undisturbed[processes]

    def hit(self, hits: list[Hit], folder: Path) -> dict[str, Any]:
        """Start a run in `folder`, hit it at each start once while hits are left, and return what came of it."""
        processes = hits[0].processes
        exit_codes = []
        began = time.monotonic()
        for number in range(1, len(hits) + MOST_STARTS):
            hit = hits[number - 1] if number <= len(hits) else None
            exit_codes.append(self._start(folder, processes, number, hit))
            if hit and hit.damage:
                globals()[hit.damage](folder)
            (folder / "filler").unlink(missing_ok=True)
            if not any(exit_codes[-1]):
                break
        wrong = [
            f"start {number}: exit codes {codes}, not hit as {hit.part}"
            for number, (hit, codes) in enumerate(zip(hits, exit_codes, strict=False), start=1)
            if {KILL: -KILL, TERM: 128 + TERM, FULL: 2}[hit.by] not in codes
        ]
        if any(exit_codes[-1]):
            wrong.append(f"never done: {self._tail(folder)}")
        wrong = wrong or list(differences(folder, self.undisturbed(processes)))
        return {
            "exit_codes": exit_codes,
            "steps_begun_again": steps_begun_again(folder),
            "seconds": round(time.monotonic() - began, 1),
            "wrong": wrong,
        }

    def _start(self, folder: Path, processes: int, number: int, hit: Hit | None) -> list[int]:
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(self._recipe(folder, processes)))
        notes = folder / "notes" / str(number)
        notes.mkdir(parents=True)
        return run_kit(
            ["train", recipe],
            processes,
            change=functools.partial(_before_start, notes, hit, folder / "filler"),
            output=self._output(folder),
        )

    def _output(self, folder: Path) -> Path:
        return self.work / f"{folder.name}.txt"  # beside a disk that may be full

    def _tail(self, folder: Path) -> str:
        return self._output(folder).read_text(errors="replace")[-3000:]

    def _recipe(self, folder: Path, processes: int) -> dict[str, Any]:
        return {
            "task": "causal-lm",
            # Dropout draws random numbers in every step: their state must be resumed too.
            "model": {
                "from_config": {
                    "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32,
                    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
                },
                "tokenizer": {"vocab_size": 300},
            },
            "data": {
                "train": [{"path": str(self.corpus), "separator": "\n\n\n"}],
                "validation": {"fraction": 0.2},
                "block_size": 32,
                "store_dir": str(folder / "store"),
            },
            "training": {**TRAINING, "per_device_train_batch_size": 4 // processes},
            "evaluation": {"prompts": ["the kit"], "generation": {"max_new_tokens": 8}},
            "run": {"output_dir": str(folder / "run")},
            "tracking": {"wandb": {"mode": "offline"}},
        }  # fmt: skip


def _before_start(notes: Path, hit: Hit | None, filler: Path) -> None:
    """Set in the process of a run what is to befall it."""
    if hit and int(os.environ.get("RANK", "0")) == hit.rank:
        install_fault(hit.fault, functools.partial(_fill, filler) if hit.by is FULL else None)
    watch_rows(notes)


def _fill(filler: Path) -> None:
    """Take all that is left of the disk."""
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def tear_metrics(folder: Path) -> None:
    """Leave half of the last line of metrics.jsonl."""
    metrics = folder / "run/metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text[: -len(text.splitlines()[-1]) // 2])


def truncate_newest(folder: Path) -> None:
    """Leave half of the weights in the newest checkpoint."""
    newest = max((folder / "run/checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    weights = newest / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Make `folder` a disk of its own; yield whether that could be done."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # W&B's process may still be ending


# ---- what is compared


def differences(found: Path, expected: Path) -> Iterator[str]:
    """Yield in what a run that was hit differs from the one that was not."""
    weights, wanted = (load_file(folder / "run/model/model.safetensors") for folder in (found, expected))
    if weights.keys() != wanted.keys() or not all(torch.equal(weights[name], wanted[name]) for name in wanted):
        yield "other weights"
    for name in ("scorecard.json", "samples.json"):
        if (found / "run" / name).read_bytes() != (expected / "run" / name).read_bytes():
            yield f"another {name}"
    if read_history(found / "run") != read_history(expected / "run"):
        yield "another metrics.jsonl"
    if tracked(found) != tracked(expected):
        yield "W&B holds something else"
    if rows_trained(found) != rows_trained(expected):
        yield "other rows"
    if more := files(found) ^ files(expected):
        yield f"too many or too few files: {sorted(more)}"


def tracked(folder: Path) -> list[Any]:
    """Return history and summary of each W&B run."""
    runs = read_runs(folder / "run").values()
    return [([computed(entry) for entry in run.history], run.summary) for run in runs]


def rows_trained(folder: Path) -> list[dict[int, list[list[int]]]]:
    """Return the rows of each step's micro-batches, of each process, as they went into the model in the end."""
    trained: list[dict[int, list[list[int]]]] = []
    for start in _starts(folder):
        for rank, notes in enumerate(read_notes(start, "rows")):
            trained += [{}] * (rank + 1 - len(trained))
            of_start: dict[int, list[list[int]]] = {}
            for note in notes:
                of_start.setdefault(note["step"], []).append(note["rows"])
            trained[rank] = trained[rank] | of_start
    return trained


def steps_begun_again(folder: Path) -> int:
    """Count the steps that a start began and an earlier one had begun already."""
    seen: set[int] = set()
    again = 0
    for start in _starts(folder):
        steps = {note["step"] for notes in read_notes(start, "rows") for note in notes}
        again += len(steps & seen)
        seen |= steps
    return again


def _starts(folder: Path) -> list[Path]:
    return sorted((folder / "notes").iterdir(), key=lambda path: int(path.name))


def files(folder: Path) -> set[str]:
    """Return all that lies in a folder, but what W&B names after the time and what belongs to the benchmark."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in names if not name.startswith(("notes", "run/wandb/", "recipe.yaml"))}


# ---- results


def run_case(runs: Runs, hits: list[Hit], name: str) -> dict[str, Any]:
    """Run a case in a folder of its own, and say what came of it; `skipped` tells where it could not be."""
    folder = runs.work / name
    folder.mkdir()
    facts = {name: value for name, value in asdict(hits[0]).items() if name in ("part", "where", "processes")}
    facts["by"] = {KILL: "SIGKILL", TERM: "SIGTERM", FULL: "full disk"}[hits[0].by]
    facts["damage"] = hits[0].damage
    if len(hits) > 1:
        facts |= {"part": ", ".join(hit.part for hit in hits), "by": ", ".join(signal.Signals(h.by).name for h in hits)}
    needs_disk = any(hit.by is FULL for hit in hits)
    with small_disk(folder) if needs_disk else nullcontext(True) as possible:
        result = facts | (runs.hit(hits, folder) if possible else {"skipped": "no right to mount a tmpfs"})
        print(f"{name:>4} {_in_words(result)}", flush=True)
        return result


def _in_words(result: dict[str, Any]) -> str:
    case = f"{result['processes']} process(es), {result['part']}: {result['by']}, {result['where']}"
    if "skipped" in result:
        return f"{case}: skipped, {result['skipped']}"
    came_of_it = "; ".join(result["wrong"]) or f"nothing lost, {result['steps_begun_again']} steps begun again"
    return f"{case}: {came_of_it} ({result['seconds']} s)"


def describe_setting() -> dict[str, Any]:
    """Return versions and machine."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "wandb")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, {platform.system()} {platform.release()}",
    }


def table(result: dict[str, Any]) -> str:
    """Return the table of docs/resilience.md."""
    lines = [
        "| part | hit while | SIGKILL | SIGTERM | full disk | 2 processes | steps begun again | bit-identical |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for part in PARTS:
        cases = [case for case in result["cases"] if case["part"] == part and "skipped" not in case]
        where = "; ".join(dict.fromkeys(case["where"] for case in cases))
        again = [case["steps_begun_again"] for case in cases]
        cells = [part, where, *(sum(case["by"] == by for case in cases) for by in ("SIGKILL", "SIGTERM", "full disk"))]
        cells += [sum(case["processes"] == 2 for case in cases), _range(again)]
        cells += [f"{sum(not case['wrong'] for case in cases)} of {len(cases)}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def write_table(result: dict[str, Any]) -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(result) + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    """Hit all runs, say what came of each, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two runs, each hit in each part in turn; writes nothing")
    parser.add_argument("--only", metavar="TEXT", help="cases with this in what is said of them; writes nothing")
    parser.add_argument("--work", help="a new folder for the runs, which are kept there; else a temporary one")
    options = parser.parse_args()
    cases = [in_turn(1), in_turn(2)] if options.short else [[hit] for hit in HITS]
    cases = [case for case in cases if (options.only or "") in str(case)]
    with ExitStack() as stack:
        work = Path(options.work or stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        runs = Runs(work)
        results = [run_case(runs, hits, str(number)) for number, hits in enumerate(cases, start=1)]
    if not options.short and not options.only:
        result = {"cases": results, **describe_setting()}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_table(result)
    sys.exit(any(result.get("wrong") for result in results))


if __name__ == "__main__":
    main()
