"""`kit vocabulary mine`: the words of a recipe's training text that would save the most tokens, in a file to review."""

import shlex
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kit.console import progress, quiet_libraries, say
from kit.data.corpus import training_documents
from kit.data.mining import (
    MinedWord,
    TextTotals,
    check_target,
    measure,
    mine_words,
    print_mined,
    recipe_line,
    write_mined,
)
from kit.data.tokenising import Encode
from kit.errors import UserError
from kit.model.loading import model_type
from kit.model.tokenizer import encoder
from kit.model.vocabulary import with_words
from kit.recipe.models import Recipe, TrainedTokenizer
from kit.recipe.vocabulary import TokensFile
from kit.stages import TASKS
from kit.training.resolving import resolve_recipe
from kit.training.topology import announced_processes


def mine(
    recipe_path: str,
    overrides: list[str],
    *,
    output: str | None,
    count: int,
    min_occurrences: int,
    overwrite: bool,
) -> None:
    """Rank the words of the training split by the tokens that they would save, and write the best ones to a file.

    What the recipe's own `vocabulary` declares is in the tokenizer first, so that mined words come on top of it. Only
    a file that `vocabulary.tokens` names is not read where it is what is to be written, or does not exist.

    Args:
        recipe_path: the recipe.
        overrides: `section.key=value`.
        output: the file; by default the one that the recipe names, else `<recipe's stem>_words.txt`.
        count: the most words to write.
        min_occurrences: words that occur less often are left out.
        overwrite: replace the file where there is one that this command wrote.

    Raises:
        UserError: the recipe or the file cannot be used, or no word would save a token.
    """
    quiet_libraries()
    if (processes := announced_processes()[0]) > 1:
        raise UserError(f"kit vocabulary mine: found {processes} processes; expected one: start it without a launcher")
    recipe = resolve_recipe(recipe_path, overrides, reads_words=False)
    if recipe.task != "causal-lm":
        raise UserError(f"{recipe_path}: found `task: {recipe.task}`; expected `causal-lm`, whose text is mined")
    named = _named_file(recipe)
    path = Path(output or named or f"{Path(recipe_path).stem}_words.txt").expanduser()
    check_target(path, overwrite)  # before the minutes that mining may take

    left_out = named if named and (_same(named, path) or not Path(named).expanduser().exists()) else None
    declared = _without_file(recipe) if left_out else recipe
    tokenizer = _tokenizer(declared)
    name = f"{_tokenizer_name(recipe)}, {len(tokenizer):,} tokens"
    if (section := declared.vocabulary) and (section.special_tokens or section.tokens):
        name += f" with what the recipe declares{f' but the words of {left_out}' if left_out else ''}"
    say(f"{recipe_path}: mining the training text for words that its tokenizer ({name}) cuts into pieces")
    words, before, after = _mine(recipe, tokenizer, count, min_occurrences)
    header = [
        *([f"changed by {shlex.join(overrides)}"] if overrides else []),
        f"tokenizer: {name}; words that occur at least {min_occurrences:,} times",
    ]
    write_mined(path, words, before, after, recipe_path, header, overwrite)
    print_mined(words, before, after)
    say(f"\nwritten: {path}")
    _tell_next(declared, path, named, shlex.join(["kit", "train", recipe_path, *overrides]))


def _mine(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, count: int, min_occurrences: int
) -> tuple[list[MinedWord], TextTotals, TextTotals]:
    """Return the best words, and the totals of the training text without and with them; the text is read twice."""
    kind = model_type(recipe.model)

    def extend(words: list[str]) -> Encode:
        return encoder(with_words(tokenizer, words, kind))

    texts = progress(training_documents(recipe.data), "mining, documents")
    words, before = mine_words(texts, encoder(tokenizer), count, min_occurrences, extend=extend)
    if not before.documents:
        raise UserError("data.train: found no document to train on, and so no word; nothing is written")
    if not words:
        raise UserError(
            f"found no word that occurs {min_occurrences:,} times or more in the training text ({before.documents:,} "
            f"documents) and would save tokens; nothing is written. Lower `--min-occurrences`, or do without new "
            f"words: the tokenizer may know this text well enough"
        )
    texts = progress(training_documents(recipe.data), "measuring, documents")
    after = measure(texts, extend([word.word for word in words]))
    if (after.documents, after.num_bytes) != (before.documents, before.num_bytes):
        raise UserError("data.train: the text changed while it was read; start again once it is at rest")
    return words, before, after


def _named_file(recipe: Recipe) -> str | None:
    tokens = recipe.vocabulary.tokens if recipe.vocabulary else None
    return tokens.from_file if isinstance(tokens, TokensFile) else None


def _same(named: str, path: Path) -> bool:
    return Path(named).expanduser().resolve() == path.resolve()


def _without_file(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"vocabulary": recipe.vocabulary.model_copy(update={"tokens": ()})})


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the recipe's tokenizer with all that `vocabulary` declares, be it new or not: nothing trains here.

    Raises:
        UserError: it cannot be loaded, or does not take what is declared.
    """
    task = TASKS[recipe.task]
    tokenizer = task.prepare_tokenizer(recipe)
    return task.extend_vocabulary(recipe.model_copy(update={"freezing": None}), tokenizer)[0]


def _tokenizer_name(recipe: Recipe) -> str:
    if isinstance(recipe.model.tokenizer, TrainedTokenizer):
        return "trained on this text"
    return recipe.model.tokenizer or recipe.model.name_or_path


def _tell_next(declared: Recipe, path: Path, named: str | None, command: str) -> None:
    if named and _same(named, path):
        say(f"next: review it, then: {command}")
        return
    say(f"next: review it, then let the recipe use it:  {recipe_line(path)}")
    tokens = declared.vocabulary.tokens if declared.vocabulary else ()
    if isinstance(tokens, TokensFile):
        say(f"(`tokens` takes one file: the words of {named}, on top of which these come, go into it too)")
    elif tokens:
        say(f"(`tokens` is a list or a file: what the recipe lists now, {len(tokens):,}, goes into the file too)")
