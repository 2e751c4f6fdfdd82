"""A classifier of which the last block, the final norm and the head train, through `kit train`, cached or not."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.clock import Clock, read_request
from kit.cli import main


def recipe(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe: three epochs, nothing measured on the way."""
    return {
        "task": "sequence-classification",
        "model": {"name_or_path": asked["model"]},
        "data": {
            "train": [{"path": asked["rows"]}],
            "split": {"validation": 0.05, "test": 0.05, "seed": 0},
            "max_length": asked["block"],
            "store_dir": "store",  # of this process alone: a filled cache has no first epoch
        },
        "freezing": {"trainable": {"last_blocks": 1, "final_norm": True, "head": True}, "cache": asked["cache"]},
        "training": {
            "num_train_epochs": asked["epochs"],
            "per_device_train_batch_size": asked["batch"],
            "learning_rate": 5e-5,
            "bf16": asked["bf16"],
            "use_cpu": asked["cpu"],
            "eval_strategy": "no",
            "save_strategy": "no",
        },
        "evaluation": {"baselines": ["majority"]},
        "run": {"output_dir": "run"},
    }


if __name__ == "__main__":
    asked = read_request()
    Path("recipe.yaml").write_text(json.dumps(recipe(asked)))  # YAML holds JSON
    Clock(asked, 0)
    sys.argv = ["kit", "train", "recipe.yaml"]
    main()
