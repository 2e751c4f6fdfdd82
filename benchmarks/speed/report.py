"""Tables of docs/performance.md, from the files of results."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.speed.children import ROOT
from benchmarks.speed.methods import CPU, GPU, XL, Method

PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- speed: written by `make docs` -->\n", "<!-- end of speed -->"
SHARE_TARGETS = {"cpu": 0.52, "cuda": 0.45}
NOT_MEASURED = "not measured"
Section = dict[str, Any]


def write_page(results: Path) -> None:
    """Write the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    PAGE.write_text(text.replace(found[0], BEGIN + page(results) + END), encoding="utf-8")


def page(results: Path) -> str:
    """Return what stands between the page's marks."""
    parts = []
    for title, name, device in (("On a CPU", "speed.json", "cpu"), ("On a GPU", "speed-gpu.json", "cuda")):
        path = results / name
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        parts.append(f"\n### {title}\n\n{tables(result, device)}\n")
    return "".join(parts)


def tables(result: dict[str, Section], device: str) -> str:
    """Return the tables of one device; what is not in the result says that it was not measured."""
    if device == "cpu":
        rest = [_spam(result.get("spam")), _preparing(result.get("preparing"))]
        rest += [_frozen(result["frozen_prefix"])] if "frozen_prefix" in result else []
        return "\n\n".join([_causal_lm(result.get("causal_lm"), CPU, "GPT-2 124M", SHARE_TARGETS["cpu"]), *rest])
    rest = [_frozen(result.get("frozen_prefix")), _causal_lm(result.get("xl"), XL, "GPT-2 XL, checkpointing")]
    return "\n\n".join([_causal_lm(result.get("causal_lm"), GPU, "GPT-2 124M", SHARE_TARGETS["cuda"]), *rest])


def _causal_lm(section: Section | None, methods: dict[str, Method], title: str, share: float | None = None) -> str:
    header = ["row", "documents", "useful tokens/s", "s per step", "of the matrix peak", "peak memory"]
    header += ["the kit is × as fast", "at least", "the kit's memory ×", "at most"]
    found = section["methods"] if section else {}
    rows = [
        _causal_lm_row(method, found.get(name, {"status": NOT_MEASURED}), share if name == "kit" else None)
        for name, method in methods.items()
    ]
    notes = (f"{method.label}: {method.note}." for method in methods.values() if method.note)
    parts = [f"**{title}.** {_setting(section)}", _table(header, rows), " ".join(notes)]
    if section and section["matrix_peak"]:
        rates = (f"{section['matrix_peak'][f'{kind}_flops'] / 1e9:,.0f} GFLOP/s in {kind}" for kind in ("bf16", "fp32"))
        parts.append(f"Matrix peak of the same run (2,048³, median): {', '.join(rates)}; shares: 6 × parameters "
                     f"× useful tokens per second. {_versions(section)}")  # fmt: skip
    return "\n\n".join(filter(None, parts))


def _causal_lm_row(method: Method, row: Section, share: float | None) -> list[str]:
    targets = [_number(method.target), _number(method.memory_target)]
    label = [method.label, "isolated" if method.isolated else "see each other"]
    if row["status"] != "measured":
        return [*label, row["status"], "–", "–", "–", "–", targets[0], "–", targets[1]]
    reached = _percent(row.get("share_of_peak")) + (f" (at least {_percent(share)})" if share else "")
    return [
        *label,
        f"{row['tokens_per_second']:,.0f}",
        f"{row['seconds_per_step']:.3g}",
        reached,
        f"{row['peak_mb'] / 1000:.2f} GB",
        _spread(row.get("ratio")),
        targets[0],
        _spread(row.get("memory_ratio")),
        targets[1],
    ]


def _setting(section: Section | None) -> str:
    if section is None:
        return "Not measured."
    setting = section["setting"]
    slow = [row for row in section["methods"].values() if row.get("steps", setting["steps"]) < setting["steps"]]
    fewer = "".join(f"; {row['steps']} of {row['label']}" for row in slow)
    return (
        f"{_machine(section['hardware'], setting['threads'])}. {setting['model']}; {setting['corpus']}, block "
        f"{setting['block']}, batch {setting['batch']}, {setting['precision']}. {setting['rounds']} rounds, steps of "
        f"each row {setting['warmup']} + {setting['steps']} (warm-up + timed{fewer}); medians, ratios with their ends."
    )


def _spam(section: Section | None) -> str:
    title = "**Spam, five epochs with evaluations, GPT-2 124M.** "
    if section is None or section["status"] != "measured":
        return title + _sentence(section)
    guide = section["guide"]
    of_loop = "guide's loop, **scaled**"
    rows = [
        [of_loop, f"{guide['seconds']:,.0f}", "–", "–"],
        [f"{of_loop}, without what follows the test set", f"{guide['seconds_test_set_only']:,.0f}", "–", "–"],
    ]
    target = f"{section['target']:.0f} (aim {section['aim']:.0f})"
    labels = {"kit": "the kit, recipe as shipped", "kit_without_zero_shot": "the kit, no zero-shot baseline"}
    for name, label in ((name, label) for name, label in labels.items() if name in section):
        ratios = f"{section[name]['ratio']:.1f}; {section[name]['ratio_test_set_only']:.1f} of the second row"
        rows.append([label, f"{section[name]['seconds']:,.1f}", ratios, target])
    return "\n\n".join(
        [
            f"{title}{_machine(section['hardware'], section['setting']['threads'])}. From the start of the process to "
            "the accuracy on the test set.",
            _table(["run", "seconds", "the kit is × sooner", "at least"], rows),
            f"Scaled {guide['scaled']}: {guide['seconds_per_step']:.2f} s per step; steps {guide['steps_s']:,.0f} s, "
            f"evaluations and accuracies after epochs {guide['evaluations_s']:,.0f} s, accuracy of the test set "
            f"{guide['test_set_s']:,.0f} s, of the training and validation rows {guide['other_accuracies_s']:,.0f} s, "
            f"start {guide['setup_s']:,.0f} s.",
        ]
    )


def _preparing(section: Section | None) -> str:
    title = "**Preparing.** "
    if section is None or section["status"] != "measured":
        return title + _sentence(section)
    setting = section["setting"]
    rows = []
    for name, row in section["methods"].items():
        speed, memory = (section["target"], section["memory_target"]) if name == "run_clm" else (None, None)
        ratios = ["–", "–"] if name == "kit" else [_spread(row["ratio"]), _spread(row["memory_ratio"])]
        figures = [f"{row['seconds']:.2f}", f"{row['mb_per_second']:.2f}", f"{row['peak_mb']:,.0f} MB"]
        rows.append([row["label"], *figures, ratios[0], _number(speed), ratios[1], _number(memory)])
    header = ["way", "seconds", "MB/s", "peak memory"]
    return "\n\n".join(
        [
            f"{title}{' + '.join(setting['texts'])}, {setting['megabytes']:.1f} MB, {setting['processes']} processes.",
            _table([*header, "the kit is × as fast", "at least", "the kit's memory ×", "at most"], rows),
        ]
    )


def _frozen(section: Section | None) -> str:
    title = "**Frozen-prefix epochs.** "
    if section is None or section["status"] != "measured":
        return title + _sentence(section)
    names = {"off": "without the cache", "on": "with it"}
    rows = [
        [label, f"{row['first_step_s']:.3g}", f"{row['later_step_s']:.3g}", f"{row['peak_mb'] / 1000:.2f} GB"]
        for cache, label in names.items()
        for row in [section[cache]]
    ]
    setting = section["setting"]
    return "\n\n".join(
        [
            f"{title}{_machine(section['hardware'], setting['threads'])}. A classifier of rows of {setting['block']} "
            f"tokens, batch {setting['batch']}, of which the last block, the final norm and the head train.",
            _table(["epochs", "s per step, first epoch", "s per step, later ones", "peak memory"], rows),
            f"Later epochs are × {_spread(section['ratio'])} as fast with the cache; at least {section['target']:g}.",
        ]
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sentence(section: Section | None) -> str:
    status = section["status"] if section else NOT_MEASURED
    return f"{status[0].upper()}{status[1:]}."


def _machine(hardware: Section, threads: int) -> str:
    return hardware.get("gpu") or f"{hardware['cpu']}, {threads} threads, {hardware['ram_gb']} GB"


def _versions(section: Section) -> str:
    own = section["versions"].get("kit", {})
    each = {name: {p: v for p, v in of.items() if own.get(p) != v} for name, of in section["versions"].items()}
    each["kit"] = own
    words = (f"{name}: {', '.join(f'{p} {v}' for p, v in of.items())}" for name, of in each.items() if of)
    return f"Versions, where they differ from the kit's: {'; '.join(words)}."


def _spread(ratio: Section | None) -> str:
    return "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}".replace("%", " %")
