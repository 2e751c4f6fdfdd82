"""The scorecard: what the domain gained, beside what general text lost."""

from collections.abc import Mapping
from typing import Any

from kit.console import table

Figures = Mapping[str, float | int]

# What never changes between before and after has no difference worth a column.
_SIZES = {"tokens", "bytes", "documents"}
# The only figure that does not depend on how a text is cut into tokens.
_ACROSS_VOCABULARIES = {"bits_per_byte"}


def make_scorecard(
    task: str,
    before: Mapping[str, Figures],
    after: Mapping[str, Figures],
    untrained: Mapping[str, Figures] | None = None,
) -> dict[str, Any]:
    """Return `before`, `after` and `delta` (after - before) for every set, as `scorecard.json` holds them.

    Where tokens were added, `untrained` is the model with them before any training. Where they cut a set's text in
    another way, figures per token have no difference that means anything.
    """
    sets = {}
    for name, old in before.items():
        new = after[name]
        compared = old.keys() - _SIZES if old["tokens"] == new["tokens"] else _ACROSS_VOCABULARIES
        delta = {key: new[key] - old[key] for key in old if key in compared}
        between = {"untrained": dict(untrained[name])} if untrained else {}
        sets[name] = {"before": dict(old), **between, "after": dict(new), "delta": delta}
    return {"task": task, "sets": sets}


def print_scorecard(scorecard: Mapping[str, Any]) -> None:
    """Print the scorecard as a table: three figures of each set, before, after and their difference."""
    rows = []
    for name, scores in scorecard["sets"].items():
        old, new, delta = scores["before"], scores["after"], scores["delta"]
        bits = delta["bits_per_byte"]
        share = f" ({bits / old['bits_per_byte']:+.1%})" if old["bits_per_byte"] else ""
        cells = {
            "bits per byte": ("bits_per_byte", "{:.4f}", "{:+.4f}" + share),
            "perplexity": ("perplexity", "{:,.2f}", "{:+,.2f}"),
            "token accuracy": ("token_accuracy", "{:.1%}", "{:+.1%}"),
        }
        lines = zip([name, f"{new['documents']:,} documents", f"{new['bytes']:,} bytes"], cells.items(), strict=True)
        for first, (figure, (key, value, change)) in lines:
            change = change.format(delta[key]) if key in delta else "other tokens"
            figures = [scores[when][key] for when in ("before", "untrained", "after") if when in scores]
            rows.append([first, figure, *map(value.format, figures), change])
    if rows:
        between = ["new tokens, untrained"] if "untrained" in scores else []
        columns = ["set", "figure", "before", *between, "after", "Δ"]
        table("Scorecard (lower bits per byte is better)", columns, rows)


def print_figures(title: str, sets: Mapping[str, Figures]) -> None:
    """Print the figures of one model on several sets."""
    columns = ["set", "bits/byte", "nats/token", "perplexity", "accuracy", "EOS nats", "tokens", "bytes"]
    rows = [
        [name, f"{f['bits_per_byte']:.4f}", f"{f['nats_per_token']:.4f}", f"{f['perplexity']:,.2f}"]
        + [f"{f['token_accuracy']:.1%}", f"{f['eos_nats']:.3f}", f"{f['tokens']:,}", f"{f['bytes']:,}"]
        for name, f in sets.items()
    ]
    table(title, columns, rows)
