"""`kit merge`: a plain model of a base model and a run's adapter, which gives the same logits."""

from pathlib import Path

from transformers.utils import ADAPTER_CONFIG_NAME

from kit.console import quiet_libraries, say
from kit.errors import UserError
from kit.files import disk_fault, write_json
from kit.model.adapter_files import merge_adapter, read_adapter
from kit.model.alignment import check_alignment
from kit.model.loading import load_adapted
from kit.model.saving import save_model, saved_model_difference
from kit.model.tokenizer import load_tokenizer
from kit.recipe.loading import load_recipe
from kit.recipe.models import ModelSection
from kit.training.run_directory import RunDirectory


def merge(target: str, output: str | None) -> None:
    """Merge an adapter into its base model, compare their logits, and write the plain model.

    Args:
        target: a run directory, or a folder with an adapter, such as a checkpoint.
        output: the folder to write; by default `merged` in the run directory.

    Raises:
        UserError: there is no adapter, its base model is not there or is another one, it cannot be merged, or the
            folder is there already.
    """
    quiet_libraries()
    directory = RunDirectory(target)
    if not directory.path.is_dir():
        what = "is a file" if directory.path.is_file() else "no such folder"
        raise UserError(f"{target}: {what}; expected a run directory, or a folder with an adapter")
    is_run = directory.recipe.is_file()
    if is_run and not directory.model.is_dir():
        raise UserError(f"{target}: the run has no model/ yet; it is written when training ends")
    section = load_recipe(directory.recipe).model if is_run else ModelSection(name_or_path=target)
    source = directory.model if is_run else directory.path
    if not (source / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(f"{source}: nothing to merge: no adapter, or one that is merged already")
    read_adapter(source)
    if output is None and not is_run:
        raise UserError("--output: the folder to write the plain model to; only a run directory has a place for it")
    folder = Path(output) if output else directory.path / "merged"
    if folder.exists():
        why = "" if output else f": {target} has been merged"
        raise UserError(f"{folder} is there already{why}; remove it, or write to another folder with --output")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--output: the folder that `{folder}` would be in does not exist")
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(source)), Path(), lambda: (), lambda: "")
    adapted = load_adapted(source, section, dequantize=True)
    check_alignment(adapted.get_base_model(), tokenizer, block_size=1)
    merged, difference = merge_adapter(adapted)
    try:
        save_model(merged, tokenizer, folder)
    except OSError as error:
        raise UserError(disk_fault(error) or f"{folder}: cannot be written: {error.strerror or error}") from error
    saved_model_difference(merged, folder)
    if is_run:
        write_json(directory.manifest, directory.read_manifest() | {"merged_logits_differ_by": difference})
    stored = str(merged.dtype).removeprefix("torch.")
    then = f"; the merged weights are then rounded to {stored}, as the base's are" if merged.dtype.itemsize < 4 else ""
    say(f"merged: the largest difference of a logit is {difference:.1g} of the largest logit, which is rounding{then}")
    say(f"model: {folder}, which `from_pretrained` loads alone; loaded again it gives the same logits, bit for bit")
