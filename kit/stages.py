"""The stages of a run in their order, from data and model to scorecard; `kit.run` says which command has which."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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

from kit.console import is_main_process, say, warn
from kit.data.corpus import Corpus
from kit.data.labeled_corpus import LabeledCorpus
from kit.errors import UserError
from kit.evaluation.inference import inference
from kit.evaluation.samples import print_samples
from kit.evaluation.scorecard import Figures
from kit.files import hash_values, make_folder, write_json, write_text
from kit.model.activations import fuse_activations
from kit.model.adapter_files import Adapter, base_facts
from kit.model.attention import settle_attention
from kit.model.chunked_loss import compute_whole_logits
from kit.model.loading import model_key
from kit.model.new_rows import put_back, set_apart
from kit.model.saving import save_model, saved_model_difference
from kit.model.shards import in_shards
from kit.model.tokenizer import tokenizer_key
from kit.model.vocabulary import Extension
from kit.model.vocabulary_audit import print_audit
from kit.recipe.loading import recipe_settings
from kit.recipe.models import Recipe
from kit.tasks import causal_lm, sequence_classification
from kit.tracking.reporters import settle_reporters
from kit.tracking.wandb_run import WandbTracker
from kit.training.adapters import adapter_key, insert_adapter
from kit.training.added_tokens import AddedTokens, Base, audit_added_tokens, report_untrained, save_audit
from kit.training.allocator import keep_freed_memory
from kit.training.callbacks.display import Display
from kit.training.callbacks.manifest import NoteProgress
from kit.training.callbacks.metrics_log import MetricsLog
from kit.training.callbacks.unfreezing import Unfreezing
from kit.training.checkpoints import choose_checkpoint, discard_after
from kit.training.freezing import FreezingPlan, check_frozen, fingerprint_frozen, make_plan, plan_as_rows, print_plan
from kit.training.measured import measured_once
from kit.training.plan import StepPlan, plan_steps
from kit.training.preemption import Preemption
from kit.training.prefix_cache import PrefixCache, make_prefix_cache
from kit.training.prefix_data import PrefixData, prefix_data
from kit.training.run_directory import RunDirectory
from kit.training.sharding import describe_sharding, is_sharded
from kit.training.throughput import Throughput
from kit.training.topology import (
    barrier,
    check_agreement,
    from_main_process,
    local_main_process_first,
)
from kit.training.trainer import KitTrainer
from kit.training.unused import settle_unused_search

_BEFORE_FORMAT = 3  # raise it whenever a figure is computed, or a sample drawn or shown, in another way
TASKS: dict[str, ModuleType] = {"causal-lm": causal_lm, "sequence-classification": sequence_classification}


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
    corpus: Corpus | LabeledCorpus
    model: PreTrainedModel
    model_key: str
    extension: Extension | None = None
    base: Base | None = None
    added: AddedTokens | None = None
    untrained: Mapping[str, Figures] = field(default_factory=dict)
    plan: FreezingPlan | None = None
    adapter: Adapter | None = None
    prefix: PrefixCache | None = None

    def measure(self, poll: Callable[[], None] = lambda: None) -> dict[str, Figures]:
        """Return the model's figures on the evaluation sets that are measured on the way."""
        with self._evaluating():
            return self.task.evaluate(self.model, self.corpus, self.recipe, self.tokenizer, self.args, poll)

    def measure_all(self, known: Mapping[str, Figures] | None = None, details: bool = True) -> dict[str, Any]:
        """Return the `figures` of every evaluation set, and with `details` what the task tells beside them.

        `known` is what `measure` has just returned of this very model, if it has.
        """
        with self._evaluating():
            return self.task.evaluate_all(
                self.model, self.corpus, self.recipe, self.tokenizer, self.args, known, details
            )

    def compare(self) -> dict[str, Any]:
        """Return the figures of what the task compares the model with."""
        with self._evaluating():
            return self.task.measure_baselines(self.corpus, self.recipe, self.tokenizer, self.args)

    def settle(self) -> None:
        """Do to the trained model what its task leaves to do after training."""
        with self._evaluating():
            self.task.settle(self.model, self.corpus, self.recipe, self.args)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        timed = self.directory.timed("evaluation") if self.directory else nullcontext()
        with timed, self.prefix.evaluating() if self.prefix else nullcontext():
            yield

    def plan_steps(self) -> StepPlan:
        """Return the steps of the run."""
        return plan_steps(len(self.corpus.rows), self.args, len(self.corpus.batches(self.args)))

    def save(self, folder: Path) -> float:
        """Write the model, load it again, and return by how much their logits differ: 0.0, or it is an error.

        Called on all processes, of which the first one writes and loads.
        """
        with inference(self.model):
            save_model(self.model, self.tokenizer, folder, self.adapter)
            return saved_model_difference(self.model, folder, self.recipe.model if self.adapter else None)

    def sample(self) -> list[list[str]]:
        """Return, on every process, what the model makes on the first one of each of the recipe's prompts."""

        def sample() -> list[list[str]]:
            return self.task.sample(self.model, self.corpus, self.recipe, self.tokenizer, self.args)

        if not in_shards(self.model):
            return from_main_process(sample)
        samples = sample()  # each process has a part of what the first one needs
        return from_main_process(lambda: samples)


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
        task.print_data(corpus, tokenizer)
        if directory and is_main_process():
            write_json(directory.ledger, corpus.ledger_as_json())
        task.check_data(corpus, recipe)
        if not corpus.sets:
            warn("nothing is measured, before or after: give `data.validation` or `evaluation.sets`")
        plan_steps(len(corpus.rows), args, len(corpus.batches(args)))
    original = base.tokenizer if base else tokenizer
    model = task.load_model(recipe, original, corpus, args.seed)
    # In shards it need not have room on one device: unless something is measured before, it never is there whole.
    if measures_only or not is_sharded(args):
        model = model.to(args.device)
    if not measures_only:
        fuse_activations(model)
    if not measures_only and getattr(recipe.data, "packing", False):
        settle_attention(model, recipe.model.attn_implementation, args, len(original))
    # Hashing a large model takes a while: once is enough.
    key = from_main_process(lambda: model_key(recipe.model, args.seed))
    return Run(recipe, task, args, directory, tokenizer, corpus, model, key, extension, base)


def measure_before(run: Run) -> dict[str, Any]:
    """Return figures and samples of the base model, with its own tokenizer, and those of the task's baselines."""
    if run.base:
        run = dataclasses.replace(run, tokenizer=run.base.tokenizer, corpus=run.base.corpus)
    baselines = _once(run, ["baselines", run.model_key], run.compare)
    return {**_measure_once(run, "before"), "baselines": baselines}


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
    plan = make_plan(run.model, run.recipe.freezing, new_ids, run.plan_steps())
    if is_sharded(run.args):
        set_apart(run.model)
        compute_whole_logits(run.model)
    if plan:
        print_plan(run.model, plan, run.args)
        if run.directory and is_main_process():
            write_json(run.directory.freezing, plan_as_rows(run.model, plan, run.args))
    prefix = make_prefix_cache(run.model, plan, run.recipe.freezing, run.plan_steps(), _prefix_data(run))
    run = dataclasses.replace(run, added=added, untrained=untrained, plan=plan, adapter=adapter, prefix=prefix)
    if added and run.directory:
        save_audit(added, run.directory.vocabulary, untrained)
    return run


def _prefix_data(run: Run) -> PrefixData:
    measured_by = run.task.measured_by(run.corpus, run.recipe, run.args)
    return prefix_data(run.corpus, measured_by, run.recipe.data.store_dir)


def _measure_once(run: Run, *state: Any) -> dict[str, Any]:
    """Return figures and samples of the run's model in a certain state, from the store if they were taken before."""

    def measure() -> dict[str, Any]:
        device = run.model.device
        run.model.to(run.args.device)
        # The prompts first: one that is too long should not be found after everything was measured.
        samples = run.sample()
        figures = run.measure()
        run.model.to(device)
        return {"figures": figures, "samples": samples}

    return _once(run, [*state, run.model_key, *run.task.begins_as(run.corpus, run.args)], measure)


def _once(run: Run, state: Any, measure: Callable[[], Any]) -> Any:
    """Return what `measure` returns on all processes, from the store if it was measured before."""
    versions = [torch.__version__, transformers.__version__, run.args.device.type]
    derived_from = [tokenizer_key(run.tokenizer), run.task.measured_by(run.corpus, run.recipe, run.args), versions]
    key = hash_values(state, _BEFORE_FORMAT, *derived_from)
    return measured_once(Path(run.recipe.data.store_dir) / "before" / key, measure)


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
    settings = recipe_settings(recipe, run.args.world_size)
    fingerprints = {"recipe": settings, "data": run.corpus.key, "model": run.model_key}
    fingerprints["sharding"] = describe_sharding(run.args)
    if run.args.device.type == "cpu":
        keep_freed_memory()
    checkpoint = from_main_process(lambda: _resume_point(run, fingerprints))
    say(f"resuming from {checkpoint}" if checkpoint else "training from the start")
    unfreezing = Unfreezing(run.plan.phases) if run.plan else None
    # The cache looks at the model in the modes that the phase before it sets.
    phased = [callback for callback in (unfreezing, run.prefix) if callback]
    own = [MetricsLog(directory.metrics), NoteProgress(directory), *phased]
    callbacks = [*own, *watchers]
    if recipe.run.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.run.early_stopping.patience, recipe.run.early_stopping.threshold))
    if tracker:
        callbacks.append(tracker.callback())
    batch = run.task.largest_batch(run.corpus, recipe, run.args)
    settle_unused_search(run.model, run.args, run.task, batch, run.plan.phases if run.plan else ())
    trainer = _make_trainer(run, fingerprints, preemption, callbacks)
    display = Display(run.task, tells_end=not watchers)
    trainer.add_callback(display)
    frozen = fingerprint_frozen(run.model, run.plan) if run.plan else {}
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        display.close()
        if unfreezing:
            unfreezing.close()
    if trainer.skipped_steps:
        directory.note(skipped_steps=trainer.skipped_steps)
    if run.plan:
        check_frozen(run.model, run.plan, frozen)
    put_back(run.model)
    # Accelerate's own way to take its autocast off again would take the chunked loss with it.
    if forward := vars(run.model).pop("_original_forward", None):
        run.model.forward = forward
    return trainer.final_figures()


def finish(run: Run, before: dict[str, Any], after: dict[str, Any], tracker: WandbTracker | None) -> dict[str, Any]:
    """Save model, samples and scorecard, the scorecard last: it marks the run as finished."""
    scorecard = run.task.make_scorecard(run.corpus, run.recipe, before, after, run.untrained)
    difference = run.save(run.directory.model)
    if run.added:
        save_audit(run.added, run.directory.vocabulary, run.untrained, (run.model, run.tokenizer))
    if is_main_process():
        run.directory.note(reloaded_logits_differ_by=difference)
        for name, text in after.get("files", {}).items():
            write_text(run.directory.path / name, text)
        shown = zip(run.task.prompts(run.recipe), before["samples"], after["samples"], strict=True)
        samples = [dict(zip(("prompt", "before", "after"), each, strict=True)) for each in shown]
        write_json(run.directory.samples, samples)
        print_samples(samples)
        if tracker:
            tracker.summarise(scorecard)
        write_json(run.directory.scorecard, scorecard)
    barrier()
    return scorecard


def _make_trainer(
    run: Run, fingerprints: dict[str, Any], preemption: Preemption, callbacks: list[TrainerCallback]
) -> KitTrainer:
    recipe, peak = run.recipe, run.recipe.tracking.peak_tflops
    use_cache = run.model.config.use_cache
    trainer = KitTrainer(
        model=run.model,
        args=run.args,
        data_collator=run.corpus.collate,
        train_dataset=run.corpus.rows,
        batches=run.corpus.batches,
        eval_dataset=run.corpus.sets or None,
        processing_class=run.tokenizer,
        callbacks=callbacks,
        task=run.task,
        measure=run.measure,
        preemption=preemption,
        fingerprints=fingerprints,
        plan=run.plan,
        adapter=run.adapter,
        prefix=run.prefix,
        throughput=Throughput(run.plan, peak and peak * 1e12, lambda: run.prefix.served if run.prefix else 0),
        name_rows=run.corpus.name_rows,
        save_minutes=recipe.run.save_minutes,
        skip_nonfinite_steps=recipe.run.skip_nonfinite_steps,
    )
    # Trainer writes `use_cache: false` into the configuration that is saved, which makes generation slow for whoever
    # loads the model; the kit passes `use_cache` with every call instead.
    run.model.config.use_cache = use_cache
    settle_reporters(trainer.callback_handler.callbacks, run.directory.path)
    return trainer


def _resume_point(run: Run, fingerprints: dict[str, Any]) -> Path | None:
    section, checkpoints = run.recipe.run, run.directory.checkpoints
    checkpoint, differences = choose_checkpoint(section.resume, checkpoints, fingerprints, section.resume_with)
    discard_after(checkpoint, checkpoints)
    if checkpoint:
        run.directory.note_resume(str(checkpoint), differences)
    return checkpoint
