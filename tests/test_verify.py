"""`kit verify`: sound models pass, and each way to be broken is found and named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kit.errors import UserError
from kit.verify import verify
from tests.material import documents, make_model, make_tokenizer
from tests.model.models import bert

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = ["stories260K/hf", "base_novels"]

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared models are not on this machine ({DATA})")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Text that the trained model has not seen, of the words that it has."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(documents(20, seed=5)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tiny model that has learned which tokens make words."""
    folder, tokenizer = tmp_path_factory.mktemp("trained"), make_tokenizer()
    model = make_model("gpt2", len(tokenizer), n_layer=3, n_embd=48)
    ids = torch.tensor(tokenizer(" ".join(documents(300, seed=1)))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    torch.manual_seed(0)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, step / 10) * (1 - step / 160)
        rows = torch.stack([ids[start : start + 32] for start in torch.randint(0, len(ids) - 32, (8,)).tolist()])
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checked(capsys):
    """A function that verifies a model and returns whether it passed, and its checks by name."""

    def check(folder, text=None, prompt="the", **options):
        capsys.readouterr()
        passed = verify(str(folder), text=text, prompt=prompt, revision=None, as_json=True, **options)
        report = json.loads(capsys.readouterr().out)
        assert report["passed"] == passed == all(c["verdict"] != "FAIL" for c in report["checks"])
        return passed, {check["name"]: check for check in report["checks"]}

    return check


@pytest.fixture
def changed(tmp_path):
    """A function that copies a model folder with its tensors, and its configuration, changed."""

    def change(folder, alter=lambda tensors: None, **config):
        target = tmp_path / "changed"
        shutil.copytree(folder, target)
        tensors = load_file(target / "model.safetensors")
        alter(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
        values = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(values | config))
        return target

    return change


def shuffle_block(number):
    def alter(tensors):
        generator = torch.Generator().manual_seed(3)
        for name, tensor in tensors.items():
            if f"h.{number}." in name or f"layers.{number}." in name:
                tensors[name] = tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)

    return alter


def verdicts(checks, verdict):
    return {name for name, check in checks.items() if check["verdict"] == verdict}


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_models_pass(checked, name):
    passed, checks = checked(DATA / name)
    assert passed
    assert verdicts(checks, "warn") == {"pad token"}
    assert verdicts(checks, "not applicable") == {"perplexity of the text"}


@needs_data
@pytest.mark.parametrize(("name", "block"), [(name, block) for name in REAL for block in (0, 3)])
def test_real_models_fail_with_one_block_shuffled(checked, changed, name, block):
    passed, checks = checked(changed(DATA / name, shuffle_block(block)))
    assert not passed
    assert checks["order in matrices"]["verdict"] == "FAIL"
    assert f".{block} (all matrices)" in checks["order in matrices"]["reason"]


@needs_data
@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_real_model_with_columns_out_of_order_in_one_block_fails_by_its_channels(checked, changed, block):
    """Neither spectrum nor loss shows it."""

    def alter(tensors):
        generator = torch.Generator().manual_seed(block)
        for name in [name for name in tensors if f".h.{block}." in name and tensors[name].dim() == 2]:
            tensors[name] = tensors[name][:, torch.randperm(tensors[name].shape[1], generator=generator)]

    passed, found = checked(changed(DATA / "base_novels", alter))
    assert not passed
    assert found["channels of blocks"]["verdict"] == "FAIL"
    assert f"h.{block}" in found["channels of blocks"]["reason"]


@needs_data
def test_a_block_whose_rows_are_out_of_order_does_harm(checked, changed):
    """Reordered rows leave the singular values as they are; only what the block does to the loss tells."""

    def alter(tensors):
        for name in (n for n in tensors if "layers.2." in n):
            tensors[name] = tensors[name][
                torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(0))
            ]

    passed, checks = checked(changed(DATA / "stories260K/hf", alter))
    assert not passed
    assert "these are left out: 2 (" in checks["blocks"]["reason"]


def test_a_trained_model_passes_on_text_that_it_knows(checked, trained, text):
    passed, checks = checked(trained, text=text)
    assert passed, checks
    assert checks["order in matrices"]["verdict"] == checks["blocks"]["verdict"] == "ok"
    assert checks["loss of the text"]["verdict"] == checks["order of tokens"]["verdict"] == "ok"


def test_a_text_of_few_tokens_tells_nothing_of_blocks(checked, trained, tmp_path):
    """No standard error can be had of one piece: a sound model would fail by it."""
    (tmp_path / "short.txt").write_text(" ".join(documents(1, seed=1))[:60])
    passed, found = checked(trained, text=str(tmp_path / "short.txt"))
    assert found["order of tokens"]["verdict"] == found["blocks"]["verdict"] == "not applicable"
    assert "or more" in found["blocks"]["reason"]
    assert passed


def test_the_perplexity_is_that_of_the_whole_text(checked, trained, text):
    _, checks = checked(trained, text=text)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), make_tokenizer()
    ids = tokenizer(Path(text).read_text())["input_ids"]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids), 64):  # n_positions
            row = torch.tensor([[ids[start - 1] if start else tokenizer.eos_token_id, *ids[start : start + 64]]])
            loss = model(row[:, :-1], use_cache=False).logits[0].log_softmax(-1)
            nats -= loss.gather(1, row[0, 1:, None]).sum().item()
    found = checks["perplexity of the text"]["figure"]
    bits = nats / torch.log(torch.tensor(2.0)).item() / len(Path(text).read_bytes())
    assert f"{bits:.3f} bits per byte, {len(ids):,} tokens" in found


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_trained_model_fails_with_one_block_shuffled(checked, changed, trained, text, block):
    passed, checks = checked(changed(trained, shuffle_block(block)), text=text)
    assert not passed
    assert "FAIL" in {checks["order in matrices"]["verdict"], checks["blocks"]["verdict"]}


def test_an_untrained_model_fails_by_its_loss(checked, tiny_models):
    passed, checks = checked(tiny_models())
    assert not passed
    assert verdicts(checks, "FAIL") == {"loss of plain sentences"}
    assert {"order in matrices", "order of tokens", "values"} <= verdicts(checks, "warn")


def test_sentences_in_a_language_that_a_model_need_not_know_are_a_warning_beside_text_that_it_should(
    checked, tiny_models, text
):
    _, checks = checked(tiny_models(), text=text)
    assert checks["loss of plain sentences"]["verdict"] == "warn"
    assert checks["loss of the text"]["verdict"] == "FAIL"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(checked, changed, tiny_models, value):
    passed, checks = checked(changed(tiny_models(), lambda t: t["transformer.h.1.mlp.c_fc.weight"][3].fill_(value)))
    assert not passed
    assert "transformer.h.1.mlp.c_fc.weight (128 NaN" in checks["values"]["reason"]
    assert checks["continuation"]["verdict"] == "not applicable"


def test_a_matrix_of_zeros_fails_and_a_bias_of_zeros_does_not(checked, changed, trained, text):
    def alter(tensors):
        tensors["transformer.h.1.attn.c_proj.weight"].zero_()
        tensors["transformer.h.1.attn.c_proj.bias"].zero_()

    _, checks = checked(changed(trained, alter), text=text)
    assert checks["values"]["verdict"] == "FAIL"
    assert "h.1.attn.c_proj.weight (a matrix, 0 throughout)" in checks["values"]["reason"]
    assert "bias" not in checks["values"]["reason"]


def test_a_norm_that_is_constant_in_one_block_alone_fails(checked, changed, trained):
    passed, checks = checked(changed(trained, lambda t: t["transformer.h.2.ln_1.weight"].fill_(1)))
    assert not passed
    assert "h.2.ln_1.weight (1 throughout)" in checks["values"]["reason"]


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda t: t.pop("transformer.h.0.ln_1.bias"), "missing: transformer.h.0.ln_1.bias"),
        (lambda t: t.update(extra=torch.randn(3)), "unexpected: extra"),
        (lambda t: t.update({"transformer.wpe.weight": torch.randn(63, 32)}), "wpe.weight ([63, 32]; expected ["),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_configuration_are_named(checked, changed, tiny_models, alter, said):
    passed, checks = checked(changed(tiny_models(), alter))
    assert not passed
    assert said in checks["parameters"]["reason"]


def test_the_parameters_of_both_are_counted_with_tied_ones_once(checked, tiny_models):
    number = sum(p.numel() for p in make_model("gpt2").parameters())
    _, checks = checked(tiny_models())
    assert checks["parameters"]["figure"] == f"{number:,} of {number:,}"


def test_a_head_beside_the_embeddings_that_it_is_tied_to_has_to_be_equal(checked, changed, tiny_models):
    def add(tensors, change):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + change

    folder = changed(tiny_models(), lambda t: add(t, 0.0))
    assert checked(folder)[1]["head"]["verdict"] == "ok"
    shutil.rmtree(folder)
    passed, checks = checked(changed(tiny_models(), lambda t: add(t, 1.0)))
    assert not passed
    assert "two different matrices" in checks["head"]["reason"]


def test_an_untied_head_that_equals_the_embeddings_is_told(checked, changed, tiny_models):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    _, checks = checked(changed(tiny_models(), copy, tie_word_embeddings=False))
    assert checks["head"]["verdict"] == "warn"


def test_mixed_dtypes_are_told(checked, changed, tiny_models):
    def halve(tensors):
        tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].half()

    _, checks = checked(changed(tiny_models(), halve))
    assert checks["dtypes"]["verdict"] == "warn"
    assert "transformer.ln_f.bias" in checks["dtypes"]["reason"]


def test_of_mixed_dtypes_the_rare_ones_are_named(checked, changed, tiny_models):
    """Whichever comes first in the file."""

    def alter(tensors):
        for name in tensors:
            if name != min(tensors):
                tensors[name] = tensors[name].bfloat16()

    _, found = checked(changed(tiny_models("gpt2"), alter))
    assert found["dtypes"]["reason"].count(".weight") + found["dtypes"]["reason"].count(".bias") == 1


def test_a_tokenizer_with_more_ids_than_rows_fails(checked, tmp_path):
    make_model("gpt2", vocab_size=300).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    passed, checks = checked(tmp_path)
    assert not passed
    assert "ids up to 319" in checks["vocabulary"]["reason"]


def test_rows_beyond_the_tokenizer_are_told_and_no_fault(checked, tmp_path):
    make_model("gpt2", vocab_size=384).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    check = checked(tmp_path)[1]["vocabulary"]
    assert check["verdict"] == "ok"
    assert check["reason"].startswith("64 rows")


def test_a_special_id_beyond_the_rows_fails(checked, changed, tiny_models):
    passed, checks = checked(changed(tiny_models(), eos_token_id=5000))
    assert not passed
    assert "eos_token_id: found 5000" in checks["vocabulary"]["reason"]


def test_a_model_without_a_tokenizer_fails_and_is_checked_in_all_that_needs_none(checked, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    passed, checks = checked(tmp_path)
    assert not passed
    assert verdicts(checks, "FAIL") == {"tokenizer"}
    assert checks["parameters"]["verdict"] == "ok"
    assert checks["continuation"]["verdict"] == "not applicable"


@pytest.mark.parametrize(("pad", "verdict"), [(None, "FAIL"), (0, "ok")])
def test_a_decoder_that_classifies_needs_a_pad_token(checked, tmp_path, pad, verdict):
    config = make_model("gpt2").config
    config.pad_token_id = pad
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path)
    _, checks = checked(tmp_path)
    assert checks["pad token"]["verdict"] == verdict
    assert checks["loss of plain sentences"]["reason"] == "a classifier predicts no tokens"


def test_a_masked_language_model_is_checked_in_what_applies(checked, tmp_path):
    bert().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    _, checks = checked(tmp_path)
    assert checks["parameters"]["verdict"] == "ok"
    assert "no causal language model" in checks["blocks"]["reason"]


def test_a_run_directory_stands_for_its_model(checked, tmp_path, tiny_models):
    shutil.copytree(tiny_models(), tmp_path / "run" / "model")
    assert "parameters" in checked(tmp_path / "run")[1]


def test_a_continuation_that_repeats_itself_is_told(checked, changed, tiny_models):
    """Where the last norm adds a direction that one token has far more of, that token always follows."""

    def alter(tensors):
        tensors["transformer.ln_f.bias"].fill_(1.0)
        tensors["transformer.wte.weight"][40] += 5.0

    _, checks = checked(changed(tiny_models(), alter))
    assert checks["continuation"]["verdict"] == "warn"
    assert "short cycle" in checks["continuation"]["reason"]


def test_the_table_names_model_and_verdict(tiny_models, capsys):
    assert verify(str(tiny_models()), text=None, prompt=None, revision=None, as_json=False) is False
    printed = capsys.readouterr().out
    assert "loss of plain sentences: FAIL: about what a model has that knows nothing" in printed
    assert "FAILED: " in printed


def test_what_cannot_be_read_is_the_users_mistake(tmp_path, tiny_models):
    def run(model, text=None):
        verify(str(model), text=text, prompt=None, revision=None, as_json=True)

    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        run(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_models(), broken)
    whole = (broken / "model.safetensors").read_bytes()
    for damaged in (whole[:-100], whole[:5], b"", b"\xff" * 100):
        (broken / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError):
            run(broken)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text(" \n")
    for name, said in (("latin.txt", "not UTF-8"), ("blank.txt", "holds no text"), ("none.txt", "cannot be read")):
        with pytest.raises(UserError, match=said):
            run(tiny_models(), str(tmp_path / name))
