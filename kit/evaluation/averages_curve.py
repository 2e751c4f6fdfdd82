"""The curve of weight averages: domain against general figure, a point for each α."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_curve(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw the domain figure against the general one, a point for each α; with one set, the figure against α."""
    domain, general, key, unit = (report[name] for name in ("domain", "general", "figure", "unit"))
    alphas = [point["alpha"] for point in report["curve"]]
    y = [point["sets"][domain][key] for point in report["curve"]]
    x = [point["sets"][general][key] for point in report["curve"]] if general else alphas
    reference = report["base_with_its_own_tokenizer"]
    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, y, "o-", color="tab:blue", label="(1 - α) · base + α · tuned")
    axes.plot([reference[general][key] if general else 0], [reference[domain][key]], "s", color="black",
              markerfacecolor="none", markersize=10, label="base, with its own tokenizer")  # fmt: skip
    for alpha, *at in zip(alphas, x, y, strict=True):
        axes.annotate(f"{alpha:g}", at, xytext=(6, 6), textcoords="offset points", fontsize=8)
    if general:
        bad = -1 if report["higher_is_better"] else 1
        axes.axvline(reference[general][key] + bad * report["limit"], color="tab:red", linestyle="--",
                     label=f"limit: {report['limit']:g} worse than the base")  # fmt: skip
    if (best := report["chosen"]["alpha"]) is not None:
        at = alphas.index(best)
        axes.plot([x[at]], [y[at]], "*", color="tab:orange", markersize=16, label=f"chosen: α = {best:g}")
    better = "higher is better" if report["higher_is_better"] else "lower is better"
    axes.set(xlabel=f"{general}: {unit} ({better})" if general else "α", ylabel=f"{domain}: {unit} ({better})")
    axes.set_title("Weight averages, by α")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
