"""What can be wrong with what a recipe freezes."""

from tests.troubleshooting.lab import case

GROUP = "Freezing"
FIRST = {"trainable": {"final_norm": True}}
WORD = {"vocabulary": {"tokens": ["kinase"]}}


def frozen(lab, **section):
    """Write the recipe that freezes."""
    return lab.recipe(freezing=section)


def phases(lab, *later, first=FIRST):
    """Write the recipe with a schedule."""
    return lab.recipe(freezing={"schedule": [first, *later]})


# ---- parts


@case(GROUP, "new tokens that stay frozen", "`vocabulary` adds", "never learn", "freezing.trainable.new_tokens: true")
def frozen_new_tokens(lab):
    return lab.recipe(freezing={"trainable": {"last_blocks": 1}}, **WORD)


@case(GROUP, "new tokens alone, and none is declared", "freezing.trainable.new_tokens", "`vocabulary` adds no token")
def no_new_tokens(lab):
    return lab.recipe(freezing={"trainable": {"new_tokens": True}})


@case(GROUP, "new tokens alone, and none is new", "freezing.trainable.new_tokens", "in the tokenizer already")
def no_token_is_new(lab):
    return lab.recipe(vocabulary={"tokens": ["the"]}, freezing={"trainable": {"new_tokens": True}})


@case(GROUP, "nothing that trains", "recipe.yaml:19: freezing:", "`trainable` names no part")
def nothing_trains(lab):
    return lab.recipe(freezing={"trainable": {"new_tokens": False}})


@case(GROUP, "more blocks than the model has", "freezing.trainable.last_blocks: found 9", "at most 2")
def too_many_blocks(lab):
    return lab.recipe(freezing={"trainable": {"last_blocks": 9}})


@case(GROUP, "all that is frozen", "freezing.frozen: everything would be frozen")
def all_frozen(lab):
    return lab.recipe(freezing={"frozen": {"patterns": [".*"]}})


@case(
    GROUP,
    "a pattern that matches no parameter",
    "freezing.trainable.patterns",
    "no parameter of",
    "the nearest name is",
)
def pattern_without_match(lab):
    return lab.recipe(freezing={"trainable": {"patterns": ["transformer.h.7.*"]}})


@case(GROUP, "a pattern that is no regular expression", "freezing.trainable.patterns", "is no regular expression")
def pattern_that_is_none(lab):
    return lab.recipe(freezing={"trainable": {"patterns": ["h.(1"]}})


@case(GROUP, "a section that says nothing", "recipe.yaml:19: freezing: `freezing` says nothing", "give `trainable`")
def nothing_said(lab):
    return lab.recipe(freezing={})


@case(GROUP, "a misspelt part", "recipe.yaml:21: freezing.trainable.embedding: unknown key", "mean `embeddings`?")
def misspelt_part(lab):
    return frozen(lab, trainable={"embedding": True})


@case(GROUP, "a module's name for a part", "recipe.yaml:21: freezing.frozen.wte: unknown key", "embeddings", "patterns")
def module_for_part(lab):
    return frozen(lab, frozen={"wte": True})


@case(GROUP, "a text for parts", "recipe.yaml:20: freezing.trainable:", 'the text "all"', "a mapping with the keys")
def text_for_parts(lab):
    return frozen(lab, trainable="all")


@case(GROUP, "no block at all", "freezing.frozen.first_blocks: found the number 0", "at least 1")
def no_block(lab):
    return frozen(lab, frozen={"first_blocks": 0})


@case(GROUP, "a lone pattern", "freezing.trainable.patterns:", "expected a list", "write `[transformer.*]`")
def lone_pattern(lab):
    return frozen(lab, trainable={"patterns": "transformer.*"})


# ---- parts that do not go together


@case(
    GROUP, "`frozen` beside parts that train", "freezing: beside `frozen`, all else trains", "`trainable.last_blocks`"
)
def frozen_beside_trainable(lab):
    return frozen(lab, frozen={"embeddings": True}, trainable={"last_blocks": 1})


@case(GROUP, "`frozen` beside a schedule", "freezing: `schedule` says what trains in each phase", "do not go with it")
def frozen_beside_schedule(lab):
    return frozen(lab, frozen={"embeddings": True}, schedule=[{"trainable": "all"}])


@case(
    GROUP, "the head, and new tokens alone", "freezing: `new_tokens` trains rows of matrices", "leave out `new_tokens`"
)
def head_and_new_tokens(lab):
    return lab.recipe(freezing={"trainable": {"head": True, "new_tokens": True}}, **WORD)


@case(
    GROUP,
    "a pattern of the embeddings, and new tokens alone",
    "the new rows of transformer.wte.weight alone, and other parts train it whole",
    "leave out one of the two",
)
def pattern_and_new_tokens(lab):
    return lab.recipe(freezing={"trainable": {"patterns": ["transformer[.]wte.*"], "new_tokens": True}}, **WORD)


@case(GROUP, "a frozen head that is tied, and new tokens", "freezing: transformer.wte.weight trains in no phase")
def frozen_tied_head(lab):
    return lab.recipe(freezing={"frozen": {"head": True}}, **WORD)


@case(
    GROUP,
    "tied head and embeddings at rates of their own",
    "freezing.groups.1: the same parameters as freezing.groups.0 (transformer.wte.weight; tied matrices are one)",
    "learning_rate",
)
def tied_groups(lab):
    rates = {"head": 1e-3, "embeddings": 1e-4}
    return frozen(lab, groups=[{"parts": {part: True}, "learning_rate": rate} for part, rate in rates.items()])


@case(GROUP, "a rate for what is frozen", "freezing.groups.0.parts: nothing of it trains in any phase")
def rate_of_frozen(lab):
    group = {"parts": {"last_blocks": 1}, "learning_rate": 1e-4}
    return frozen(lab, trainable={"final_norm": True}, groups=[group])


@case(GROUP, "a group without anything of its own", "freezing.groups.0:", "a `learning_rate` or a `weight_decay`")
def group_of_nothing(lab):
    return frozen(lab, groups=[{"parts": {"head": True}}])


@case(GROUP, "a layer decay above 1", "recipe.yaml:20: freezing.layer_decay: found the number 1.1", "at most 1")
def large_layer_decay(lab):
    return frozen(lab, layer_decay=1.1)


# ---- phases


@case(GROUP, "a phase after the end of training", "freezing.schedule.1.epoch: found 50", "the run ends after 2")
def phase_after_the_end(lab):
    return phases(lab, {"epoch": 50, "trainable": "all"})


@case(GROUP, "phases out of order", "recipe.yaml:19: freezing:", "begin at [2.0, 1.0]", "later than the one before")
def phases_out_of_order(lab):
    return phases(lab, {"epoch": 2, "trainable": {"last_blocks": 1}}, {"epoch": 1, "trainable": "all"})


@case(GROUP, "phases that begin together", "freezing.schedule.2.fraction: found 0.5", "where the phase before begins")
def phases_together(lab):
    return phases(lab, {"fraction": 0.4, "trainable": {"last_blocks": 1}}, {"fraction": 0.5, "trainable": "all"})


@case(GROUP, "a phase that does not say when", "phase 2 of `schedule` does not say when it begins", "`epoch`, `step`")
def phase_without_start(lab):
    return phases(lab, {"trainable": "all"})


@case(GROUP, "a first phase that begins later", "the first phase begins with the run: leave out its `epoch`")
def late_first_phase(lab):
    return phases(lab, first={"epoch": 1, **FIRST})


@case(GROUP, "phases counted in epochs and in steps", "freezing: the phases", "the same for all of them")
def phases_in_two_units(lab):
    return phases(lab, {"epoch": 0.1, "trainable": {"last_blocks": 1}}, {"step": 1, "trainable": "all"})


@case(GROUP, "a phase after one in which all trains", "only the last phase of `schedule` can train all")
def phase_after_all(lab):
    return phases(lab, {"step": 1, "trainable": {"head": True}}, first={"trainable": "all"})


@case(GROUP, "a phase that adds nothing", "freezing.schedule.1.trainable: all of it trains already")
def phase_of_nothing_new(lab):
    return phases(lab, {"step": 1, "trainable": {"embeddings": True}}, first={"trainable": {"head": True}})
