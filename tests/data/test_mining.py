"""Mined words against brute force: every occurrence cut out of its text, and tokenizers that really have the words."""

import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AddedToken, AutoTokenizer

from kit.data.builtin import read_corpus
from kit.data.mining import MinedWord, TextTotals, measure, mine_words, print_mined, write_mined
from kit.errors import UserError
from kit.model.tokenizer import encoder
from kit.model.vocabulary import with_words
from tests.data.encoders import encode_characters
from tests.material import documents, make_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
NEW = ["asyncio", "numpy", "__init__", "UTF-8", "Größe", "PyTypeObject", "to_dict", "vocabulary", "tensors"]
TOTALS = TextTotals(documents=3, num_bytes=6_000, words=1_000, tokens=3_000)
AFTER = TextTotals(documents=3, num_bytes=6_000, words=1_000, tokens=2_293)


def is_inside(character):
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M" or character in "‌‍"


def scan(text):
    """Yield (start, end) of every word of a text, a character at a time."""
    at = 0
    while at < len(text):
        end = at
        while end < len(text) and (
            is_inside(text[end])
            or (end > at and text[end] == "-" and text[end + 1 : end + 2].isdigit())
        ):  # fmt: skip
            end += 1
        if any(map(str.isalpha, text[at:end])):
            yield at, end
        at = max(end, at + 1)


def extend_characters(words):
    """Return an encoder by the character to which whole words are one token each."""

    def encode(texts):
        found = ([text[start:end] for start, end in scan(text)] for text in texts)
        saved = (sum(len(word) - 1 for word in some if word in words) for some in found)
        return [range(len(text) - less) for text, less in zip(texts, saved, strict=True)]

    return encode


def mine_characters(texts, *args, **options):
    return mine_words(texts, encode_characters, *args, extend=extend_characters, **options)


def added(make):
    """Return what extends a tokenizer as the kit does: `make` returns it anew."""
    return lambda words: encoder(with_words(make(), words))


def cut_out(make):
    """Return what extends a tokenizer as `add_tokens` does, which takes a word out of the text before all else."""
    return lambda words: encoder(with_added(make(), words))


def with_added(tokenizer, words):
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    return tokenizer


def brute_force(texts, encode):
    """Return occurrences and saved tokens of each word: each of its occurrences is cut out of the whole text."""
    occurrences, saved = Counter(), Counter()
    for text in texts:
        found = list(scan(text))
        parts = [part for start, end in found for part in (text[:start], text[end:])]
        lengths = [len(ids) for ids in encode([text, *parts])]
        for number, (start, end) in enumerate(found):
            occurrences[text[start:end]] += 1
            saved[text[start:end]] += lengths[0] - lengths[1 + 2 * number] - 1 - lengths[2 + 2 * number]
    return occurrences, saved


def mixed_documents(number, seed):
    """Documents with new words in all positions: at start and end, in brackets, after marks, inside longer words."""
    rng = random.Random(seed)
    forms = ["{}", "({})", "{}.", "`{}`", "{}s", "x{}", "{},", "\n{}", "{}\n", ".{}", '"{}"', "{0}.{0}", "{0} {0}"]
    texts = []
    for text in documents(number, seed, longest=20):
        words = text.split(" ")
        for _ in range(rng.randint(1, 4)):
            words.insert(rng.randint(0, len(words)), rng.choice(forms).format(rng.choice(NEW)))
        texts.append(" ".join(words))
    return texts


def promised(totals, words):
    """Return the tokens that are left if each word saves what is said of it."""
    return totals.tokens - sum(word.saved for word in words)


# ---- what a word is


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("asyncio.run(main)", ["asyncio", "run", "main"]),
        ("COX-2, UTF-8; a well-known IL-6R", ["COX-2", "UTF-8", "a", "well", "known", "IL-6R"]),
        ("``__init__`` to_dict _x", ["__init__", "to_dict", "_x"]),
        ("3 404 1-2 3rd x2", ["3rd", "x2"]),
        ("Case case CASE", ["Case", "case", "CASE"]),
        ("np.ndarray#comment", ["np", "ndarray", "comment"]),
        ("Größe Gro\u0308ße हिन्दी می‌خواهم", ["Größe", "Gro\u0308ße", "हिन्दी", "می‌خواهم"]),
        ("don't\tstop\r\nnow\u00a0and\u2028then", ["don", "t", "stop", "now", "and", "then"]),
        (f"{'A' * 64} {'B' * 65} c", ["A" * 64, "c"]),
        ("...", []),
        ("", []),
    ],
)
def test_words(text, words):
    """An encoder by the character, of which every word but those of one letter has several."""
    mined, _ = mine_characters([text, text], 100, min_occurrences=2)
    expected = [word for word in dict.fromkeys(words) if len(word) > 1]
    assert {word.word for word in mined} == set(expected)
    assert all(word.saved == 2 * (len(word.word) - 1) for word in mined)


def test_words_inside_longer_words_do_not_count():
    text = "init __init__ init2 reinit inits init-3 un-init"
    mined, _ = mine_characters([text], 10, min_occurrences=1)
    assert {word.word: word.occurrences for word in mined}["init"] == 2


# ---- what it saves


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_brute_force(coding, seed):
    """Of words that are cut out of their texts."""
    texts = mixed_documents(40, seed)
    occurrences, saved = brute_force(texts, coding.encode)
    extend = cut_out(make_tokenizer)
    mined, totals = mine_words(iter(texts), coding.encode, 1_000, min_occurrences=3, extend=extend)
    for word in mined:
        assert (word.occurrences, word.saved) == (occurrences[word.word], saved[word.word]), word
        assert word.pieces == len(coding.encode([f" {word.word}"])[0])
    is_token = {word: len(coding.encode([f" {word}"])[0]) == 1 for word in saved}
    expected = {w for w, number in saved.items() if number > 0 and occurrences[w] >= 3 and not is_token[w]}
    assert {word.word for word in mined} == expected
    assert {"asyncio", "__init__", "UTF-8", "PyTypeObject"} <= expected
    ranks = [(-word.saved, word.word) for word in mined]
    assert ranks == sorted(ranks)
    assert totals == measure(texts, coding.encode)


def test_each_word_saves_what_a_tokenizer_with_it_alone_saves(coding):
    """In whole texts, where the kit adds it."""
    texts = mixed_documents(40, seed=3)
    extend = added(make_tokenizer)
    mined, totals = mine_words(texts, coding.encode, 1_000, min_occurrences=3, extend=extend)
    assert len(mined) > len(NEW)
    for word in mined:
        assert word.saved == totals.tokens - measure(texts, extend([word.word])).tokens, word


def test_a_space_before_the_token_may_be_a_token_of_its_own(coding):
    """Counting pieces less one would promise a token more for each occurrence after a space than `add_tokens` saves."""
    pieces = len(coding.encode([" asyncio"])[0])
    for extend, left in ((cut_out(make_tokenizer), 2), (added(make_tokenizer), 1)):
        mined, _ = mine_words(["use asyncio"] * 5, coding.encode, 10, extend=extend)
        [word] = [word for word in mined if word.word == "asyncio"]
        assert word == MinedWord("asyncio", 5, pieces, 5 * (pieces - left))


def test_tokens_are_those_after_a_space_wherever_the_word_stands(coding):
    word = next(w for w in NEW if len(coding.encode([w])[0]) > len(coding.encode([f" {w}"])[0]) > 1)
    mined, _ = mine_words([f"{word}\n({word}"] * 5, coding.encode, 10, extend=added(make_tokenizer))
    pieces = len(coding.encode([f" {word}"])[0])
    [found] = [found for found in mined if found.word == word]
    assert found.pieces == pieces
    assert found.saved > found.occurrences * (pieces - 1)


def test_a_tokenizer_with_the_words_tells_what_they_save():
    """What it passes over saves nothing and is left out, whatever arithmetic says; the others rank by what it does."""
    texts = mixed_documents(300, seed=8)
    asked = []

    def extend(words):
        asked.append(words)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([AddedToken(w, single_word=True, normalized=False) for w in words if w != "asyncio"])
        return encoder(tokenizer)

    encode = encoder(make_tokenizer())
    words, totals = mine_words(iter(texts), encode, 5, extend=extend)
    [candidates] = asked
    assert "asyncio" in candidates
    assert len(words) == 5 < len(candidates) <= 15
    assert "asyncio" not in {word.word for word in words}
    _, saved = brute_force(texts, encode)
    assert all(word.saved == saved[word.word] for word in words)
    exact = measure(texts, extend([word.word for word in words]))
    assert promised(totals, words) == pytest.approx(exact.tokens, rel=0.001)
    assert mine_words(["a b"], encode, 5, extend=extend)[0] == []
    assert len(asked) == 2


def test_what_is_a_token_already_is_not_mined(coding, tokenizer):
    """As ` the` is: a token `the` would cost one more than it saves."""
    known = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    bare = [token for token in known if token.isalpha() and len(token) > 1]
    assert bare
    texts = [f"({token} {token}.{token}" for token in bare for _ in range(5)]
    after_space = [token for token in bare if len(coding.encode([f" {token}"])[0]) == 1]
    assert after_space
    mined, _ = mine_words(texts, coding.encode, 1_000, extend=added(make_tokenizer))
    assert not {word.word for word in mined} & set(after_space)


def test_the_tokenizer_with_the_words_saves_what_was_promised():
    texts = mixed_documents(300, seed=4)
    extend = added(make_tokenizer)
    words, totals = mine_words(texts, encoder(make_tokenizer()), 20, extend=extend)
    exact = measure(texts, extend([word.word for word in words]))
    assert totals.tokens - promised(totals, words) == pytest.approx(totals.tokens - exact.tokens, rel=0.01)
    assert totals.tokens - exact.tokens > 0.1 * totals.tokens


def test_docstrings(coding):
    """Real text, with indentation and markup, where what stands further away may matter: a little."""
    texts = [text for text in read_corpus("docstrings", ("filelock",)) if isinstance(text, str)][::3]
    occurrences, saved = brute_force(texts, coding.encode)
    extend = cut_out(make_tokenizer)
    mined, totals = mine_words(texts, encoder(make_tokenizer()), 50, extend=extend)
    assert [word.occurrences for word in mined] == [occurrences[word.word] for word in mined]
    assert sum(word.saved for word in mined) == pytest.approx(sum(saved[word.word] for word in mined), rel=0.01)
    exact = measure(texts, extend([word.word for word in mined]))
    assert sum(word.saved for word in mined) == pytest.approx(totals.tokens - exact.tokens, rel=0.02)


# ---- ranking, thresholds, memory


def test_ranking_does_not_depend_on_the_order_of_texts(coding):
    texts = mixed_documents(60, seed=5)
    forward, backward = (
        mine_words(some, coding.encode, 30, min_occurrences=1, extend=added(make_tokenizer))
        for some in (texts, texts[::-1])
    )
    assert backward == forward
    mined, _ = mine_characters(["bb aa cc"], 10, min_occurrences=1)
    assert [word.word for word in mined] == ["aa", "bb", "cc"]


def test_count_and_min_occurrences():
    texts = ["seldom often often", "often"]
    assert [word.word for word in mine_characters(texts, 1, 1)[0]] == ["often"]
    assert [word.word for word in mine_characters(texts, 9, 2)[0]] == ["often"]
    assert [word.word for word in mine_characters(texts, 9, 1)[0]] == ["often", "seldom"]
    assert mine_characters(texts, 0, 1)[0] == []
    assert mine_characters([], 9)[0] == []


@pytest.mark.parametrize("whole", [False, True], ids=["many texts", "one text"])
def test_forgetting_rare_words_loses_no_frequent_one(monkeypatch, whole):
    """A stream of words that occur once or twice, and two that recur, one of them only after much was forgotten."""
    monkeypatch.setattr("kit.data.mining._FOUND", 500)
    monkeypatch.setattr("kit.data.mining._BATCH", 5_000)
    rng = random.Random(0)
    texts = []
    for number in range(400):
        words = [f"rare{rng.randrange(20_000)}" for _ in range(50)] + ["frequent"] * rng.randint(0, 2)
        words += ["late"] if number > 200 else []
        texts.append(" ".join(rng.sample(words, len(words))))
    texts = [" ".join(texts)] if whole else texts
    exact = Counter(word for text in texts for word in text.split(" "))
    mined, totals = mine_characters(iter(texts), 10, most_counted=2_000)
    found = {word.word: word.occurrences for word in mined}
    assert 0 < totals.most_missed < exact["late"]
    assert exact["frequent"] - totals.most_missed <= found["frequent"] <= exact["frequent"]
    assert exact["late"] - totals.most_missed <= found["late"] <= exact["late"]
    assert all(number <= exact[word] <= number + totals.most_missed for word, number in found.items())
    assert totals.words == sum(exact.values())
    complete, totals = mine_characters(texts, 10)
    assert totals.most_missed == 0
    assert all(word.occurrences == exact[word.word] for word in complete)


# ---- totals


def test_totals():
    totals = measure(["ab cd", "", "é\n"], encode_characters)
    assert totals == TextTotals(documents=3, num_bytes=8, words=3, tokens=7)
    assert (totals.fertility, totals.bytes_per_token) == (7 / 3, 8 / 7)
    nothing = measure([], encode_characters)
    assert (nothing.fertility, nothing.bytes_per_token) == (0.0, 0.0)


# ---- what is shown


def read_words(path):
    """Read a file as a recipe does: `#` begins a comment."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def test_the_file(tmp_path):
    path = tmp_path / "words.txt"
    words = [MinedWord("asyncio", 1_234, 4, 702), MinedWord("Größe", 7, 2, 5)]
    write_mined(path, words, TOTALS, AFTER, "a.yaml", header=["changed\nby hand"])
    text = path.read_text(encoding="utf-8")
    assert "\nasyncio    # 1,234 times, 4 tokens after a space, saves 702\n" in text
    assert "\nGröße      # 7 times, 2 tokens after a space, saves 5\n" in text
    first = "# Words of the training text of a.yaml that save the most tokens, each as one token\n"
    assert text.startswith(f"{first}# changed\n# by hand\n#\n# 3 documents, 6,000 bytes, 1,000 words; ")
    assert "with these 2 words:\n#     tokens           3,000 → 2,293 (-23.6%)\n" in text
    assert "#     tokens per word  3.000 → 2.293\n#     bytes per token  2.000 → 2.617\n" in text
    assert f"vocabulary: {{tokens: {{from_file: {path}}}}}" in text
    assert read_words(path) == ["asyncio", "Größe"]


@pytest.mark.parametrize("name", ["words.txt", "my words: 1 #.txt", "wörter.txt", "{x}.txt", "123", "null", "1.5"])
def test_the_recipe_line_is_yaml(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_mined(name, [], TOTALS, TOTALS, "a.yaml")
    [line] = [line for line in (tmp_path / name).read_text(encoding="utf-8").splitlines() if "from_file" in line]
    assert yaml.safe_load(line[1:]) == {"vocabulary": {"tokens": {"from_file": name}}}


def test_mined_words_come_back_from_the_file(tmp_path, coding):
    texts = ["#hash C# a#b `#` हिन्दी Gro\u0308ße می‌خواهم x\u2028y\x0bzz __init__ UTF-8"] * 5 + mixed_documents(50, 6)
    words, totals = mine_words(texts, coding.encode, 1_000, extend=cut_out(make_tokenizer))
    assert {"हिन्दी", "Gro\u0308ße", "می‌خواهم", "__init__", "UTF-8"} <= {word.word for word in words}
    write_mined(tmp_path / "words.txt", words, totals, totals, "a.yaml")
    assert read_words(tmp_path / "words.txt") == [word.word for word in words]


def test_a_file_is_not_overwritten(tmp_path):
    path = tmp_path / "words.txt"
    write_mined(path, [MinedWord("old", 5, 2, 5)], TOTALS, AFTER, "a.yaml")
    path.write_text(path.read_text() + "chosen by hand\n")
    with pytest.raises(UserError, match=r"words\.txt: exists already, perhaps.*`--output`.*`--overwrite`"):
        write_mined(path, [], TOTALS, TOTALS, "b.yaml")
    assert read_words(path) == ["old", "chosen by hand"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as an editor may leave it
    write_mined(path, [MinedWord("new", 5, 2, 5)], TOTALS, AFTER, "b.yaml", overwrite=True)
    assert read_words(path) == ["new"]
    with pytest.raises(UserError, match="is a folder"):
        write_mined(tmp_path, [], TOTALS, TOTALS, "a.yaml", overwrite=True)
    with pytest.raises(UserError, match=r"missing/words\.txt: its folder does not exist"):
        write_mined(tmp_path / "missing" / "words.txt", [], TOTALS, TOTALS, "a.yaml")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("content", ["", "task: lm\n", "words\n# Words of the training text of a.yaml\n"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_was_not_mined_is_never_overwritten(tmp_path, content, overwrite):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml: exists already, and mining did not write it; .*`--output`"):
        write_mined(path, [], TOTALS, AFTER, "recipe.yaml", overwrite=overwrite)
    assert path.read_text() == content


def test_the_table(capsys):
    words = [MinedWord(f"word{i}", 1_000 - i, 3, 1_000 - i) for i in range(30)]
    print_mined(words, TextTotals(3, 60_000, 10_000, 40_000), TextTotals(3, 60_000, 10_000, 10_435), most=20)
    shown = capsys.readouterr().out
    assert "word19" in shown
    assert "word20" not in shown
    assert "and 10 more" in shown
    assert "3 documents, 60,000 bytes, 10,000 words; as they are, and with these 30 words:" in shown
    assert "tokens           40,000 → 10,435 (-73.9%)" in shown
    assert "tokens per word   4.000 → 1.044" in shown
    assert "tokens after a space" in shown
    assert "elsewhere" in shown
    assert "warning" not in shown
    exact = [MinedWord(word.word, word.occurrences, 3, 2 * word.occurrences) for word in words]
    print_mined(exact, TOTALS, AFTER)
    assert "elsewhere" not in capsys.readouterr().out
    print_mined(words, TextTotals(3, 60_000, 10_000, 40_000, most_missed=12), TextTotals(3, 60_000, 10_000, 10_435))
    shown = capsys.readouterr().out
    assert "each may occur up to 12 times more often" in shown


# ---- real tokenizers


@pytest.mark.parametrize("name", ["base_novels", "stories260K/hf"])
def test_python_docs(name):
    """Byte-level BPE, and one that puts a mark before each text: the saving that is promised is there."""
    if not (DATA / "python_docs").is_dir() or not (DATA / name).is_dir():
        pytest.skip("../shared/data is not on this machine")
    texts = (DATA / "python_docs" / "corpus.txt").read_text(encoding="utf-8").split("\n\n\n")[::15]
    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    extend = added(lambda: tokenizer)
    words, totals = mine_words(texts, encoder(tokenizer), 100, extend=extend)
    exact = measure(texts, extend([word.word for word in words]))
    assert len(words) == 100
    # Longer words save more than is promised, where the pre-tokenizer finds the added ones in them.
    assert totals.tokens - promised(totals, words) == pytest.approx(totals.tokens - exact.tokens, rel=0.05)
