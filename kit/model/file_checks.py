"""What the files of a model tell without a forward pass: the first rows of `kit verify`."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from kit.model.architecture import Architecture
from kit.model.headers import StoredTensor, read_tensor
from kit.model.sanity import Alignment, Order, TensorFacts
from kit.names import fold_names
from kit.recipe.models import ModelSection

OK, WARN, FAIL, NONE = "ok", "warn", "FAIL", "not applicable"
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_STRANGE = 0.5  # share of a block's tensors whose channels are sized as in no neighbour


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, what was found, and what to think of it."""

    name: str
    figure: str
    verdict: str
    reason: str


def read_value(section: ModelSection, tensor: StoredTensor) -> Any:
    """Read one tensor."""
    value = read_tensor(section.name_or_path, section.revision, tensor)
    return value if value.element_size() > 1 else value.float()  # torch knows little of 8-bit floats


def check_files(architecture: Architecture, tensors: list[StoredTensor]) -> Check:
    """Compare the files' tensors with the architecture's."""
    held = {architecture.own_name(t.name) or t.name: t.parameters for t in tensors}
    parameters = dict(architecture.model.named_parameters(remove_duplicate=False))
    stored = sum(number for name, number in held.items() if name in parameters and name not in architecture.tied)
    expected = sum(architecture.parameters().values())
    figure = f"{stored:,} of {expected:,}"
    if not architecture.compared:
        return Check("parameters", figure, NONE, "a quantized model's matrices are packed, and not compared")
    wrong = {
        "missing": fold_names(architecture.missing),
        "unexpected": fold_names(architecture.unused),
        "of another shape": ", ".join(f"{n} ({f}; expected {e})" for n, f, e in architecture.mismatched[:8]),
    }
    reason = "; ".join(f"{what}: {names}" for what, names in wrong.items() if names)
    return Check("parameters", figure, FAIL if reason else OK, reason)


def check_values(facts: list[TensorFacts]) -> Check:
    """Judge NaN and constants; a zero bias is a usual beginning, a norm's gain of ones one that all norms share."""
    alike: dict[str, list[TensorFacts]] = {}
    for each in facts:
        alike.setdefault(".".join("*" if p.isdigit() else p for p in each.name.split(".")), []).append(each)
    bad = [f"{f.name} ({f.bad:,} NaN or infinite)" for f in facts if f.bad]
    plain = []
    for each in (f for group in alike.values() for f in group if f.constant is not None):
        if each.dim > 1:
            bad.append(f"{each.name} (a matrix, {each.constant:g} throughout)")
    for group in alike.values():
        gains = [f for f in group if f.constant is not None and f.dim == 1 and not f.name.endswith("bias")]
        told = [f"{f.name} ({f.constant:g} throughout)" for f in gains]
        # Blocks that were trained alike are not constant in one of them alone; and a gain of zero gives nothing on.
        (plain if len(gains) == len(group) and len({f.constant for f in gains}) == 1 else bad).extend(told)
    listed = ", ".join((bad or plain)[:8]) + (f", and {len(bad or plain) - 8} more" if len(bad or plain) > 8 else "")
    verdict = FAIL if bad else WARN if plain else OK
    reason = listed + (": as untrained norms are" if plain and not bad else "")
    return Check("values", f"{len(facts):,} tensors: {len(bad)} bad, {len(plain)} constant", verdict, reason)


def check_order(order: Order | None) -> Check:
    """Judge what `compare_blocks` found."""
    name = "order in matrices"
    if order is None:
        return Check(name, "-", NONE, "there are not two blocks of matrices to compare")
    figure = f"{order.least:+.2f} to {order.largest:+.2f} a block"
    if not order.trained:
        reason = "no matrix stands out of its own entries shuffled: weights hardly trained, or all shuffled"
        return Check(name, figure, WARN, reason)
    found = [*(f"{each} (all matrices)" for each in order.blocks), *order.matrices]
    what = "no more order than their own entries shuffled, unlike those of other blocks: "
    return Check(name, figure, FAIL if found else OK, what + ", ".join(found[:8]) if found else "")


def check_channels(alignments: list[Alignment]) -> Check:
    """Judge what `compare_neighbours` found."""
    name = "channels of blocks"
    if not alignments:
        return Check(name, "-", NONE, "no three neighbouring blocks agree on which channels are large")
    worst = max(alignments, key=lambda each: (bool(each.certain), len(each.strange) / each.judged))
    figure = f"at most {len(worst.strange)} of {worst.judged} tensors of a block unlike its neighbours'"
    found = [each.block for each in alignments if each.certain or len(each.strange) / each.judged >= _STRANGE]
    reason = f"tensors whose rows or columns are in another order than those around them: {', '.join(found[:8])}"
    return Check(name, figure, FAIL if found else OK, reason if found else "")


def check_head(section: ModelSection, architecture: Architecture, tensors: list[StoredTensor]) -> Check:
    """Compare head and embeddings with what the configuration says of them."""
    embedding, head = architecture.model.get_input_embeddings(), architecture.model.get_output_embeddings()
    held = {architecture.own_name(t.name): t for t in tensors}
    modules = dict(architecture.model.named_modules())
    names = [f"{name}.weight" for name, module in modules.items() if module is embedding or module is head]
    tied = bool(head is not None and set(names) & set(architecture.tied))
    figure = "tied" if tied else "not tied"
    if head is None:
        return Check("head", "-", NONE, "the model has no output embeddings")
    if not set(names) <= set(held) or len(names) < 2:
        return Check("head", figure, OK, "")
    first, second = (read_value(section, held[name]) for name in names[:2])
    equal = first.shape == second.shape and bool((first == second).all())
    if tied:
        reason = f"the configuration ties {names[1]} to {names[0]}, and the files hold two different matrices"
        return Check("head", figure, OK if equal else FAIL, "" if equal else reason)
    reason = "the configuration ties nothing, and head and embeddings are equal: `tie_word_embeddings` may be missing"
    return Check("head", figure, WARN if equal else OK, reason if equal else "")


def check_dtypes(tensors: list[StoredTensor]) -> Check:
    """List the types of the tensors."""
    counts = Counter(t.dtype for t in tensors if t.dtype in FLOATS)
    figure = ", ".join(f"{number:,} {dtype}" for dtype, number in counts.most_common())
    rare = [t.name for t in tensors if t.dtype in counts and t.dtype != counts.most_common(1)[0][0]]
    if not counts:
        return Check("dtypes", "-", FAIL, "no tensor is of floating-point numbers")
    mixed = len(counts) > 1
    return Check("dtypes", figure, WARN if mixed else OK, f"mixed, among others {fold_names(rare)}" if mixed else "")
