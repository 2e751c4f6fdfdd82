"""`kit export`: a run's model as a folder to hand on, with a model card; to the Hub only where that is asked for."""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kit.console import quiet_libraries, say, warn
from kit.errors import UserError, did_you_mean
from kit.files import disk_fault, read_json, replaced_folder, write_text
from kit.model.card import TAG, hub_name, write_card
from kit.model.configuration import CAUSAL_LM, CLASSIFIER
from kit.model.hub import ADAPTER_RECORD, is_adapter
from kit.model.loading import load_adapted
from kit.model.saving import fixed_logits, saved_model_difference
from kit.network import why_offline
from kit.recipe.loading import load_recipe
from kit.recipe.models import Generation, Recipe
from kit.training.run_directory import RunDirectory, read_status

DTYPES = ("bfloat16", "float16", "float32")
_CARD = "README.md"


def export(
    target: str,
    to: str,
    *,
    dtype: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers loads alone: the run's model, its tokenizer, generation settings, a card.

    Of an adapter's run it is what `kit merge` made of it; where there is no such model it is the adapter, if others can
    have its base.

    Args:
        target: a run directory.
        to: the folder to write.
        dtype: of the weights; by default as they are stored.
        push_to_hub: name of the repository to upload the folder to, such as `me/my-model`; nothing is sent without.
        public: whether others see the repository.
        overwrite: whether an earlier export there is replaced.

    Raises:
        UserError: the run has not ended, its model cannot be handed on, the folder is not to be written, or the Hub
            does not take it; then the folder is there all the same.
    """
    quiet_libraries()
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype: found `{dtype}`; expected one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    _check_repository(push_to_hub, public)
    directory = _finished_run(target)
    folder = _check_target(Path(to), directory, overwrite)
    recipe = load_recipe(directory.recipe)
    source = _choose_source(target, directory, dtype)
    try:
        with replaced_folder(folder) as temporary:
            write = _write_adapter if is_adapter(source) else _write_model
            config, said, stored = write(recipe, source, temporary, dtype)
            added = len(read_json(directory.vocabulary).get("tokens", ())) if directory.vocabulary.is_file() else 0
            card = write_card(
                recipe, directory.read_manifest(), read_json(directory.scorecard), config, dtype=stored,
                repository=push_to_hub, is_adapter=is_adapter(source), added_tokens=added,
            )  # fmt: skip
            write_text(temporary / _CARD, card)
    except OSError as error:
        raise UserError(disk_fault(error) or f"{folder}: cannot be written: {error.strerror or error}") from error
    say(said)
    say(f"exported: {folder}    card: {folder / _CARD}")
    if hub_name(recipe.model) is None and recipe.model.name_or_path is not None:
        say("the card names no base model: it is not known to be on the Hub; nor a licence: both are yours to add")
    if push_to_hub:
        push(folder, push_to_hub, public)


# ---- what is exported


def _finished_run(target: str) -> RunDirectory:
    directory = RunDirectory(target)
    if not directory.path.is_dir():
        siblings = [p.name for p in directory.path.parent.iterdir()] if directory.path.parent.is_dir() else []
        what = "is a file" if directory.path.is_file() else "no such folder"
        raise UserError(f"{target}: {what}; expected a run directory{did_you_mean(directory.path.name, siblings)}")
    if not directory.recipe.is_file():
        raise UserError(f"{target}: no run directory (it holds no {directory.recipe.name})")
    status = read_status(target)
    if status != "done" or not directory.is_finished() or not directory.model.is_dir():
        raise UserError(f"{target}: the run has not ended well (status: {status}); expected a finished run")
    return directory


def _choose_source(target: str, directory: RunDirectory, dtype: str | None) -> Path:
    """Return the folder of the model to hand on: the run's, or of an adapter's run the merged one where there is one.

    Raises:
        UserError: it is an adapter that nobody else could load, or that is to be rounded.
    """
    if not is_adapter(directory.model):
        return directory.model
    merged = directory.path / "merged"
    if merged.is_dir():
        say(f"exported is {merged}, the plain model that `kit merge` made of the run's adapter")
        return merged
    record, model = read_json(directory.model / ADAPTER_RECORD), directory.model
    mend = f"`kit merge {target}` makes a plain model of it first"
    if dtype is not None:
        raise UserError(f"--dtype: found {dtype}, but the run's model is an adapter, which stays as it is; {mend}")
    if record["path"] is not None:
        raise UserError(f"{model}: an adapter of a model in a folder here, which others do not have; {mend}")
    if record["rows_with_new_tokens"] > record["rows"] or record["trained_ids"]:
        raise UserError(f"{model}: an adapter with rows of new tokens, which peft alone does not load; {mend}")
    if record["load_in_4bit"]:
        raise UserError(f"{model}: an adapter of a base in 4 bits, which others would load in another type; {mend}")
    say(f"exported is the adapter alone; who loads it needs {record['name']} from the Hub ({mend})")
    return directory.model


def _write_model(recipe: Recipe, source: Path, folder: Path, dtype: str | None) -> tuple[Any, str, str]:
    """Write a plain model; return its configuration, what is to be said of its logits, and its type of numbers."""
    kind = CLASSIFIER if recipe.task == CLASSIFIER.task else CAUSAL_LM
    options = {"trust_remote_code": recipe.model.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    plain = kind.auto_class.from_pretrained(source, dtype="auto", **options)
    # Loaded in that type, not turned into it, which would round what `from_pretrained` keeps in float32 as well.
    wanted = getattr(torch, dtype) if dtype else plain.dtype
    model = plain if wanted == plain.dtype else kind.auto_class.from_pretrained(source, dtype=wanted, **options)
    before, stored = fixed_logits(plain).double(), str(wanted).removeprefix("torch.")
    if model is not plain:
        del plain
        if not fixed_logits(model).isfinite().all() and before.isfinite().all():
            raise UserError(f"--dtype: in {dtype} the model gives logits that are no numbers; expected another type")
    if kind is CAUSAL_LM:
        set_generation(model, tokenizer, recipe.evaluation.generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved_model_difference(model, folder)
    difference = (fixed_logits(model).double() - before).abs().max().item()
    said = f"weights in {stored}; loaded again the folder gives the same logits, bit for bit"
    if difference:
        largest = before.abs().max().item()
        said += f"; from those of the run they differ by up to {difference:.2g} (the largest logit is {largest:.3g})"
    return model.config, said, stored


def set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Generation) -> None:
    """Give a model the generation settings that the run drew its samples with, and the tokenizer's special ids.

    What ended a text beside the tokenizer's EOS goes on ending it; without a padding token rows are filled up with EOS.
    """
    generation: GenerationConfig = model.generation_config
    ends = generation.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    own = tokenizer.eos_token_id
    if own is not None and own not in ends:
        ends = [own, *ends]
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else generation.bos_token_id
    generation.pad_token_id = own if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    generation.max_new_tokens, generation.max_length = settings.max_new_tokens, None
    generation._from_model_config = False  # or `generate` would take them from the configuration again
    generation.do_sample = settings.do_sample
    if settings.do_sample:
        generation.top_k, generation.temperature = settings.top_k, settings.temperature
    else:  # transformers refuses to save settings of a sampling that does not take place
        for name in ("top_k", "top_p", "temperature", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(generation, name, None)


@torch.no_grad()
def _write_adapter(recipe: Recipe, source: Path, folder: Path, dtype: None) -> tuple[Any, str, str]:
    """Copy an adapter whose base is on the Hub; peft alone gives the same logits as the kit."""
    from peft import PeftModel

    for path in source.iterdir():
        if path.name != _CARD:
            shutil.copy(path, folder / path.name)
    record = read_json(folder / ADAPTER_RECORD)
    expected = load_adapted(source, recipe.model).get_base_model()
    logits, config = fixed_logits(expected), expected.config
    del expected
    kind = CLASSIFIER if recipe.task == CLASSIFIER.task else CAUSAL_LM
    base = kind.auto_class.from_pretrained(
        record["name"],
        revision=record["revision"],
        dtype=record["dtype"],
        config=AutoConfig.from_pretrained(folder),
        trust_remote_code=recipe.model.trust_remote_code,
        local_files_only=why_offline() is not None,
    )
    difference = (fixed_logits(PeftModel.from_pretrained(base, folder)) - logits).abs().max().item()
    if difference:
        raise RuntimeError(f"{folder}: peft gives other logits than the run's model: by up to {difference}")
    said = "the adapter; in its base it gives the same logits when peft alone loads it, bit for bit"
    return config, said, record["dtype"]


# ---- where to


def _check_target(folder: Path, directory: RunDirectory, overwrite: bool) -> Path:
    """Return the folder to write.

    Raises:
        UserError: it lies in the run directory or around it, is something else than an earlier export, or is one that
            is not to be replaced.
    """
    real, run = folder.resolve(), directory.path.resolve()
    if real.is_relative_to(run) or run.is_relative_to(real):
        raise UserError(f"--to: `{folder}` and the run directory {directory.path} lie in each other; expected another")
    if not real.parent.is_dir():
        raise UserError(f"--to: the folder that `{folder}` would be in does not exist")
    if not folder.exists():
        return folder
    card = folder / _CARD
    earlier = card.is_file() and f"- {TAG}\n" in card.read_text(encoding="utf-8", errors="replace")
    if not earlier:
        raise UserError(f"--to: `{folder}` is there already, and no earlier export; expected a new folder")
    if not overwrite:
        raise UserError(f"--to: `{folder}` is there already; --overwrite replaces it")
    return folder


def _check_repository(name: str | None, public: bool) -> None:
    if name is None:
        if public:
            raise UserError("--public goes with --push-to-hub, which names the repository")
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: `{name}` is no name of a repository, such as me/my-model: {error}") from None


def push(folder: Path, repository: str, public: bool) -> None:
    """Upload a folder to a repository on the Hub, which is made where there is none: private unless asked otherwise.

    Raises:
        UserError: the Hub cannot be reached, does not know the user, or refuses; or a repository that is public
            already would get the model unasked.
    """
    here = f"the folder {folder} is there, nothing was sent"
    if reason := why_offline():
        raise UserError(f"--push-to-hub: {reason}; {here}")
    if get_token() is None:
        raise UserError(f"--push-to-hub: no token: `hf auth login`, or set HF_TOKEN; {here}")
    api = HfApi()
    try:
        name = api.create_repo(repository, private=not public, exist_ok=True).repo_id
        if not public and not api.model_info(name).private:
            raise UserError(f"--push-to-hub: {name} is there and public: --public says that this is meant; {here}")
        url = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model and card, by kit export")
    except UserError:
        raise
    except Exception as error:  # of the network, of the Hub or of its client, each in a way of its own
        reason = " ".join(str(error).split())[:600]
        raise UserError(
            f"--push-to-hub: {repository}: {type(error).__name__}: {reason}; the folder {folder} is there"
        ) from error
    if public and api.model_info(name).private:
        warn(f"{name} was there and stays private; its settings on the Hub make it public")
    say(f"pushed to {name}, {'public' if public else 'private'}: {url}")
