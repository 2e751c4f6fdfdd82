"""What can be wrong with the tokens that a recipe adds."""

import json
from pathlib import Path

from tests.troubleshooting.lab import case

GROUP = "Vocabulary"
SPEAKERS = {"special_tokens": ["<|user|>", "<|assistant|>"]}
ROLES = {"user": "<|user|>", "assistant": "<|assistant|>"}


def tokens(lab, *words, **keys):
    """Write the recipe that adds some words."""
    return lab.recipe(vocabulary={"tokens": list(words), **keys})


def listed(lab, content, name="words.txt"):
    """Write a file of words and the recipe that adds them."""
    lab.write("words.txt", content)
    return lab.recipe(vocabulary={"tokens": {"from_file": name}})


def normalised(lab, *kinds):
    """Give the model's tokenizer normalisers."""
    path = Path("model/tokenizer.json")
    state = json.loads(path.read_text())
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": kind} for kind in kinds]}
    lab.write(str(path), json.dumps(state))


# ---- tokens


@case(GROUP, "an empty token", "recipe.yaml:22: vocabulary.tokens.1:", 'the text ""', "at least 1 character")
def empty_token(lab):
    return tokens(lab, "kinase", "")


@case(GROUP, "a token of whitespace", "vocabulary.tokens.1: found '  '", "more than whitespace")
def blank_token(lab):
    return tokens(lab, "kinase", "  ")


@case(GROUP, "a word with a space at its end", "vocabulary.tokens.0: found 'kinase '", "without whitespace at its ends")
def space_in_word(lab):
    return tokens(lab, "kinase ")


@case(GROUP, "a word with a line break", "vocabulary.tokens.0: found 'kin\\nase'", "without line breaks")
def line_break_in_word(lab):
    return tokens(lab, "kin\nase")


@case(
    GROUP, "a number among words", "recipe.yaml:22: vocabulary.tokens.1:", "the number 1937", 'write "1937" in quotes'
)
def number_as_token(lab):
    return tokens(lab, "kinase", 1937)


@case(GROUP, "a word that is declared twice", "vocabulary.tokens.2: `kinase`", "already, in vocabulary.tokens.0")
def token_twice(lab):
    return tokens(lab, "kinase", "ligand", "kinase")


@case(GROUP, "a special token that is also a word", "vocabulary.tokens.0: `<|q|>`", "vocabulary.special_tokens.0")
def special_and_ordinary(lab):
    return tokens(lab, "<|q|>", special_tokens=["<|q|>"])


@case(
    GROUP,
    "a special token with its text under `token`",
    "recipe.yaml:21: vocabulary.special_tokens.0.token: unknown key",
    hides="secret",
)
def content_under_another_name(lab):
    return lab.recipe(vocabulary={"special_tokens": [{"token": "<|q|>", "description": "a question"}]})


@case(
    GROUP,
    "words that the normaliser changes",
    "'Kinase' would never be found: the normaliser makes 'kinase' of it",
    "'ﬁbrin' would never be found: the normaliser makes 'fibrin' of it",
)
def normaliser_changes_words(lab):
    normalised(lab, "Lowercase", "NFKC")
    return tokens(lab, "Kinase", "ligand", "ﬁbrin")


@case(GROUP, "a word that the tokenizer cannot take whole", "'Größe-2'", "(./model)", "read", "without losing text")
def token_that_loses_text(lab):
    return tokens(lab, "kinase", "Größe-2")


# ---- a file of words


@case(GROUP, "a misspelt file of words", "tokens.from_file: wrods.txt: no such file", "did you mean `words.txt`?")
def misspelt_words(lab):
    return listed(lab, "kinase\n", name="wrods.txt")


@case(GROUP, "a file of words that was not mined yet", "mined.list: no such file", "`kit vocabulary mine` writes")
def words_not_mined(lab):
    return listed(lab, "kinase\n", name="mined.list")


@case(GROUP, "a folder instead of a file of words", "tokens.from_file: model: is a folder", "one token a line")
def folder_of_words(lab):
    return listed(lab, "kinase\n", name="model")


@case(GROUP, "a file of words with nothing but comments", "words.txt holds no tokens; expected one a line")
def no_words(lab):
    return listed(lab, "# mined\n\n  # kinase\n")


@case(GROUP, "a file of words in Latin-1", "words.txt:2: byte 0xdf is not UTF-8", "save the file in UTF-8")
def words_in_latin_1(lab):
    return listed(lab, "kinase\nGießen\n".encode("latin-1"))


@case(GROUP, "a file of words in UTF-16", "words.txt:1: UTF-16 text; save the file in UTF-8")
def words_in_utf_16(lab):
    return listed(lab, "kinase\nligand\n".encode("utf-16"))


@case(GROUP, "a file of words in UTF-16 that does not say so", "words.txt:1: holds NUL", "save the file in UTF-8")
def words_in_unmarked_utf_16(lab):
    return listed(lab, "kinase\nligand\n".encode("utf-16-le"))


@case(GROUP, "a text instead of a file of words", "words.txt:1: found 12,999 characters", "a token of at most 500")
def text_for_words(lab):
    return listed(lab, "to a reader, " * 1000)


@case(GROUP, "a word that a file holds twice", "words.txt:4: `kinase` is declared already, in words.txt:1")
def word_twice_in_a_file(lab):
    return listed(lab, "kinase\nligand\n\nkinase  # again\n")


# ---- the section


@case(GROUP, "a vocabulary without anything", "recipe.yaml:19: vocabulary:", "`special_tokens` or `tokens`")
def empty_vocabulary(lab):
    return lab.recipe(vocabulary={})


@case(GROUP, "a misspelt key of the vocabulary", "recipe.yaml:22: vocabulary.initialise:", "did you mean `initialize`?")
def misspelt_vocabulary_key(lab):
    return tokens(lab, "kinase", initialise="mean")


@case(GROUP, "tokens to remove", "recipe.yaml:22: vocabulary.remove_tokens: unknown key")
def tokens_to_remove(lab):
    return tokens(lab, "kinase", remove_tokens=["the"])


@case(GROUP, "an unknown beginning for new rows", "vocabulary.initialize", '"subword_mean"', "mean `subword-mean`?")
def unknown_initialisation(lab):
    return tokens(lab, "kinase", initialize="subword_mean")


@case(GROUP, "rows in multiples of 0", "vocabulary.pad_to_multiple_of: found the number 0", "at least 1")
def multiple_of_zero(lab):
    return tokens(lab, "kinase", pad_to_multiple_of=0)


# ---- roles and chat templates


@case(GROUP, "a role of a token that is nowhere", "roles.user", "no token `<|usr|>`", "`<|user|>`", "special_tokens")
def role_without_token(lab):
    return lab.recipe(vocabulary={**SPEAKERS, "roles": {**ROLES, "user": "<|usr|>"}})


@case(GROUP, "a role of an ordinary word", "vocabulary.roles.pad_token: `kinase`", "ordinary", "special_tokens")
def role_of_a_word(lab):
    return tokens(lab, "kinase", roles={"pad_token": "kinase"})


@case(GROUP, "a chat with one speaker", "vocabulary.roles: a chat has both `user` and `assistant`")
def one_speaker(lab):
    return lab.recipe(vocabulary={**SPEAKERS, "roles": {"user": "<|user|>"}})


@case(
    GROUP,
    "a chat template that Jinja cannot read",
    "vocabulary.chat_template, line 1:",
    "TemplateSyntaxError",
    "endfor",
)
def broken_template(lab):
    template = "{% for message in messages %}{{ message.content }}"
    return lab.recipe(vocabulary={**SPEAKERS, "roles": ROLES, "chat_template": template})


@case(GROUP, "a file that Jinja cannot read", "chat.jinja, line 2:", "TemplateSyntaxError", "unexpected '}'")
def broken_template_file(lab):
    lab.write("chat.jinja", "{% for message in messages %}\n{{ message.content }\n{% endfor %}\n")
    return lab.recipe(vocabulary={**SPEAKERS, "roles": ROLES, "chat_template": {"from_file": "chat.jinja"}})


@case(GROUP, "a chat template that does not exist", "vocabulary.chat_template.from_file: chat.jinja:", "o such file")
def missing_template(lab):
    return lab.recipe(vocabulary={**SPEAKERS, "roles": ROLES, "chat_template": {"from_file": "chat.jinja"}})


# ---- mining


@case(GROUP, "mined words for a file that exists", "corpus.txt: exists already", "`--output`", "`--overwrite`")
def mine_into_a_file(lab):
    return ["vocabulary", "mine", "recipe.yaml", "--output", "corpus.txt"]


@case(GROUP, "mined words for a folder", "model: is a folder", "expected a file")
def mine_into_a_folder(lab):
    return ["vocabulary", "mine", "recipe.yaml", "--output", "model"]


@case(GROUP, "mining of a recipe that does not exist", "recpie.yaml: no such file", "`recipe.yaml`")
def mine_missing_recipe(lab):
    return ["vocabulary", "mine", "recpie.yaml"]


@case(GROUP, "mining without text", "data.train: found no document", "nothing is written")
def mine_no_text(lab):
    lab.source("empty.txt", "\n\n", sample_by="line")
    return ["vocabulary", "mine", "recipe.yaml"]


@case(GROUP, "mining where no word is frequent", "occurs 100,000 times or more", "Lower `--min-occurrences`")
def mine_nothing(lab):
    return ["vocabulary", "mine", "recipe.yaml", "--min-occurrences", "100000"]


# ---- a run that is there already


@case(GROUP, "a finished run, and other words since", "vocabulary.tokens: [", "run.resume=never")
def words_changed_after_a_run(lab):
    assert lab.kit(*listed(lab, "tensors\nkinase\n"))[0] == 0
    return listed(lab, "tensors\n")


@case(GROUP, "a word less in the recipe of a run", "run: holds a run of another recipe", "vocabulary.tokens", "kinase")
def word_removed_from_a_run(lab):
    assert lab.kit(*tokens(lab, "tensors", "kinase"))[0] == 0
    return tokens(lab, "tensors")
