"""The kit, with notes of which rows each process trains on and which files it writes: `-m tests.watched_kit train …`.

The notes lie in the folder that KIT_NOTES names; what is written in the folder around it is noted.
"""

import json
import os
import re
import sys
from pathlib import Path

_TEMPORARY = re.compile(r"/\.([^/]+)\.[0-9a-f]{8}(?=/|$)")  # of `kit.files`


def watch_rows(notes):
    """Note the rows of each micro-batch of a causal LM, before they are trained on, and the steps finished by then."""
    from kit.training.trainer import KitTrainer

    training_step = KitTrainer.training_step
    known = {}

    def step(self, model, inputs, *args, **kwargs):
        if "shift_labels" not in inputs:
            return training_step(self, model, inputs, *args, **kwargs)
        if not known:
            rows = [self.train_dataset[index]["shift_labels"].tobytes() for index in range(len(self.train_dataset))]
            known.update({row: index for index, row in enumerate(rows)})
            assert len(known) == len(rows), "two rows are alike"
        labels = inputs["shift_labels"].cpu().numpy()
        rows = [-1 if (row == -100).all() else known[row.tobytes()] for row in labels]
        _note(notes, "rows", {"step": self.state.global_step, "rows": rows})
        return training_step(self, model, inputs, *args, **kwargs)

    KitTrainer.training_step = step


def watch_files(notes):
    """Note each file that is opened for writing, under the name that it gets in the end."""
    import safetensors.torch
    import torch
    from transformers import PreTrainedTokenizerFast

    around = Path(notes).resolve().parent

    def note(path):
        path = Path(path).resolve()
        if path.is_relative_to(around) and not path.is_relative_to(notes):
            name = _TEMPORARY.sub(r"/\1", f"/{path.relative_to(around).as_posix()}")
            _note(notes, "files", name.removeprefix("/"))

    def opened(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            note(arguments[0])

    sys.addaudithook(opened)

    # What is not written through Python's `open`, in C++ and Rust.
    def noting(owner, name, path_of):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            note(path_of(*args, **kwargs))
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    noting(torch, "save", lambda value, path, *_, **__: path)
    noting(safetensors.torch, "serialize_file", lambda tensors, path, *_, **__: path)
    noting(
        PreTrainedTokenizerFast,
        "_save_pretrained",
        lambda self, save_directory, *_, **__: f"{save_directory}/tokenizer.json",
    )


def watch(notes):
    """Note rows and files."""
    Path(notes).mkdir(parents=True, exist_ok=True)
    watch_rows(Path(notes))
    watch_files(Path(notes))


def read_notes(notes, kind):
    """Return the notes of a kind, of each process in the order of its ranks."""
    files = sorted(Path(notes).glob(f"{kind}-*.jsonl"), key=lambda path: int(path.stem.split("-")[1]))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def _note(notes, kind, value):
    with open(notes / f"{kind}-{os.environ.get('RANK', '0')}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    watch(os.environ["KIT_NOTES"])
    from kit import cli

    cli.main()
