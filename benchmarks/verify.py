"""What `kit verify` finds of a model with one damaged block: each block in turn, in several ways.

    python benchmarks/verify.py MODEL [MODEL ...] [--text FILE] [--ways entries rows ...]

Writes benchmarks/results/verify.json, and prints the table that docs/checkpoints.md shows: how many of the blocks were
found, and by which checks. The model itself comes first: what fails of it is a false alarm.
"""

import argparse
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from comparison import ROOT, describe_setting, write_result
from safetensors.torch import load_file, save_file

from kit.verify import verify

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors, Tensors], Tensors]
_GENERATOR = torch.Generator()


def _shuffle(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
    if axis is None:
        flat = tensor.flatten()
        return flat[torch.randperm(flat.numel(), generator=_GENERATOR)].view_as(tensor)
    return tensor.index_select(axis, torch.randperm(tensor.shape[axis], generator=_GENERATOR))


def _each(
    change: Callable[[torch.Tensor], torch.Tensor], dims: tuple[int, ...]
) -> Callable[[Tensors, Tensors], Tensors]:
    return lambda block, following: {n: change(t) if t.dim() in dims else t for n, t in block.items()}


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous() if tensor.shape[0] == tensor.shape[1] else tensor


# What becomes of a block's tensors; the tensors of the next block are given, too.
WAYS: dict[str, Damage] = {
    "entries of every tensor shuffled": _each(lambda t: _shuffle(t, None), (1, 2)),
    "rows of every tensor shuffled": _each(lambda t: _shuffle(t, 0), (1, 2)),
    "columns of every matrix shuffled": _each(lambda t: _shuffle(t, 1), (2,)),
    "entries of norms and biases shuffled": _each(lambda t: _shuffle(t, None), (1,)),
    "square matrices transposed": _each(_transposed, (2,)),
    "the next block's tensors in its place": lambda block, following: following or block,
}


def blocks_of(tensors: Tensors) -> dict[int, Tensors]:
    """Return the tensors of each block, by their names within it."""
    found: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        if match := re.search(r"\.(\d+)\.(.*)", name):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    return found


def check(folder: Path, text: str | None) -> list[str]:
    """Return the names of the checks that fail."""
    said = io.StringIO()
    with redirect_stdout(said):
        verify(str(folder), text=text, prompt=None, revision=None, as_json=True)
    return [each["name"] for each in json.loads(said.getvalue())["checks"] if each["verdict"] == "FAIL"]


def name_of(model: Path) -> str:
    """Return a folder's name, or that of the folder around it where its own tells nothing."""
    return model.absolute().parts[-2 if model.name in ("hf", "model") else -1]


def damaged(model: Path, folder: Path, number: int, way: str) -> bool:
    """Write a model with one block changed; False where the way changes nothing of it."""
    tensors = load_file(model / "model.safetensors")
    blocks = blocks_of(tensors)
    _GENERATOR.manual_seed(number)
    changed = WAYS[way](blocks[number], blocks.get(number + 1, {}))
    if all(torch.equal(changed[name], tensor) for name, tensor in blocks[number].items()):
        return False
    for name in tensors:
        if (match := re.search(r"\.(\d+)\.(.*)", name)) and int(match[1]) == number:
            tensors[name] = changed[match[2]].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return True


def main() -> None:
    """Damage each block in each way, and write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders with one safetensors file")
    parser.add_argument("--text", help="text that the models know")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/verify.json"))
    options = parser.parse_args()
    options.corpus, options.base = None, options.models[0]
    found: dict[str, dict] = {}
    for model in map(Path, options.models):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(shutil.copytree(model, Path(temporary) / "model"))
            alone = found[name_of(model)] = {"as it is": {"0": check(model, options.text)}}
            for way in options.ways:
                alone[way] = {}
                for number in blocks_of(load_file(model / "model.safetensors")):
                    if damaged(model, folder, number, way):
                        alone[way][str(number)] = check(folder, options.text)
                print(f"{model}, {way}: {alone[way]}", flush=True)
    options.models = list(found)
    setting = {key: value for key, value in describe_setting(options).items() if key not in ("corpus", "base")}
    write_result(options, {**setting, "models": found})
    print("| damage to one block, each in turn | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for way in options.ways:
        cells = []
        for of in found.values():
            names = [name for checks in of[way].values() for name in checks]
            by = ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(names))
            cells.append(f"{sum(map(bool, of[way].values()))} of {len(of[way])}{f': {by}' if by else ''}")
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
