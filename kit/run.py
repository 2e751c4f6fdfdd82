"""The product in reading order: what each command does, from recipe to scorecard."""

from pathlib import Path

from kit.console import is_main_process, quiet_libraries, say
from kit.errors import UserError
from kit.files import read_json, write_json
from kit.model.freezing import count_parameters
from kit.recipe.loading import dump_recipe, load_recipe, overrides_for_model
from kit.stages import TASKS, extend_model, finish, measure_before, prepare_run, run_training
from kit.tracking.wandb_run import tracked
from kit.training.arguments import make_training_arguments
from kit.training.attempt import attempt, holding
from kit.training.disk import check_room
from kit.training.earlier_run import check_same_recipe, effective_resume, inputs_key, is_finished
from kit.training.memory import out_of_memory_explained
from kit.training.peers import ending_together
from kit.training.plan import describe_global_batch
from kit.training.resolving import resolve_recipe
from kit.training.run_directory import RunDirectory
from kit.training.topology import (
    check_topology,
    describe,
    from_main_process,
)


def train(recipe_path: str, overrides: list[str]) -> None:
    """Adapt a model as a recipe says, from raw text to scorecard, or go on where an earlier attempt stopped.

    Raises:
        UserError: the recipe, its data or its model cannot be used.
        Preempted: SIGTERM; the same command goes on from what was saved.
    """
    quiet_libraries()
    recipe = resolve_recipe(recipe_path, overrides)
    task = TASKS[recipe.task]
    directory = RunDirectory(recipe.run.output_dir)
    with attempt(directory):
        args, precision = make_training_arguments(recipe, task, directory.checkpoints)
        check_topology(args)
        with ending_together(recipe, directory) as preemption, out_of_memory_explained(recipe, args):
            asked = recipe
            recipe = asked.model_copy(update={"run": from_main_process(lambda: effective_resume(asked, directory))})
            if recipe.run.resume == "never":
                from_main_process(directory.move_aside)
            elif from_main_process(lambda: is_finished(recipe, task, directory, args.seed, args.world_size)):
                task.print_scorecard(read_json(directory.scorecard))
                say(f"{directory.path} is finished: nothing to do (`run.resume=never` runs it again)")
                return
            inputs = from_main_process(lambda: inputs_key(recipe, task, args.seed))
            facts = {"topology": describe(args), "precision": precision, "resume": asked.run.resume, "inputs": inputs}
            facts["recipe"] = recipe_path
            directory.start(dump_recipe(asked), **facts)
            say(f"{directory.path}: {args.world_size} process(es) on {args.device.type}, {precision}")
            say(describe_global_batch(args))
            with directory.timed("preparation"):
                run = prepare_run(recipe, args, directory)
                before = measure_before(run)
                run = extend_model(run, before["figures"])
            from_main_process(lambda: check_room(run.model, recipe, run.plan_steps(), directory.checkpoints))
            total, trainable = count_parameters(run.model)
            directory.note(data=run.corpus.key, model=run.model_key, parameters=total, trainable=trainable)
            with tracked(recipe, directory.path) as tracker, directory.timed("training"):
                figures = run_training(run, tracker, preemption)
                run.settle()
                after = {**run.measure_all(figures), "samples": run.sample()}
                scorecard = finish(run, before, after, tracker)
        task.print_scorecard(scorecard)
        merged = f" (an adapter: `kit merge {directory.path}` makes a plain model)" if run.adapter else ""
        say(f"model: {directory.model}{merged}    scorecard: {directory.scorecard}")


def prepare(recipe_path: str, overrides: list[str]) -> None:
    """Do all of a run that needs no training: tokenizer, token stores, ledger, the base model's figures, new tokens."""
    quiet_libraries()
    recipe = resolve_recipe(recipe_path, overrides)
    directory = RunDirectory(recipe.run.output_dir)
    args, _ = make_training_arguments(recipe, TASKS[recipe.task], directory.checkpoints)
    check_topology(args)
    with ending_together(recipe), holding(directory):
        from_main_process(lambda: check_same_recipe(recipe, directory))
        with out_of_memory_explained(recipe, args):
            # What a finished run says of itself stays as it is.
            run = prepare_run(recipe, args, None if directory.is_finished() else directory)
            before = measure_before(run)["figures"]
            run.task.print_figures("Before training", before)
            extend_model(run, before)
        directory.end("prepared")


def evaluate(target: str, overrides: list[str], model: str | None, output: str | None) -> None:
    """Measure a model on the evaluation sets of a recipe, or of the recipe that a run directory holds."""
    quiet_libraries()
    directory = RunDirectory(target)
    if output and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise UserError(f"--output: `{output}` is a folder, or its folder does not exist; expected a file to write")
    recipe_path = directory.recipe if directory.path.is_dir() else Path(target)
    if directory.path.is_dir() and model is None:
        if not directory.model.is_dir():
            raise UserError(f"{target}: no finished run (it has no model/); expected a run directory or a recipe file")
        model = str(directory.model)
    recipe = load_recipe(recipe_path, [*overrides, *(overrides_for_model(model) if model else [])])
    if recipe.vocabulary and not model:
        say("measured is the base model, with its own tokens: the recipe's `vocabulary` is added when it trains")
    untrained = recipe.run.model_copy(update={"global_batch_size": None})
    recipe = recipe.model_copy(update={"vocabulary": None, "freezing": None, "adapter": None, "run": untrained})
    args, _ = make_training_arguments(recipe, TASKS[recipe.task], directory.checkpoints)
    check_topology(args)
    with ending_together(recipe), out_of_memory_explained(recipe, args):
        run = prepare_run(recipe, args, None, measures_only=True)
        figures = run.measure_all(details=False)["figures"]
    if not run.corpus.sets:
        raise UserError(f"{recipe_path}: nothing to evaluate: give `data.validation` or `evaluation.sets`")
    run.task.print_figures(recipe.model.name_or_path or "fresh model", figures)
    if output and is_main_process():
        write_json(output, {"task": recipe.task, "model": recipe.model.name_or_path, "sets": figures})
