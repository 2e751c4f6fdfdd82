"""From a layout to Hugging Face's and back, a tensor at a time; whatever does not fit the table is named."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor, computed
from kit.checkpoints.layout import Layout, Line, Settings, expand, is_buffer
from kit.checkpoints.layouts import huggingface
from kit.errors import UserError, suggest
from kit.names import fold_names

_HEAD = "lm_head.weight"  # of GPT-2 and Llama
_MOST = 3  # tensors of another shape are told one by one


@dataclass
class Report:
    """What a conversion did beside renaming.

    Attributes:
        notes: what was chosen, in words.
        buffers: names that hold no weight and were left out.
        allowed: names of tensors that do not fit and were let pass by a pattern, with what became of them.
        zeros: Hugging Face's names of what only one side has: zeros.
        twice: Hugging Face's names of heads that are the embeddings, and are not written as heads of their own.
    """

    notes: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    allowed: dict[str, str] = field(default_factory=dict)
    zeros: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


def to_hf(
    checkpoint: Checkpoint, layout: Layout, given: Mapping[str, Any], allow: Sequence[str] = ()
) -> tuple[dict[str, LazyTensor], PreTrainedConfig, Settings, Report]:
    """Return a checkpoint's tensors as Hugging Face has them, its configuration, the layout's settings, and a report.

    Args:
        checkpoint: of the layout.
        layout: a module of `kit.checkpoints.layouts`, other than Hugging Face's.
        given: settings that the user gives.
        allow: regular expressions that match in full what may be missing (zeros then) or more than the layout has.

    Raises:
        UserError: the settings are not known or disagree, or tensors are missing, unknown or mis-shaped; all are named.
    """
    settings, notes = layout.read_settings(checkpoint, given)
    config = layout.make_config(settings)
    report = Report([*checkpoint.notes, *notes])
    shapes, dtype = huggingface.expected_shapes(config), _most_common_dtype(checkpoint.tensors.values())
    found: dict[str, LazyTensor] = {}
    missing, misshaped, used = [], [], set()
    for line, hf, own in expand(layout.TABLE, settings["n_layer"]):
        used |= set(own)
        absent = [name for name in own if name not in checkpoint.tensors]
        if line.head and config.tie_word_embeddings:
            continue  # `read_settings` has seen that it is the embeddings
        if len(absent) == len(own) and line.switch and not settings[line.switch]:
            found[hf] = _zeros(shapes[hf], dtype)
            report.zeros.append(hf)
        elif absent and all(_is_allowed(name, allow) for name in absent):
            found[hf] = _zeros(shapes[hf], dtype)
            report.zeros.append(hf)
            report.allowed |= dict.fromkeys(absent, f"missing: `{hf}` is zeros")
        elif absent:
            missing += absent
        else:
            sources = [checkpoint.tensors[name] for name in own]
            try:
                made = _turned(line, config, sources)
            except (RuntimeError, IndexError):  # sizes that cannot even be joined
                made = None
            if made is None or made.shape != shapes[hf]:
                shape = made.shape if made else None
                misshaped.append(_told(own, [each.shape for each in sources], hf, shape, shapes[hf]))
            else:
                found[hf] = made
    extra = _sort_out([name for name in checkpoint.tensors if name not in used], layout, allow, report)
    _complain(checkpoint, layout.NAME, missing, extra, misshaped, used)
    config.dtype = dtype
    _check_floats(checkpoint, found)
    return {name: found[name] for name in shapes if name in found}, config, settings, report


def read_hf(
    checkpoint: Checkpoint, given: Mapping[str, Any], allow: Sequence[str] = ()
) -> tuple[dict[str, LazyTensor], PreTrainedConfig, Report]:
    """Return the tensors of a checkpoint in Hugging Face's layout, its configuration, and a report.

    Raises:
        UserError: there is no configuration, or the tensors are not those that it describes; all are named.
    """
    config = huggingface.read_config(checkpoint, given)
    tensors, notes = huggingface.rename(checkpoint, config)
    report, shapes = Report([*checkpoint.notes, *notes]), huggingface.expected_shapes(config)
    missing = [name for name in shapes if name not in tensors]
    misshaped = [
        f"`{name}` {tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    heads = huggingface.tied_names(config)
    for name in heads & tensors.keys():
        if not torch.equal(tensors[name].read(), tensors[huggingface.embeddings_name(config)].read()):
            misshaped.append(f"`{name}` is not the embeddings, to which config.json ties it")
    extra = _sort_out(
        [name for name in tensors if name not in shapes and name not in heads], huggingface, allow, report
    )
    dtype = _most_common_dtype(checkpoint.tensors.values())
    for name in [name for name in missing if _is_allowed(name, allow)]:
        missing.remove(name)
        tensors[name] = _zeros(shapes[name], dtype)
        report.zeros.append(name)
        report.allowed[name] = "missing: zeros"
    _complain(checkpoint, huggingface.NAME, missing, extra, misshaped, set(shapes))
    config.dtype = dtype
    _check_floats(checkpoint, {name: tensors[name] for name in shapes})
    return {name: tensors[name] for name in shapes}, config, report


def from_hf(
    tensors: Mapping[str, LazyTensor],
    config: PreTrainedConfig,
    layout: Layout,
    given: Mapping[str, Any],
    allow: Sequence[str] = (),
) -> tuple[dict[str, LazyTensor], Settings, Report]:
    """Return Hugging Face's tensors as a layout has them, what its file says beside them, and a report.

    A switch of the layout, such as `bias`, is off where all that hangs on it is zero, unless it is given.

    Raises:
        UserError: the layout cannot hold such a model; tensors are missing, unknown or mis-shaped.
    """
    if config.model_type != layout.MODEL_TYPE:
        raise UserError(f"the layout {layout.NAME} holds {layout.MODEL_TYPE}; the model is {config.model_type}")
    report = Report()
    lines = expand(layout.TABLE, config.num_hidden_layers)
    used: set[str] = set()
    if not config.tie_word_embeddings and _is_tied(tensors, config):
        # Where a file holds both, nothing tells it from a tied one.
        config = copy.deepcopy(config)
        config.tie_word_embeddings = True
        report.notes.append(f"{_HEAD} is the embeddings bit for bit: written as tied")
        report.twice.append(_HEAD)
        used.add(_HEAD)
    switches = _switches(lines, tensors, given)
    settings = layout.own_settings(config, switches)
    shapes = huggingface.expected_shapes(config)
    found: dict[str, LazyTensor] = {}
    missing, misshaped = [], []
    for line, hf, own in lines:
        used.add(hf)
        source = tensors.get(hf)
        if line.head and config.tie_word_embeddings:
            if not layout.KEEPS_TIED_HEAD:
                continue
            # The same tensor under a second name, so that a `.pt` file keeps one.
            embeddings = huggingface.embeddings_name(config)
            found[own[0]] = next(found[names[0]] for _, name, names in lines if name == embeddings)
            continue
        if line.switch and not switches[line.switch]:
            report.zeros.append(hf)
            continue
        if source is None:
            if not _is_allowed(hf, allow):
                missing.append(hf)
            continue
        if hf in shapes and source.shape != shapes[hf]:
            misshaped.append(f"`{hf}` {source.shape}, expected {shapes[hf]}")
            continue
        for position, name in enumerate(own):
            found[name] = computed(lambda t, line=line, at=position: line.turn.to_own(t, config)[at], [source])
    unused = [name for name in tensors if name not in used]
    extra = _sort_out(unused, huggingface, allow, report)
    _complain(None, layout.NAME, missing, extra, misshaped, used)
    return found, settings, report


def _sort_out(unused: list[str], layout: Any, allow: Sequence[str], report: Report) -> list[str]:
    """Return names that are neither a buffer nor allowed; note the others."""
    report.buffers += [name for name in unused if is_buffer(layout, name)]
    others = [name for name in unused if not is_buffer(layout, name)]
    report.allowed |= {n: "left out: the layout has no such tensor" for n in others if _is_allowed(n, allow)}
    return [name for name in others if not _is_allowed(name, allow)]


def _turned(line: Line, config: PreTrainedConfig, own: list[LazyTensor]) -> LazyTensor:
    return computed(lambda *tensors: line.turn.to_hf(list(tensors), config), own)


def _is_tied(tensors: Mapping[str, LazyTensor], config: PreTrainedConfig) -> bool:
    """Tell whether a head of its own holds the embeddings' very bits."""
    embeddings, head = tensors.get(huggingface.embeddings_name(config)), tensors.get(_HEAD)
    if head is None or embeddings is None or (head.shape, head.dtype) != (embeddings.shape, embeddings.dtype):
        return False
    return torch.equal(head.read(), embeddings.read())


def _switches(
    lines: list[tuple[Line, str, tuple[str, ...]]], tensors: Mapping[str, LazyTensor], given: Mapping[str, Any]
) -> dict[str, bool]:
    switches = {line.switch: False for line, _, _ in lines if line.switch}
    for line, hf, _ in lines:
        if line.switch and not switches[line.switch] and hf in tensors:
            switches[line.switch] = bool(tensors[hf].read().any())
    for name in switches.keys() & given.keys():
        if not isinstance(given[name], bool):
            raise UserError(f"--set {name}={given[name]}: expected true or false")
        if switches[name] and not given[name]:
            raise UserError(f"--set {name}={given[name]}: the model has biases there that are not zero")
        switches[name] = given[name]
    return switches


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def _most_common_dtype(tensors: Iterable[LazyTensor]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def _is_allowed(name: str, allow: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in allow)


def _told(
    own: tuple[str, ...],
    shapes: list[tuple[int, ...]],
    hf: str,
    made: tuple[int, ...] | None,
    expected: tuple[int, ...],
) -> str:
    named = ", ".join(f"`{name}` {shape}" for name, shape in zip(own, shapes, strict=True))
    found = f"makes {made}" if made else "cannot be joined"
    turned = ", which is turned" if made == expected[::-1] and made != expected else ""
    return f"{named}: {found}{turned}; expected {expected} of `{hf}`"


def _check_floats(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> None:
    if whole := [name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]:
        kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in whole}))
        raise UserError(f"{checkpoint.path}: weights of type {kinds}, as quantized ones are: {fold_names(whole)}")


def _complain(
    checkpoint: Checkpoint | None,
    layout: str,
    missing: list[str],
    extra: list[str],
    misshaped: list[str],
    known: set[str],
) -> None:
    faults = []
    if missing:
        faults.append(f"missing: {fold_names(missing)}")
    if extra:
        near = suggest(extra[0], missing or known) if len(extra) <= len(known) else ""
        faults.append(f"not in the layout: {fold_names(extra)}{near}")
    if misshaped:
        more = f"; and {len(misshaped) - _MOST:,} more" if len(misshaped) > _MOST else ""
        faults.append(f"of another shape: {'; '.join(misshaped[:_MOST])}{more}")
    if faults:
        where = f"{checkpoint.path}: " if checkpoint else ""
        allow = "; --allow PATTERN lets tensors pass that may be missing or too many" if missing or extra else ""
        raise UserError(f"{where}does not fit the layout {layout}: {'. '.join(faults)}{allow}")
