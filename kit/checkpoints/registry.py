"""All layouts, and which one a checkpoint has."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.conversion import to_hf
from kit.checkpoints.formats import llama2c_bin, tensorflow_bundle
from kit.checkpoints.layout import Settings, matches
from kit.checkpoints.layouts import guide, huggingface, llama2c, llms_from_scratch, nanogpt, openai_tf
from kit.checkpoints.writing import describe, save_pickled, write_pickled, write_safetensors
from kit.errors import UserError, did_you_mean
from kit.names import fold_names

FOREIGN: dict[str, ModuleType] = {
    module.NAME: module for module in (guide, nanogpt, llms_from_scratch, openai_tf, llama2c)
}
LAYOUTS: dict[str, ModuleType] = {huggingface.NAME: huggingface, **FOREIGN}


def find_layout(name: str, option: str) -> ModuleType:
    """Return a layout by its name.

    Raises:
        UserError: there is none; `option` is where the name stands.
    """
    if name not in LAYOUTS:
        raise UserError(f"{option} {name}: no such layout{did_you_mean(name, LAYOUTS)}")
    return LAYOUTS[name]


def settings_of_target(layout: ModuleType) -> set[str]:
    """Return what may be said of how a layout is written: tensors that it may lack, and options of its format."""
    return {line.switch for line in getattr(layout, "TABLE", ()) if line.switch} | {*getattr(layout, "OPTIONS", ())}


def as_files_name_it(checkpoint: Checkpoint, layout: ModuleType) -> Checkpoint:
    """Return a checkpoint under the one spelling of a layout's names that its table has."""
    return layout.normalized(checkpoint) if hasattr(layout, "normalized") else checkpoint


def write_layout(
    layout: ModuleType, made: Path, tensors: Mapping[str, LazyTensor], settings: Settings
) -> Sequence[str]:
    """Write a layout's file or folder, in the format that its suffix says; return notes.

    Raises:
        UserError: a package that writes it is not installed.
    """
    return _WRITERS.get((layout.NAME, made.suffix), _WRITERS.get(("", made.suffix)))(made, tensors, settings) or ()


def _write_safetensors(made: Path, tensors: Mapping[str, LazyTensor], settings: Settings) -> None:
    write_safetensors(made, tensors, describe(settings))


def _write_dictionary(made: Path, tensors: Mapping[str, LazyTensor], settings: Settings) -> None:
    save_pickled(made, openai_tf.nested(tensors, settings))


# By layout, where it has a format of its own, and suffix.
_WRITERS: dict[tuple[str, str], Callable[..., Sequence[str] | None]] = {
    ("", ".safetensors"): _write_safetensors,
    ("", ".pt"): write_pickled,
    (openai_tf.NAME, ""): tensorflow_bundle.write,
    (openai_tf.NAME, ".pt"): _write_dictionary,
    (llama2c.NAME, ".bin"): llama2c_bin.write,
}


def recognise(checkpoint: Checkpoint) -> tuple[ModuleType, str]:
    """Return the layout of a checkpoint, and why it is that one.

    Names decide; where two layouts share all of them (nanoGPT's are Hugging Face's), the shapes of the matrices that
    are not square do, for all of them, and what lies beside the tensors.

    Raises:
        UserError: it is no known layout.
    """
    not_hf = huggingface.why_not(checkpoint)
    if not not_hf:
        return huggingface, "config.json describes these tensors"
    spelled = {name: as_files_name_it(checkpoint, layout) for name, layout in FOREIGN.items()}
    scores = {name: matches(layout, spelled[name].tensors) for name, layout in FOREIGN.items()}
    faults = {}
    for name in [name for name, (found, unknown) in scores.items() if found and not unknown]:
        if fault := _why_not(spelled[name], FOREIGN[name]):
            faults[name] = fault
            continue
        return FOREIGN[name], f"its {scores[name][0]:,} names are this layout's, and their shapes fit"
    if faults:
        raise UserError(f"{not_hf}. As another layout: {next(iter(faults.values()))}")
    best = max(scores, key=lambda name: scores[name][0])
    found, unknown = scores[best]
    if not found:
        some = fold_names(list(checkpoint.tensors)[:200])
        raise UserError(f"{checkpoint.path}: no known layout has such names: {some}; expected {', '.join(LAYOUTS)}")
    raise UserError(
        f"{checkpoint.path}: no layout fits; {best} knows {found:,} of its {found + unknown:,} names: --from {best} "
        f"tells which it does not. Hugging Face's own: {not_hf}"
    )


def _why_not(checkpoint: Checkpoint, layout: ModuleType, given: dict[str, int] | None = None) -> str | None:
    """Return why a checkpoint's tensors are not a layout's, or None."""
    try:
        to_hf(checkpoint, layout, given or {}, allow=(".*",))
    except UserError as error:
        # What no tensor tells is asked for once the layout is known; no shape hangs on it.
        if not given and (asked := re.search(r"--set (\w+)=", str(error))):
            return _why_not(checkpoint, layout, {asked[1]: 1})
        return str(error)
    return None
