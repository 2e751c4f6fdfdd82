"""What can be wrong with the folders that a run writes to."""

import errno
import os
import subprocess
import sys
from pathlib import Path

from safetensors import SafetensorError

from kit.data import store
from kit.training import run_directory
from kit.training.trainer import KitTrainer
from tests.material import documents
from tests.troubleshooting.lab import case

GROUP = "Folders and disks"


@case(GROUP, "an output folder below a file", "run.output_dir", "/home/you/notes/run", "cannot be written", "Not a dir")
def folder_below_a_file(lab):
    lab.write("notes", "a file")
    return lab.recipe(run={"output_dir": "notes/run"})


@case(
    GROUP, "a store folder below a file", "data.store_dir: /home/you/notes/store cannot be written", "Not a directory"
)
def store_below_a_file(lab):
    lab.write("notes", "a file")
    return lab.recipe(data={"store_dir": "notes/store"})


@case(GROUP, "a read-only output folder", "run.output_dir", "/home/you/frozen/run", "is read-only")
def read_only(lab):
    if lab.disk("frozen", "1m"):
        lab.remount("frozen", "ro")
    else:
        frozen = Path("frozen").absolute()
        frozen.chmod(0o555)
        lab.stack.callback(frozen.chmod, 0o755)
        if os.access(frozen, os.W_OK):  # root, for whom permissions do not hold
            lab.monkeypatch.setattr(os, "access", lambda *args: False)
    lab.recipe(run={"output_dir": "frozen/run"})
    return ["check", "recipe.yaml"]


@case(GROUP, "an output folder with something else in it", "/home/you/run is no run directory", "thesis.tex", "empty")
def foreign_folder(lab):
    lab.write("run/thesis.tex", "years of work")
    return lab.recipe()


@case(GROUP, "an output folder with another recipe's run", "run: holds a run of another recipe", "0.001 -> 0.002")
def another_recipe(lab):
    assert lab.kit(*lab.recipe())[0] == 0
    return ["train", "recipe.yaml", "training.learning_rate=2e-3"]


_HOLD = """
from filelock import FileLock
lock = FileLock(".run.lock")
lock.acquire()
print("held", flush=True)
input()
"""


def hold_run_folder(lab):
    """Lock the run folder from another process, as a live run does; return the process."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lab.stack.callback(holder.wait)
    lab.stack.callback(holder.kill)
    assert holder.stdout.readline() == "held\n"
    return holder


@case(GROUP, "an output folder that another run is using", "run: another run is using this folder", "run.output_dir=")
def live_run(lab):
    lab.monkeypatch.setattr(run_directory, "_LOCK_PATIENCE_S", 0.2)
    hold_run_folder(lab)
    return lab.recipe()


@case(GROUP, "`run.resume: must` without a checkpoint", "run.resume", "/home/you/run/checkpoints holds none")
def nothing_to_resume(lab):
    return ["train", "recipe.yaml", "run.resume=must"]


@case(
    GROUP,
    "a full disk while text is tokenised",
    "the disk is full",
    "0.1 MiB for `data.store_dir` (disk/store)",
    "data.store_dir=",
)
def full_disk_for_stores(lab):
    if not lab.disk("disk", "100k"):

        def fail(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        lab.monkeypatch.setattr(store, "_write_store", fail)
    lab.write("corpus.txt", "\n".join(documents(3000, seed=3)))
    return lab.recipe(data={"store_dir": "disk/store"})


@case(
    GROUP,
    "a full disk while a checkpoint is saved",
    "the disk is full",
    "0.1 MiB for `run.output_dir` (disk/run)",
    "last checkpoint",
)
def full_disk_for_checkpoints(lab):
    # As if it had been emptier when the run began.
    lab.monkeypatch.setattr("kit.run.check_room", lambda *_: "")
    if not lab.disk("disk", "700k"):
        save_progress = KitTrainer._save_progress

        def fail(trainer, *args):
            if trainer.state.global_step == 2:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            save_progress(trainer, *args)

        lab.monkeypatch.setattr(KitTrainer, "_save_progress", fail)
    return lab.recipe(training={"save_strategy": "steps", "save_steps": 1}, run={"output_dir": "disk/run"})
