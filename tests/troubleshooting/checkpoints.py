"""What can be wrong with a checkpoint of other code, and with what is made of a finished run's model."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.material import make_model, make_tokenizer
from tests.troubleshooting.lab import case

GROUP, AFTER = "Checkpoints", "Verifying, interpolating, exporting"
WEIGHTS = "model/model.safetensors"
GUIDE = ["convert", "own.safetensors", "converted", "--set", "n_head=2"]


def own(lab):
    """Write the model as a GPT of one's own has it, which says nothing of its heads; return the weights."""
    assert lab.kit("convert", "model", "own.safetensors", "--to", "guide")[0] == 0
    weights = load_file("own.safetensors")
    save_file(weights, "own.safetensors")
    return weights


def cut(path, size):
    """Cut a file off."""
    with open(path, "r+b") as file:
        file.truncate(size)


def trained(lab):
    """Train; return the run's folder."""
    assert lab.kit(*lab.recipe())[0] == 0
    return "run"


class Code:
    """An object whose pickle runs a command where it is read."""

    def __reduce__(self):
        return os.system, ("echo run > owned",)


# ---- the files


@case(GROUP, "a misspelt checkpoint", "own.safetensor: no such file", "did you mean `own.safetensors`?")
def misspelt_checkpoint(lab):
    own(lab)
    return ["convert", "own.safetensor", "converted"]


@case(GROUP, "a safetensors file that is cut off", "own.safetensors: a safetensors file of 9,000 bytes", "cut off")
def cut_safetensors(lab):
    own(lab)
    cut("own.safetensors", 9000)
    return GUIDE


@case(GROUP, "a file of torch.save that is cut off", "ckpt.pt: damaged, cut off, or not written by torch.save")
def cut_pickle(lab):
    torch.save(own(lab), "ckpt.pt")
    cut("ckpt.pt", 9000)
    return ["convert", "ckpt.pt", "converted"]


@case(GROUP, "a checkpoint that runs code", "ckpt.pt: a pickle that holds code: posix.system", "nothing of it was run")
def code_in_checkpoint(lab):
    torch.save({"model": Code()}, "ckpt.pt")
    return ["convert", "ckpt.pt", "converted"]


@case(GROUP, "no checkpoint", "corpus.txt: text; it begins with", "expected safetensors, torch.save's files")
def no_checkpoint(lab):
    return ["convert", "corpus.txt", "converted"]


@case(GROUP, "a checkpoint without one of its shards", "sharded: 1 of", "model-00002-of-")
def checkpoint_without_a_shard(lab):
    make_model().save_pretrained("sharded", max_shard_size="100KB")
    next(Path("sharded").glob("model-00002-of-*")).unlink()
    return ["convert", "sharded", "converted"]


# ---- names, shapes, settings


@case(GROUP, "a checkpoint of Hugging Face's without its config.json", "model: ", "--config")
def checkpoint_without_config(lab):
    Path("model/config.json").unlink()
    return ["convert", "model", "converted"]


@case(
    GROUP,
    "tensors missing, too many and of another shape",
    "missing: blocks.1.attn.c_attn.bias",
    "not in the layout: extra",
    "of another shape: `blocks.0.mlp.fc1.weight` (7, 9)",
    "--allow PATTERN",
)
def tensors_that_do_not_fit(lab):
    weights = own(lab) | {"extra": torch.zeros(3), "blocks.0.mlp.fc1.weight": torch.zeros(7, 9)}
    del weights["blocks.1.attn.c_attn.bias"]
    save_file(weights, "own.safetensors")
    return [*GUIDE, "--from", "guide"]


@case(GROUP, "a checkpoint that does not tell its heads", "no tensor tells the number of heads", "--set n_head=")
def unknown_heads(lab):
    own(lab)
    return GUIDE[:3]


@case(GROUP, "heads that do not divide the width", "own.safetensors: n_head 5; expected a number that divides 32")
def heads_that_do_not_divide(lab):
    own(lab)
    return [*GUIDE[:4], "n_head=5"]


@case(GROUP, "a misspelt setting", "--set n_heads: GPT-2 has no such setting; did you mean `n_head`?")
def misspelt_setting(lab):
    own(lab)
    return [*GUIDE[:4], "n_heads=2"]


@case(GROUP, "a misspelt layout", "--from nanoGTP: no such layout; did you mean `nanogpt`?")
def misspelt_layout(lab):
    own(lab)
    return [*GUIDE, "--from", "nanoGTP"]


@case(GROUP, "a layout for other models", "the layout nanogpt holds gpt2; the model is llama")
def layout_for_other_models(lab):
    make_model("llama").save_pretrained("llama")
    return ["convert", "llama", "ckpt.pt", "--to", "nanogpt"]


@case(GROUP, "a checkpoint with another model's tokenizer", "other: its tokenizer has 400 tokens", "have 320 rows")
def checkpoint_with_other_tokenizer(lab):
    own(lab)
    make_tokenizer(400).save_pretrained("other")
    return [*GUIDE, "--tokenizer", "other"]


# ---- what is written


@case(GROUP, "a conversion onto its source", "model: is the source itself; name another target")
def onto_the_source(lab):
    return ["convert", "model", "model/../model", "--overwrite"]


@case(GROUP, "a file for a layout that is a folder", "converted.safetensors: the layout hf is written to a folder")
def file_for_a_folder(lab):
    return ["convert", "model", "converted.safetensors"]


@case(
    GROUP,
    "a folder of other things in the place of a model",
    "thesis: not a folder that a conversion has written",
    "not replaced",
)
def folder_of_other_things(lab):
    lab.write("thesis/thesis.tex", "years of work")
    return ["convert", "model", "thesis", "--overwrite"]


@case(GROUP, "a disk that a conversion fills", "the disk is full", "make room")
def disk_full_of_conversion(lab):
    if lab.disk("disk", "100k"):
        return ["convert", "model", "disk/converted"]
    Path("disk").rmdir()
    lab.monkeypatch.setattr("kit.convert.write_safetensors", no_room)
    return ["convert", "model", "converted"]


def no_room(*arguments):
    raise OSError(28, "No space left on device")


# ---- verify, interpolate, export


@case(
    AFTER, "a checkpoint of other code to verify", "own.safetensors is a file; expected a model folder", "kit convert"
)
def file_to_verify(lab):
    own(lab)
    return ["verify", "own.safetensors"]


@case(AFTER, "weights to verify that are cut off", "`model`: model.safetensors is cut off or damaged (9,000 bytes)")
def cut_weights_to_verify(lab):
    cut(WEIGHTS, 9000)
    return ["verify", "model"]


@case(AFTER, "an empty text to verify on", "--text: empty.txt holds no text")
def empty_text(lab):
    lab.write("empty.txt", "")
    return ["verify", "model", "--text", "empty.txt"]


@case(AFTER, "shares beyond the two models", "--alphas: found `0:2:0.5`; expected", "from 0 (BASE) to 1 (TUNED)")
def shares_beyond(lab):
    return ["interpolate", "model", "model", *lab.recipe()[1:], "--alphas", "0:2:0.5"]


@case(AFTER, "a misspelt set to be good at", "--domain: the recipe has no evaluation set", "did you mean `domain`?")
def misspelt_set(lab):
    shutil.copytree("model", "tuned")
    return ["interpolate", "model", "tuned", *lab.recipe()[1:], "--domain", "domian", "-o", "average"]


@case(AFTER, "two models with other heads", "config.n_head: found 2 in BASE and 4 in TUNED", "fine-tuned from BASE")
def models_with_other_heads(lab):
    shutil.copytree("model", "tuned")
    config = Path("tuned/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_head": 4}))
    return ["interpolate", "model", "tuned", *lab.recipe()[1:], "-o", "average"]


@case(AFTER, "a model to export that is no run", "model: no run directory (it holds no recipe.yaml)")
def export_of_no_run(lab):
    return ["export", "model", "--to", "exported"]


@case(AFTER, "a run to export that has not ended", "run: the run has not ended well", "expected a finished run")
def export_of_unfinished_run(lab):
    trained(lab)
    manifest = Path("run/manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"status": "user-error"}))
    (Path("run") / "scorecard.json").unlink()
    return ["export", "run", "--to", "exported"]


@case(AFTER, "a misspelt type of the weights", "--dtype: found `bf16`; expected one of", "did you mean `bfloat16`?")
def misspelt_dtype(lab):
    return ["export", trained(lab), "--to", "exported", "--dtype", "bf16"]


@case(AFTER, "an export into its run", "--to: `run/exported` and the run directory run lie in each other")
def export_into_its_run(lab):
    return ["export", trained(lab), "--to", "run/exported"]
