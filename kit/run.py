"""The product in reading order: what each command does, from recipe to scorecard."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from kit.console import is_main_process, quiet_libraries, say, warn
from kit.data.corpus import Corpus
from kit.data.ledger import check_dropped, ledger_as_json, print_ledger
from kit.errors import UserError
from kit.evaluation.samples import continue_prompts, print_samples
from kit.evaluation.scorecard import Figures, make_scorecard, print_figures, print_scorecard
from kit.files import build_once, hash_values, make_folder, read_json, read_seal, write_json
from kit.model.adapter_files import Adapter, base_facts
from kit.model.declared_tokens import with_tokens_read
from kit.model.freezing import count_parameters
from kit.model.loading import model_key
from kit.model.saving import save_model, saved_model_difference
from kit.model.tokenizer import describe_special_tokens, tokenizer_key
from kit.model.vocabulary import Extension
from kit.model.vocabulary_audit import print_audit
from kit.recipe.loading import dump_recipe, load_recipe, overrides_for_model, recipe_fingerprint
from kit.recipe.models import Recipe
from kit.tasks import causal_lm
from kit.tracking import WandbTracker, tracked
from kit.training.adapters import adapter_key, insert_adapter
from kit.training.added_tokens import AddedTokens, Base, audit_added_tokens, report_untrained, save_audit
from kit.training.arguments import make_training_arguments
from kit.training.attempt import attempt, holding
from kit.training.callbacks.display import Display
from kit.training.callbacks.metrics_log import MetricsLog
from kit.training.callbacks.unfreezing import Unfreezing
from kit.training.checkpoints import choose_checkpoint, discard_after
from kit.training.earlier_run import check_same_recipe, effective_resume, inputs_key, is_finished
from kit.training.freezing import FreezingPlan, check_frozen, fingerprint_frozen, make_plan, plan_as_rows, print_plan
from kit.training.memory import out_of_memory_explained
from kit.training.plan import plan_steps
from kit.training.preemption import Preemption
from kit.training.run_directory import RunDirectory, read_status
from kit.training.topology import (
    barrier,
    check_agreement,
    check_topology,
    describe,
    from_main_process,
    local_main_process_first,
)
from kit.training.trainer import KitTrainer

_BEFORE_FORMAT = 2  # raise it whenever a figure is computed, or a sample drawn or shown, in another way
TASKS: dict[str, ModuleType] = {"causal-lm": causal_lm}


def train(recipe_path: str, overrides: list[str]) -> None:
    """Adapt a model as a recipe says, from raw text to scorecard, or go on where an earlier attempt stopped.

    Raises:
        UserError: the recipe, its data or its model cannot be used.
        Preempted: SIGTERM; the same command goes on from what was saved.
    """
    quiet_libraries()
    recipe = resolve_recipe(recipe_path, overrides)
    directory = RunDirectory(recipe.run.output_dir)
    with attempt(directory, recipe) as preemption:
        args, precision = make_training_arguments(recipe, TASKS[recipe.task], directory.checkpoints)
        check_topology(args)
        asked = recipe
        recipe = asked.model_copy(update={"run": from_main_process(lambda: effective_resume(asked, directory))})
        if recipe.run.resume == "never":
            from_main_process(directory.move_aside)
        elif from_main_process(lambda: is_finished(recipe, directory, args.seed)):
            print_scorecard(read_json(directory.scorecard))
            say(f"{directory.path} is finished: nothing to do (`run.resume=never` runs it again)")
            return
        inputs = from_main_process(lambda: inputs_key(recipe, args.seed))
        facts = {"topology": describe(args), "precision": precision, "resume": asked.run.resume, "inputs": inputs}
        directory.start(dump_recipe(asked), **facts)
        say(f"{directory.path}: {args.world_size} process(es) on {args.device.type}, {precision}")
        with out_of_memory_explained(recipe, args, directory):
            run = prepare_run(recipe, args, directory)
            before = measure_before(run)
            run = extend_model(run, before["figures"])
            total, trainable = count_parameters(run.model)
            directory.note(data=run.corpus.key, model=run.model_key, parameters=total, trainable=trainable)
            with tracked(recipe, directory.path) as tracker:
                figures = run_training(run, tracker, preemption)
                after = {"figures": figures or run.measure(), "samples": from_main_process(run.sample)}
                scorecard = finish(run, before, after, tracker)
        print_scorecard(scorecard)
        merged = f" (an adapter: `kit merge {directory.path}` makes a plain model)" if run.adapter else ""
        say(f"model: {directory.model}{merged}    scorecard: {directory.scorecard}")


def prepare(recipe_path: str, overrides: list[str]) -> None:
    """Do all of a run that needs no training: tokenizer, token stores, ledger, the base model's figures, new tokens."""
    quiet_libraries()
    recipe = resolve_recipe(recipe_path, overrides)
    directory = RunDirectory(recipe.run.output_dir)
    args, _ = make_training_arguments(recipe, TASKS[recipe.task], directory.checkpoints)
    check_topology(args)
    with holding(directory):
        from_main_process(lambda: check_same_recipe(recipe, directory))
        with out_of_memory_explained(recipe, args):
            # What a finished run says of itself stays as it is.
            run = prepare_run(recipe, args, None if directory.is_finished() else directory)
            before = measure_before(run)["figures"]
            print_figures("Before training", before)
            extend_model(run, before)


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
    recipe = recipe.model_copy(update={"vocabulary": None, "freezing": None, "adapter": None})
    args, _ = make_training_arguments(recipe, TASKS[recipe.task], directory.checkpoints)
    check_topology(args)
    with out_of_memory_explained(recipe, args):
        run = prepare_run(recipe, args, None, measures_only=True)
        figures = run.measure()
    if not run.corpus.sets:
        raise UserError(f"{recipe_path}: nothing to evaluate: give `data.validation` or `evaluation.sets`")
    print_figures(recipe.model.name_or_path or "fresh model", figures)
    if output and is_main_process():
        write_json(output, {"task": recipe.task, "model": recipe.model.name_or_path, "sets": figures})


# ---- the parts of a run, in their order


@dataclass(frozen=True)
class Run:
    """A recipe with everything that was made from it.

    `extension` and `base` are there where the recipe has a `vocabulary`; `model` has no rows for the tokens that it
    adds until `extend_model` gives it some, and `added` then tells of them.
    """

    recipe: Recipe
    task: ModuleType
    args: TrainingArguments
    directory: RunDirectory | None
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    model: PreTrainedModel
    model_key: str
    extension: Extension | None = None
    base: Base | None = None
    added: AddedTokens | None = None
    untrained: Mapping[str, Figures] = field(default_factory=dict)
    plan: FreezingPlan | None = None
    adapter: Adapter | None = None

    def measure(self, poll: Callable[[], None] = lambda: None) -> dict[str, Figures]:
        """Return the model's figures on every evaluation set."""
        return self.task.evaluate(self.model, self.corpus, self.recipe, self.tokenizer, self.args, poll)

    def save(self, folder: Path) -> float:
        """Write the model, load it again, and return by how much their logits differ: 0.0, or it is an error."""
        save_model(self.model, self.tokenizer, folder, self.adapter)
        return saved_model_difference(self.model, folder, self.recipe.model if self.adapter else None)

    def sample(self) -> list[list[str]]:
        """Return continuations of the recipe's prompts."""
        generation = self.recipe.evaluation.generation.model_dump()
        return continue_prompts(self.model, self.tokenizer, self.recipe.evaluation.prompts, **generation)


def prepare_run(
    recipe: Recipe, args: TrainingArguments, directory: RunDirectory | None, measures_only: bool = False
) -> Run:
    """Make tokenizer, token stores, rows, ledger and model; the first process of each machine builds what is missing.

    Args:
        recipe: the recipe.
        args: its training arguments.
        directory: where the ledger is written; nowhere where None.
        measures_only: nothing is going to be trained, so that the training data need not suffice for it.

    Raises:
        UserError: data or model cannot be used, or more tokens would be dropped than the recipe allows.
    """
    task = TASKS[recipe.task]
    task.check_early(recipe, trains=not measures_only)

    def prepare_data() -> tuple[PreTrainedTokenizerBase, Corpus, Extension | None, Base | None]:
        make_folder("data.store_dir", recipe.data.store_dir)
        try:
            original = task.prepare_tokenizer(recipe)
            tokenizer, extension = task.extend_vocabulary(recipe, original)
            corpus = task.prepare_examples(recipe, tokenizer, args.seed)
            if extension is None:
                return tokenizer, corpus, None, None
            return tokenizer, corpus, extension, Base(original, *task.recode_examples(recipe, corpus, original))
        except MemoryError as error:
            raise UserError(f"out of memory while the data is prepared ({error}); lower `data.num_proc`") from error

    tokenizer, corpus, extension, base = local_main_process_first(prepare_data)
    check_agreement("the same data", corpus.key, tokenizer_key(tokenizer))
    if not measures_only:
        describe_special_tokens(tokenizer)
        print_ledger(corpus.ledger)
        if directory and is_main_process():
            write_json(directory.ledger, ledger_as_json(corpus.ledger))
        check_dropped(corpus.ledger, recipe.data.max_dropped)
        if not corpus.sets:
            warn("nothing is measured, before or after: give `data.validation` or `evaluation.sets`")
        plan_steps(len(corpus.rows), args)
    original = base.tokenizer if base else tokenizer
    model = task.load_model(recipe, original, args.seed).to(args.device)
    # Hashing the weights of a large model takes a while: once is enough.
    key = from_main_process(lambda: model_key(recipe.model, args.seed))
    return Run(recipe, task, args, directory, tokenizer, corpus, model, key, extension, base)


def measure_before(run: Run) -> dict[str, Any]:
    """Return figures and samples of the base model, with its own tokenizer."""
    if run.base:
        run = dataclasses.replace(run, tokenizer=run.base.tokenizer, corpus=run.base.corpus)
    return _measure_once(run, "before")


def extend_model(run: Run, before: Mapping[str, Figures] | None = None) -> Run:
    """Give the tokens that the recipe adds their embeddings, audit them, put the adapter in, and freeze the rest.

    Args:
        run: what was prepared; its model changes in place.
        before: figures of the model as it was, to say what the new tokens alone do to them; else nothing is measured.
    """
    added, untrained, new_ids, adapter = None, {}, [], None
    base = base_facts(run.model, run.recipe.model) if run.recipe.adapter else None
    if run.extension:
        rows_before = run.model.get_input_embeddings().weight.shape[0]
        run.task.extend_model(run.model, run.recipe, run.tokenizer, run.extension, run.args.seed)
        added = audit_added_tokens(run.model, rows_before, run.extension, run.tokenizer, run.corpus, run.base)
        check_agreement("the same new embeddings", added.key)
        print_audit(added.audit)
        if before:
            untrained = _measure_once(run, "extended", run.recipe.vocabulary.model_dump(), run.args.seed)["figures"]
            report_untrained(before, untrained)
        new_ids = [row.id for row in run.extension.rows]
    if base:
        adapter = insert_adapter(run.model, run.recipe, base, new_ids, run.args.seed)
        check_agreement("the same adapter", adapter_key(run.model), base.fingerprint)
    plan = make_plan(run.model, run.recipe.freezing, new_ids, plan_steps(len(run.corpus.rows), run.args))
    if plan:
        print_plan(run.model, plan, run.args)
        if run.directory and is_main_process():
            write_json(run.directory.freezing, plan_as_rows(run.model, plan, run.args))
    run = dataclasses.replace(run, added=added, untrained=untrained, plan=plan, adapter=adapter)
    if added and run.directory and is_main_process():
        save_audit(added, run.directory.vocabulary, untrained)
    return run


def _measure_once(run: Run, *state: Any) -> dict[str, Any]:
    """Return figures and samples of the run's model in a certain state, from the store if they were taken before."""
    sets = {name: documents.key for name, documents in run.corpus.sets.items()}
    asked = run.recipe.evaluation.model_dump(mode="json")
    versions = [torch.__version__, transformers.__version__, run.args.device.type]
    derived_from = [run.model_key, tokenizer_key(run.tokenizer), sets, run.recipe.data.block_size, asked, versions]
    key = hash_values(*state, _BEFORE_FORMAT, *derived_from)
    folder = Path(run.recipe.data.store_dir) / "before" / key
    if not from_main_process(lambda: read_seal(folder) is not None):
        # The prompts first: one that is too long should not be found after everything was measured.
        samples = from_main_process(run.sample)
        measured = {"figures": run.measure(), "samples": samples}
        if is_main_process():
            build_once(folder, lambda temporary: write_json(temporary / "before.json", measured))
        barrier()
    return read_json(folder / "before.json")


def run_training(
    run: Run, tracker: WandbTracker | None, preemption: Preemption, *watchers: TrainerCallback
) -> dict[str, Figures] | None:
    """Train the run's model in place, from the checkpoint that `run.resume` chooses.

    Args:
        run: what was prepared.
        tracker: of the W&B run, if there is one.
        preemption: where a SIGTERM is noticed.
        watchers: callbacks beside the kit's own.

    Returns:
        The figures of the trained model, if the last evaluation on the way measured it.
    """
    recipe, directory = run.recipe, run.directory
    fingerprints = {"recipe": recipe_fingerprint(recipe), "data": run.corpus.key, "model": run.model_key}
    checkpoint = from_main_process(lambda: _resume_point(run, fingerprints))
    say(f"resuming from {checkpoint}" if checkpoint else "training from the start")
    unfreezing = Unfreezing(run.plan.phases) if run.plan else None
    callbacks = [MetricsLog(directory.metrics), *([unfreezing] if unfreezing else []), *watchers]
    if recipe.run.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.run.early_stopping.patience, recipe.run.early_stopping.threshold))
    if tracker:
        callbacks.append(tracker.callback())
    use_cache = run.model.config.use_cache
    trainer = KitTrainer(
        model=run.model,
        args=run.args,
        data_collator=run.corpus.collate,
        train_dataset=run.corpus.rows,
        eval_dataset=run.corpus.sets or None,
        processing_class=run.tokenizer,
        callbacks=callbacks,
        task=run.task,
        measure=run.measure,
        preemption=preemption,
        fingerprints=fingerprints,
        plan=run.plan,
        adapter=run.adapter,
    )
    # Trainer writes `use_cache: false` into the configuration that is saved, which makes generation slow for whoever
    # loads the model; the kit passes `use_cache` with every call instead.
    run.model.config.use_cache = use_cache
    display = Display(lambda: float(trainer.weight_seen), tells_end=not watchers)
    trainer.add_callback(display)
    frozen = fingerprint_frozen(run.model, run.plan) if run.plan else {}
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        display.close()
        if unfreezing:
            unfreezing.close()
    if run.plan:
        check_frozen(run.model, run.plan, frozen)
    # Takes accelerate's autocast off the model's forward again.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return trainer.final_figures()


def finish(run: Run, before: dict[str, Any], after: dict[str, Any], tracker: WandbTracker | None) -> dict[str, Any]:
    """Save model, samples and scorecard, the scorecard last: it marks the run as finished."""
    scorecard = make_scorecard(run.recipe.task, before["figures"], after["figures"], run.untrained)
    if is_main_process():
        run.directory.note(reloaded_logits_differ_by=run.save(run.directory.model))
        pairs = zip(run.recipe.evaluation.prompts, before["samples"], after["samples"], strict=True)
        samples = [{"prompt": prompt, "before": old, "after": new} for prompt, old, new in pairs]
        write_json(run.directory.samples, samples)
        print_samples(samples)
        if run.added:
            save_audit(run.added, run.directory.vocabulary, run.untrained, (run.model, run.tokenizer))
        if tracker:
            tracker.summarise(scorecard)
        write_json(run.directory.scorecard, scorecard)
    barrier()
    return scorecard


# ---- around a run


def status(recipe_path: str, overrides: list[str]) -> tuple[str, str]:
    """Return the run directory of a recipe and how its run stands."""
    folder = resolve_recipe(recipe_path, overrides, reads_words=False).run.output_dir
    return folder, read_status(folder)


def resolve_recipe(recipe_path: str, overrides: list[str], reads_words: bool = True) -> Recipe:
    """Load a recipe and settle the folder of its run, by default named after the file, and the words that it adds.

    A run's own `recipe.yaml` so holds the words themselves, whatever becomes of the file that they were read from.
    """
    recipe = load_recipe(recipe_path, overrides)
    folder = recipe.run.output_dir or f"runs/{Path(recipe_path).stem}"
    settled = {"run": recipe.run.model_copy(update={"output_dir": folder})}
    if reads_words:
        settled["vocabulary"] = with_tokens_read(recipe.vocabulary)
    return recipe.model_copy(update=settled)


def _resume_point(run: Run, fingerprints: dict[str, str]) -> Path | None:
    checkpoints = run.directory.checkpoints
    checkpoint = choose_checkpoint(run.recipe.run.resume, checkpoints, run.args.world_size, fingerprints)
    discard_after(checkpoint, checkpoints)
    return checkpoint
