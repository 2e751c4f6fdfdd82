"""Bad inputs, each given to the real command: one message, exit code 2, nothing half-written.

The messages are the tables of docs/troubleshooting.md. `make docs` (KIT_WRITE_DOCS=1) writes them anew.
"""

import json
import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from kit import cli, network
from kit.files import read_seal
from tests.material import documents
from tests.troubleshooting import (
    adapters,
    checkpoints,
    classification,
    data,
    folders,
    freezing,
    models,
    recipes,
    vocabulary,
)
from tests.troubleshooting import lab as laboratory
from tests.troubleshooting.lab import Lab

PAGE = Path(__file__).parents[1] / "docs/troubleshooting.md"
BEGIN, END = "<!-- messages: written by `make docs` -->", "<!-- end of messages -->"
WRITES = os.environ.get("KIT_WRITE_DOCS") == "1"
RECORDS = {"manifest.json", "recipe.yaml", "ledger.json", "metrics.jsonl"}
ROWS: dict[str, str] = {}  # of the cases that have been run

# In the order of the page, not of the imports.
CASES = [
    case
    for module in (recipes, data, models, vocabulary, freezing, adapters, classification, checkpoints, folders)
    for case in laboratory.CASES
    if module is sys.modules[case.room]
]


@pytest.fixture
def kit(monkeypatch, capfd):
    """A function that runs a command and returns exit code, standard output and standard error."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["kit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return command


@pytest.fixture
def lab(tmp_path, tiny_models, monkeypatch, kit):
    model = tiny_models()
    network.why_offline.cache_clear()
    with ExitStack() as stack:
        yield Lab(tmp_path, model, monkeypatch, stack, kit)
        monkeypatch.undo()  # before file systems are unmounted: one may be the working directory
    network.why_offline.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.spoil.__name__)
def test_bad_input_gets_one_message_and_leaves_nothing_half_written(case, lab, monkeypatch):
    command = case.spoil(lab)
    complaints = []
    complain = cli._complain
    monkeypatch.setattr(cli, "_complain", lambda message: (complaints.append(message), complain(message)))
    before, memory = set(os.listdir()), peak_memory(reset=True)

    code, out, err = lab.kit(*command)

    assert code == 2, out + err
    assert complaints == [err.rstrip("\n")]
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert peak_memory() - memory < 300 * 2**20
    message = lab.normal(err.removeprefix("error: ").rstrip("\n"))
    for words in case.says:
        assert words in message
    assert len(message) < 1000
    assert case.hides is None or case.hides not in out + err
    left_whole(command, before, message, lab)
    ROWS[case.title] = row(case, message)
    if not WRITES:
        assert ROWS[case.title] in PAGE.read_text().splitlines(), "run `make docs`, and look at what has changed"


def left_whole(command, before, message, lab):
    """Check that a later run would not take anything that is there for more than it is."""
    assert set(os.listdir()) - before <= {"run", "store", ".run.lock"}
    everything = list(Path().rglob("*"))
    assert not [path for path in everything if re.fullmatch(r"\..*\.[0-9a-f]{8}", path.name)]
    for path in everything:
        if path.parent.parent.name == "store" and not path.name.startswith("."):
            assert read_seal(path), path
    for run in (Path("run"), Path("disk/run")):
        if not run.exists() or not any(run.iterdir()) or (run / "thesis.tex").exists():
            continue
        assert command[0] != "check"
        manifest = json.loads((run / "manifest.json").read_text())
        if manifest["status"] == "done":  # an earlier run, which was not touched
            assert (run / "scorecard.json").exists()
        else:
            assert manifest["status"] == "user-error"
            assert not (run / "scorecard.json").exists()
            if command[0] == "train":
                assert lab.normal(manifest["message"]) == message
        assert all(read_seal(checkpoint) for checkpoint in run.glob("checkpoints/*"))


def peak_memory(reset=False):
    """Return the most memory that this process held since the last reset, in bytes; 0 where Linux is not at hand."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except (OSError, ValueError):
        return 0
    return int(peak) * 1024


def row(case, message):
    """Return a message as a row of a Markdown table."""
    ticks = max(map(len, re.findall("`+", message)), default=0) * "`" + "`"
    lines = [f"{ticks} {line.strip()} {ticks}".replace("|", "\\|") for line in message.splitlines()]
    return f"| {case.title} | {'<br>'.join(lines)} |"


# ---- what is close to a mistake, and none


def test_bad_rows_can_be_left_out_and_are_counted(lab):
    rows = [{"text": None}, {"text": 7}, *({"text": text} for text in documents(60, seed=2)), {"text": "a\0b"}, {}]
    code, out, err = lab.kit(*lab.source("corpus.jsonl", data.jsonl(rows), on_bad_text="skip"))
    assert code == 0, err
    ledger = Path("run/ledger.json").read_text()
    assert re.search(r'"unusable text":\s*(\{\s*"documents": )?4\b', ledger), ledger
    assert "unusable text" in out


def test_byte_order_mark_is_none_of_the_text(lab):
    texts = documents(60, seed=2)
    ledgers = []
    for name, start in (("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")):
        lab.source(name, start + "\n".join(texts).encode(), sample_by="line")
        code, out, err = lab.kit("prepare", "recipe.yaml", f"run.output_dir={name}.run")
        assert (code, err) == (0, "")
        assert "BOM" not in out
        ledgers.append(Path(f"{name}.run/ledger.json").read_text().replace(name, ""))
    assert ledgers[0] == ledgers[1]


def test_lock_of_a_killed_run_does_not_block(lab):
    holder = folders.hold_run_folder(lab)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert Path(".run.lock").exists()
    code, _, err = lab.kit(*lab.recipe())
    assert code == 0, err


def test_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_with_room(lab):
    """The disk is full at the weights (safetensors), at what torch pickles, at what follows the second checkpoint."""
    # As if it had been emptier when the run began.
    lab.monkeypatch.setattr("kit.run.check_room", lambda *_: "")
    recipe = {"training": {"save_strategy": "steps", "save_steps": 1}}
    lab.recipe(**recipe, run={"output_dir": "roomy/run"})
    if not lab.disk("roomy", "100m"):
        pytest.skip("needs to mount a file system")
    assert lab.kit("train", "recipe.yaml")[0] == 0
    expected = Path("roomy/run/scorecard.json").read_text()
    [first, second] = sorted(Path("roomy/run/checkpoints").iterdir())
    sizes = {path.name: blocks(path) for path in second.iterdir()}
    before_pickles = sizes["model.safetensors"] + sizes["tokenizer.json"]
    everything = sum(sizes.values())
    beside = sum(blocks(path) for path in Path("roomy/run").iterdir() if path.name in RECORDS) + 8
    for number, room in enumerate([50, before_pickles + 60, everything]):
        disk = f"disk{number}"
        assert lab.disk(disk, f"{sum(map(blocks, first.iterdir())) + beside + room}k")
        lab.recipe(**recipe, run={"output_dir": f"{disk}/run"})
        code, out, err = lab.kit("train", "recipe.yaml")
        assert (code, err.count("error: ")) == (2, 1), (room, sizes, out + err)
        assert "the disk is full" in err
        assert "Traceback" not in out + err
        status = json.loads(Path(f"{disk}/run/manifest.json").read_text())["status"]
        assert status == "user-error", (room, sizes, out)
        checkpoints = sorted(Path(f"{disk}/run/checkpoints").iterdir())
        assert [path.name for path in checkpoints] == [first.name, second.name][: 1 + (number == 2)]
        assert all(map(read_seal, checkpoints))
        assert not Path(f"{disk}/run/model").exists()
        lab.remount(disk, "size=10m")
        code, out, err = lab.kit("train", "recipe.yaml")
        assert code == 0, err
        assert f"resuming from {checkpoints[-1]}" in out
        assert Path(f"{disk}/run/scorecard.json").read_text() == expected


def blocks(path):
    """Return the space that a file takes, in KiB."""
    return path.stat().st_blocks // 2


# ---- the page


def test_page_has_these_rows_and_no_others():
    text = PAGE.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    if WRITES:
        known = {line.split(" | ")[0].removeprefix("| "): line for line in text[start:end].splitlines()}
        text = text[:start] + tables(known | ROWS) + text[end:]
        PAGE.write_text(text)
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    rows = [line for line in text[start:end].splitlines() if line.startswith("| ") and "---" not in line]
    titles = [line.split(" | ")[0].removeprefix("| ") for line in rows if not line.startswith("| what is wrong ")]
    assert titles == [case.title for case in CASES]
    assert len(set(titles)) == len(titles)


def tables(rows):
    """Return the tables of all cases, a group each."""
    parts = []
    for group in dict.fromkeys(case.group for case in CASES):
        lines = [rows[case.title] for case in CASES if case.group == group]
        parts.append("\n".join(["", f"### {group}", "", "| what is wrong | message |", "| --- | --- |", *lines, ""]))
    return "\n" + "".join(parts) + "\n"
