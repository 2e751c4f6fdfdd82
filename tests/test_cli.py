"""The command line: exit codes, one message without a traceback, the same as `kit` and as `python -m kit`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kit import cli, run


@pytest.fixture
def kit(monkeypatch, capfd):
    """A function that runs a command and returns exit code, standard output and standard error."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["kit", *map(str, arguments)])
        capfd.readouterr()  # what fixtures printed
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return command


def test_train_evaluate_generate_status(kit, write_recipe, tmp_path):
    recipe = write_recipe()
    code, out, _ = kit("train", recipe, "training.max_steps=1")
    assert code == 0
    assert "Token ledger" in out
    assert "Scorecard" in out
    assert kit("status", recipe)[0] == 0
    code, out, _ = kit("evaluate", tmp_path / "run", "-o", tmp_path / "figures.json")
    assert code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["sets"]["domain"]
    assert f"{figures['bits_per_byte']:.4f}" in out
    options = ("--prompt", "the kit", "--num-return-sequences", 3, "--max-length", 12, "--top-k", 50, "--seed", 42)
    code, out, _ = kit("generate", tmp_path / "run", *options)
    assert code == 0
    assert out.count("the kit") >= 3
    assert kit("generate", tmp_path / "run", *options)[1] == out


def test_vocabulary_mine(kit, write_recipe, tmp_path):
    recipe, path = write_recipe(), tmp_path / "words.txt"
    code, out, err = kit("vocabulary", "mine", recipe, "-o", path, "--count", 3)
    assert (code, err) == (0, "")
    assert f"vocabulary: {{tokens: {{from_file: {path}}}}}" in out
    words = path.read_text(encoding="utf-8")
    assert sum(not line.startswith("#") for line in words.split("\n\n", 1)[1].splitlines()) == 3
    code, out, err = kit("vocabulary", "mine", recipe, "-o", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: exists already")
    assert path.read_text(encoding="utf-8") == words
    assert kit("vocabulary", "mine", recipe, "-o", path, "--count", 3, "--overwrite")[0] == 0
    assert path.read_text(encoding="utf-8") == words


@pytest.mark.parametrize(
    "options",
    [["--count", "0"], ["--min-occurrences", "-1"], ["--min-occurrences", "1000000"], ["data.blocksize=1"]]
    + [["-o", "missing/words.txt"], ["-o", "."], ["data.train.0.path=no/such/file.txt"]],
)
def test_vocabulary_mine_writes_nothing_when_something_is_wrong(kit, write_recipe, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    code, _, err = kit("vocabulary", "mine", write_recipe(), *options)
    assert code == 2
    assert len([line for line in err.splitlines() if "rror" in line]) == 1
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.txt"))


@pytest.mark.parametrize("change", ["training.learning_rat=1", "data.train.0.path=no/such/file.txt", "model.dtype=fp8"])
def test_user_errors_exit_with_2_and_one_message(kit, write_recipe, tmp_path, change):
    recipe = write_recipe()
    code, _, err = kit("train", recipe, change)
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not (tmp_path / "run/model").exists()


def test_user_error_that_needs_the_run_directory_is_in_the_manifest(kit, write_recipe, tmp_path):
    recipe = write_recipe(data={"block_size": 4096})
    assert kit("train", recipe)[0] == 2
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["status"] == "user-error"
    assert "at most 64" in manifest["message"]
    assert kit("status", recipe)[:2] == (2, f"{tmp_path / 'run'}: user-error\n{manifest['message']}\n")


def test_fault_of_ours_exits_with_1_and_a_traceback(kit, write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "finish", lambda *args: 1 / 0)
    code, _, err = kit("train", write_recipe())
    assert code == 1
    assert "ZeroDivisionError" in err
    assert json.loads((tmp_path / "run/manifest.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["trian", "x.yaml"], "trian"),
        (["train"], "RECIPE"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["evaluate", "missing"], "missing"),
        (["vocabulary", "mien", "x.yaml"], "mien"),
        (["vocabulary", "mine", "missing.yaml"], "missing.yaml"),
        (["generate", "no/such/model/here", "--prompt", "a"], "no/such/model/here"),
        (["generate", "m", "--prompt", "a", "--max-length", "3", "--max-new-tokens", "3"], "--max-length"),
        (["generate", "m", "--prompt", "a", "--top-k", "-1"], "top-k"),
    ],
)
def test_wrong_commands_exit_with_2(kit, arguments, word):
    code, out, err = kit(*arguments)
    assert code == 2
    assert word in out + err
    assert "Traceback" not in err


def test_env_shows_versions_and_no_values_of_variables(kit, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    code, out, _ = kit("env")
    assert code == 0
    assert "transformers" in out
    assert "hf_x" not in out


def test_python_m_kit_is_kit():
    commands = [[sys.executable, "-m", "kit"], [str(Path(sys.executable).with_name("kit"))]]
    shown = [subprocess.run([*c, "--help"], capture_output=True, text=True, check=True).stdout for c in commands]
    assert "prepare" in shown[0]
    assert shown[0].replace("python -m kit", "kit") == shown[1]
