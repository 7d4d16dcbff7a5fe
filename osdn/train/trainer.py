"""What a process holds of a run, and how it goes through it."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException
from tqdm import tqdm

from osdn.data import load_tokenizer
from osdn.errors import UserError
from osdn.model.configuration import OSDNConfig
from osdn.model.flops import flops_per_token
from osdn.system.signals import Signals
from osdn.train.checkpoint import reading as checkpoint
from osdn.train.checkpoint.writing import Saver
from osdn.train.distributed.parallel import Parallel
from osdn.train.distributed.stall import Heartbeat
from osdn.train.log.run_log import RunLog, tell
from osdn.train.log.speed import Moment, peak_memory, utilisation
from osdn.train.log.trackers import TensorBoard, Tracker, WeightsAndBiases
from osdn.train.optim import fill_state, make_optimizer, named_state
from osdn.train.recipe import Recipe
from osdn.train.setup import check_read, export, make_config, make_rows, make_sharded, passes
from osdn.train.step import Launched, Outcome, Stepper
from osdn.train.validate import bits_per_byte

PATIENCE = 10  # non-finite steps in a row


def _silent(message: str) -> None:
    """What `tell` is in the processes but one."""


class Run:
    """One process's part of a run.

    Args:
        found: the checkpoint that the run goes on from.

    Raises:
        UserError: something the user can put right.
    """

    def __init__(
        self, recipe: Recipe, out: Path, found: checkpoint.Checkpoint | None, parallel: Parallel
    ) -> None:
        self.recipe, self.out, self.options = recipe, out, recipe.train
        self.parallel = parallel
        self.tell: Callable[[str], None] = tell if parallel.main else _silent
        self.step = self.nonfinite = self.in_a_row = 0
        self.saved = self.tried = 0  # steps of the newest checkpoint, and of the last attempt
        self.log: RunLog | None = None
        self.launched: Launched | None = None  # step number `step`, not accounted for yet
        self.since = Moment(parallel.device)  # when the time of that step began
        config = parallel.together(lambda: self._make_data(found))
        self._make_model(config, found)
        parallel.from_main(self._open_log)  # last: it cuts the log off behind the checkpoint
        options = recipe.parallel
        self.heartbeat = Heartbeat(parallel, seconds=options.stall_seconds, tell=tell)
        self.stepper = Stepper(
            self.sharded,
            self.optimizer,
            parallel,
            self.options,
            passes=self.passes,
            beat=self.heartbeat.beat,
        )
        self.saver = Saver(out / "checkpoints", parallel, keep=self.options.keep_checkpoints)

    def _make_data(self, found: checkpoint.Checkpoint | None) -> OSDNConfig:
        """What a user's mistake can stop, before the processes depend on each other."""
        recipe, rank, size = self.recipe, self.parallel.rank, self.parallel.size
        self.passes = passes(recipe, size)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        made = make_rows(recipe, self.tokenizer, rank=rank, world=size)
        self.rows, self.validation, self.validation_bytes, self.read = made
        if found is not None:
            check_read(found.state.get("read", {}), self.read)
            self.rows.load_state_dict(found.state["data"])
        return make_config(recipe, self.tokenizer)

    def _make_model(self, config: OSDNConfig, found: checkpoint.Checkpoint | None) -> None:
        self.sharded = make_sharded(self.recipe, config, self.parallel)
        self.flops = flops_per_token(config, self.options.seq_len)
        self.optimizer = make_optimizer(self.sharded.model, self.options.optimizer)
        fill_state(self.optimizer, 0)
        if found is None:
            return
        state = found.state
        self.step = self.saved = self.tried = state["step"]
        self.nonfinite, self.in_a_row = state["nonfinite"], state["in_a_row"]
        fill_state(self.optimizer, self.step - self.nonfinite)
        tensors = named_state(self.sharded.model, self.optimizer)
        checkpoint.load_tensors(found.directory, tensors, self.parallel)
        self.tell(f"going on from {found.directory}")

    def _open_log(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = RunLog(self.out, step=self.step, trackers=self._trackers(), tell=tell)
        except OSError as error:
            raise UserError(f"{self.out}: cannot write there: {error.strerror}") from error

    def _trackers(self) -> list[Tracker]:
        logging, trackers = self.recipe.logging, list[Tracker]()
        installed = find_spec("tensorboard") is not None
        if installed if logging.tensorboard is None else logging.tensorboard:
            trackers.append(TensorBoard(self.out, self.step))
        if logging.wandb is not None:
            trackers.append(WeightsAndBiases(self.out, logging.wandb, self.recipe.resolved()))
        return trackers

    def complete(self, signals: Signals) -> None:
        """Everything from here to the finished model."""
        options = self.options
        show = self.recipe.logging.progress and self.parallel.main
        bar = tqdm(
            total=options.steps, initial=self.step, unit="step", disable=None if show else True
        )
        with bar:
            while True:
                due = self.step % options.validate_every == 0 and self.step > 0
                if self.validation and (due or self.step == options.steps):
                    self._settle()
                    self._validate(signals)
                if self._asked(signals):
                    self._settle()
                    self._interrupted(signals)
                if self.step == options.steps:
                    break
                bar.set_postfix_str(self._train_step(), refresh=False)
                bar.update()
                if self.step == options.steps or self.step % options.checkpoint_every == 0:
                    self._settle()
                    if not self.in_a_row:
                        self._save()
        if self.tried < self.step:
            self._save()
        self._finish_save()
        export(self.out, self.sharded, self.tokenizer)

    def _asked(self, signals: Signals) -> bool:
        """Whether a signal came to any process; all processes must ask together."""
        received = self.parallel.largest(signals.received or 0)
        if received:  # else one that came meanwhile would be forgotten
            signals.received = received
        return received > 0

    def _train_step(self) -> str:
        """Launch a step and account for the one before it; what the progress bar shows of that."""
        every, number = self.recipe.logging.precond_every, self.step + 1
        if self.launched is None:
            self.since = Moment(self.parallel.device)
        measure = every is not None and number % every == 0
        launched = self.stepper(number, self.rows, measure=measure)
        shown = self._settle()
        self.step, self.launched = number, launched
        if launched.done.event is None:  # a CPU has made the step by now
            shown = self._settle()
        if self.saver.done:
            self._finish_save()
        return shown

    def _settle(self) -> str:
        """Account for the step launched last, if that is not done; what the bar shows of it."""
        if self.launched is None:
            return ""
        launched, self.launched = self.launched, None
        outcome = launched.outcome()
        seconds, self.since = launched.done.after(self.since), launched.done
        self.in_a_row = 0 if outcome.finite else self.in_a_row + 1
        self.nonfinite += not outcome.finite
        speed = self.options.seq_len * self.options.batch_rows / seconds
        if self.log is not None:
            if outcome.precond is not None:
                self.log.write("precond", self.step, **outcome.precond)
            if self.step % self.recipe.logging.every == 0 or not outcome.finite:
                self._write(outcome, seconds, speed)
        if self.in_a_row == PATIENCE:
            self._give_up()
        return f"loss {outcome.loss:.3f}, {speed:,.0f} tokens/s"

    def _write(self, outcome: Outcome, seconds: float, speed: float) -> None:
        assert self.log is not None
        self.log.write(
            "train",
            self.step,
            loss=outcome.loss if math.isfinite(outcome.loss) else None,
            grad_norm=outcome.norm if math.isfinite(outcome.norm) else None,
            lr=outcome.lr,
            nonfinite=self.nonfinite,
            seconds=round(seconds, 6),
            tokens_per_s=round(speed, 1),
            peak_memory=peak_memory(self.parallel.device),
            mfu=utilisation(
                speed, self.flops, self.parallel.device, self.options.precision, self.parallel.size
            ),
        )

    def _give_up(self) -> None:
        self._finish_save()
        if not self.parallel.main:
            raise SystemExit(1)
        kept = f"checkpoint step_{self.saved} is" if self.saved else "no checkpoint was"
        raise UserError(
            f"loss or gradient not finite in {PATIENCE} steps in a row, up to step "
            f"{self.step}; {kept} kept; lower train.optimizer.lr or lengthen the warm-up "
            "(train.schedule.warmup_steps) in a new directory"
        )

    def _validate(self, signals: Signals) -> None:
        """Bits per byte of the held-out text; a signal cuts it off."""
        began = time.perf_counter()
        self.heartbeat.beat(self.step, "validating")
        bits = bits_per_byte(
            self.sharded,
            self.validation,
            self.validation_bytes,
            self.parallel,
            at_once=self.options.rows,
            cut_off=lambda: self._asked(signals),
        )
        if bits is None:
            return
        if self.log is not None:
            self.log.write(
                "validation",
                self.step,
                bits_per_byte=bits if math.isfinite(bits) else None,
                seconds=round(time.perf_counter() - began, 6),
            )
        self.tell(f"step {self.step}: {bits:.4f} bits per byte of held-out text")

    def state(self) -> dict[str, Any]:
        """The run's counters."""
        return {
            "step": self.step,
            "nonfinite": self.nonfinite,
            "in_a_row": self.in_a_row,
            "parameters": sum(p.numel() for p in self.sharded.model.parameters()),
        }

    def _save(self) -> None:
        """Begin to save a checkpoint; a disk that refuses it is told of, and the run goes on."""
        self._finish_save()
        self.tried = self.step
        self.heartbeat.beat(self.step, "saving")
        problem = None
        if self.log is not None:
            try:
                self.log.sync()
            except OSError as error:
                problem = error.strerror
        gathered = self.parallel.gather((self.rows.state_dict(), problem))
        if problem := gathered[0][1]:
            self._not_saved(self.step, problem)
            return
        self.saver.start(
            named_state(self.sharded.model, self.optimizer),
            {**self.state(), "read": self.read, "data": [data for data, _ in gathered]},
            self.recipe.resolved(),
        )

    def _finish_save(self) -> None:
        """Wait for the save that is under way, if one is."""
        try:
            self.saved = self.saver.finish() or self.saved
        except OSError as error:
            self._not_saved(self.saver.step, error.strerror or str(error))

    def _not_saved(self, step: int, problem: str) -> None:
        last = f"step_{self.saved} is intact" if self.saved else "there is none yet"
        self.tell(
            f"WARNING: no checkpoint at step {step}: {problem}; training goes on, "
            f"and of the earlier checkpoints {last}; make room"
        )

    def _interrupted(self, signals: Signals) -> None:
        self._finish_save()
        if self.in_a_row:  # a checkpoint of this streak would take the place of a good one
            self.tell(f"step {self.step} was not finite: not saved")
        elif self.saved < self.step:
            self._save()
            self._finish_save()
        if self.step and self.saved == self.step:
            self.tell(f"saved step {self.step}; give the same command again to go on")
        signals.leave()

    def close(self) -> None:
        """Let go of files, and of the other processes."""
        with suppress(OSError, RuntimeError, CheckpointException):
            self.saver.finish()
        self.saver.close()
        self.heartbeat.close()
        self.rows.close()
        if self.log is not None:
            self.log.close()
