"""What can be wrong with a model or a tokenizer."""

import json
import pickle
import shutil
import socket
from pathlib import Path

from huggingface_hub import constants

from kit import network
from tests.material import make_model, make_tokenizer
from tests.troubleshooting.lab import case

GROUP = "Model and tokenizer"


@case(GROUP, "a model folder that does not exist", "model.name_or_path", "`./modle`", "/home/you/modle", "`model`")
def missing_model(lab):
    return lab.recipe(model={"name_or_path": "./modle"})


@case(GROUP, "a tokenizer of another model", "./other", "ids up to 399", "`./model` has 320 embeddings")
def other_tokenizer(lab):
    make_tokenizer(400).save_pretrained("other")
    return lab.recipe(model={"tokenizer": "./other"})


@case(GROUP, "blocks longer than the model's positions", "data.block_size", "found 4,096", "at most 64")
def long_blocks(lab):
    return lab.recipe(data={"block_size": 4096})


@case(GROUP, "an encoder", "model.name_or_path", "`bert`", "needs a decoder")
def encoder(lab):
    lab.write("bert/config.json", json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    return lab.recipe(model={"name_or_path": "./bert"})


@case(GROUP, "weights in pickle format alone", "pytorch_model.bin", "can run any code", "safetensors")
def pickled_weights(lab):
    Path("model/model.safetensors").unlink()
    lab.write("model/pytorch_model.bin", pickle.dumps({"weight": 1}))
    return lab.recipe()


@case(GROUP, "a model that needs code of its own", "./model", "running code", "`model.trust_remote_code: true`")
def remote_code(lab):
    config = json.loads(Path("model/config.json").read_text())
    config |= {"model_type": "novel", "auto_map": {"AutoConfig": "novel.Config", "AutoModelForCausalLM": "novel.Model"}}
    lab.write("model/config.json", json.dumps(config))
    lab.write("model/novel.py", "open('owned', 'w')\n")
    return lab.recipe()


@case(GROUP, "no weights", "./model", "holds no weights", "model.safetensors")
def no_weights(lab):
    Path("model/model.safetensors").unlink()
    return lab.recipe()


def cut_off(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@case(GROUP, "weights that are cut off", "./model", "model.safetensors is cut off or damaged", "bytes)")
def truncated(lab):
    cut_off(Path("model/model.safetensors"))
    return lab.recipe()


def shards(lab):
    Path("model/model.safetensors").unlink()
    make_model().save_pretrained("model", max_shard_size="20KB")
    return sorted(Path("model").glob("model-*.safetensors"))


@case(GROUP, "one of several files of weights cut off", "./model", "model-00002-of-", "is cut off or damaged")
def truncated_shard(lab):
    cut_off(shards(lab)[1])
    return lab.recipe()


@case(GROUP, "one of several files of weights missing", "1 of ", "are missing: model-00002-of-")
def missing_shard(lab):
    shards(lab)[1].unlink()
    return lab.recipe()


@case(GROUP, "a Git LFS pointer in the place of weights", "model.safetensors", "Git LFS pointer", "`git lfs pull`")
def lfs_pointer(lab):
    lab.write("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return lab.recipe()


@case(GROUP, "no tokenizer in the folder", "./model", "no tokenizer", "`model.tokenizer`")
def no_tokenizer(lab):
    for path in Path("model").glob("*token*"):
        path.unlink()
    return lab.recipe()


@case(GROUP, "a name on the Hub, without a network", "`some-team/medical-lm`", "not in the cache", "cannot be reached")
def no_network(lab):
    def no_connection(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    lab.monkeypatch.setattr(network, "is_offline_mode", lambda: False)
    lab.monkeypatch.setattr(network, "getproxies", dict)
    lab.monkeypatch.setattr(socket, "create_connection", no_connection)
    return lab.recipe(model={"name_or_path": "some-team/medical-lm"})


@case(GROUP, "a name on the Hub, offline, nothing in the cache", "its config.json is not in", "HF_HUB_OFFLINE is set")
def offline(lab):
    return lab.recipe(model={"name_or_path": "some-team/medical-lm"})


@case(GROUP, "a name on the Hub, offline, weights not in the cache", "its model.safetensors is not", "HF_HUB_OFFLINE")
def offline_without_weights(lab):
    cache = Path("hub/models--some-team--medical-lm").absolute()
    lab.write(cache / "refs/main", "0" * 40)
    shutil.copytree("model", cache / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    lab.monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache.parent))
    return lab.recipe(model={"name_or_path": "some-team/medical-lm"})


@case(GROUP, "weights that hold NaN", "not finite", "NaN")
def nan_weights(lab):
    model = make_model()
    model.transformer.wte.weight.data[7] = float("nan")
    model.save_pretrained("model")
    return lab.recipe()


@case(GROUP, "a learning rate far too high", "training has diverged", "`training.learning_rate`")
def divergence(lab):
    return lab.recipe(training={"learning_rate": 1e18, "logging_steps": 1, "max_steps": 20, "max_grad_norm": 0})


@case(GROUP, "`kit generate` from a run that has not ended", "run:", "has no model/ yet")
def generate_too_early(lab):
    assert lab.kit(*lab.recipe(data={"block_size": 4096}))[0] == 2
    Path("run/recipe.yaml").touch()
    return ["generate", "run", "--prompt", "the kit"]
