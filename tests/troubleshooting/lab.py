"""A working directory in which everything is right, for a case to spoil one thing in it."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import constants

from tests.material import documents

HOME = "/home/you"  # what stands in the documentation for the working directory of whoever reads it


@dataclass(frozen=True)
class Case:
    """One thing that is wrong.

    Attributes:
        group: heading of the table on the page.
        title: what is wrong, in the words of the page.
        spoil: makes the bad input in a `Lab` and returns the arguments of the command.
        says: what the message has to hold: the place, what was found, what is expected.
        hides: what it must not hold.
    """

    group: str
    title: str
    spoil: Callable[["Lab"], list[str]]
    says: tuple[str, ...]
    hides: str | None = None

    @property
    def room(self) -> str:
        """Name of the module that holds the case."""
        return self.spoil.__module__


CASES: list[Case] = []


def case(group: str, title: str, *says: str, hides: str | None = None):
    """Enter the decorated function as a case; see `Case`."""

    def enter(spoil):
        CASES.append(Case(group, title, spoil, says, hides))
        return spoil

    return enter


class Lab:
    """A folder with a corpus, a tiny model and a recipe that trains for two steps.

    Attributes:
        folder: the working directory.
        monkeypatch: pytest's.
        stack: what is undone after the case.
        kit: runs a command and returns exit code, standard output and standard error.
    """

    def __init__(self, folder: Path, model: Path, monkeypatch, stack: ExitStack, kit) -> None:
        """Make the folder's content and go there."""
        self.folder, self.monkeypatch, self.stack, self.kit = folder, monkeypatch, stack, kit
        monkeypatch.chdir(folder)
        shutil.copytree(model, "model")
        self.write("corpus.txt", "\n".join(documents(120, seed=1)))
        self.recipe()

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file."""
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def recipe(self, name: str = "recipe.yaml", **sections) -> list[str]:
        """Write the recipe, changed by sections (None leaves a key out); return the command that trains it."""
        recipe = {
            "task": "causal-lm",
            "model": {"name_or_path": "./model"},
            "data": {
                "train": [{"path": "corpus.txt", "sample_by": "line"}],
                "validation": {"fraction": 0.1},
                "block_size": 32,
                "store_dir": "store",
            },
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 1e-3},
            "run": {"output_dir": "run"},
        }
        for section, values in sections.items():
            recipe[section] = {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
        for section in recipe.values():
            if isinstance(section, dict):
                for key in [key for key, value in section.items() if value is None]:
                    del section[key]
        self.write(name, yaml.safe_dump(recipe, sort_keys=False))
        return ["train", name]

    def source(self, path: str, content: str | bytes | None = None, **keys) -> list[str]:
        """Write a file and the recipe that trains on it."""
        if content is not None:
            self.write(path, content)
        return self.recipe(data={"train": [{"path": path, **keys}]})

    def disk(self, name: str, size: str) -> bool:
        """Mount a file system of its own at a new folder; return whether this machine lets us."""
        Path(name).mkdir()
        path = str(Path(name).absolute())
        if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "kit-test", path]).returncode:
            return False
        self.stack.callback(subprocess.run, ["umount", "--lazy", path], check=True)
        return True

    def remount(self, name: str, options: str) -> None:
        """Change the options of a file system that `disk` mounted."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(Path(name).absolute())], check=True)

    def normal(self, message: str) -> str:
        """Return a message without what differs from machine to machine."""
        for path in (str(self.folder), str(self.folder.resolve())):
            message = message.replace(path, HOME)
        message = message.replace(constants.HF_HUB_CACHE, "~/.cache/huggingface/hub")
        message = re.sub(r"fingerprint [0-9a-f]{32}, found [0-9a-f]{32}", "fingerprint 8ac5…, found a339…", message)
        message = re.sub(r"transformers \d+(\.\w+)+", "transformers 5", message)
        return re.sub(r"[\d,.]+ MiB for", "0.1 MiB for", message)
