"""The classification row: a guide's loop, timed in part and scaled, and the shipped recipe, run whole."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.children import ROOT, Failed, run_child, run_method
from benchmarks.speed.material import Material, model_folder

RECIPE = ROOT / "recipes/spam/cls_gpt2_last-block.yaml"
EPOCHS, EVAL_EVERY, EVAL_BATCHES = 5, 50, 5 + 5
TARGET, AIM = 12.0, 20.0
WITHOUT_ZERO_SHOT = "evaluation.baselines=[majority,tfidf_logreg]"


def measure(options: Any, material: Material, sms: Path | None) -> dict[str, Any]:
    """Measure both, once and in this order, and return the section of the result."""
    if sms is None:
        return {"status": "not measured (needs the SMS Spam Collection: --sms FILE)"}
    section: dict[str, Any] = {
        "status": "measured",
        "setting": {"threads": options.threads, "epochs": EPOCHS, "shape": options.shape},
        "target": TARGET,
        "aim": AIM,
    }
    try:
        # As Hugging Face gives GPT-2: with dropout, which the recipe decides on.
        base = model_folder(options.work, material, options.shape, options.positions, True)
        ours = {"kit": []} | ({"kit_without_zero_shot": [WITHOUT_ZERO_SHOT]} if options.spam_twice else {})
        for name, overrides in ours.items():
            section[name] = _run_recipe(options, base, sms, overrides)
            print(f"  {name}: {section[name]['seconds']:.1f} s", flush=True)
        plain = model_folder(options.work, material, options.shape, options.positions, False)
        asked = {"model": str(plain), "sms": str(sms), "steps": options.guide_steps}
        found = run_method("guide_spam", asked, options.work, options.threads).figures
    except (Failed, OSError) as error:
        return section | {"status": f"failed: {error}"}
    section["versions"] = {"kit": found.pop("versions")}
    section["guide"] = scale(found)
    for name in ours:
        section[name]["ratio"] = section["guide"]["seconds"] / section[name]["seconds"]
        section[name]["ratio_test_set_only"] = section["guide"]["seconds_test_set_only"] / section[name]["seconds"]
    print(f"  guide: {section['guide']['seconds']:.0f} s, scaled", flush=True)
    return section


def scale(found: dict[str, Any]) -> dict[str, Any]:
    """Return the time of the whole loop from what was timed: five epochs, evaluations, all the accuracies."""
    step = found["seconds_of_steps"] / found["steps_timed"]
    steps = EPOCHS * found["steps_per_epoch"]
    evaluations = -(-steps // EVAL_EVERY)  # at steps 0, 50, 100, …
    per_batch = found["evaluation_s"] / found["evaluation_batches"]
    counts = found["batches"]
    parts = {
        "setup_s": found["setup_s"],
        "steps_s": steps * step,
        # An accuracy after an epoch is on as many batches as an evaluation.
        "evaluations_s": (evaluations + EPOCHS) * EVAL_BATCHES * per_batch,
        "test_set_s": counts["test"] * per_batch,
        "other_accuracies_s": (counts["train"] + counts["validation"]) * per_batch,
    }
    total = sum(parts.values())
    return {
        "scaled": f"from {found['steps_timed']} of {steps} steps, and from the losses on "
        f"{found['evaluation_batches']} batches, for {evaluations} evaluations and {EPOCHS} accuracies after epochs on "
        f"{EVAL_BATCHES} each, and for the accuracies at the end on {sum(counts.values())}",
        "seconds": total,
        "seconds_test_set_only": total - parts["other_accuracies_s"],
        "seconds_per_step": step,
        **parts,
        "measured": found,
    }


def _run_recipe(options: Any, base: Path, sms: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the shipped recipe in an empty folder, nothing kept from earlier runs, to the end of its process."""
    with tempfile.TemporaryDirectory(prefix=".measured-", dir=options.work) as name:
        folder = Path(name)
        (folder / "SMSSpamCollection").symlink_to(sms)
        command = [sys.executable, "-m", "kit", "train", str(RECIPE), f"model.name_or_path={base}", *overrides]
        command += ["run.output_dir=run", "data.store_dir=store", *options.spam_overrides]
        child = run_child(command, folder, options.threads)
        scorecard = json.loads((folder / "run/scorecard.json").read_text())
        manifest = json.loads((folder / "run/manifest.json").read_text())
    return {
        "seconds": child.seconds,
        "peak_mb": child.peak_mb(),
        "stages": manifest.get("seconds"),
        "test_accuracy": _find(scorecard, "test", "accuracy"),
    }


def _find(scorecard: Any, *path: str) -> Any:
    """Return the value below these keys, the first one at any depth."""
    if not path:
        return scorecard
    if isinstance(scorecard, dict):
        if path[0] in scorecard:
            return _find(scorecard[path[0]], *path[1:])
        return next((found for each in scorecard.values() if (found := _find(each, *path)) is not None), None)
    return None
