"""The scorecard: what the domain gained, beside what general text lost."""

from collections.abc import Mapping
from typing import Any

from kit.console import table

Figures = Mapping[str, float | int]

# What never changes between before and after has no difference worth a column.
_SIZES = {"tokens", "bytes", "documents"}


def make_scorecard(task: str, before: Mapping[str, Figures], after: Mapping[str, Figures]) -> dict[str, Any]:
    """Return `before`, `after` and `delta` (after - before) for every set, as `scorecard.json` holds them."""
    sets = {}
    for name, old in before.items():
        new = after[name]
        delta = {key: new[key] - old[key] for key in old if key not in _SIZES}
        sets[name] = {"before": dict(old), "after": dict(new), "delta": delta}
    return {"task": task, "sets": sets}


def print_scorecard(scorecard: Mapping[str, Any]) -> None:
    """Print the scorecard as a table: three figures of each set, before, after and their difference."""
    rows = []
    for name, scores in scorecard["sets"].items():
        old, new = scores["before"], scores["after"]
        bits, perplexity, accuracy = (new[key] - old[key] for key in ("bits_per_byte", "perplexity", "token_accuracy"))
        share = f" ({bits / old['bits_per_byte']:+.1%})" if old["bits_per_byte"] else ""
        size = [f"{new['documents']:,} documents", f"{new['bytes']:,} bytes"]
        rows += [
            [
                name,
                "bits per byte",
                f"{old['bits_per_byte']:.4f}",
                f"{new['bits_per_byte']:.4f}",
                f"{bits:+.4f}{share}",
            ],
            [size[0], "perplexity", f"{old['perplexity']:,.2f}", f"{new['perplexity']:,.2f}", f"{perplexity:+,.2f}"],
            [size[1], "token accuracy", f"{old['token_accuracy']:.1%}", f"{new['token_accuracy']:.1%}"]
            + [f"{accuracy:+.1%}"],
        ]
    if rows:
        table("Scorecard (lower bits per byte is better)", ["set", "figure", "before", "after", "Δ"], rows)


def print_figures(title: str, sets: Mapping[str, Figures]) -> None:
    """Print the figures of one model on several sets."""
    columns = ["set", "bits/byte", "nats/token", "perplexity", "accuracy", "EOS nats", "tokens", "bytes"]
    rows = [
        [name, f"{f['bits_per_byte']:.4f}", f"{f['nats_per_token']:.4f}", f"{f['perplexity']:,.2f}"]
        + [f"{f['token_accuracy']:.1%}", f"{f['eos_nats']:.3f}", f"{f['tokens']:,}", f"{f['bytes']:,}"]
        for name, f in sets.items()
    ]
    table(title, columns, rows)
