"""`kit check`: everything about a recipe that can be found without training it, and with `--probe` two steps of it."""

import dataclasses
import resource
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kit.console import is_main_process, quiet_libraries, say, table, warn
from kit.model.freezing import count_parameters
from kit.recipe.loading import recipe_settings
from kit.recipe.models import Recipe
from kit.stages import TASKS, Run, extend_model, prepare_run, run_training
from kit.training.arguments import make_training_arguments
from kit.training.checkpoints import choose_checkpoint
from kit.training.disk import check_room, in_units, size_of
from kit.training.earlier_run import effective_resume, is_finished
from kit.training.memory import estimate_memory, out_of_memory_explained
from kit.training.peers import ending_together
from kit.training.plan import StepPlan
from kit.training.preemption import Preemption
from kit.training.resolving import resolve_recipe
from kit.training.run_directory import RunDirectory, read_status
from kit.training.sharding import is_sharded
from kit.training.timings import measure_choices
from kit.training.topology import barrier, check_topology, describe, from_main_process

_PROBE_STEPS = 2
_PROBE_DOCUMENTS = 4
_GIB = 2**30


def check(recipe_path: str, overrides: list[str], probe: bool = False, compiles: bool = False) -> None:
    """Find everything that is wrong with a recipe before it trains, and show what it is going to do.

    Nothing is written but token stores and, with `probe`, rows of the frozen-prefix cache; the run itself then finds
    both.

    Args:
        recipe_path: the recipe's file.
        overrides: `section.key=value`.
        probe: also train two steps, evaluate, save and load what was saved, in a temporary folder.
        compiles: with the probe, also compile the model, and say whether that pays.

    Raises:
        UserError: the recipe cannot be run.
    """
    quiet_libraries()
    recipe = resolve_recipe(recipe_path, overrides)
    directory = RunDirectory(recipe.run.output_dir)
    args, precision = make_training_arguments(recipe, TASKS[recipe.task], directory.checkpoints)
    check_topology(args)
    resume, state = from_main_process(lambda: _check_folder(recipe, directory, args))
    say(f"recipe {recipe_path}: {recipe.task}, into {directory.path} ({state})")
    say(f"{args.world_size} process(es) on {describe(args)['device']}, {precision}")
    with ending_together(recipe) as preemption, out_of_memory_explained(recipe, args):
        run = prepare_run(recipe, args, None)
        from_main_process(lambda: _check_rest(run, directory, resume))
        plan = run.plan_steps()
        if is_main_process():
            run.task.print_examples(run.corpus, run.tokenizer)
        run = extend_model(run)
        if is_main_process():
            print_what_trains(run)
            print_plan(run, plan)
            print_memory(run)
        say(f"disk: {from_main_process(lambda: check_room(run.model, recipe, plan, directory.checkpoints))}")
        if probe:
            probe_run(run, plan, preemption, compiles)
    say(f"\nnothing found that would stop it: kit train {shlex.join([recipe_path, *overrides])}")


def _check_folder(recipe: Recipe, directory: RunDirectory, args: TrainingArguments) -> tuple[str, str]:
    """Return what `run.resume` comes to, and what the run's folder holds; nothing in it is touched.

    Raises:
        UserError: the folder cannot be written, or holds something that this recipe's run cannot go on with.
    """
    directory.check()
    recipe = recipe.model_copy(update={"run": effective_resume(recipe, directory)})
    finished = is_finished(recipe, TASKS[recipe.task], directory, args.seed, args.world_size)
    status = read_status(directory.path)
    state = {"missing": "a new run", "prepared": "a new run, prepared"}.get(status, f"holds a run: {status}")
    return recipe.run.resume, f"{state}: nothing is left to do" if finished else state


def _check_rest(run: Run, directory: RunDirectory, resume: str) -> None:
    """Check what a run looks at only once data and model are there.

    Raises:
        UserError: there is no checkpoint to go on from, or a prompt is too long.
    """
    settings = recipe_settings(run.recipe, run.args.world_size)
    fingerprints = {"recipe": settings, "data": run.corpus.key, "model": run.model_key}
    if not directory.is_finished() or resume not in ("auto", "must"):
        checkpoint, _ = choose_checkpoint(resume, directory.checkpoints, fingerprints, run.recipe.run.resume_with)
        if checkpoint:
            say(f"goes on from {checkpoint}")
    run.task.check_prompts(run.model, run.tokenizer, run.recipe)


def print_what_trains(run: Run) -> None:
    """Print the model's parameters and which of them train."""
    model = run.model
    total, trainable = count_parameters(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    rows, used = embedding.shape[0], max(run.tokenizer.get_vocab().values()) + 1
    say(
        f"\n{type(model).__name__}: {total:,} parameters, {trainable:,} train ({trainable / total:.1%}); "
        f"{'' if head is None else 'tied ' if tied else 'untied '}embeddings of {rows:,} rows for "
        f"{len(run.tokenizer):,} tokens" + (f", {rows - used:,} of them spare" if rows > used else "")
    )


def print_plan(run: Run, plan: StepPlan) -> None:
    """Print rows, steps and what else the task counts."""
    args = run.args
    factors = [str(args.per_device_train_batch_size)]
    factors += [str(n) for n in (args.gradient_accumulation_steps, args.world_size) if n > 1]
    per_step, in_all = run.task.describe_steps(run.corpus, run.recipe, plan.rows_per_step, plan.epochs)
    say(
        f"{' × '.join(factors)} rows{per_step} per optimizer step; {plan.rows:,} rows = {plan.steps_per_epoch:,} steps "
        f"per epoch"
    )
    evaluations, checkpoints = plan.stops
    say(
        f"{plan.steps:,} steps = {plan.epochs:.2f} epochs{in_all}; "
        f"learning rate {args.learning_rate:g} ({args.lr_scheduler_type.value}, {args.get_warmup_steps(plan.steps):,} "
        f"warm-up steps); {evaluations:,} evaluations and {checkpoints:,} checkpoints on the way"
    )


def print_memory(run: Run) -> None:
    """Print an estimate of the memory that training takes on one device, and what the device has."""
    batch = run.task.largest_batch(run.corpus, run.recipe, run.args)
    parts = estimate_memory(run.model, run.args, run.task, batch)
    known = sum(size for size in parts.values() if size is not None)
    rows = [[name, "unknown" if size is None else in_units(size)] for name, size in parts.items()]
    table(
        "Memory of training on one device, estimated",
        ["what", "size"],
        [*rows, ["together", in_units(known)]],
    )
    if parts["activations"] is None:
        warn(
            f"what {type(run.model).__name__} keeps for the backward pass cannot be counted without running it: "
            f"`kit check --probe` does"
        )
    available = _available_memory(run.args.device, run.args.world_size)
    if known > available:
        warn(
            f"that is more than the {available / _GIB:.1f} GiB there are: lower `training.per_device_train_batch_size`"
        )


def _available_memory(device: torch.device, processes: int) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total / processes


# ---- The probe


def probe_run(run: Run, plan: StepPlan, preemption: Preemption, compiles: bool) -> None:
    """Train two real steps, evaluate a few documents, save, load again and compare, in a folder that goes again.

    Then show what was taken of precision, optimizer, loss and compilation, and the times behind it.
    """
    # Beside the token stores: neither where the run is going to be, nor where it would be looked for.
    folder = from_main_process(lambda: tempfile.mkdtemp(prefix=".probe-", dir=run.recipe.data.store_dir))
    try:
        _probe_in(Path(folder), run, plan, preemption, compiles)
        barrier()  # the others may still be reading
    finally:
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)


def _probe_in(folder: Path, run: Run, plan: StepPlan, preemption: Preemption, compiles: bool) -> None:
    directory = RunDirectory(folder)
    recipe = run.recipe.model_copy(
        update={
            "training": run.recipe.training | {"report_to": "none"},
            "run": run.recipe.run.model_copy(update={"resume": "never"}),
        }
    )
    args, precision = make_training_arguments(recipe, run.task, directory.checkpoints)
    sets = {name: documents.first(_PROBE_DOCUMENTS) for name, documents in run.corpus.sets.items()}
    corpus = dataclasses.replace(run.corpus, sets=sets)
    freezing, phases = run.plan, 1
    if freezing:  # a step in each phase, and more in the last, which takes the most time and memory
        phases = len(freezing.phases)
        soon = (dataclasses.replace(phase, start=i, warmup_steps=0) for i, phase in enumerate(freezing.phases))
        freezing = dataclasses.replace(freezing, phases=tuple(soon))
    probe = dataclasses.replace(run, recipe=recipe, args=args, directory=directory, corpus=corpus, plan=freezing)
    stop = _StopAfter(phases - 1 + _PROBE_STEPS, evaluate=bool(sets))
    say()
    run_training(probe, None, preemption, stop)
    rate = "at most, at the rate of the last phase," if phases > 1 else "about"
    say(
        f"probe: {len(stop.seconds)} steps ({', '.join(f'{s:.2f} s' for s in stop.seconds)}), an evaluation and a "
        f"checkpoint of {size_of(directory.checkpoints) / 2**20:,.0f} MiB; all {plan.steps:,} steps take {rate} "
        f"{_duration(stop.seconds[-1] * plan.steps)}, evaluations apart"
    )
    if is_main_process():
        probe.save(directory.model)
        say(f"probe: saved and loaded again, the model gives the same logits; at most {_peak_memory(args)} in use")
    if is_sharded(args):
        say("precision, optimizer and loss are not measured on a model in shards")
        return
    rows = range(min(args.per_device_train_batch_size, len(corpus.rows)))
    batch = corpus.collate([corpus.rows[row] for row in rows])
    choices = measure_choices(run.model, args, run.task, batch, precision, plan.steps, compiles)
    table("What was taken, and the times behind it", ["what", "taken", "measured"], [list(row) for row in choices])


class _StopAfter(TrainerCallback):
    """Takes the time of each optimizer step, and ends the training with an evaluation and a checkpoint after a few.

    So the steps are those of the run itself: a run with fewer would have another learning rate.
    """

    def __init__(self, steps: int, evaluate: bool) -> None:
        self.steps, self.evaluate = steps, evaluate
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        if state.global_step >= min(self.steps, state.max_steps):
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = self.evaluate
        return control


def _peak_memory(args: TrainingArguments) -> str:
    if args.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / _GIB:.2f} GiB of GPU memory were"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / _GIB:.2f} GiB of memory, Python and its libraries included, were"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
