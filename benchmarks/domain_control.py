"""Does the domain's text help, or just more training? Runs the offline recipes and their control, and compares.

    python benchmarks/domain_control.py

Trains recipes/offline/lm_gpt2_pretrain, then from its model lm_gpt2_adapt (domain text) and lm_gpt2_control (as many
steps on more general text), or takes their finished runs from runs/. Writes benchmarks/results/domain_control.json.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the three recipes and print what each does to the domain."""
    scores = {}
    for name in ("pretrain", "adapt", "control"):
        recipe = ROOT / "recipes/offline" / f"lm_gpt2_{name}.yaml"
        subprocess.run([sys.executable, "-m", "kit", "train", str(recipe)], check=True)
        scores[name] = json.loads(Path("runs", f"lm_gpt2_{name}", "scorecard.json").read_text())["sets"]
    bits = {
        "base": scores["adapt"]["domain"]["before"]["bits_per_byte"],
        "adapt": scores["adapt"]["domain"]["after"]["bits_per_byte"],
        "control": scores["control"]["domain"]["after"]["bits_per_byte"],
    }
    same_documents = scores["adapt"]["domain"]["before"] == scores["control"]["domain"]["before"]
    result = {
        "domain_bits_per_byte": bits,
        "adapt_below_control": 1 - bits["adapt"] / bits["control"],
        "same_documents_and_base": same_documents,
        "general_bits_per_byte": {name: scores[name]["general"]["after"]["bits_per_byte"] for name in scores},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    path = ROOT / "benchmarks/results/domain_control.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
