"""What does preparing a corpus cost: memory beside the size of the corpus, and speed beside other ways to do it.

    python benchmarks/preparation.py [--corpus-gb 2] [--text FILE] [--tokenizer FOLDER] [--num-proc 2]

Two measurements, both on text that is made or found on this machine; nothing is downloaded:

Memory: `kit prepare`, as a user types it, on a synthetic corpus of `--corpus-gb` and on one of an eighth of that. The
    memory of the whole process tree is sampled: the sum of PSS, in which a page that several processes map counts once,
    mapped files (libraries, the token store) included; and its part that no file backs.
Speed: the same file and tokenizer in one run, by turns: the tokenizer alone on documents in memory, which bounds the
    others; the kit, from a file to the rows of an epoch; and the method of transformers' run_clm.py, from a file to
    its blocks. Every measurement has a process and a folder of its own and as many cores as `--num-proc`.

Writes benchmarks/results/preparation.json.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
MB, GB = 10**6, 10**9
PACKAGES = ("torch", "transformers", "numpy", "accelerate", "datasets", "peft")
SEPARATOR = "\n\n\n"
BLOCK_SIZE = 1024
BATCH_CHARACTERS = 1 << 20
VOCAB_SIZE = 16_384
DUPLICATES = 0.03
SAMPLE_EVERY_S = 0.25


def main() -> None:
    """Measure memory and speed, print them and write the result."""
    options = parse_options()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Path("runs").mkdir(exist_ok=True)
    # What is not measured this time stays as it is in the file.
    result: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    with tempfile.TemporaryDirectory(prefix=".preparation-", dir="runs") as name:
        folder = Path(name).absolute()
        text = options.text or write_builtin_text(folder / "text.txt")
        separator = options.separator.encode().decode("unicode_escape")
        tokenizer = prepare_tokenizer(options.tokenizer, text, separator, folder / "tokenizer")
        cores = sorted(os.sched_getaffinity(0))[: options.num_proc]
        result["settings"] = {
            "num_proc": options.num_proc,
            "cores": len(cores),
            "tokenizer": options.tokenizer.name if options.tokenizer else f"byte-level BPE, {VOCAB_SIZE:,} tokens",
        }
        if options.corpus_gb:
            sizes = (options.corpus_gb / 8, options.corpus_gb)
            result["memory"] = [measure_memory(folder / "corpus", size, tokenizer, cores) for size in sizes]
            print_memory(result["memory"])
        if options.repeats:
            result["text"] = options.text.name if options.text else f"docstrings of {', '.join(PACKAGES)}"
            result["speed"] = measure_speed(folder / "speed", text, separator, tokenizer, cores, options.repeats)
            print_speed(result["speed"])
    result["hardware"] = describe_hardware()
    packages = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")
    result["versions"] = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{options.output}")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-gb", type=float, default=2.0, help="size of the synthetic corpus; 0: no memory part")
    parser.add_argument("--text", type=Path, help="text for the speed part; default: docstrings of installed packages")
    parser.add_argument("--separator", default="\\n\\n\\n", help="between the documents of --text; escapes are read")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: one is trained on the text")
    parser.add_argument("--num-proc", type=int, default=2, help="processes that tokenise, and cores for everything")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the speed part; 0: no speed part")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/preparation.json")
    options = parser.parse_args()
    if options.num_proc > len(os.sched_getaffinity(0)):
        parser.error(f"--num-proc: there are {len(os.sched_getaffinity(0))} cores")
    return options


# ---- Text and tokenizer


def write_builtin_text(path: Path) -> Path:
    """Write the docstrings of installed packages to one file."""
    from kit.data.builtin import read_corpus

    path.write_text(SEPARATOR.join(read_corpus("docstrings", PACKAGES)), encoding="utf-8")
    return path


def prepare_tokenizer(
    given: Path | None, text: Path, separator: str, folder: Path, vocab_size: int = VOCAB_SIZE
) -> Path:
    """Save the tokenizer of all measurements to a folder that `AutoTokenizer` takes."""
    from transformers import AutoTokenizer, GPT2TokenizerFast

    from kit.data.sources import read_documents
    from kit.model.tokenizer import load_tokenizer
    from kit.recipe.models import ModelSection

    if given is None:
        source = make_source(text, separator)
        section = ModelSection(from_config={"model_type": "gpt2"}, tokenizer={"vocab_size": vocab_size})
        documents = (document for document in read_documents(source) if isinstance(document, str))
        tokenizer = load_tokenizer(section, folder.parent / "store", lambda: documents, lambda: "text")
    elif (given / "merges.txt").is_file() and not (given / "tokenizer.json").is_file():
        tokenizer = GPT2TokenizerFast.from_pretrained(given)  # GPT-2's own two files, which name no class
    else:
        tokenizer = AutoTokenizer.from_pretrained(given)
    tokenizer.save_pretrained(folder)
    return folder


def make_source(path: Path, separator: str) -> Any:
    """Return a text file as a source of the kit."""
    from kit.recipe.data import TrainSource

    return TrainSource.model_validate({"path": str(path), "format": "text", "separator": separator})


def write_synthetic_corpus(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write a corpus, half as JSONL and half as text with a separator; return its bytes and its documents.

    Words follow Zipf's law over the vocabulary of the Python reference, lengths of documents a log-normal law with a
    median of 150 words and a mean of 300; a few documents are copies of earlier ones. The same on every run.
    """
    folder.mkdir()
    documents = synthetic_documents()
    sizes, count = [], 0
    for name, form in (
        ("corpus.jsonl", lambda text: json.dumps({"text": text}, ensure_ascii=False) + "\n"),
        ("corpus.txt", lambda text: text + SEPARATOR),
    ):
        size = 0
        with open(folder / name, "wb") as file:
            while size < gigabytes * GB / 2:
                size += file.write(form(next(documents)).encode())
                count += 1
        sizes.append(size)
    return sum(sizes), count


def synthetic_documents() -> Iterator[str]:
    """Yield documents of made-up text without end."""
    from kit.data.builtin import read_corpus

    reference = read_corpus("python-reference", ())
    counts = Counter(itertools.chain.from_iterable(re.findall("[A-Za-z']+", text) for text in reference))
    words = np.array([word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))], dtype=object)
    cumulated = np.cumsum(1 / np.arange(1, len(words) + 1))
    random = np.random.default_rng(0)
    kept: list[str] = []
    while True:
        lengths = np.maximum(2, random.lognormal(np.log(150), 1.18, size=4096)).astype(int)
        drawn = words[np.searchsorted(cumulated, random.random(int(lengths.sum())) * cumulated[-1])].tolist()
        again = random.random(len(lengths)) < DUPLICATES
        end = 0
        for length, is_copy in zip(lengths.tolist(), again.tolist(), strict=True):
            end += length
            sentences = (" ".join(drawn[at : min(end, at + 15)]) for at in range(end - length, end, 15))
            text = kept[end % len(kept)] if is_copy and kept else ".\n".join(sentences)
            if len(kept) < 1000:
                kept.append(text)
            yield text


# ---- Memory


def measure_memory(folder: Path, gigabytes: float, tokenizer: Path, cores: list[int]) -> dict[str, Any]:
    """Prepare a synthetic corpus with `kit prepare`, and return what it took."""
    started = time.perf_counter()
    size, documents = write_synthetic_corpus(folder, gigabytes)
    print(f"wrote {size / MB:,.0f} MB in {time.perf_counter() - started:.0f} s", flush=True)
    (folder / "sentence.txt").write_text("The model is measured on this sentence alone.\n")
    recipe = {
        "task": "causal-lm",
        "model": {
            "from_config": {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 16, "n_positions": BLOCK_SIZE},
            "tokenizer": str(tokenizer),
        },
        "data": {
            "train": [
                {"path": str(folder / "corpus.jsonl")},
                {"path": str(folder / "corpus.txt"), "separator": SEPARATOR},
            ],
            "validation": {"fraction": 0.01},
            "block_size": BLOCK_SIZE,
            "num_proc": len(cores),
            "store_dir": str(folder / "store"),
        },
        "training": {"max_steps": 1, "use_cpu": True},
        "evaluation": {"sets": {"sentence": {"path": str(folder / "sentence.txt")}}},
        "run": {"output_dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # YAML holds JSON
    started = time.perf_counter()
    with open(folder / "log.txt", "w+") as log:
        command = [sys.executable, "-m", "kit", "prepare", str(folder / "recipe.yaml")]
        child = start(command, cores, stdout=log, stderr=subprocess.STDOUT)
        peak = watch_memory(child)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"kit prepare failed:\n{log.read()[-4000:]}")
    seconds = time.perf_counter() - started
    ledger = json.loads((folder / "run/ledger.json").read_text())
    remove(folder)
    dropped = sum(entry["documents"] for row in ledger for entry in row["dropped_documents"].values())
    return {
        "corpus_mb": size / MB,
        "documents": documents,
        "duplicates_dropped": dropped,
        "tokens": sum(row["read"] for row in ledger),
        "seconds": seconds,
        "mb_per_second": size / MB / seconds,
        **peak,
    }


def watch_memory(child: subprocess.Popen) -> dict[str, Any]:
    """Sample the memory of a process and its descendants until it ends; return the peaks."""
    peak: dict[str, Any] = {"peak_mb": 0.0, "peak_not_of_files_mb": 0.0}
    started = time.perf_counter()
    root = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        parts = [memory_of(process.pid) for process in tree]
        total = sum(part["Pss"] for part in parts)
        if total > peak["peak_mb"]:
            peak |= {
                "peak_mb": total,
                "peak_at_s": time.perf_counter() - started,
                "peak_main_mb": parts[0]["Pss"],
                "peak_others_mb": [part["Pss"] for part in parts[1:]],
            }
        anonymous = sum(part["Pss"] - part["Pss_File"] for part in parts)
        peak["peak_not_of_files_mb"] = max(peak["peak_not_of_files_mb"], anonymous)
        time.sleep(SAMPLE_EVERY_S)
    return peak


def memory_of(pid: int) -> dict[str, float]:
    """Return the kernel's account of a process's memory in MB: `Pss` and, of it, `Pss_File`, pages of mapped files."""
    try:
        account = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        account = ""  # it ended between being listed and being looked at
    lines = re.findall(r"^(\w+): +(\d+) kB$", account, re.MULTILINE)
    return {"Pss": 0.0, "Pss_File": 0.0} | {name: int(kilobytes) * 1024 / MB for name, kilobytes in lines}


# ---- Speed


def measure_speed(
    folder: Path, text: Path, separator: str, tokenizer: Path, cores: list[int], repeats: int
) -> dict[str, Any]:
    """Run each method by turns, and return medians in MB of text per second."""
    several = len(cores)
    bound = f"tokenizer alone, {several} threads"
    methods = {bound: ("tokenizer", several)}
    for name in ("kit", "run_clm"):
        methods |= {f"{name}, num_proc {n}": (name, n) for n in sorted({1, several})}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for turn in range(repeats):
        for name, (method, num_proc) in methods.items():
            folder.mkdir()
            asked = {"method": method, "text": str(text), "separator": separator, "tokenizer": str(tokenizer)}
            asked |= {"folder": str(folder), "num_proc": num_proc}
            command = [sys.executable, __file__, "--one", json.dumps(asked)]
            child = start(command, cores, stdout=subprocess.PIPE, text=True)
            output, _ = child.communicate()
            if child.returncode:
                raise SystemExit(f"{name} failed:\n{output[-4000:]}")
            runs[name].append(json.loads(output.splitlines()[-1]))
            remove(folder)
            print(f"turn {turn + 1}, {name}: {runs[name][-1]['seconds']:.2f} s", flush=True)
    alone, kit = runs[bound][0], runs[f"kit, num_proc {several}"][0]
    if kit["tokens"] != alone["tokens"] + alone["documents"]:
        raise SystemExit("the kit and the tokenizer alone disagree on the number of tokens")
    megabytes = text.stat().st_size / MB
    speeds = {name: [megabytes / run["seconds"] for run in of] for name, of in runs.items()}
    fastest = statistics.median(speeds[bound])
    return {
        "megabytes": megabytes,
        "documents": alone["documents"],
        "block_size": BLOCK_SIZE,
        "methods": {
            name: {
                "mb_per_second": statistics.median(of),
                "of_tokenizer_alone": statistics.median(of) / fastest,
                "each": of,
                "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs[name]),
                "tokens": runs[name][0]["tokens"],
            }
            for name, of in speeds.items()
        },
    }


def tokenizer_alone(asked: dict[str, Any]) -> dict[str, Any]:
    """Encode documents that are held in memory, in batches, and throw the encodings away."""
    from transformers import AutoTokenizer

    from kit.data.sources import read_documents

    source = make_source(asked["text"], asked["separator"])
    documents = [text for text in read_documents(source) if isinstance(text, str)]
    backend = AutoTokenizer.from_pretrained(asked["tokenizer"]).backend_tokenizer
    # Of the kit's size: all at once would take a gigabyte for 20 MB of text, few at a time leaves threads without work.
    ends = np.cumsum([len(text) for text in documents])
    cuts = np.unique(np.searchsorted(ends, np.arange(0, ends[-1] + BATCH_CHARACTERS, BATCH_CHARACTERS))).tolist()
    batches = [documents[start:end] for start, end in itertools.pairwise(cuts)]
    tokens = 0
    started = clock()
    for batch in batches:
        tokens += sum(map(len, backend.encode_batch_fast(batch, add_special_tokens=False)))
    return {**since(started), "tokens": tokens, "documents": len(documents)}


def kit_alone(asked: dict[str, Any]) -> dict[str, Any]:
    """Go from a file to a sealed token store and the rows of an epoch."""
    from transformers import AutoTokenizer

    from kit.console import quiet_libraries
    from kit.data.corpus import build_corpus
    from kit.recipe.data import DataSection
    from kit.tasks.causal_lm import token_coding

    quiet_libraries()
    source = make_source(asked["text"], asked["separator"])
    data = DataSection(
        train=[source], block_size=BLOCK_SIZE, num_proc=asked["num_proc"], store_dir=f"{asked['folder']}/store"
    )
    tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
    started = clock()
    corpus = build_corpus(data, {}, token_coding(tokenizer), seed=0)
    return {**since(started), "tokens": sum(row.read for row in corpus.ledger)}


def run_clm(asked: dict[str, Any]) -> dict[str, Any]:
    """Go from a file to blocks as transformers' examples/pytorch/language-modeling/run_clm.py does."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
    num_proc = asked["num_proc"] if asked["num_proc"] > 1 else None

    def tokenize(examples: dict[str, list]) -> Any:
        return tokenizer(examples["text"])

    def group_texts(examples: dict[str, list]) -> dict[str, list]:
        joined = {name: list(itertools.chain(*rows)) for name, rows in examples.items()}
        total = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        blocks = {name: [ids[i : i + BLOCK_SIZE] for i in range(0, total, BLOCK_SIZE)] for name, ids in joined.items()}
        return blocks | {"labels": blocks["input_ids"].copy()}

    started = clock()
    raw = datasets.load_dataset("text", data_files={"train": asked["text"]}, keep_linebreaks=True)
    tokenized = raw.map(tokenize, batched=True, num_proc=num_proc, remove_columns=["text"])
    blocks = tokenized.map(group_texts, batched=True, num_proc=num_proc)["train"]
    return {**since(started), "tokens": len(blocks) * BLOCK_SIZE}


def clock() -> tuple[float, float]:
    """Return the time, and the processor time of this process and of those of its children that have ended."""
    return time.perf_counter(), sum(os.times()[:4])


def since(started: tuple[float, float]) -> dict[str, float]:
    """Return what has passed on the clock."""
    seconds, cpu_seconds = (now - then for now, then in zip(clock(), started, strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


METHODS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "tokenizer": tokenizer_alone,
    "kit": kit_alone,
    "run_clm": run_clm,
}


def measure_one(asked: dict[str, Any]) -> None:
    """In a process of its own: measure one method once."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{asked['folder']}/cache"}
    print(json.dumps(METHODS[asked["method"]](asked)))


# ---- Around the measurements


def start(command: list[str], cores: list[int], **options: Any) -> subprocess.Popen:
    """Start a process that may use the given cores alone."""
    return subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, cores), **options)


def remove(folder: Path) -> None:
    """Remove a folder and wait until the disk is at rest, so that the next measurement does not pay for it."""
    shutil.rmtree(folder)
    os.sync()


def describe_hardware() -> dict[str, Any]:
    """Return processor, cores and memory."""
    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = psutil.virtual_memory().total
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "ram_gb": round(memory / GB)}


def print_memory(rows: list[dict[str, Any]]) -> None:
    """Print the memory part as a table."""
    print("\nkit prepare: corpus  documents  seconds    MB/s  peak memory  not of files  main and other processes")
    for row in rows:
        parts = " + ".join(f"{megabytes:.0f}" for megabytes in (row["peak_main_mb"], *row["peak_others_mb"]))
        print(
            f"{row['corpus_mb']:16,.0f} MB {row['documents']:10,} {row['seconds']:8.1f} {row['mb_per_second']:7.2f} "
            f"{row['peak_mb']:9.0f} MB {row['peak_not_of_files_mb']:10.0f} MB  {parts}"
        )


def print_speed(speed: dict[str, Any]) -> None:
    """Print the speed part as a table."""
    print(f"\n{speed['megabytes']:.1f} MB in {speed['documents']:,} documents")
    print(f"{'':30} {'MB/s':>6} {'of the first':>13} {'CPU seconds':>12}  each")
    for name, row in speed["methods"].items():
        each = " ".join(f"{value:.2f}" for value in row["each"])
        print(
            f"{name:30} {row['mb_per_second']:6.2f} {row['of_tokenizer_alone']:13.0%} "
            f"{row['cpu_seconds']:12.2f}  {each}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure_one(json.loads(sys.argv[2]))
    else:
        main()
