"""The tables of docs/performance.md are those of the results, and the sums behind them are right."""

import os
from argparse import Namespace

import pytest

from benchmarks.speed import causal_lm, report, spam
from benchmarks.speed.material import prepare
from benchmarks.speed.methods import CPU, GPU, XL, Method

RESULTS = report.ROOT / "benchmarks/results"


def test_the_tables_are_those_of_the_results():
    if os.environ.get("KIT_WRITE_DOCS") == "1":
        report.write_page(RESULTS)
    text = report.PAGE.read_text(encoding="utf-8")
    assert text.split(report.BEGIN)[1].split(report.END)[0] == report.page(RESULTS), "make docs"


def _figures(tokens_per_second, peak_mb):
    same = {"seconds_per_step": 1.0, "labels_per_step": 8.0}
    return {"tokens_per_second": tokens_per_second, "peak_mb": peak_mb, **same}


def _section(failed):
    """Two rounds, of which the second one is on a machine that has become half as fast."""
    rounds = [
        {"kit": _figures(300, 40), "run_clm": _figures(200, 80), "peak": {"bf16_flops": 4e3, "fp32_flops": 2e3}},
        {"kit": _figures(150, 40), "run_clm": _figures(120, 50), "peak": {"bf16_flops": 2e3, "fp32_flops": 1e3}},
    ]
    methods = {name: CPU[name] for name in ("kit", "run_clm", "trl", "litgpt")}
    section = causal_lm._summarise(Namespace(steps=2), methods, rounds, failed)
    section["setting"] = {"parameters": 2, "precision": "bf16", "threads": 2, "model": "m", "corpus": "c"}
    section["setting"] |= dict.fromkeys(("block", "batch", "rounds", "warmup", "steps"), 2)
    section |= {"hardware": {"cpu": "a processor", "ram_gb": 1}, "versions": {"kit": {"torch": "2"}}}
    causal_lm._add_share_of_peak(section)
    return section


def test_the_table_names_rows_of_which_fewer_steps_were_timed():
    section = _section({})
    assert "2 + 2 (warm-up + timed);" in report.tables({"causal_lm": section}, "cpu")
    section["methods"]["run_clm"]["steps"] = 1
    assert f"2 + 2 (warm-up + timed; 1 of {CPU['run_clm'].label});" in report.tables({"causal_lm": section}, "cpu")


def test_ratios_are_taken_within_a_round():
    row = _section({})["methods"]["run_clm"]
    assert row["ratio"] == pytest.approx({"median": 1.375, "min": 1.25, "max": 1.5})
    assert row["memory_ratio"] == pytest.approx({"median": 0.65, "min": 0.5, "max": 0.8})


def test_share_of_the_peak_counts_six_operations_per_parameter_and_token():
    assert _section({})["methods"]["kit"]["share_of_peak"] == pytest.approx(6 * 2 * 225 / 3e3)


def test_a_row_says_why_it_has_no_figures():
    table = report.tables({"causal_lm": _section({"trl": "no matching distribution"})}, "cpu")
    rows = {line.split(" | ")[0].lstrip("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert "| failed: no matching distribution |" in rows[CPU["trl"].label]
    assert "| not measured |" in rows[CPU["litgpt"].label]
    assert "1.38 (1.25–1.50) | 1 | 0.65 (0.50–0.80) | 0.7 |" in rows[CPU["run_clm"].label]
    assert "(at least 52 %)" in rows[CPU["kit"].label]


def test_nothing_measured_gives_tables_that_say_so():
    for device, methods in (("cpu", CPU), ("cuda", GPU | XL)):
        table = report.tables({}, device)
        assert table.count("ot measured") >= len(methods)


def test_the_loop_is_scaled_from_what_was_timed():
    found = {
        "setup_s": 10.0, "steps_timed": 2, "steps_per_epoch": 130, "seconds_of_steps": 2.5, "evaluation_s": 16.0,
        "evaluation_batches": 20, "batches": {"train": 131, "validation": 19, "test": 38},
    }  # fmt: skip
    guide = spam.scale(found)
    # 650 steps; 13 evaluations and 5 accuracies on 10 batches each; 38 and 150 batches at the end.
    assert guide["seconds_test_set_only"] == pytest.approx(10 + 650 * 1.25 + 18 * 8 + 38 * 0.8)
    assert guide["seconds"] == pytest.approx(10 + 650 * 1.25 + 18 * 8 + 188 * 0.8)
    assert "2 of 650 steps" in guide["scaled"]


@pytest.mark.parametrize("twice", [False, True])
def test_the_recipe_without_its_zero_shot_baseline_has_a_row_where_it_was_run(twice):
    names = ("seconds", "seconds_test_set_only", "seconds_per_step", "steps_s", "evaluations_s", "test_set_s")
    guide = dict.fromkeys((*names, "other_accuracies_s", "setup_s"), 1.0) | {"scaled": "from a part"}
    run = {"seconds": 2.0, "ratio": 3.0, "ratio_test_set_only": 2.5}
    section = {"status": "measured", "hardware": {"gpu": "one"}, "setting": {"threads": 2}, "target": 12, "aim": 20}
    section |= {"guide": guide, "kit": run} | ({"kit_without_zero_shot": run} if twice else {})
    table = report.tables({"spam": section}, "cpu")
    assert ("no zero-shot baseline" in table) == twice
    assert "| the kit, recipe as shipped | 2.0 | 3.0; 2.5 of the second row |" in table


def test_material_is_made_anew_for_another_text_of_the_same_name(tmp_path):
    made = []
    for folder, text in (("a", "one\n\n\ntwo"), ("a", "one\n\n\ntwo"), ("b", "one\n\n\n2\n\n\nthree")):
        corpus = tmp_path / folder / "data/corpus.txt"
        corpus.parent.mkdir(parents=True, exist_ok=True)
        corpus.write_text(text)
        material = prepare(tmp_path / "work", corpus, None, False)
        made.append((material.about["documents"], material.text.stat().st_mtime_ns, material.text.read_text()))
    assert made[0] == made[1]
    assert [(count, text) for count, _, text in made[1:]] == [(2, "one\n\n\ntwo"), (3, "one\n\n\n2\n\n\nthree")]


def test_every_row_has_a_program_and_an_environment():
    for method in (*CPU.values(), *GPU.values(), *XL.values()):
        assert isinstance(method, Method)
        assert (report.ROOT / f"benchmarks/speed/{method.module}.py").is_file()
        assert method.environment in ("kit", "trl", "litgpt")
        assert method.environment == "kit" or method.module.startswith(method.environment)
