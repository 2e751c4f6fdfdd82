"""Names of tensors for people: in natural order, and many folded into one line."""

import re
from collections.abc import Iterable

_MOST_LISTED = 12


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts h.2 before h.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def fold_names(names: Iterable[str]) -> str:
    """Return names as one line; those that differ in one number become one, `h.{0–11}.attn.bias`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=natural_key):
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}.")[1:-1], []).append(name)
    items = []
    for template, alike in groups.items():
        parts = [name.split(".") for name in alike]
        vary = [at for at in range(len(parts[0])) if len({name[at] for name in parts}) > 1]
        if len(vary) == 1:
            [at] = vary
            items.append(".".join([*parts[0][:at], number_ranges(name[at] for name in parts), *parts[0][at + 1 :]]))
        else:
            items.append(alike[0] if len(alike) == 1 else f"{template} ({len(alike):,} of them)")
    more = f", and {len(items) - _MOST_LISTED:,} more" if len(items) > _MOST_LISTED else ""
    return ", ".join(items[:_MOST_LISTED]) + more


def number_ranges(numbers: Iterable[str]) -> str:
    """Return numbers as runs: `{1–11}`, `{0,2,4–6}`, or the only one as it is."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and runs[-1][-1] + 1 == number:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
    return text if text.isdigit() else f"{{{text}}}"
