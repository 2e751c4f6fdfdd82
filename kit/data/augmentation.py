"""Noisy copies of training texts: characters mistyped, words left out or swapped.

The noise of a text depends on the text, the seed and the number of the copy alone, never on other rows.
"""

import random
import re
from collections.abc import Callable

from kit.recipe.classification import Augment

_SPACE = re.compile(r"(\s+)")


def noisy_copy(text: str, augment: Augment, copy: int) -> str:
    """Return a noisy copy of a text; white space stays as it is, and at least one word is left.

    Each word is left out or swapped with the next with probability `words`, and has a character replaced (by another
    of the text), left out, doubled or swapped with the next one with probability `characters`.

    Args:
        text: the text.
        augment: how much noise, and its seed.
        copy: its number; each is different.
    """
    # `random()` alone is promised to draw the same in every version of Python.
    draw = random.Random(f"{augment.seed} {copy} {text}").random
    pieces = [*_SPACE.split(text), ""]
    words = [[word, space] for word, space in zip(pieces[::2], pieces[1::2], strict=True)]
    words = _noise_of_words(words, augment.words, draw)
    letters = "".join(text.split())
    for word in words:
        if word[0] and draw() < augment.characters:
            word[0] = _mistyped(word[0], letters, draw)
    return "".join(word + space for word, space in words)


def _noise_of_words(words: list[list[str]], share: float, draw: Callable[[], float]) -> list[list[str]]:
    left = sum(bool(word) for word, _ in words)
    result, index = [], 0
    while index < len(words):
        word, space = words[index]
        index += 1
        if not word or draw() >= share:
            result.append([word, space])
        elif draw() < 0.5 and left > 1:
            left -= 1
            if index == len(words) and result:
                result[-1][1] = space
        elif index < len(words) and words[index][0]:
            result += [[words[index][0], space], [word, words[index][1]]]
            index += 1
        else:
            result.append([word, space])
    return result


def _mistyped(word: str, letters: str, draw: Callable[[], float]) -> str:
    at, kind = int(draw() * len(word)), int(draw() * 4)
    before, character, after = word[:at], word[at], word[at + 1 :]
    if kind == 0:
        return before + letters[int(draw() * len(letters))] + after
    if kind == 1 and len(word) > 1:
        return before + after
    if kind == 2 and after:
        return before + after[0] + character + after[1:]
    return before + character + character + after
