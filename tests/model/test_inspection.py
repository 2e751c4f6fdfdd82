"""Inspection reads headers alone, finds what loading would find wrong, and stays readable however large a model is."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from kit.errors import UserError
from kit.model.headers import read_headers
from kit.model_commands import inspect
from tests.material import ARCHITECTURES, make_model, make_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def shown(capsys):
    """A function that inspects a model and returns what was printed, runs of spaces as one."""

    def show(model, **options):
        capsys.readouterr()
        inspect(str(model), **options)
        return re.sub(r"[ │┃]+", " ", capsys.readouterr().out)

    return show


@pytest.fixture
def copied(tiny_models, tmp_path):
    """A function that copies a tiny model to where it may be changed."""
    return lambda *of, **config: shutil.copytree(tiny_models(*of, **config), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    """A folder with a model in several files."""
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def change(folder, edit):
    """Edit the tensors of a model that is stored in one file."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def table_names(text):
    """Return the names of the table's rows, in their order."""
    return re.findall(r"^ (\S+\.\S+) (?:\d|scalar)", text, flags=re.MULTILINE)


def test_every_architecture_fits_its_own_files(shown, tiny_models):
    for name in ARCHITECTURES:
        for tied in (True, False):
            folder = tiny_models(name, tie_word_embeddings=tied)
            model = AutoModelForCausalLM.from_pretrained(folder)
            text = shown(folder)
            assert f"{type(model).__name__} (model_type {name})" in text
            assert f"architecture: {model.num_parameters():,} parameters" in text
            assert "the files hold every tensor of the architecture" in text
            assert (" tied yes: " in text) is tied
            assert (" output head " in text) is not tied
            assert "warning" not in text


def test_what_the_configuration_says(shown, tiny_models):
    text = shown(tiny_models("llama"))
    for fact in ("layers 2", "hidden size 32; feed-forward 64", "attention heads 2 of size 16; 1 for keys and values",
                 "positions 64; rotary", "stored dtype float32"):  # fmt: skip
        assert f" {fact}" in text
    assert "c_attn, c_fc, c_proj hold (in, out)" in shown(tiny_models())


def test_capping_and_kinds_of_layers_are_notable(shown, tmp_path):
    config = Gemma2Config(num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, vocab_size=90, sliding_window=128)  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    text = shown(tmp_path)
    assert "layers 4: 2 sliding_attention, 2 full_attention" in text
    assert "attn_logit_softcapping 50.0, final_logit_softcapping 30.0, sliding_window 128" in text
    assert "tokenizer: none in this folder" in text


def test_rows_stand_in_the_order_of_the_architecture(shown, tmp_path):
    """The format sorts names as text: h.10 before h.2, and ln_f before wte."""
    model = make_model(n_layer=12)
    model.save_pretrained(tmp_path)
    stored = [name for name in model.state_dict() if name != "lm_head.weight"]
    assert table_names(shown(tmp_path, show_all=True)) == stored
    folded = shown(tmp_path)
    assert table_names(folded) == [name for name in stored if not re.search(r"\.h\.([1-9]|1\d)\.", name)]
    assert "not shown, being alike: transformer.h.{1–11} (as transformer.h.0)" in folded
    assert " transformer.h.0.attn.c_attn.weight 32 × 96 float32 12 × 3,072 " in folded


def test_experts_are_folded_within_layers(shown, tmp_path):
    """The files hold an expert each, the model one tensor of all; that is no difference."""
    config = MixtralConfig(num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=100, num_local_experts=4)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    text = shown(tmp_path)
    assert " model.layers.0.block_sparse_moe.experts.0.w1.weight 48 × 32 float32 12 × 1,536 " in text
    assert "the files hold every tensor of the architecture" in text
    names = table_names(text)
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert len(names) == 13


def test_a_block_unlike_the_others_is_shown(shown, copied):
    folder = copied(n_layer=3)
    change(folder, lambda tensors: tensors.update({"transformer.h.1.ln_1.bias": torch.zeros(32).bfloat16()}))
    text = shown(folder)
    assert "not shown, being alike: transformer.h.2 (as transformer.h.0);" in text
    assert " transformer.h.1.ln_1.bias 32 bfloat16 " in text
    assert re.search(r"stored dtype float32 \(\d+ of the tensors\), bfloat16 \(1 of the tensors\)", text)


def test_shards_hold_the_whole_model(shown, sharded):
    held = {tensor.name: tuple(tensor.shape) for tensor in read_headers(sharded)}
    assert held == {name: tuple(t.shape) for name, t in make_model().state_dict().items() if name != "lm_head.weight"}
    assert re.search(r"\d shards, model-00001-of-0000", shown(sharded))


def test_bfloat16(shown, tmp_path):
    model = make_model().bfloat16()
    model.save_pretrained(tmp_path)
    text = shown(tmp_path)
    assert " stored dtype bfloat16\n" in text
    assert f"{model.num_parameters():,} parameters, {2 * model.num_parameters():,} bytes" in text


def test_encoders(shown, tmp_path):
    config = BertConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=99)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    text = shown(tmp_path)
    assert "BertForMaskedLM (model_type bert)" in text
    assert "the files hold every tensor of the architecture" in text


def test_differences_are_named(shown, copied):
    def spoil(tensors):
        del tensors["transformer.h.0.ln_1.bias"], tensors["transformer.h.1.ln_1.bias"]
        tensors["extra.weight"] = torch.ones(3)
        tensors["transformer.wpe.weight"] = torch.ones(5, 32)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    folder = copied()
    change(folder, spoil)
    text = shown(folder)
    assert "in the architecture, not in the files: transformer.h.{0–1}.ln_1.bias\n" in text
    assert "in the files, not used by the architecture: extra.weight\n" in text
    assert "transformer.wpe.weight is 5 × 32 in the files, but 64 × 32 in the architecture" in text
    assert "lm_head.weight is stored although it is tied to transformer.wte.weight" in text
    assert "the files hold every tensor" not in text


def test_gpt2_as_it_lies_on_the_hub(shown, copied):
    """Its names lack the prefix, and its causal masks are stored: neither is a fault of the files."""

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors.update({f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(2)})

    folder = copied()
    change(folder, age)
    text = shown(folder)
    assert "ignored on loading: h.{0–1}.attn.bias\n" in text
    assert "the files hold every tensor of the architecture" in text
    assert table_names(text)[:3] == ["wte.weight", "wpe.weight", "h.0.ln_1.weight"]
    assert "warning" not in text


def test_quantized_files_are_not_compared(shown, copied):
    folder = copied()
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    text = shown(folder)
    assert "quantized quant_method gptq, bits 4" in text
    assert "the files hold every tensor" not in text
    assert "architecture: " in text


def test_an_architecture_that_cannot_be_built_is_still_shown(shown, copied):
    folder = copied("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "no_such_function"}))
    text = shown(folder)
    assert "warning: the architecture cannot be built" in text
    assert "model.embed_tokens.weight" in table_names(text)


def test_tokenizer(shown, copied):
    folder = copied()
    size = len(make_tokenizer())
    assert f"{size} tokens" in shown(folder)
    text = shown(folder)
    assert f"no BOS, EOS <eos> (0), no pad token; largest id {size - 1}, the embedding has {size} rows" in text
    change(folder, lambda tensors: tensors.update({"transformer.wte.weight": torch.ones(200, 32)}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200, "eos_token_id": 7}))
    text = shown(folder)
    assert "warning: the tokenizer makes ids that the embedding has no row for" in text
    assert "warning: config.json gives EOS the id 7, the tokenizer 0" in text


def test_a_run_directory_stands_for_its_model(shown, copied, tmp_path):
    copied()
    (tmp_path / "recipe.yaml").write_text("")
    assert "GPT2LMHeadModel" in shown(tmp_path)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="the run has no model/ yet"):
        inspect(str(tmp_path))


def test_values(shown, copied):
    folder = copied()
    weight = torch.tensor([[3.0, -1.0, float("nan"), 2.0, float("inf")] + [0.5] * 27] * 64)
    change(folder, lambda tensors: tensors.update({"transformer.wpe.weight": weight}))
    text = shown(folder, values="transformer.wpe.weight")
    finite = weight[weight.isfinite()].double()
    for line in ("transformer.wpe.weight in model.safetensors", " shape 64 × 32 (2,048 values)", " dtype float32",
                 f" mean {finite.mean():.6g}", f" std {finite.std(correction=0):.6g}", " min -1", " max 3",
                 " not finite 128 (left out of the figures above)",
                 " first 8 3, -1, nan, 2, inf, 0.5, 0.5, 0.5"):  # fmt: skip
        assert f"{line}\n" in text
    assert "Tensors" not in text


def test_values_come_from_the_shard_that_holds_them(shown, sharded):
    tensors = {t.name: t for t in read_headers(sharded)}
    wanted = tensors["transformer.ln_f.weight"]
    for shard in sharded.glob("*.safetensors"):
        if shard.name != wanted.file:  # of the other files, only the header is whole
            header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
            content = shard.read_bytes()
            shard.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    assert f"transformer.ln_f.weight in {wanted.file}\n" in (text := shown(sharded, values=wanted.name))
    assert " mean 1\n" in text


ODD = [
    torch.tensor(3),
    torch.ones(0, 4),
    torch.tensor([True, False]),
    torch.full((2, 2), float("nan")),
    torch.arange(12).to(torch.float8_e4m3fn),
]


@pytest.mark.parametrize("tensor", ODD, ids=lambda tensor: str(tensor.dtype))
def test_values_of_any_type_and_size(shown, copied, tensor):
    folder = copied()
    change(folder, lambda tensors: tensors.update(odd=tensor))
    assert f" dtype {str(tensor.dtype).removeprefix('torch.')}\n" in shown(folder, values="odd")
    assert "not used by the architecture: odd" in shown(folder)


def test_unknown_tensor(tiny_models):
    with pytest.raises(UserError, match=r"did you mean `transformer\.h\.1\.attn\.c_attn\.weight`"):
        inspect(str(tiny_models()), values="transformer.h.1.attn.c_atn.weight")
    with pytest.raises(UserError, match=r"tied to `transformer\.wte\.weight`, which is stored"):
        inspect(str(tiny_models()), values="lm_head.weight")


def no_config(folder):
    (folder / "config.json").unlink()


def adapter(folder):
    no_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def cut_off(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def unknown_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_2"}))


def no_json(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(("spoil", "message"), [
    (no_config, r"no config\.json"),
    (adapter, "holds an adapter"),
    (pickled, r"pytorch_model\.bin.*safetensors"),
    (no_weights, "no weights"),
    (cut_off, r"model\.safetensors is cut off or damaged"),
    (empty, r"model\.safetensors is cut off or damaged"),
    (pointer, "Git LFS pointer"),
    (unknown_type, "unknown model_type `gpt_2`; did you mean `gpt2`"),
    (no_json, r"config\.json"),
])  # fmt: skip
def test_unusable_folders(copied, spoil, message):
    folder = copied()
    spoil(folder)
    with pytest.raises(UserError, match=message):
        inspect(str(folder))


def test_unusable_shards(sharded):
    index, shard = sharded / INDEX, sorted(sharded.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{shard.name} is cut off"):
        inspect(str(sharded))
    shard.unlink()
    with pytest.raises(UserError, match=rf"missing.*{shard.name}"):
        inspect(str(sharded))
    shard.write_bytes(whole)
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(UserError, match=re.escape(INDEX)):
            inspect(str(sharded))


def test_an_index_that_errs_is_told_of(shown, sharded):
    index = json.loads((sharded / INDEX).read_text())
    first, *_, last = sorted(index["weight_map"])
    del index["weight_map"][first]
    index["weight_map"]["no.such.tensor"] = index["weight_map"][last]
    (sharded / INDEX).write_text(json.dumps(index))
    text = shown(sharded)
    assert f"{INDEX} names a file that does not hold it for no.such.tensor" in text
    assert f"{INDEX} does not name {first}" in text


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "no-organisation/no-model"])
def test_no_such_model(name):
    with pytest.raises(UserError):
        inspect(name)


def test_a_model_in_the_cache_is_read_without_the_hub(shown, copied, tmp_path, monkeypatch):
    """As `HF_HUB_OFFLINE=1 kit inspect org/name` after the model was downloaded once."""
    folder, cache = copied(), tmp_path / "cache"
    snapshot = cache / "models--org--name/snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (cache / "models--org--name/refs").mkdir()
    (cache / "models--org--name/refs/main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(cache), raising=False)
    text = shown("org/name")
    assert "the files hold every tensor of the architecture" in text
    assert "EOS <eos> (0)" in text
    assert " mean 1\n" in shown("org/name", values="transformer.ln_f.weight")
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no weights.*in the cache, since HF_HUB_OFFLINE is set"):
        inspect("org/name")
