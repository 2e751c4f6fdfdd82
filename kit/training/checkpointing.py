"""Checkpoints of Trainer that are whole or not there, and from which a run goes on exactly."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from kit.files import is_sealed, read_json, read_seal, write_json
from kit.model.adapter_files import Adapter
from kit.training.checkpoints import complete_checkpoint
from kit.training.topology import barrier

_PROGRESS = "progress.json"
_LOSS = "loss_{rank}.pt"


class CheckpointingTrainer(Trainer):
    """Trainer whose checkpoints have a marker, hold all that it keeps in memory, and are loaded strictly.

    Attributes:
        fingerprints: of recipe, data and model, stored with each checkpoint.
        adapter: in the model, if it has one.
    """

    fingerprints: dict[str, str]
    adapter: Adapter | None
    _resumed_from: Path | None = None
    _over = False
    _in_epoch_end = False

    # ---- Saving ----

    def _save_checkpoint(self, model: Any, trial: Any, due: dict[str, bool] | None = None) -> None:
        """Save a checkpoint whose marker is written last, then let older ones go.

        Trainer writes in place without a marker and deletes the checkpoint before while the new one may be broken.
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
                    complete_checkpoint(folder, self.state.global_step, self.args.world_size, self.fingerprints)
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
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        barrier()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the weights under the names that the model has for them in memory, by which they are loaded.

        Trainer writes those of the model's first publication, such as `embed_out` for GPT-NeoX's head, and does not
        find them again. Of a model with an adapter only that is saved; Trainer would leave the rows of new tokens out.
        """
        save = partial(self.model.save_pretrained, save_original_format=False)
        self.model.save_pretrained = (lambda folder, **_: self.adapter.write(folder)) if self.adapter else save
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained

    def _save_progress(self, folder: Path, due: dict[str, bool]) -> None:
        """Save what Trainer keeps in memory only: the loss since the last log line, and what is still to be done."""
        loss = {
            "since_last_log": self._tr_loss.cpu(),
            "total": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
        }
        torch.save(loss, folder / _LOSS.format(rank=self.args.process_index))
        if self.args.should_save:
            stopped = self.control.should_training_stop
            write_json(folder / _PROGRESS, {"due": due, "in_epoch_end": self._in_epoch_end, "stopped": stopped})

    def _restore_progress(self) -> None:
        """Restore what `_save_progress` saved, and catch up with it."""
        if self._resumed_from is None:
            return
        rank_loss = self._resumed_from / _LOSS.format(rank=self.args.process_index)
        loss = torch.load(rank_loss, weights_only=True, map_location="cpu")
        self._tr_loss = loss["since_last_log"].to(self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = loss["total"], loss["logged"]
        self._initial_global_step = 0  # the mean training loss covers the whole run, whatever it was split into
        if self.state.best_global_step:
            # Beside the checkpoint resumed from, whose folder may have moved or be another run's.
            best = self._resumed_from.absolute().parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if is_sealed(best) else None
        self._catch_up(**read_json(self._resumed_from / _PROGRESS))

    # ---- Resuming ----

    def _catch_up(self, due: dict[str, bool], in_epoch_end: bool, stopped: bool) -> None:
        """Do what the run that is resumed still had to do after the step that its checkpoint was saved at.

        Trainer has a boundary after each step and another one after each epoch, and resumes behind both.
        """
        boundary = (self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, 0.0)
        if any(due.values()):
            self.control.should_evaluate, self.control.should_save = due["evaluate"], due["save"]
            self._maybe_log_save_evaluate(*boundary)
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
        """Load a checkpoint's weights; where `_save` wrote an adapter, into the one that is in the model."""
        if self.adapter:
            self.adapter.restore(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, unless it is damaged; Trainer does not look."""
        if read_seal(self.state.best_model_checkpoint) is None:
            raise RuntimeError(
                f"{self.state.best_model_checkpoint}, the best checkpoint, is damaged: a file has changed"
            )
        if self.adapter:
            self.adapter.restore(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that does not hold every tensor; Trainer loads non-strictly and logs a line."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = set(load_result.missing_keys) - tied
        if missing or load_result.unexpected_keys:
            raise RuntimeError(
                f"checkpoint and model differ: missing {missing}, unexpected {load_result.unexpected_keys}"
            )
        self.model.tie_weights()
