"""What a process holds of a run, and how it goes through it."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from osdn.data import load_tokenizer
from osdn.errors import UserError
from osdn.model.card import Training
from osdn.model.configuration import OSDNConfig
from osdn.model.flops import flops_per_token
from osdn.system.locks import DirectoryLock
from osdn.system.signals import Signals
from osdn.train.checkpoint import reading as checkpoint
from osdn.train.checkpoint.keeper import Keeper
from osdn.train.distributed.parallel import Parallel
from osdn.train.distributed.stall import Heartbeat
from osdn.train.log.progress import Progress
from osdn.train.log.run_log import RunLog, tell
from osdn.train.log.speed import Moment, peak_memory, utilisation
from osdn.train.log.trackers import open_trackers
from osdn.train.optim import fill_state, make_optimizer, named_state
from osdn.train.recipe import Recipe
from osdn.train.setup import check_read, export, make_config, make_rows, make_sharded, passes
from osdn.train.step import LaunchedStep, StepOutcome, Stepper
from osdn.train.validate import bits_per_byte

# Weights stay as they are, so the rows of ten steps say that it is not the data.
PATIENCE = 10  # non-finite steps in a row


def _silent(message: str) -> None:
    """What `tell` is in the processes but one."""


class Trainer:
    """One process's part of a run.

    Args:
        found: the checkpoint to resume from.
        lock: of the run's directory, held by the process that writes the log.

    Raises:
        UserError: something the user can put right.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        found: checkpoint.Checkpoint | None,
        parallel: Parallel,
        lock: DirectoryLock,
    ) -> None:
        self.recipe, self.out, self.options = recipe, out, recipe.train
        self.parallel = parallel
        self.tell: Callable[[str], None] = tell if parallel.main else _silent
        self.step = self.nonfinite = self.in_a_row = 0
        self.bits: float | None = None  # per byte of the held-out text, of the last validation
        self.log: RunLog | None = None
        self.launched: LaunchedStep | None = None  # step number `step`, not accounted for yet
        self.since = Moment(parallel.device)  # when the time of that step began
        # Every process makes its data, and all stop if one cannot: later they wait for each other.
        config = parallel.together(lambda: self._make_data(found))
        self._make_model(config, found)
        # Last of what can fail, since it cuts the log off after the checkpoint.
        parallel.from_main(lambda: self._open_log(found))
        stall = recipe.parallel.stall_seconds
        self.heartbeat = Heartbeat(parallel, seconds=stall, tell=tell)
        self.stepper = Stepper(
            self.sharded,
            self.optimizer,
            parallel,
            self.options,
            passes=self.passes,
            beat=self.heartbeat.beat,
        )
        self.checkpoints = Keeper(
            out / "checkpoints",
            parallel,
            keep=self.options.keep_checkpoints,
            saved=self.step,
            lock=lock,
            tell=self.tell,
        )

    def _make_data(self, found: checkpoint.Checkpoint | None) -> OSDNConfig:
        """What a user's mistake can stop, before the processes depend on each other."""
        recipe, rank, size = self.recipe, self.parallel.rank, self.parallel.size
        # Cheapest first: numbers, then the tokenizer, then the text.
        self.passes = passes(recipe, size)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        self.data = make_rows(recipe, self.tokenizer, rank=rank, world=size)
        self.rows, self.read = self.data.rows, self.data.read
        if found is not None:
            # Before the position is taken over: in another text it means another place.
            check_read(found.state.read, self.read)
            self.rows.load_state_dict(found.state.data)
        return make_config(recipe, self.tokenizer)

    def _make_model(self, config: OSDNConfig, found: checkpoint.Checkpoint | None) -> None:
        """Model and optimizer, with their initial values or the checkpoint's."""
        # Not within `together`: FSDP2's own collectives begin here.
        self.sharded = make_sharded(self.recipe, config, self.parallel)
        self.flops = flops_per_token(config, self.options.seq_len)
        self.optimizer = make_optimizer(self.sharded.model, self.options.optimizer)
        # The moments must exist before a checkpoint can be loaded into them.
        fill_state(self.optimizer, 0)
        if found is None:
            return
        state = found.state
        self.step = state.step
        self.nonfinite, self.in_a_row = state.nonfinite, state.in_a_row
        fill_state(self.optimizer, self.step - self.nonfinite)  # skipped steps were no updates
        tensors = named_state(self.sharded.model, self.optimizer)
        checkpoint.load_tensors(found.directory, tensors, self.parallel)
        self.tell(f"resuming from {found.directory}")

    def _open_log(self, found: checkpoint.Checkpoint | None) -> None:
        """In the process that writes it."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            # TensorBoard must know the step, to hide what comes after it.
            trackers = open_trackers(self.recipe, self.out, self.step, tell)
            logged = found.state.logged if found is not None else 0
            self.log = RunLog(self.out, step=self.step, logged=logged, trackers=trackers, tell=tell)
        except OSError as error:
            raise UserError(f"{self.out}: cannot write there: {error.strerror}") from error

    def complete(self, signals: Signals) -> None:
        """Everything from here to the finished model."""
        options = self.options
        # For the first line, so that a wrong size is seen before an hour has passed.
        parameters = self.state()["parameters"]
        progress = Progress(
            total=options.steps,
            done=self.step,
            show=self.recipe.logging.progress and self.parallel.main,
            about=f"{self.out}: {parameters:,} parameters on {self.parallel.device}",
        )
        with progress:
            while True:
                # A validation comes before the step after it, so that a resumed run makes it again.
                due = self.step % options.validate_every == 0 and self.step > 0
                if self.data.validation and (due or self.step >= options.steps):
                    self._settle()
                    self._validate(signals)
                # Signals are acted on here only: between steps, by all processes together.
                if self._asked(signals):
                    self._settle()
                    self._interrupted(signals)
                if self.step >= options.steps:
                    break
                progress.advance(self.train_step())
                if self.step >= options.steps or self.step % options.checkpoint_every == 0:
                    self._settle()
                    # A checkpoint within a streak of bad steps would take a good one's place.
                    if not self.in_a_row:
                        self.save()
        # A last step that was not finite is not saved above. The run is over, so it is now.
        if self.checkpoints.tried < self.step:
            self.save()
        self.checkpoints.finish_last()
        export(self.out, self.sharded, self.tokenizer, self._training())

    def _training(self) -> Training:
        """What the model card tells."""
        return Training(
            recipe=self.recipe.resolved(),
            steps=self.step,
            tokens=self.step * self.options.seq_len * self.options.batch_rows,
            corpus=self.data.corpus,
            bits_per_byte=self.bits,
            held_out_bytes=self.data.validation_bytes,
        )

    def _asked(self, signals: Signals) -> bool:
        """Whether a signal came to any process; all processes must ask together."""
        # The largest wins: SIGTERM (15) over SIGINT (2).
        received = self.parallel.largest(signals.received or 0)
        if received:  # else one that came meanwhile would be forgotten
            signals.received = received
        return received > 0

    def train_step(self) -> str:
        """Launch a step and account for the one before it; what the progress bar shows of that."""
        every, number = self.recipe.logging.precond_every, self.step + 1
        # The first step, or the one after a validation: its time starts now.
        if self.launched is None:
            self.since = Moment(self.parallel.device)
        measure = every is not None and number % every == 0
        launched = self.stepper(number, self.rows, measure=measure)
        # The step before is read only now, so that a GPU never waits for the host.
        shown = self._settle()
        self.step, self.launched = number, launched
        if launched.done.event is None:  # a CPU has made the step by now
            shown = self._settle()
        # A save that has ended is reported at once, not at the next one.
        if self.checkpoints.done:
            self.checkpoints.finish()
        return shown

    def _settle(self) -> str:
        """Account for the step launched last, if that is not done; what the bar shows of it."""
        if self.launched is None:
            return ""
        # Taken first: what follows may raise, and must not account twice.
        launched, self.launched = self.launched, None
        outcome = launched.outcome()
        # From the end of one step to the end of the next, on the device's own clock.
        seconds, self.since = launched.done.after(self.since), launched.done
        self.in_a_row = 0 if outcome.finite else self.in_a_row + 1
        self.nonfinite += not outcome.finite
        speed = self.options.seq_len * self.options.batch_rows / seconds
        if self.log is not None:
            if outcome.precond is not None:
                self.log.write("precond", self.step, **outcome.precond)
            # A skipped step is logged whatever logging.every is.
            if self.step % self.recipe.logging.every == 0 or not outcome.finite:
                self._write(outcome, seconds, speed)
        if self.in_a_row == PATIENCE:
            self._give_up()
        return f"loss {outcome.loss:.3f}, {speed:,.0f} tokens/s"

    def _write(self, outcome: StepOutcome, seconds: float, speed: float) -> None:
        """The log's line about one step."""
        assert self.log is not None
        self.log.write(
            "train",
            self.step,
            loss=outcome.loss if math.isfinite(outcome.loss) else None,  # JSON has no NaN
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
        """After PATIENCE steps that were not finite: weights no longer change, nor would they."""
        # A save under way is of a good step, and the message below names it.
        self.checkpoints.finish()
        if not self.parallel.main:
            raise SystemExit(1)
        saved = self.checkpoints.saved
        kept = f"checkpoint step_{saved} is" if saved else "no checkpoint was"
        raise UserError(
            f"loss or gradient not finite in {PATIENCE} steps in a row, up to step "
            f"{self.step}; {kept} kept; lower train.optimizer.lr or lengthen the warm-up "
            "(train.schedule.warmup_steps) in a new directory"
        )

    def _validate(self, signals: Signals) -> None:
        """Bits per byte of the held-out text; a signal cuts it off."""
        began = time.perf_counter()
        # A stage of its own: it may take longer than a step.
        self.heartbeat.beat(self.step, "validating")
        bits = bits_per_byte(
            self.sharded,
            self.data.validation,
            self.data.validation_bytes,
            self.parallel,
            at_once=self.options.rows,
            cut_off=lambda: self._asked(signals),
        )
        if bits is None:
            return
        self.bits = bits
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

    def save(self) -> None:
        """Begin to save a checkpoint of this step."""
        self.heartbeat.beat(self.step, "saving")
        self.checkpoints.start(
            named_state(self.sharded.model, self.optimizer),
            {**self.state(), "read": self.read},
            self.rows.state_dict(),
            self.recipe.resolved(),
            self.log,
        )

    def _interrupted(self, signals: Signals) -> None:
        """Save what was trained, and end as the signal asks."""
        # A save that is under way may be of this very step.
        self.checkpoints.finish()
        # Weights are those of the last good step, but the rows have moved on.
        if self.in_a_row:
            self.tell(f"step {self.step} was not finite: not saved")
        elif self.checkpoints.saved < self.step:
            self.save()
            self.checkpoints.finish()
        if self.step and self.checkpoints.saved == self.step:
            self.tell(f"saved step {self.step}; give the same command again to resume")
        signals.leave()

    def close(self) -> None:
        """Let go of files, and of the other processes."""
        # The writer first: it uses the process group, the lock and the log's step.
        self.checkpoints.close()
        self.heartbeat.close()
        self.rows.close()
        if self.log is not None:
            self.log.close()
