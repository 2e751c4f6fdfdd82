"""Folders and names that cannot be loaded: one line that names the file and says what to do; nothing is run."""

import json
import pickle
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file

from kit import network
from kit.errors import UserError
from kit.model import hub
from kit.model.loading import check_pretrained, load_causal_lm, model_key
from kit.model.saving import save_model, saved_model_difference
from kit.model.tokenizer import load_tokenizer
from kit.recipe.models import ModelSection
from tests.material import make_model, make_tokenizer


@pytest.fixture
def folder(tiny_models, tmp_path):
    """A copy of the tiny GPT-2 to break."""
    return shutil.copytree(tiny_models(), tmp_path / "tiny-gpt2")


@pytest.fixture
def sharded(tmp_path):
    """A tiny GPT-2 in several files."""
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 3
    return tmp_path / "sharded"


@pytest.fixture
def refusal():
    """A function that returns the one-line message that a folder or name gets, the same early and at loading."""

    def message(name, **keys):
        section = ModelSection(name_or_path=str(name), **keys)
        messages = []
        for load in (lambda: check_pretrained(section, 8), lambda: load_causal_lm(section, make_tokenizer(), 0)):
            with pytest.raises(UserError) as error:
                load()
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert messages[0].startswith("model.name_or_path: ")
        assert "\n" not in messages[0]
        assert len(messages[0]) < 700
        return messages[0]

    return message


# ---- weights


class _RunsCode(str):
    """A path; unpickling it creates the file."""

    def __reduce__(self):
        return (open, (str(self), "w"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickled_weights_are_refused_and_not_read(refusal, folder, tmp_path, file):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(_RunsCode(str(tmp_path / "it ran"))))
    message = refusal(folder)
    assert f"weights in {file}" in message
    assert "unpickling can run any code" in message
    assert "save_pretrained" in message
    assert not (tmp_path / "it ran").exists()


def test_pickles_beside_safetensors_do_not_matter(folder):
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert load_causal_lm(ModelSection(name_or_path=str(folder)), make_tokenizer(), 0)


def test_what_a_trainer_pickles_is_not_called_weights(refusal, folder):
    (folder / "model.safetensors").rename(folder / "weights.gone")
    (folder / "training_args.bin").write_bytes(b"anything")
    assert "holds no weights: there is neither model.safetensors nor" in refusal(folder)


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
def test_file_that_was_cut_off(refusal, folder, kept):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(len(whole) * kept)])
    message = refusal(folder)
    assert f"`{folder}`: model.safetensors is cut off or damaged" in message
    assert "offline" not in message  # no network would help


def test_shard_that_was_cut_off_is_named(refusal, sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name} is cut off or damaged" in refusal(sharded)


def test_git_lfs_pointer(refusal, folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model.safetensors is a Git LFS pointer, not the file itself: `git lfs pull`" in refusal(folder)


def test_shards_that_are_missing_are_named(refusal, sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].unlink()
    message = refusal(sharded)
    assert f"1 of {len(shards)} files that model.safetensors.index.json names are missing: {shards[0].name}" in message


@pytest.mark.parametrize(
    "text", ["", '{"weight_map": {"a": "model-0', "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', "\x00"]
)
def test_index_that_is_none(refusal, sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    message = refusal(sharded)
    assert "model.safetensors.index.json cannot be read; expected JSON with a `weight_map`" in message


def test_index_that_is_not_text(refusal, sharded):
    (sharded / "model.safetensors.index.json").write_bytes(b"\xff\xfe\x00")
    assert "model.safetensors.index.json cannot be read" in refusal(sharded)


def test_shards_load(sharded):
    model = load_causal_lm(ModelSection(name_or_path=str(sharded)), make_tokenizer(), 0)
    assert torch.equal(model.state_dict()["transformer.wte.weight"], make_model().transformer.wte.weight)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_configuration_that_is_none(refusal, folder, text):
    (folder / "config.json").write_text(text)
    assert str(folder) in refusal(folder)


def test_folder_of_an_adapter(refusal, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = refusal(tmp_path / "lora")
    assert "holds a PEFT adapter, not a model" in message
    assert "merge_and_unload" in message


def test_folder_without_configuration(refusal, folder):
    (folder / "config.json").unlink()
    assert f"`{folder}` holds no config.json" in refusal(folder)


def test_folder_of_weights_alone_holds_no_tokenizer(folder):
    for file in folder.glob("*.json"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer; name one with `model\.tokenizer`"):
        load_tokenizer(ModelSection(name_or_path=str(folder)), "", lambda: (), lambda: "")


# ---- code that comes with a model


CODE = """
open({evidence!r}, "a").write("it ran")
from transformers import GPT2Config, GPT2LMHeadModel
class Config(GPT2Config):
    model_type = "of-its-own"
class Model(GPT2LMHeadModel):
    config_class = Config
"""


@pytest.fixture
def with_code(folder, tmp_path):
    """A model folder that cannot be loaded without its code, and the file that shows that the code was run."""
    evidence = tmp_path / "it ran"
    (folder / "modeling_own.py").write_text(CODE.format(evidence=str(evidence)))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "of-its-own", "auto_map": auto_map}))
    return folder, evidence


def test_code_in_a_model_folder_does_not_run_untrusted(refusal, with_code):
    folder, evidence = with_code
    message = refusal(folder)
    assert "running code that comes with it" in message
    assert "`model.trust_remote_code: true`" in message
    assert "`model.revision`" in message
    assert not evidence.exists()


def test_trusted_code_runs_and_the_saved_model_is_compared(with_code, tmp_path, monkeypatch):
    """The comparison at the end of a run must not ask again whether to run the code, after hours of training."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, evidence = with_code
    section = ModelSection(name_or_path=str(folder), trust_remote_code=True, revision="0" * 40)
    model = load_causal_lm(section, make_tokenizer(), 0)
    assert evidence.exists()
    assert type(model).__name__ == "Model"
    key = model_key(section, 0)
    with open(folder / "modeling_own.py", "a") as code:
        code.write("# another version\n")
    assert model_key(section, 0) != key
    save_model(model, make_tokenizer(), tmp_path / "saved")
    assert saved_model_difference(model, tmp_path / "saved") == 0.0


def test_unknown_type_without_code(refusal, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt9"}))
    message = refusal(folder)
    assert "is of type `gpt9`, which transformers " in message
    assert "does not know" in message


# ---- names


@pytest.fixture
def no_network(monkeypatch):
    """A machine that nobody has told that it is offline; counts the connections that are tried."""
    tried = []

    def refuse(address, timeout):
        tried.append(address)
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(network, "is_offline_mode", lambda: False)
    monkeypatch.setattr(network, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    network.why_offline.cache_clear()
    yield tried
    network.why_offline.cache_clear()


def test_hub_name_in_offline_mode(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal("some-team/no-such-model")
    assert f"`some-team/no-such-model` is no folder here ({tmp_path}/some-team/no-such-model)" in message
    assert "its config.json is not in the cache (" in message
    assert message.endswith("and HF_HUB_OFFLINE is set")


def test_hub_name_without_a_network(refusal, no_network, capsys):
    """The client would try each file six times, a minute and twelve lines before the message."""
    message = refusal("some-team/no-such-model")
    assert "its config.json is not in the cache" in message
    assert message.endswith("huggingface.co cannot be reached: Name or service not known")
    assert no_network == [("huggingface.co", 443)]
    assert capsys.readouterr().out.count("warning: huggingface.co cannot be reached") == 1


@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    """A Hub model in the cache, as a download leaves it; returns the folder of its files."""
    import huggingface_hub

    commit = "0123456789abcdef" * 2 + "01234567"
    root = tmp_path / "cache/models--team--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    shutil.copytree(folder, root / "snapshots" / commit)
    for module in (huggingface_hub.constants, hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    return root / "snapshots" / commit


def test_cached_model_loads_without_a_network(cached, no_network):
    section = ModelSection(name_or_path="team/model")
    tokenizer = load_tokenizer(section, "", lambda: (), lambda: "")
    model = load_causal_lm(section, tokenizer, 0)
    stored = load_file(cached / "model.safetensors")
    assert torch.equal(model.state_dict()["transformer.wte.weight"], stored["transformer.wte.weight"])
    assert model_key(section, 0)
    assert len(no_network) == 1


def test_file_that_the_cache_lacks_is_named(cached):
    (cached / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"`team/model` is no folder here .* its model\.safetensors is not in the cache"
    ):
        load_causal_lm(ModelSection(name_or_path="team/model"), make_tokenizer(), 0)


def test_a_proxy_is_left_to_the_client(no_network, monkeypatch):
    monkeypatch.setattr(network, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert network.why_offline() is None
    assert no_network == []


def test_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    section = ModelSection(name_or_path="~/tiny-gpt2")
    tokenizer = load_tokenizer(section, "", lambda: (), lambda: "")
    assert load_causal_lm(section, tokenizer, 0).config.model_type == "gpt2"
    assert model_key(section, 0) == model_key(ModelSection(name_or_path=str(folder)), 0)
    assert load_tokenizer(ModelSection(name_or_path=str(folder), tokenizer="~/tiny-gpt2"), "", lambda: (), lambda: "")


def test_folder_in_the_home_folder_that_is_missing(refusal, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    message = refusal("~/tiny-gtp2")
    assert f"`{tmp_path}/tiny-gtp2`: no such folder" in message
    assert "did you mean `tiny-gpt2`?" in message
