"""`kit interpolate`: averages of a base model's weights and a fine-tuned one's, measured on a recipe's sets.

Fine-tuning gains on the domain and loses on general text; on the line between the two models there often is one that
keeps most of the gain and loses little (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from kit.console import quiet_libraries, say, table, warn
from kit.errors import UserError, did_you_mean
from kit.evaluation.averages_curve import plot_curve
from kit.evaluation.scorecard import Figures
from kit.files import replaced_folder, write_json
from kit.model.averaging import WeightAverage, check_alike, new_token_ids
from kit.model.classifier import label_names
from kit.model.configuration import CLASSIFIER
from kit.model.hub import expand, is_adapter
from kit.model.loading import load_config, stored_kind
from kit.model.saving import save_model, saved_model_difference
from kit.model.tokenizer import tokenizer_key
from kit.recipe.loading import load_recipe, overrides_for_model
from kit.recipe.models import ModelSection, Recipe
from kit.stages import TASKS, Run, prepare_run
from kit.training.arguments import make_training_arguments
from kit.training.memory import out_of_memory_explained
from kit.training.run_directory import PACKAGES, RunDirectory, model_of

REPORT, CURVE = "interpolation.json", "curve.png"
_LIMIT = 0.02
_MOST_ALPHAS = 1000
_HELD_OUT = "test"  # not to be chosen by, unless that is asked for


def interpolate(
    base: str,
    tuned: str,
    recipe_path: str,
    overrides: list[str],
    *,
    alphas: str = "0:1:0.1",
    limit: float | None = None,
    domain: str | None = None,
    general: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Measure weight averages, print and plot the curve, and save the best one that loses little on general text.

    Args:
        base: the model that `tuned` was fine-tuned from: a run directory, a model folder or a Hub model.
        tuned: likewise; of an adapter's run, what `kit merge` made of it.
        recipe_path: its evaluation sets are measured on.
        overrides: `section.key=value`.
        alphas: `first:last:step`, the last included, or `0,0.3,1`.
        limit: by how much the general figure may be worse than the base's, in the figure's unit.
        domain: the set that is to be best; by default `domain`, or the one that is the validation split.
        general: the set that the limit is for; by default `general`, or the only other one.
        output: the folder to write; by default `interpolated` in the run directory of `tuned`.
        overwrite: whether an earlier interpolation there is replaced.

    Raises:
        UserError: models, recipe, alphas or folder cannot be used, or no figure is a number.
    """
    quiet_libraries()
    points = parse_alphas(alphas)
    if limit is not None and not 0 <= limit < math.inf:
        raise UserError(f"--limit: found {limit}; expected a number from 0 on")
    sources = {"BASE": _plain_model(base, "BASE"), "TUNED": _plain_model(tuned, "TUNED")}
    folder = _check_output(output, tuned, sources, overwrite)
    recipe, of_base = _read_recipe(recipe_path, overrides, sources)
    task = TASKS[recipe.task]
    args, _ = make_training_arguments(recipe, task, folder)
    if args.world_size > 1:
        raise UserError("kit interpolate: found several processes; it runs in one, start it without a launcher")
    with out_of_memory_explained(recipe, args):
        run = prepare_run(recipe, args, None, measures_only=True)
        sets = choose_sets(recipe, list(run.corpus.sets), domain, general)
        if sets.general is None and limit is not None:
            raise UserError("--limit: there is no general set to limit; name one with --general, or leave --limit out")
        run = _without_held_out(run, sets)
        reference, average = _measure_base(run, of_base)
        curve = {alpha: _measure(run, average, alpha) for alpha in points}
        rule = Rule(task, sets, _LIMIT if limit is None else limit, reference)
        best = rule.choose(curve)
        _print_curve(rule, curve, best, average.new_rows)
        facts = {"base": base, "tuned": tuned, "recipe": recipe_path, "overrides": overrides}
        report = facts | make_report(rule, curve, best, average.new_rows, str(run.model.dtype).removeprefix("torch."))
        if best is not None:
            average.set(best)
        del average  # the copies: the saved model is loaded beside this one
        _write(run, report, folder)


def parse_alphas(text: str) -> list[float]:
    """Return the values of `first:last:step` (the last included) or `0,0.3,1`: from 0 to 1, sorted, each once.

    Raises:
        UserError: the text is neither, or a value is below 0 or above 1, where a model would be extrapolated.
    """
    expected = "expected `first:last:step`, such as 0:1:0.1, or values such as 0,0.3,1, all from 0 (BASE) to 1 (TUNED)"
    try:  # decimal: three times 0.1 is 0.3
        if ":" in text:
            first, last, step = (Decimal(part.strip()) for part in text.split(":"))
            # Before any arithmetic: ten to the power of a million has as many digits.
            sound = 0 <= first <= last <= 1 and step * _MOST_ALPHAS >= last - first and step > 0
            count = int((last - first) / step) + 1 if sound else 0
            values = [first + step * number for number in range(count)]
            if values and values[-1] != last:
                values.append(last)
        else:
            values = [Decimal(part.strip()) for part in text.split(",")]
    except (InvalidOperation, ValueError, OverflowError):
        raise UserError(f"--alphas: found `{text}`; {expected}") from None
    if not values or len(values) > _MOST_ALPHAS or not all(value.is_finite() and 0 <= value <= 1 for value in values):
        raise UserError(f"--alphas: found `{text}`; {expected}, at most {_MOST_ALPHAS:,} of them")
    return sorted({float(value) for value in values})


# ---- the two models


def _read_recipe(path: str, overrides: list[str], sources: Mapping[str, str]) -> tuple[Recipe, ModelSection]:
    """Return the recipe with TUNED as its model, and how BASE is loaded."""
    directory = RunDirectory(path)
    file = directory.recipe if directory.path.is_dir() else path
    recipe = load_recipe(file, [*overrides, *overrides_for_model(sources["TUNED"])])
    sections = {name: _section(recipe.model, model) for name, model in sources.items()}
    _check_kinds(recipe, sections)
    nothing = {"vocabulary": None, "freezing": None, "adapter": None}  # which are for training
    return recipe.model_copy(update={"model": sections["TUNED"], **nothing}), sections["BASE"]


def _plain_model(target: str, name: str) -> str:
    """Return the whole model of a run directory, a folder or a name on the Hub; of an adapter's run the merged one."""
    model = model_of(target)
    if not is_adapter(expand(model)):
        return model
    merged = Path(target) / "merged"
    if not merged.is_dir():
        raise UserError(f"{name}: {model} holds an adapter, not a whole model: `kit merge {target}` makes one of it")
    say(f"{name}: {merged}, what `kit merge` made of the run's adapter")
    return str(merged)


def _section(section: ModelSection, name: str) -> ModelSection:
    """Return how a model is loaded: in the precision that it is stored in."""
    section = section.model_copy(update={"name_or_path": name})
    stored = str(getattr(load_config(section), "dtype", None)).removeprefix("torch.")
    if stored not in ("float32", "bfloat16", "float64"):
        if stored != "None":
            say(f"{name}: stored as {stored}; held, averaged and saved as float32")
        stored = "float32"
    return section.model_copy(update={"dtype": stored})


def _check_kinds(recipe: Recipe, sections: Mapping[str, ModelSection]) -> None:
    if recipe.task != CLASSIFIER.task:
        return
    for name, section in sections.items():
        if stored_kind(section) is not CLASSIFIER:
            raise UserError(
                f"{name}: {section.name_or_path} is no classifier: it has no head to average with the other's; for "
                f"`task: {recipe.task}` BASE and TUNED are classifiers of the same labels"
            )
    labels = {name: label_names(load_config(section)) for name, section in sections.items()}
    if set(labels["BASE"]) != set(labels["TUNED"]):
        raise UserError(f"id2label: BASE tells apart {labels['BASE']} and TUNED {labels['TUNED']}; expected the same")


def _check_labels(run: Run) -> None:
    if run.recipe.task == CLASSIFIER.task:
        own, given = label_names(load_config(run.recipe.model)), list(run.corpus.labels.names)
        if set(own) != set(given):
            raise UserError(f"the models tell apart {own}, and the recipe's data has the labels {given}")


def _measure_base(run: Run, section: ModelSection) -> tuple[dict[str, Figures], WeightAverage]:
    """Return the figures of the base as it is, with its own tokenizer, and what averages it with the run's model."""
    _check_labels(run)
    recipe = run.recipe.model_copy(update={"model": section})
    run.task.check_early(recipe, trains=False)
    tokenizer, corpus = run.task.prepare_tokenizer(recipe), run.corpus
    new_ids = new_token_ids(tokenizer, run.tokenizer)
    if tokenizer_key(tokenizer) != tokenizer_key(run.tokenizer):
        if recipe.task == CLASSIFIER.task:
            raise UserError("BASE and TUNED have different tokenizers; expected TUNED to be fine-tuned from BASE")
        corpus, _ = run.task.recode_examples(recipe, run.corpus, tokenizer)
    model = run.task.load_model(recipe, tokenizer, corpus, run.args.seed)
    check_alike(model, run.model)
    model.to(run.args.device)
    base = dataclasses.replace(run, recipe=recipe, tokenizer=tokenizer, corpus=corpus, model=model)
    reference = base.measure_all(details=False)["figures"]
    return reference, WeightAverage(model.cpu(), run.model, new_ids)


def _measure(run: Run, average: WeightAverage, alpha: float) -> dict[str, Figures]:
    average.set(alpha)
    say(f"α = {alpha:g}")
    return run.measure_all(details=False)["figures"]


# ---- which sets, and which average


@dataclass(frozen=True)
class Sets:
    """The set that is to be best, the one that must not lose much, and all that are measured."""

    domain: str
    general: str | None


def choose_sets(recipe: Recipe, names: Sequence[str], domain: str | None, general: str | None) -> Sets:
    """Return which set is the domain and which is general text, as the options say, or else their names and splits.

    Raises:
        UserError: there is no such set, or it cannot be told.
    """
    if not names:
        raise UserError("the recipe has nothing to evaluate: give `data.validation` or `evaluation.sets`")
    for option, name in (("--domain", domain), ("--general", general)):
        if name is not None and name not in names:
            raise UserError(f"{option}: the recipe has no evaluation set `{name}`{did_you_mean(name, names)}")
    if domain is not None and domain == general:
        raise UserError(f"--general: found `{general}`, which is the domain's set already; expected another")
    splits = {name: getattr(given, "data_split", None) for name, given in recipe.evaluation.sets.items()}
    free = [name for name in names if name != general]
    usual = [name for name in free if name == "domain"] or [
        name for name in free if name == "validation" or splits.get(name) == "validation"
    ]
    if domain is None and len(usual or free) != 1:
        raise UserError(f"--domain: name the set that is to be best, one of {', '.join(names)}")
    domain = domain or (usual or free)[0]
    others = [name for name in names if name not in (domain, "train_sample", _HELD_OUT) and splits.get(name) != "train"]
    if general is None and "general" in others:
        general = "general"
    if general is None and len(others) > 1:
        raise UserError(f"--general: name the set that must not lose much, one of {', '.join(others)}")
    return Sets(domain, general or next(iter(others), None))


def _without_held_out(run: Run, sets: Sets) -> Run:
    kept = {n: s for n, s in run.corpus.sets.items() if n != _HELD_OUT or n in (sets.domain, sets.general)}
    if len(kept) < len(run.corpus.sets):
        say(f"`{_HELD_OUT}` is not measured: a set that an average is chosen by no longer tells how good that is")
    return dataclasses.replace(run, corpus=dataclasses.replace(run.corpus, sets=kept))


@dataclass(frozen=True)
class Rule:
    """What the best average is: that of the best domain figure among those that lose at most `limit` in general."""

    task: ModuleType
    sets: Sets
    limit: float
    reference: Mapping[str, Figures]

    @property
    def figure(self) -> str:
        """The figure that all is told by."""
        return self.task.DEFAULT_FIGURE

    @property
    def unit(self) -> str:
        """What the figure is called for people."""
        return self.task.SHOWN_FIGURE[1]

    @property
    def sign(self) -> int:
        """What makes less of the figure the better one."""
        return -1 if self.figure in self.task.HIGHER_IS_BETTER else 1

    def loses(self, figures: Mapping[str, Figures]) -> float:
        """Return by how much the general figure is worse than the base's; 0 without a general set."""
        general = self.sets.general
        return self.sign * (figures[general][self.figure] - self.reference[general][self.figure]) if general else 0.0

    def choose(self, curve: Mapping[float, Mapping[str, Figures]]) -> float | None:
        """Return the best α, of equals the one nearest to the base; None where all lose too much.

        Raises:
            UserError: no domain figure is a number.
        """
        losses = {alpha: self.sign * figures[self.sets.domain][self.figure] for alpha, figures in curve.items()}
        if wrong := [f"{alpha:g}" for alpha, loss in losses.items() if not math.isfinite(loss)]:
            warn(f"`{self.sets.domain}` has no figure that is a number at α = {', '.join(wrong)}")
            if len(wrong) == len(losses):
                raise UserError(f"no average gives a {self.unit} on `{self.sets.domain}`: the weights hold NaN or Inf")
        fits = [alpha for alpha in losses if math.isfinite(losses[alpha]) and self.loses(curve[alpha]) <= self.limit]
        return min(fits, key=lambda alpha: (losses[alpha], alpha), default=None)

    def explain(self, best: float | None) -> str:
        """Return why this α."""
        domain, general = self.sets.domain, self.sets.general
        if not general:
            return f"the best {self.unit} on `{domain}`; there is no general set, hence no limit"
        limit = f"the {self.unit} of `{general}` is at most {self.limit:g} worse than the base's"
        if best is None:
            return f"none: at no α is it so that {limit}"
        return f"the best {self.unit} on `{domain}` of those where {limit}"


# ---- shown


def _print_curve(rule: Rule, curve: Mapping[float, Mapping[str, Figures]], best: float | None, new_rows: int) -> None:
    names = list(rule.reference)
    rows = [["base", *(f"{rule.reference[name][rule.figure]:.4f}" for name in names), "", ""]]
    for alpha, figures in curve.items():
        loss = rule.loses(figures)
        mark = "best" if alpha == best else "" if loss <= rule.limit else "beyond the limit"
        change = f"{rule.sign * loss:+.4f}" if rule.sets.general else ""
        rows.append([f"{alpha:g}", *(f"{figures[name][rule.figure]:.4f}" for name in names), change, mark])
    columns = ["α", *names, f"Δ {rule.sets.general or ''}".strip(), ""]
    table(f"{rule.unit} of (1 - α) · base + α · tuned", columns, rows)
    if new_rows:
        say(
            f"{new_rows:,} rows of the embeddings have no counterpart in the base: they are TUNED's at every α, and "
            f"α = 0 is the base with them and with TUNED's tokenizer; `base` is the base with its own"
        )
    chosen = f"chosen: α = {best:g}: " if best is not None else "chosen: "
    say(f"{chosen}{rule.explain(best)}")
    if best is None:
        warn("no model is saved; give smaller --alphas, or a larger --limit")
    elif best == 0:
        warn("α = 0 is the base: no average of those measured is better within the limit")


def make_report(
    rule: Rule, curve: Mapping[float, Mapping[str, Figures]], best: float | None, new_rows: int, dtype: str
) -> dict[str, Any]:
    """Return what `interpolation.json` holds beside where the models and the recipe are."""
    return {
        "figure": rule.figure,
        "unit": rule.unit,
        "higher_is_better": rule.sign < 0,
        "domain": rule.sets.domain,
        "general": rule.sets.general,
        "limit": rule.limit if rule.sets.general else None,
        "chosen": {"alpha": best, "why": rule.explain(best)},
        "base_with_its_own_tokenizer": dict(rule.reference),
        "curve": [{"alpha": alpha, "sets": figures} for alpha, figures in curve.items()],
        "new_rows": new_rows,
        "dtype": dtype,
        "versions": {name: version(name) for name in ("domain-adaptation-kit", *PACKAGES)},
    }


# ---- the folder


def _write(run: Run, report: Mapping[str, Any], folder: Path) -> None:
    """Write curve, report and, where there is a best one, the model as it now is."""
    best = report["chosen"]["alpha"]
    with replaced_folder(folder) as temporary:
        if best is not None:
            save_model(run.model, run.tokenizer, temporary / "model")
            saved_model_difference(run.model, temporary / "model")
        plot_curve(report, temporary / CURVE)
        write_json(temporary / REPORT, report)
    if best is not None:
        say(f"model: {folder / 'model'} (α = {best:g}); loaded again it gives the same logits, bit for bit")
    say(f"curve: {folder / CURVE}    figures: {folder / REPORT}")


def _check_output(output: str | None, tuned: str, sources: Mapping[str, str], overwrite: bool) -> Path:
    """Return the folder to write.

    Raises:
        UserError: it is there already, or one of the models is in it or around it.
    """
    directory = RunDirectory(tuned)
    if output is None and not directory.recipe.is_file():
        raise UserError("--output: the folder to write; only a run directory has a place for it")
    folder = Path(output) if output else directory.path / "interpolated"
    real = folder.resolve()
    if not real.parent.is_dir():
        raise UserError(f"--output: the folder that `{folder}` would be in does not exist")
    for name, source in sources.items():
        place = Path(expand(source)).resolve()
        if place.is_dir() and (place.is_relative_to(real) or real.is_relative_to(place)):
            raise UserError(f"--output: `{folder}` and {name} ({source}) lie in each other; expected another folder")
    if folder.exists() and not (folder / REPORT).is_file():
        raise UserError(f"--output: `{folder}` is there already, and no earlier interpolation; expected a new folder")
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} is there already; --overwrite replaces it, --output names another folder")
    return folder
