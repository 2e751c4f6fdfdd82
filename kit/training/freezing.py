"""The plan of a recipe's `freezing` section for one model and one run: printed, saved, followed, and proven."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from kit.console import say, table, warn
from kit.errors import UserError
from kit.model.freezing import check_new_tokens, count_parameters
from kit.model.new_rows import is_new_rows, new_row_ids, train_new_rows
from kit.model.parts import adapter_names, block_parameters, find_parts, select
from kit.model.quantization import number_of_values
from kit.model.shards import whole
from kit.recipe.freezing import FreezingSection, Parts, PhaseSection
from kit.training.parameter_groups import (
    GroupRule,
    Phase,
    ever_trained,
    make_groups,
    parameter_settings,
    require_all_phases,
)
from kit.training.plan import StepPlan


@dataclass(frozen=True)
class FreezingPlan:
    """What trains from which step on, and at which rate.

    Attributes:
        phases: the parameters that train, from step 0 on in phases.
        rules: rates and weight decays of their own.
        layer_decay: factor of the rate per depth.
        depth_of: 0 for the head and the final norm, one more per block downward, embeddings deepest.
    """

    phases: tuple[Phase, ...]
    rules: tuple[GroupRule, ...] = ()
    layer_decay: float | None = None
    depth_of: dict[str, int] = field(default_factory=dict)

    def groups(self, model: nn.Module, decay_names: set[str], args: TrainingArguments) -> list[dict[str, Any]]:
        """Return the optimizer's groups; see `make_groups`."""
        require_all_phases(model, self.phases)
        return make_groups(model, decay_names, args, self.phases, self.rules, self.layer_decay, self.depth_of)


def make_plan(
    model: PreTrainedModel, section: FreezingSection | None, new_ids: Sequence[int], steps: StepPlan
) -> FreezingPlan | None:
    """Work out a recipe's freezing for a model, and let what trains in any phase require grad.

    To be called once the model is on its device, before its optimizer is created.

    Args:
        model: the model. With an adapter it is the plan that what `add_adapter` let train does.
        section: the recipe's; None lets everything train, and gives no plan.
        new_ids: of the tokens that `vocabulary` added.
        steps: of the run.

    Raises:
        UserError: a part, a pattern or a phase does not fit the model or the run, or nothing would be frozen or train.
    """
    if adapter_names(model):
        phases = [Phase(0, frozenset(name for name, p in model.named_parameters() if p.requires_grad))]
        if new_ids and new_row_ids(model) is None:
            _check_new_tokens_learn(model, phases)
        return FreezingPlan(tuple(phases))
    if section is None:
        return None
    check_new_tokens(section, len(new_ids))
    _tell_of_tied(model, section)
    # Some tables never train, such as sinusoidal positions.
    can_train = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if section.new_tokens:
        train_new_rows(model, new_ids)
    can_train |= {name for name, _ in model.named_parameters() if is_new_rows(name)}
    phases = [replace(phase, trainable=phase.trainable & can_train) for phase in _phases(model, section, steps)]
    if not all(phase.trainable for phase in phases):
        raise UserError("freezing: nothing would train; these parts hold only what never trains in this model")
    _check_rows_train_alone(model, phases)
    rules = [
        GroupRule(_names(model, g.parts, f"freezing.groups.{i}.parts"), g.learning_rate, g.weight_decay)
        for i, g in enumerate(section.groups)
    ]
    if new_ids and not section.new_tokens:
        _check_new_tokens_learn(model, phases)
    _check_groups(rules)
    for number, rule in enumerate(rules):
        if not rule.names & ever_trained(phases):
            raise UserError(f"freezing.groups.{number}.parts: nothing of it trains in any phase")
    require_all_phases(model, phases)
    depth_of = _depths(model) if section.layer_decay is not None else {}
    return FreezingPlan(tuple(phases), tuple(rules), section.layer_decay, depth_of)


def _phases(model: PreTrainedModel, section: FreezingSection, steps: StepPlan) -> list[Phase]:
    """Return the phases of a section; one where it has no schedule."""
    every = frozenset(name for name, _ in model.named_parameters())
    if section.frozen is not None:
        trainable = every - _names(model, section.frozen, "freezing.frozen")
        if not trainable:
            raise UserError("freezing.frozen: everything would be frozen; leave out a part that is to train")
        return [Phase(0, trainable)]
    if section.trainable is not None:
        return [Phase(0, _names(model, section.trainable, "freezing.trainable"))]
    if not section.schedule:
        return [Phase(0, every)]
    phases: list[Phase] = []
    for number, wanted in enumerate(section.schedule):
        key = f"freezing.schedule.{number}"
        names = every if wanted.trainable == "all" else _names(model, wanted.trainable, f"{key}.trainable")
        before = phases[-1].trainable if phases else frozenset()
        if names <= before:
            raise UserError(f"{key}.trainable: all of it trains already; expected something more than before")
        phases.append(Phase(_start(wanted, steps, key, phases), before | names, wanted.warmup_steps))
    return phases


def _tell_of_tied(model: PreTrainedModel, section: FreezingSection) -> None:
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    for key, parts in section.named_parts():
        if parts.head != parts.embeddings:
            one, other = ("head", "embeddings") if parts.head else ("embeddings", "head")
            say(f"freezing.{key}: `{one}` is `{other}` too: in this model both are one matrix")


def _start(wanted: PhaseSection, steps: StepPlan, key: str, earlier: Sequence[Phase]) -> int:
    """Return the optimizer steps made before a phase."""
    if wanted.start is None:
        return 0
    name, value = wanted.start
    start = {"epoch": value * steps.steps_per_epoch, "step": value, "fraction": value * steps.steps}[name]
    start = math.ceil(round(start, 6))  # 0.55 × 100 is 55.000000000000007
    where = "" if name == "step" else f", which is step {start:,}"
    if start >= steps.steps:
        raise UserError(f"{key}.{name}: found {value:g}{where}; the run ends after {steps.steps:,} steps")
    if start <= earlier[-1].start:
        raise UserError(f"{key}.{name}: found {value:g}{where}, where the phase before begins")
    if wanted.warmup_steps > steps.steps - start:
        left = steps.steps - start
        warn(f"{key}.warmup_steps: found {wanted.warmup_steps:,}, but the run ends {left:,} steps after its beginning")
    return start


def _names(model: PreTrainedModel, parts: Parts, key: str) -> frozenset[str]:
    return frozenset(name for names in select(model, parts.model_dump(), key).values() for name in names)


def _matrices_of_new_rows(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the matrices and biases in which only the rows of new tokens train."""
    owners = {name for name, _ in model.named_parameters(remove_duplicate=False) if is_new_rows(name)}
    of_owners = {name.rpartition(".")[0] + end for name in owners for end in (".weight", ".bias")}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    return frozenset(first[id(every[name])] for name in of_owners & set(every))


def _check_new_tokens_learn(model: PreTrainedModel, phases: Sequence[Phase]) -> None:
    """Refuse a plan in which added tokens would not be learned as inputs, or, with a head of its own, as outputs."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(module.weight) for module in modules if module is not None}
    for name, parameter in model.named_parameters():
        if id(parameter) in weights and name not in ever_trained(phases):
            raise UserError(
                f"freezing: {name} trains in no phase: the tokens that `vocabulary` adds would never learn; let their "
                f"rows train alone (`trainable: {{new_tokens: true}}`, without `embeddings` and `head`), or the whole "
                f"matrices (`embeddings` and `head` both)"
            )


def _check_groups(rules: Sequence[GroupRule]) -> None:
    """Refuse groups that are one tied matrix under two names, each with a rate or decay of its own."""
    for number, rule in enumerate(rules):
        for other in range(number):
            for value in ("learning_rate", "weight_decay"):
                ours, theirs = getattr(rule, value), getattr(rules[other], value)
                if None not in (ours, theirs) and ours != theirs and rule.names == rules[other].names:
                    raise UserError(
                        f"freezing.groups.{number}: the same parameters as freezing.groups.{other} "
                        f"({min(rule.names)}; tied matrices are one), with another {value}: leave out one of the two"
                    )


def _check_rows_train_alone(model: PreTrainedModel, phases: Iterable[Phase]) -> None:
    if both := sorted(_matrices_of_new_rows(model) & ever_trained(list(phases))):
        raise UserError(
            f"freezing: `new_tokens` trains the new rows of {both[0]} alone, and other parts train it whole: leave out "
            f"one of the two"
        )


def _depths(model: PreTrainedModel) -> dict[str, int]:
    """Return the depth of each parameter, as `FreezingPlan.depth_of` has it."""
    parts, blocks = find_parts(model), block_parameters(model)
    deepest = len(blocks) + 1
    depths = {name: 0 for name, _ in model.named_parameters()}
    for number, names in enumerate(blocks):
        depths |= dict.fromkeys(names, len(blocks) - number)
    shallow = {*parts["head"], *parts["final_norm"]} - {*parts["embeddings"]}
    bottom = [name for part in ("embeddings", "position_embeddings", "other") for name in parts[part]]
    depths |= {name: deepest for name in bottom if name not in shallow}
    # New rows are as deep as the matrix that they are of.
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    for name in parts["new_tokens"]:
        owner, _, own = name.rpartition(".")
        depths[name] = depths[first[id(every[f"{owner}.{'bias' if own == 'new_bias' else 'weight'}"])]]
    return depths


# ---- shown and saved


def plan_as_rows(model: PreTrainedModel, plan: FreezingPlan, args: TrainingArguments) -> list[dict[str, Any]]:
    """Return the plan part by part, in the model's order.

    Each has its tensors and parameters, their share of all, the peak learning rate, the phase that it trains from (from
    1 on), and the steps before that. Blocks that train alike are one entry, and so are the tensors of a part that do.
    """
    of_part = part_labels(model)
    frozen_matrices = _matrices_of_new_rows(model)
    settings = parameter_settings(model, set(), args, plan.phases, plan.rules, plan.layer_decay, plan.depth_of)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    new_rows = sum(p.numel() for name, p in model.named_parameters() if is_new_rows(name))
    for name, parameter in model.named_parameters():
        how = settings.get(name)
        rate, phase = (how.learning_rate, how.first_phase + 1) if how else (None, None)
        begins = plan.phases[how.first_phase] if how else None
        when = {"from_step": begins.start, "warmup_steps": begins.warmup_steps} if begins else {"from_step": None}
        counted = {"part": of_part[name], "tensors": 0, "parameters": 0, "share": 0.0}
        row = rows.setdefault((of_part[name], rate, phase), {**counted, "learning_rate": rate, "phase": phase, **when})
        row["tensors"] += 1
        row["parameters"] += number_of_values(parameter)
        if name in frozen_matrices and new_rows:
            row["parameters"] -= _own_rows(model, parameter)
    merged, total = _merge_blocks(list(rows.values())), count_parameters(model)[0]
    return [{**row, "share": row["parameters"] / total} for row in merged]


def _merge_blocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with one for all blocks that train alike, at the place of the first of them."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    numbers: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        block = row["part"].removeprefix("block ")
        key = ("blocks" if block.isdigit() else row["part"], row["learning_rate"], row["from_step"])
        numbers.setdefault(key, []).extend([int(block)] if block.isdigit() else [])
        known = merged.setdefault(key, {**row, "tensors": 0, "parameters": 0})
        known["tensors"] += row["tensors"]
        known["parameters"] += row["parameters"]
    for key, found in numbers.items():
        if len(found) > 1:
            runs = [list(run) for _, run in groupby(enumerate(found), key=lambda pair: pair[1] - pair[0])]
            ranges = [f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
            merged[key]["part"] = f"blocks {', '.join(ranges)}"
    return list(merged.values())


def _own_rows(model: PreTrainedModel, parameter: nn.Parameter) -> int:
    ids = new_row_ids(model)
    return len(ids) * parameter[0].numel() if ids else 0


def part_labels(model: PreTrainedModel) -> dict[str, str]:
    """Return the part of each parameter, by which it is listed."""
    labels = {name: "new tokens" if is_new_rows(name) else "others" for name, _ in model.named_parameters()}
    adapter = dict.fromkeys(adapter_names(model), "adapter")
    # What peft keeps of a module whose copy trains: it is neither used nor saved.
    adapter |= {name: "replaced by the adapter" for name in labels if "original_module" in name.split(".")}
    try:
        parts, blocks = find_parts(model), block_parameters(model)
    except UserError:  # an architecture that does not tell its parts is frozen by patterns
        return labels | adapter
    for part in ("head", "final_norm", "position_embeddings", "embeddings"):
        labels |= dict.fromkeys(parts[part], part.replace("_", " "))
    for number, names in enumerate(blocks):
        labels |= dict.fromkeys(names, f"block {number}")
    return labels | adapter


def print_plan(model: PreTrainedModel, plan: FreezingPlan, args: TrainingArguments) -> None:
    """Print what trains, from which step on and at which peak learning rate."""
    total, trainable = count_parameters(model)
    cells = [
        [row["part"], f"{row['tensors']:,}", f"{row['parameters']:,}", f"{row['share']:.2%}", *_when(row)]
        for row in plan_as_rows(model, plan, args)
    ]
    table("Freezing", ["part", "tensors", "parameters", "share", "learning rate", "phase"], cells)
    when = " in the end" if len(plan.phases) > 1 else ""
    adapter = ", the adapter's included," if adapter_names(model) else ""
    say(f"{trainable:,} of {total:,} parameters{adapter} train{when} ({trainable / total:.2%})")


def _when(row: dict[str, Any]) -> list[str]:
    if row["phase"] is None:
        return ["frozen", ""]
    start = f", after step {row['from_step']:,}" if row["from_step"] else ""
    start += f", {row['warmup_steps']:,} of warm-up" if row["warmup_steps"] else ""
    return [f"{row['learning_rate']:.3g}", f"{row['phase']}{start}"]


# ---- proven


@torch.no_grad()
def fingerprint_frozen(model: PreTrainedModel, plan: FreezingPlan) -> dict[str, str]:
    """Return a hash of every tensor that trains in no phase; of matrices with new rows, of all other rows.

    Called on all processes.
    """
    trained, ids = ever_trained(plan.phases), new_row_ids(model)
    matrices = _matrices_of_new_rows(model)
    found = {}
    for name, parameter in model.named_parameters():
        if name in trained:
            continue
        full = whole(parameter)
        pieces = [full[: ids.start], full[ids.stop :]] if name in matrices and ids else [full]
        digest = xxhash.xxh3_128()
        for piece in pieces:
            digest.update(piece.cpu().reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def check_frozen(model: PreTrainedModel, plan: FreezingPlan, before: dict[str, str]) -> int:
    """Compare frozen tensors with their fingerprints; say and return how many there are.

    Raises:
        RuntimeError: one has changed.
    """
    changed = [name for name, digest in fingerprint_frozen(model, plan).items() if before[name] != digest]
    if changed:
        raise RuntimeError(f"{len(changed)} frozen tensors have changed in training: {', '.join(changed[:5])}")
    if before:
        say(f"frozen: {len(before):,} tensors, bit for bit as they were before training")
    else:
        say("frozen: no tensor throughout, each trained in some phase")
    return len(before)
