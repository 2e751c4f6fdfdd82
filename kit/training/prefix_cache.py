"""The frozen-prefix cache: what leaves the frozen bottom of a model is a constant of a row, and computed once.

It is filled on demand. The first time that a row is needed it goes through the whole model, so a first epoch costs and
computes what it does without a cache; what leaves the prefix is written down (`prefix_store.py`). A micro-batch whose
rows are all there skips the prefix (`kit.model.prefix`). So nothing has to be resumed, and whatever is missing or
damaged is computed once more.

A row is known by its content, not by its place: it is found again in whatever batch and process, twice in an epoch,
and in the evaluation sets, and a row that were to change would not be taken for what it was.
"""

import inspect
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from kit.console import say, warn
from kit.errors import UserError
from kit.evaluation.inference import inference
from kit.files import hash_values
from kit.model.attention import loaded_kernel, packed_kernel
from kit.model.prefix import Prefix, prefix_depth
from kit.recipe.freezing import FreezingSection
from kit.training.disk import in_units
from kit.training.freezing import FreezingPlan
from kit.training.parameter_groups import phase_at
from kit.training.plan import StepPlan
from kit.training.prefix_data import PrefixData
from kit.training.prefix_rows import Rows, probe_batch, rows_of_call, take_rows
from kit.training.prefix_store import PrefixStore, make_room
from kit.training.sharding import sharding_of
from kit.training.throughput import flops_per_token
from kit.training.topology import any_process, local_main_process_first, on_any_process

_FORMAT = 1  # raise it whenever what is stored, or what a row is known by, changes
_GIB = 2**30
_OF_NO_VALUE = ("_name_or_path", "use_cache", "_attn_implementation")  # of a configuration, to hidden states


class PrefixCache(TrainerCallback):
    """Keeps what leaves the frozen bottom of a model, phase by phase of its freezing plan.

    Attributes:
        served: training micro-batches that have skipped the prefix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: FreezingPlan,
        section: FreezingSection,
        steps: StepPlan,
        data: PrefixData,
    ) -> None:
        """Make the cache of a run; what it needs of the model and the disk is looked at when a phase begins.

        Raises:
            UserError: `freezing.cache` is `on`, and there can be none in any phase.
        """
        self.model, self.plan, self.section, self.steps, self.data = model, plan, section, steps, data
        self.args = steps.args
        self.served = 0
        self._depths = [prefix_depth(model, phase.trainable) for phase in plan.phases]
        self._phase: int | None = None
        self._prefix: Prefix | None = None
        self._store: PrefixStore | None = None
        self._kept: frozenset[str] = frozenset()
        self._dtypes: dict[str, torch.dtype] = {}
        self._writes: set[str] = set()
        self._reserved = 0  # bytes for training rows that are still to come
        self._damaged = 0
        cause = _excluded(self.args)
        if cause is None and not any(depth for depth, _ in self._depths):
            cause = self._depths[0][1]
        self.is_possible = cause is None
        if cause:
            self._refuse(cause)

    # ---- The phases of a plan

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the cache of the phase that training begins or goes on in."""
        self._phase = None
        self._follow(state.global_step)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go over to the cache of the phase that this step belongs to."""
        self._follow(state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write no more: what is measured after training is read once."""
        self._writes = set()

    def _follow(self, step: int) -> None:
        phase = phase_at(self.plan.phases, step)
        if phase == self._phase or not self.is_possible:
            return
        self._phase, self._prefix, self._store, self._kept = phase, None, None, frozenset()
        depth, why = self._depths[phase]
        if depth == 0:
            say(f"frozen-prefix cache: ends with the phase before: {why}" if phase else _off(why))
        else:
            self._begin(phase, depth)

    def _begin(self, phase: int, depth: int) -> None:
        """Open the cache of a phase, if it can be and pays.

        Raises:
            UserError: `freezing.cache` is `on`, and it cannot be.
        """
        wanted = self._wanted(phase)
        if not wanted:
            say(_off("no row is read twice in this phase, and nothing is measured on the way"))
            return
        prefix = Prefix(self.model, depth)
        why = self._try_out(prefix)
        # What follows is done together, so all have to go the same way.
        if any_process(why is not None, self.args.device):
            self._refuse(why or "another process cannot pass over these blocks")
            return
        sizes = {name: number * prefix.width * self._dtypes[name].itemsize for name, number in wanted.items()}
        folder = Path(self.data.store_dir) / "prefix" / self._key(prefix, phase)
        # The first process of a machine removes what is to go before others look.
        store, kept, why = local_main_process_first(lambda: self._open(folder, sizes))
        nothing, no_training = on_any_process([store is None, "training" not in kept], self.args.device)
        if nothing or (no_training and self.section.cache == "on"):
            self._refuse(why or "another process has no room")
            return
        self._prefix, self._store, self._kept, self._writes, self._damaged = prefix, store, kept, set(kept), 0
        self._reserved = sizes["training"] if "training" in kept else 0
        self._tell(prefix, folder, {purpose: sizes[purpose] for purpose in sizes if purpose in kept}, why)

    def _wanted(self, phase: int) -> dict[str, int]:
        """Return what is read more than once in a phase, with its positions."""
        ends = [*(p.start for p in self.plan.phases[1:]), self.steps.steps][phase]
        epochs = (ends - self.plan.phases[phase].start) / self.steps.steps_per_epoch
        found = {"training": self.data.positions} if epochs > 1 or self.section.cache == "on" else {}
        if self.args.eval_strategy.value != "no" and self.data.evaluated:
            found["evaluation"] = self.data.evaluated
        return found

    def _try_out(self, prefix: Prefix) -> str | None:
        """Return why a prefix cannot be passed over, in the precision of training."""
        args, rows = self.args, [self.data.rows[0], self.data.rows[len(self.data.rows) // 2]]
        batch = {name: tensor.to(args.device) for name, tensor in probe_batch(rows, self.data.collate).items()}
        # As tasks call it: with a cache, packed documents would not be told apart.
        if "use_cache" in inspect.signature(type(self.model).forward).parameters:
            batch["use_cache"] = False
        dtype = torch.float16 if args.fp16 else torch.bfloat16

        def forward(batch: Mapping[str, Any]) -> torch.Tensor:
            with torch.autocast(args.device.type, dtype, enabled=args.fp16 or args.bf16):
                return self.model(**batch).logits

        why = prefix.check(forward, batch)
        if why is None:
            # Without autocast, what comes out of a block may have another precision.
            with torch.no_grad(), inference(self.model), prefix.captured() as found:
                self.model(**batch)
            self._dtypes = {"training": prefix.dtype, "evaluation": found[0].dtype}
        return why

    def _key(self, prefix: Prefix, phase: int) -> str:
        """Return a hash of all that hidden states depend on, but for the rows.

        In their last bits they also depend on which other rows are in the batch, and on how sums are split. So a store
        is of certain data, of one way to batch it and of one kind of machine: a run computes the same bits whether it
        finds one or fills it.
        """
        args = self.args
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _OF_NO_VALUE}
        kernels = [packed_kernel(self.model), loaded_kernel(self.model)]
        matmul = torch.backends.cuda.matmul.fp32_precision
        precision = [args.bf16, args.fp16, matmul, str(self.model.dtype), str(self._dtypes), kernels]
        precision += [args.use_liger_kernel, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
        batches = [args.seed, args.data_seed, args.train_batch_size, args.gradient_accumulation_steps, args.world_size]
        batches += [args.per_device_eval_batch_size, self.plan.phases[phase].start, self.data.key]
        device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
        versions = [_FORMAT, torch.__version__, transformers.__version__, device]
        of_model = [type(self.model).__name__, json.loads(json.dumps(config, default=str)), prefix.depth, prefix.key()]
        return hash_values("frozen prefix", of_model, precision, batches, versions)

    def _open(self, folder: Path, sizes: Mapping[str, int]) -> tuple[PrefixStore | None, frozenset[str], str]:
        """Return the store, what of `sizes` has room in it, and why the rest has none."""
        try:
            return self._make_room(folder, sizes, int(self.section.cache_gib * _GIB))
        except OSError as error:  # a disk that nobody may write to, or that is gone
            return None, frozenset(), f"{folder} cannot be used: {error}"

    def _make_room(
        self, folder: Path, sizes: Mapping[str, int], limit: int
    ) -> tuple[PrefixStore | None, frozenset[str], str]:
        store = PrefixStore(folder, limit)
        existing = next(path for path in folder.parents if path.exists())
        total, _, free = shutil.disk_usage(existing)
        kept, needed, left_out = [], 0, []
        for purpose, size in sizes.items():
            if needed + size > limit:
                why = f"{purpose} takes {in_units(size)}, `freezing.cache_gib` allows {in_units(limit - needed)}"
            elif total and needed + size - store.num_bytes > free / 2:
                why = (
                    f"{purpose} takes {in_units(size)}, and {existing.absolute()} has {in_units(free)} free, of which "
                )
                why += "the cache takes at most half"
            else:
                kept, needed = [*kept, purpose], needed + size
                continue
            left_out.append(why)
        why = "; ".join(left_out)
        if not kept:
            return None, frozenset(), why
        if removed := make_room(folder.parent, folder, needed, limit):
            say(f"frozen-prefix cache: {len(removed)} older ones removed (`freezing.cache_gib` is for all together)")
        if folder.exists():
            folder.touch()  # used last
        return store, frozenset(kept), why

    # ---- What is told

    def _refuse(self, why: str) -> None:
        if self.section.cache == "on":
            raise UserError(f"freezing.cache: found `on`, but {why}; `auto` goes on without a cache where it must")
        say(_off(why))

    def _tell(self, prefix: Prefix, folder: Path, sizes: Mapping[str, int], why: str) -> None:
        parts = " and ".join(f"about {in_units(size)} for {purpose}" for purpose, size in sizes.items())
        there = f", {in_units(self._store.num_bytes)} of which are there" if len(self._store) else ""
        whole, rest = (flops_per_token(self.model, self.data.length, skipped) for skipped in (0, prefix.depth))
        saved = ""
        if whole and "training" in sizes:
            saved = f"; from the second time on a training row leaves out {1 - rest / whole:.0%} of a step's arithmetic"
        say(
            f"frozen-prefix cache: nothing trains below block {prefix.depth}: what comes out is kept in {folder}, "
            f"{parts}{there}{saved}{f'; left out: {why}' if why else ''}"
        )

    def _tell_damage(self) -> None:
        if self._store.damaged and not self._damaged:
            warn("frozen-prefix cache: rows on the disk are damaged; such rows are computed again")
        self._damaged = self._store.damaged

    # ---- Rows

    def training(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Return a context in which the model may be called once with a micro-batch, without the names of its rows."""
        rows = take_rows(inputs)
        if rows is None or "training" not in self._kept:
            return nullcontext()
        return self._serving(rows, inputs["input_ids"].shape, "training")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the rows of every batch that the model is called with be kept, and read where they are all there."""
        if "evaluation" not in self._kept:
            yield
            return
        calls: list[ExitStack] = []

        def before(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
            calls.append(ExitStack())
            if (rows := rows_of_call(args, kwargs)) is not None:
                calls[-1].enter_context(self._serving(rows, kwargs["input_ids"].shape, "evaluation"))

        def after(*_: Any) -> None:
            calls.pop().close()

        handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _serving(self, rows: Rows, shape: torch.Size, purpose: str) -> Iterator[None]:
        """Pass over the prefix where all rows are there; else write down those that are not."""
        if purpose == "training":  # other processes have as many
            each = self._prefix.width * self._dtypes[purpose].itemsize * self.args.world_size
            self._reserved = max(0, self._reserved - sum(length for _, _, length in rows) * each)
        there = self._store.holds([digest for digest, _, _ in rows])
        hidden = self._read(rows, shape, self._dtypes[purpose]) if there else None
        self._tell_damage()
        if hidden is not None:
            self.served += purpose == "training"
            with self._prefix.replaced(hidden.to(self.args.device, non_blocking=True)):
                yield
            return
        with self._prefix.captured() as found:
            yield
        if len(found) == 1 and purpose in self._writes:  # none where the model was interrupted
            self._write(rows, found[0], purpose)

    def _read(self, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the hidden states of rows (rows, positions, width), 0 where there is padding, or None."""
        on_gpu = self.args.device.type == "cuda"
        hidden = torch.zeros((*shape, self._prefix.width), dtype=dtype, pin_memory=on_gpu)
        for (digest, start, length), row in zip(rows, hidden, strict=True):
            if not self._store.read(digest, row[start : start + length].view(-1).view(torch.uint8).numpy()):
                return None
        return hidden

    def _write(self, rows: Rows, hidden: torch.Tensor, purpose: str) -> None:
        hidden, reserved = hidden.cpu(), self._reserved if purpose == "evaluation" else 0
        try:
            for (digest, start, length), row in zip(rows, hidden, strict=True):
                payload = row[start : start + length].contiguous().view(-1).view(torch.uint8)
                self._store.write(digest, payload.numpy(), reserved)
        except OSError as error:
            # Its limit is of one purpose alone, a disk that is full has no room for any.
            self._writes -= {purpose} if error.errno is None else {*self._writes}
            warn(f"frozen-prefix cache: no more rows are kept of {purpose}, the run goes on without them: {error}")


def make_prefix_cache(
    model: PreTrainedModel,
    plan: FreezingPlan | None,
    section: FreezingSection | None,
    steps: StepPlan,
    data: PrefixData,
) -> PrefixCache | None:
    """Return the cache of a run, or None where there is none in any phase; says why.

    Args:
        model: before it is wrapped.
        plan: of what trains; None where everything does.
        section: the recipe's; None where an adapter alone makes the plan.
        steps: of the run.
        data: of the run.

    Raises:
        UserError: `freezing.cache` is `on`, and there can be none.
    """
    section = section or FreezingSection.model_construct()
    if plan is None or section.cache == "off":
        return None
    cache = PrefixCache(model, plan, section, steps, data)
    return cache if cache.is_possible else None


def _off(why: str) -> str:
    return f"frozen-prefix cache: off, since {why}"


def _excluded(args: TrainingArguments) -> str | None:
    """Return why a run can have no cache, by its training arguments."""
    if name := sharding_of(vars(args)):
        return f"{name} gathers the weights of each block just before it computes"
    if args.torch_compile:
        return "a compiled model would be compiled again at each change between the two"
    return None
