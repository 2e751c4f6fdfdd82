"""Checkpoints of Trainer that are whole or not there, and from which a run goes on exactly."""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from kit.files import is_sealed, read_json, read_seal, write_json
from kit.model.adapter_files import Adapter
from kit.model.new_rows import put_back, take_out
from kit.model.saving import whole_state
from kit.model.shards import load
from kit.training.checkpoints import complete_checkpoint, discard_timed, is_timed, saved_world_size
from kit.training.resuming import ResumingTrainer
from kit.training.sharding import load_optimizer, save_optimizer, step_only_what_trains
from kit.training.throughput import Throughput
from kit.training.topology import barrier

_PROGRESS = "progress.json"
_LOSS = "loss_{rank}.pt"


class CheckpointingTrainer(ResumingTrainer):
    """Trainer whose checkpoints have a marker, hold all that it keeps in memory, and are loaded strictly.

    Attributes:
        fingerprints: of recipe, data and model, stored with each checkpoint.
        adapter: in the model, if it has one.
        skipped_steps: those in which loss or gradient was no number.
        throughput: what counts tokens, over all that the run was split into.
    """

    fingerprints: dict[str, str]
    adapter: Adapter | None
    throughput: Throughput
    skipped_steps = 0  # for a loss or gradient that is no number
    _saved_at = 0.0
    _resumed_from: Path | None = None
    _over = False
    _in_epoch_end = False

    # ---- Saving ----

    def _save_checkpoint(self, model: Any, trial: Any, due: dict[str, bool] | None = None, timed: bool = False) -> None:
        """Save a checkpoint whose marker is written last, then let older ones go.

        Trainer writes in place without a marker and deletes the checkpoint before while the new one may be broken.
        One that is saved since time has passed goes with the next one: which others are kept, and which is the best,
        is as without it.
        """
        run_dir = Path(self.args.output_dir)
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        is_new = not is_sealed(folder)
        barrier()  # nobody writes before everybody has looked
        if is_new:
            if self.args.should_save and folder.exists():
                shutil.rmtree(folder)
            barrier()
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
                self._save_progress(folder, due or {"evaluate": False, "save": False})
                barrier()
                if self.args.should_save:
                    facts = self.fingerprints | ({"timed": True} if timed else {})
                    complete_checkpoint(folder, self.state.global_step, self.args.world_size, facts)
            except Exception:
                # Of no use to anybody; on a full disk it would also leave no room for the manifest to tell so.
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                self.args.save_total_limit = limit
        elif self.state.best_global_step == self.state.global_step:
            # The same step's state, saved before its evaluation was interrupted: only the verdict is new.
            self.state.best_model_checkpoint = str(folder)
        if self.args.should_save:
            self._let_go_before(folder, timed)
        self._saved_at = time.monotonic()
        barrier()

    def _let_go_before(self, newest: Path, timed: bool) -> None:
        discard_timed(newest.parent, newest=newest)
        if not timed:
            rotate_checkpoints(
                output_dir=str(newest.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights, of a model in shards whole; Trainer gives the first process shards where some are tied."""
        put_back(self.model)
        self._save(output_dir, self.adapter.state() if self.adapter else whole_state(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the weights under the names that the model has for them in memory, by which they are loaded.

        Trainer writes those of the model's first publication, such as `embed_out` for GPT-NeoX's head, and does not
        find them again. Of a model with an adapter only that is saved; Trainer would leave the rows of new tokens out.
        """
        save = partial(self.model.save_pretrained, save_original_format=False)
        if self.adapter:
            save = lambda folder, state_dict, **_: self.adapter.write(folder, state_dict)  # noqa: E731
        self.model.save_pretrained = save
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save an optimizer that FSDP2 has cut up as it lies there; Trainer would also write the weights once more."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.optimizer, output_dir, self.args.process_index)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_steps_state(self, checkpoint: str) -> None:
        """Load what `_save_optimizer_and_scheduler` saved."""
        if not self.is_fsdp_enabled:
            super()._load_steps_state(checkpoint)
            return
        load_optimizer(self.optimizer, checkpoint, self.args.process_index)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_progress(self, folder: Path, due: dict[str, bool]) -> None:
        """Save what Trainer keeps in memory only: the loss since the last log line, and what is still to be done."""
        loss = {
            "since_last_log": self._tr_loss.cpu(),
            "total": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
            "tokens_seen": self.throughput.tokens_seen.cpu(),
        }
        torch.save(loss, folder / _LOSS.format(rank=self.args.process_index))
        if self.args.should_save:
            stopped = self.control.should_training_stop
            progress = {"due": due, "in_epoch_end": self._in_epoch_end, "stopped": stopped}
            write_json(folder / _PROGRESS, progress | {"skipped_steps": self.skipped_steps})

    def _restore_progress(self) -> None:
        """Restore what `_save_progress` saved, and catch up with it."""
        if self._resumed_from is None:
            return
        self._hold_recipe()
        loss = self._load_loss(self._resumed_from)
        self._tr_loss = loss["since_last_log"].to(self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = loss["total"], loss["logged"]
        self.throughput.go_on_from(loss["tokens_seen"])
        self._initial_global_step = 0  # the mean training loss covers the whole run, whatever it was split into
        if self.state.best_global_step:
            # Beside the checkpoint resumed from, whose folder may have moved or be another run's.
            best = self._resumed_from.absolute().parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if is_sealed(best) else None
        if self.args.should_save and self._resumed_from.parent.resolve() == Path(self.args.output_dir).resolve():
            # A kill may have come between the marker and what goes for it; no other save need follow.
            self._let_go_before(self._resumed_from, is_timed(self._resumed_from))
        self._catch_up(**read_json(self._resumed_from / _PROGRESS))

    # ---- Resuming ----

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the model, load the checkpoint; DeepSpeed would move what is frozen, and not load rows apart."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:
            take_out(self.model)
            step_only_what_trains(self.model_wrapped.optimizer)
        return prepared

    def _load_loss(self, folder: Path) -> dict[str, Any]:
        """Load what this process saved of the loss; where there were more or fewer, the mean of theirs."""
        before = saved_world_size(folder)
        ranks = [self.args.process_index] if before == self.args.world_size else range(before)
        files = [folder / _LOSS.format(rank=rank) for rank in ranks]
        losses = [torch.load(file, weights_only=True, map_location="cpu") for file in files]
        # Each is its share times the number of processes: the log line, which takes the mean too, is the same.
        return losses[0] | {"since_last_log": torch.stack([loss["since_last_log"] for loss in losses]).mean(0)}

    def _catch_up(self, due: dict[str, bool], in_epoch_end: bool, stopped: bool, skipped_steps: int) -> None:
        """Do what the run that is resumed still had to do after the step that its checkpoint was saved at.

        Trainer has a boundary after each step and another one after each epoch, and resumes behind both.
        """
        self.skipped_steps = skipped_steps
        boundary = (self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, 0.0)
        if any(due.values()):
            self.control.should_evaluate, self.control.should_save = due["evaluate"], due["save"]
            self._maybe_log_save_evaluate(*boundary)
        stopped = stopped and self._has_run_out_of_patience()
        self._over = stopped or self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        if not in_epoch_end and (self._over or self.state.epoch == int(self.state.epoch)):
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(*boundary)
            self._over = self._over or self.control.should_training_stop

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the run that is resumed had ended; Trainer would train one step more."""
        if self._over:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights strictly; Trainer passes over what is missing, and knows only its own shards."""
        if self.adapter:
            self.adapter.restore(resume_from_checkpoint)
        else:
            load(self.model, resume_from_checkpoint)
        take_out(self.model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, unless it is damaged; Trainer does not look."""
        if read_seal(self.state.best_model_checkpoint) is None:
            raise RuntimeError(
                f"{self.state.best_model_checkpoint}, the best checkpoint, is damaged: a file has changed"
            )
        self._load_from_checkpoint(self.state.best_model_checkpoint)
