"""`run.resume_with`: in what a run may differ from the one that it goes on with, and in what it never can."""

from collections.abc import Collection, Mapping, Sequence

from kit.errors import nearest
from kit.recipe.models import Recipe
from kit.recipe.running import RunSection

WORLD_SIZE = "world_size"
# What may differ between two runs without changing a number that they compute, beside all of `tracking`.
# Steps can be skipped by a run that would end there: what it trained until then is the same.
NOT_FOR_THE_NUMBERS = {
    "run.resume",
    "run.resume_with",
    "run.output_dir",
    "run.save_minutes",
    "run.skip_nonfinite_steps",
    "data.store_dir",
    "data.num_proc",
    "freezing.cache",
    "freezing.cache_gib",
}
_DATA = "it says what the model and its data are; train another run, from the model of this one if need be"
_PLACE = "a step would be another place in the epoch, so that rows would be left out or seen twice; keep"
_ORDER = f"{_PLACE} it"
_OPTIMIZER = "the checkpoint holds the state of the optimizer that it names"
_BEST = "the best figure so far is that of another metric"
_NEVER = {
    "run.global_batch_size": f"{_PLACE} the rows of an optimizer step over all processes (`run.global_batch_size`)",
    "training.per_device_train_batch_size": f"{_PLACE} its product with accumulation and the number of processes",
    "training.gradient_accumulation_steps": f"{_PLACE} its product with batch size and the number of processes",
    **dict.fromkeys(("training.seed", "training.data_seed"), _ORDER),
    **dict.fromkeys(("training.optim", "training.optim_args", "training.optim_target_modules"), _OPTIMIZER),
    **dict.fromkeys(("training.metric_for_best_model", "training.greater_is_better"), _BEST),
    "training.fp16": "the checkpoint has, or lacks, the state of its loss scaling",
    **dict.fromkeys(
        ("training.fsdp", "training.fsdp_config", "training.deepspeed"),
        "the checkpoint is laid out for the way in which its processes share the model",
    ),
    **dict.fromkeys(("evaluation.sets", "evaluation.train_sample", "evaluation.temperature_scaling"), _DATA),
}
# What the state of a schedule that follows the loss holds in itself.
_RATES = ("training.learning_rate", "training.lr_scheduler_type", "training.lr_scheduler_kwargs")
_FOLLOW_THE_LOSS = {"reduce_lr_on_plateau", "greedy"}


def explain_refusal(name: str, recipe: type[Recipe], training_names: Collection[str]) -> str | None:
    """Return why a run cannot be resumed with a difference of this name, or None where it can.

    Args:
        name: of `run.resume_with`.
        recipe: the model of the recipe's task.
        training_names: the keys that `training` takes.
    """
    section, _, key = name.partition(".")
    keys = {
        "run": RunSection.model_fields,
        "evaluation": recipe.model_fields["evaluation"].annotation.model_fields,
        "training": training_names,
    }
    every = [WORLD_SIZE, *(f"{section}.{key}" for section in keys for key in keys[section])]
    if section == "tracking" or name in NOT_FOR_THE_NUMBERS:
        return "this may differ without being named; leave it out"
    if name == WORLD_SIZE or (section in keys and key.split(".")[0] in keys[section]):
        return _never(name)
    if section in recipe.model_fields and section not in keys:
        return _DATA
    expected = f"expected `{WORLD_SIZE}` or a key of `training`, `run` or `evaluation`"
    near = next((known for known in every if known.rpartition(".")[2] == name), None) or nearest(name, every)
    return f"no such key; {f'did you mean `{near}`?' if near else expected}"


def split_differences(
    differences: Mapping[str, str], names: Sequence[str], settings: Sequence[Mapping[str, object]]
) -> tuple[list[str], list[str]]:
    """Return the lines of differences that are named, and those of the others, with what stands in their way.

    Args:
        differences: keys that differ, with a line on each.
        names: of `run.resume_with`.
        settings: of the two runs.
    """
    schedules = {str(s.get("training.lr_scheduler_type")) for s in settings} & _FOLLOW_THE_LOSS
    named, refused = [], []
    for key, line in differences.items():
        reason = _never(key) if key == WORLD_SIZE or key.split(".")[0] in ("run", "evaluation", "training") else _DATA
        if schedules and key.startswith(_RATES):
            reason = f"a schedule that follows the loss (`{min(schedules)}`) goes on from rates of its own"
        if reason is None and covers(names, key):
            named.append(line)
        else:
            refused.append(f"{line} ({reason or f'`run.resume_with: [{key}]` would allow it'})")
    return named, refused


def covers(names: Sequence[str], key: str) -> bool:
    """Tell whether one of the names is the key, or something that the key is a part of."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def _never(key: str) -> str | None:
    return next((reason for name, reason in _NEVER.items() if covers([name], key)), None)
