"""The kit on the causal-LM rows: a recipe through `kit train`, as a user types it."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.clock import Clock, read_request
from kit.cli import main


def recipe(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe: no validation and no sets, so that nothing but steps happens."""
    return {
        "task": "causal-lm",
        "model": {"name_or_path": asked["model"]},
        "data": {
            "train": [{"path": asked["corpus"], "format": "text", "separator": asked["separator"]}],
            "block_size": asked["block"],
            "store_dir": asked["store"],
        },
        "training": {
            "max_steps": asked["stop_after"],
            "per_device_train_batch_size": asked["batch"],
            "bf16": asked["bf16"],
            "use_cpu": asked["cpu"],
            "logging_steps": 1,
            "save_strategy": "no",
            **asked.get("training", {}),
        },
        "run": {"output_dir": "run"},
    }


def labels_seen(steps: int) -> float:
    """Return the label positions of a step, from the run's own count; the last step is not logged yet."""
    entries = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    last = [entry for entry in entries if "tokens_seen" in entry][-1]
    return last["tokens_seen"] / last["step"]


if __name__ == "__main__":
    asked = read_request()
    Path("recipe.yaml").write_text(json.dumps(recipe(asked)))  # YAML holds JSON
    Clock(asked, labels_seen)
    sys.argv = ["kit", "train", "recipe.yaml"]
    main()
