"""The disk that checkpoints and model take, worked out before a run trains."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from kit.console import warn
from kit.errors import UserError
from kit.recipe.models import Recipe
from kit.training.checkpoints import checkpoints_newest_first, step_of
from kit.training.memory import optimizer_bytes
from kit.training.plan import StepPlan
from kit.training.sharding import sharding_of

_MIB, _GIB = 2**20, 2**30


def check_room(model: PreTrainedModel, recipe: Recipe, plan: StepPlan, checkpoints: Path) -> str:
    """Return in words what the run is going to write beside small files, and how much room there is.

    Counted is what is certain to be written, weights and optimizer state. What lies there of the run already counts as
    written. Where the file system does not tell its free space nothing is checked.

    Args:
        model: as it is going to train, not yet wrapped.
        recipe: of the run.
        plan: its steps.
        checkpoints: the folder of its checkpoints, which need not exist.

    Raises:
        UserError: there is not enough room for them.
    """
    args, (_, stops) = plan.args, plan.stops
    saved = sum(_trainable(model) if recipe.adapter else _weights(model))
    each = saved + int(optimizer_bytes(model, args))
    if sharding_of(vars(args)) == "DeepSpeed":  # writes the model once more, and what trains beside its state
        each += sum(_weights(model)) + sum(_trainable(model)) * (args.deepspeed_plugin.zero_stage == 2)
    timed = int(recipe.run.save_minutes is not None)
    # The newest and the best one stay, whatever the limit.
    limit = args.save_total_limit and max(args.save_total_limit, 1 + bool(args.load_best_model_at_end))
    there = checkpoints_newest_first(checkpoints)
    written = sum(size_of(path) for path in there)
    ended = bool(there) and step_of(there[0]) >= plan.steps
    # An early end may leave some out, and what no limit lets go somebody else may; two there are in any case.
    fewer = recipe.run.early_stopping or args.save_strategy.value == "best" or not args.save_total_limit
    at_once, kept = _count(min(stops, 2) if fewer else stops, limit, timed)
    needed = max(max(at_once * each, kept * each + saved) - written, each if at_once else 0, saved)
    needed = saved if ended else needed
    existing = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.exists())
    total, _, free = shutil.disk_usage(existing)
    words = f"{at_once} checkpoints of {in_units(each)} at once and a model of {in_units(saved)}"
    if total and free < needed:
        less = ", or set `training.save_total_limit=1`" if args.save_total_limit != 1 and at_once > 2 else ""
        raise UserError(
            f"run.output_dir: {existing.absolute()} has {in_units(free)} free, {in_units(needed)} are needed: for "
            f"{words}{f', {in_units(written)} of which are there' if written else ''} (a checkpoint is written before "
            f"an older one goes). Make room, name a folder on another disk with `run.output_dir=…`{less}"
        )
    whole, kept = _count(stops, limit, timed)
    if total and not ended and free < max(whole * each, kept * each + saved) - written:
        warn(
            f"{existing.absolute()} has {in_units(free)} free, which is not enough for all {kept} checkpoints of "
            f"{in_units(each)} that the run may keep: give a `training.save_total_limit`"
        )
    return f"{whole} checkpoints of {in_units(each)} at once, a model of {in_units(saved)}; {in_units(free)} are free"


def _count(stops: int, limit: int | None, timed: int) -> tuple[int, int]:
    """Return how many checkpoints lie there at once, and how many at the end, when the model comes to them."""
    kept = min(stops, limit or stops)
    return max(min(stops, kept + 1) + timed, 2 * timed), kept + timed


def _trainable(model: PreTrainedModel) -> list[int]:
    return [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]


def _weights(model: PreTrainedModel) -> list[int]:
    """Return the bytes of each tensor that is saved, tied ones once."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in model.state_dict().values()}
    return [tensor.numel() * tensor.element_size() for tensor in tensors.values()]


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_units(size: float) -> str:
    """Return a number of bytes in words."""
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.1f} MiB"
