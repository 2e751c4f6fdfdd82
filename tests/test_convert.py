"""`kit convert`: other code's checkpoints to Hugging Face's and back, proven, whole or not at all."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit import convert as convert_module
from kit.checkpoints.layout import SAME
from kit.checkpoints.layouts import nanogpt
from kit.checkpoints.registry import LAYOUTS
from kit.cli import main
from kit.convert import convert
from kit.errors import UserError

HEADS = ["n_head=2"]
FILES = {"guide": "m.safetensors", "nanogpt": "m.pt", "llms-from-scratch": "m.pt", "openai-tf": "m.pt"}


@pytest.fixture
def gpt2(tiny_models, tmp_path):
    """A GPT-2 folder in which no tensor is what initialisation makes of it."""
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_models("gpt2"), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        tensor.normal_(0, 0.3, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("layout", FILES)
def test_there_and_back_is_the_same_model(layout, gpt2, tmp_path, capsys):
    file = tmp_path / FILES[layout]
    convert(str(gpt2), str(file), target_layout=layout)
    convert(str(file), str(tmp_path / "back"), tokenizer=str(gpt2))
    assert equal(tensors_of(gpt2), tensors_of(tmp_path / "back"))
    assert f"layout {layout}, its" in capsys.readouterr().out  # recognised, and why
    report = json.loads((tmp_path / "back/conversion.json").read_text())
    assert (report["from"], report["to"]) == (layout, "hf")
    assert 0 <= report["proof"]["difference"] < 1e-4 * max(1, report["proof"]["largest"])
    assert (tmp_path / f"{FILES[layout]}.conversion.json").is_file()


def test_the_result_loads_alone_with_the_ids_of_its_tokenizer(gpt2, tmp_path):
    convert(str(gpt2), str(tmp_path / "m.pt"), target_layout="nanogpt")
    convert(str(tmp_path / "m.pt"), str(tmp_path / "back"), tokenizer=str(gpt2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(gpt2).get_vocab()
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id is not None


def test_from_one_foreign_layout_to_another(gpt2, tmp_path):
    convert(str(gpt2), str(tmp_path / "a.pt"), target_layout="llms-from-scratch")
    convert(str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors"), target_layout="guide")
    convert(str(tmp_path / "b.safetensors"), str(tmp_path / "back"))
    assert equal(tensors_of(gpt2), tensors_of(tmp_path / "back"))


def test_another_format_of_the_same_layout(gpt2, tmp_path):
    """A state dict that somebody saved, with the names of a compiled model in DDP, beside its configuration."""
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": wrapped, "optimizer": {"state": {}}}, tmp_path / "ckpt.pt")
    convert(str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), config=str(gpt2 / "config.json"), tokenizer=str(gpt2))
    assert equal(tensors_of(gpt2), tensors_of(tmp_path / "out"))


def test_a_wrong_table_is_caught_by_the_logits_and_leaves_nothing(gpt2, tmp_path, monkeypatch):
    """A square matrix that is not transposed has the right shape."""
    table = [
        line if line.hf != "transformer.h.{n}.attn.c_proj.weight" else type(line)(line.hf, line.own, SAME)
        for line in nanogpt.TABLE
    ]
    monkeypatch.setattr(nanogpt, "TABLE", tuple(table))
    before = left_in(tmp_path)
    with pytest.raises(UserError, match="not the same model"):
        convert(str(gpt2), str(tmp_path / "m.pt"), target_layout="nanogpt")
    assert left_in(tmp_path) == before


def test_without_the_proof_the_report_says_so(gpt2, tmp_path):
    convert(str(gpt2), str(tmp_path / "m.pt"), target_layout="nanogpt", verify=False)
    assert json.loads((tmp_path / "m.pt.conversion.json").read_text())["proof"] is None


def test_rows_of_the_vocabulary(gpt2, tmp_path, capsys):
    rows = tensors_of(gpt2)["transformer.wte.weight"].shape[0]
    convert(str(gpt2), str(tmp_path / "m.pt"), target_layout="nanogpt", vocab_size=rows + 16)
    convert(str(tmp_path / "m.pt"), str(tmp_path / "back"), tokenizer=str(gpt2), vocab_size=rows)
    assert equal(tensors_of(gpt2), tensors_of(tmp_path / "back"))
    with pytest.raises(UserError, match=r"tokenizer has .* tokens, the embeddings have .* rows"):
        convert(str(gpt2), str(tmp_path / "few.pt"), target_layout="nanogpt", vocab_size=20)
    assert not (tmp_path / "few.pt").exists()
    assert "16 are added, as zeros" in capsys.readouterr().out


def test_tensors_that_do_not_fit_are_all_named_and_let_pass_by_pattern(gpt2, tmp_path, capsys):
    convert(str(gpt2), str(tmp_path / "m.pt"), target_layout="nanogpt")
    content = torch.load(tmp_path / "m.pt")
    del content["model"]["transformer.h.1.mlp.c_fc.bias"]
    content["model"]["transformer.h.0.attn.rotary"] = torch.ones(3)
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"missing: transformer\.h\.1\.mlp\.c_fc\.bias.*h\.0\.attn\.rotary"):
        convert(str(tmp_path / "odd.pt"), str(tmp_path / "out"), source_layout="nanogpt")
    allow = [r".*rotary", r".*\.c_fc\.bias"]
    convert(str(tmp_path / "odd.pt"), str(tmp_path / "out"), source_layout="nanogpt", allow=allow)
    assert not tensors_of(tmp_path / "out")["transformer.h.1.mlp.c_fc.bias"].any()
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert report["read"]["allowed"].keys() == {"transformer.h.0.attn.rotary", "transformer.h.1.mlp.c_fc.bias"}
    assert "left out" in capsys.readouterr().out


def test_biases_that_the_source_lacks(gpt2, tmp_path):
    """NanoGPT trains with `bias=False`; Hugging Face's GPT-2 has zeros there."""
    tensors = tensors_of(gpt2)
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name].zero_()
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    convert(str(gpt2), str(tmp_path / "m.pt"), target_layout="nanogpt")
    content = torch.load(tmp_path / "m.pt")
    assert content["model_args"]["bias"] is False
    assert not any(name.endswith(".bias") for name in content["model"])
    convert(str(tmp_path / "m.pt"), str(tmp_path / "back"))
    assert equal(tensors, tensors_of(tmp_path / "back"))
    convert(str(gpt2), str(tmp_path / "with.pt"), target_layout="nanogpt", given=["bias=true"])
    assert torch.load(tmp_path / "with.pt")["model_args"]["bias"] is True


def test_a_full_disk_leaves_the_source_and_nothing_else(gpt2, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before, tensors = left_in(tmp_path), tensors_of(gpt2)
    monkeypatch.setattr(convert_module, "write_safetensors", fail)
    with pytest.raises(UserError, match="the disk is full"):
        convert(str(gpt2), str(tmp_path / "out"))
    assert left_in(tmp_path) == before
    assert equal(tensors, tensors_of(gpt2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{gpt2}", "{gpt2}"], "the source itself"),
        (["{gpt2}", "{gpt2}/inside"], "lies in the source"),
        (["{gpt2}", "out", "--to", "nanogtp"], "did you mean `nanogpt`"),
        (["{gpt2}", "out.safetensors", "--to", "openai-tf"], "is written to a folder, .pt"),
        (["{gpt2}", "out.bin", "--to", "llama2.c"], "holds llama; the model is gpt2"),
        (["{gpt2}", "out.pt", "--to", "nanogpt", "--set", "bias"], "expected name=value"),
        (["{gpt2}", "out", "--tokenizer", "nowhere"], "no tokenizer there"),
        (["{gpt2}", "out", "--config", "absent.json"], "--config absent.json: No such file"),
        (["{gpt2}", "out", "--allow", "("], "--allow (: no regular expression"),
        (["{gpt2}", "out.pt", "--to", "nanogpt", "--set", "bias=banana"], "expected true or false"),
        (["{gpt2}", "out", "--vocab-size", "100000000000"], "expected at most 1,048,576 more"),
        (["absent", "out"], "no such file or folder"),
        (["{gpt2}/tokenizer.json", "out"], "expected safetensors"),
    ],
)
def test_mistakes_are_one_message(arguments, says, gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = left_in(tmp_path)
    monkeypatch.setattr("sys.argv", ["kit", "convert", *(each.format(gpt2=gpt2) for each in arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert left_in(tmp_path) == before


def test_heads_that_no_tensor_tells(gpt2, tmp_path):
    """GPT-2's own sizes are known by their width; any other has to be given."""
    content = tensors_of(gpt2)
    for name, tensor in content.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            content[name] = tensor.T.contiguous()
    torch.save(content, tmp_path / "bare.pt")
    with pytest.raises(UserError, match=r"--set n_head="):
        convert(str(tmp_path / "bare.pt"), str(tmp_path / "out"))
    heads = json.loads((gpt2 / "config.json").read_text())["n_head"]
    convert(str(tmp_path / "bare.pt"), str(tmp_path / "out"), given=[f"n_head={heads}"])
    assert equal(tensors_of(gpt2), tensors_of(tmp_path / "out"))


def test_every_layout_is_tried_above():
    assert {*FILES, "llama2.c", "hf"} == LAYOUTS.keys()  # llama2.c in tests/checkpoints/test_llama2c.py


def test_a_folder_that_no_conversion_wrote_is_not_replaced(gpt2, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/config.json").write_text("{}")
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a folder that a conversion has written"):
        convert(str(gpt2), str(tmp_path / "thesis"), overwrite=True)
    assert left_in(tmp_path / "thesis") == ["config.json", "thesis.tex"]
    convert(str(gpt2), str(tmp_path / "out"))
    with pytest.raises(UserError, match="--overwrite replaces it"):
        convert(str(gpt2), str(tmp_path / "out"))
    convert(str(gpt2), str(tmp_path / "out"), overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="is a link"):
        convert(str(gpt2), str(tmp_path / "link"), overwrite=True)


def test_what_lies_beside_the_target_is_not_replaced(tiny_models, tmp_path):
    llama = tiny_models("llama", tie_word_embeddings=True)
    for name in ("m.bin.conversion.json", "m.tokenizer.bin"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}: exists already"):
            convert(str(llama), str(tmp_path / "m.bin"), target_layout="llama2.c")
        assert left_in(tmp_path) == [name]
        (tmp_path / name).unlink()


def test_a_target_that_appears_meanwhile_is_not_replaced(gpt2, tmp_path, monkeypatch):
    def write_and_disturb(*arguments):
        write(*arguments)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("years of work")

    write = convert_module.write_safetensors
    monkeypatch.setattr(convert_module, "write_safetensors", write_and_disturb)
    with pytest.raises(UserError, match="exists by now"):
        convert(str(gpt2), str(tmp_path / "out"))
    assert left_in(tmp_path / "out") == ["thesis.tex"]


def test_what_a_file_says_counts_before_a_configuration_beside_it(gpt2, tiny_models, tmp_path):
    """The one beside it may be another model's, of the same sizes but for its heads."""
    convert(str(gpt2), str(tmp_path / "m.safetensors"), target_layout="guide")
    config = json.loads((gpt2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_head": 1}))
    convert(str(tmp_path / "m.safetensors"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["n_head"] == config["n_head"] != 1


def test_a_head_that_is_the_embeddings_is_tied_in_other_layouts(tiny_models, tmp_path, capsys):
    untied = tmp_path / "untied"
    shutil.copytree(tiny_models("gpt2", tie_word_embeddings=False), untied)
    tensors = tensors_of(untied)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, untied / "model.safetensors", {"format": "pt"})
    tied = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    for layout, name in FILES.items():
        convert(str(untied), str(tmp_path / f"{layout}-{name}"), target_layout=layout)
        assert "written as tied" in capsys.readouterr().out
        convert(str(tmp_path / f"{layout}-{name}"), str(tmp_path / f"{layout}-back"))
        assert equal(tied, tensors_of(tmp_path / f"{layout}-back"))
    convert(str(untied), str(tmp_path / "same"))
    assert equal(tensors, tensors_of(tmp_path / "same"))


def test_a_head_that_its_configuration_ties_and_that_is_another_is_refused(gpt2, tmp_path):
    tensors = tensors_of(gpt2)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is not the embeddings, to which config.json ties it"):
        convert(str(gpt2), str(tmp_path / "out"), source_layout="hf")


def test_masks_of_old_files_are_no_weights(gpt2, tmp_path, capsys):
    """Files of the bare model, without the head, with masks beside the weights."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(gpt2).items()}
    tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64).tril() for n in range(2)}
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    convert(str(gpt2), str(tmp_path / "out"))
    said = capsys.readouterr().out
    weights = sum(tensor.numel() for tensor in tensors_of(tmp_path / "out").values())
    assert f"{weights:,} weights read, {weights:,} written" in said
    assert "masks and constants" in said


def test_generation_settings_stay_with_the_model(gpt2, tmp_path):
    (gpt2 / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "do_sample": True}))
    convert(str(gpt2), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [0, 5]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.fill_(float("nan")), "NaN or infinity in transformer.ln_f.weight"),
        (lambda t: t.to(torch.int8), "weights of type int8.*transformer.ln_f.weight"),
    ],
)
def test_weights_that_give_no_logits_are_named(change, says, gpt2, tmp_path):
    tensors = tensors_of(gpt2)
    tensors["transformer.ln_f.weight"] = change(tensors["transformer.ln_f.weight"])
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=says):
        convert(str(gpt2), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_table_that_forgets_tensors_is_our_fault(gpt2, tmp_path, monkeypatch):
    """Counted, as the logits of what was read do not know of them."""
    convert(str(gpt2), str(tmp_path / "m.pt"), target_layout="nanogpt")
    found = convert_module._count
    monkeypatch.setattr(convert_module, "_count", lambda *of: found(*of) + 1)
    with pytest.raises(RuntimeError, match="weights of the source"):
        convert(str(tmp_path / "m.pt"), str(tmp_path / "out"))
