"""The training loop: steps, validations and checkpoints, and how a run ends."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from osdn.data import Batch, collate, load_tokenizer
from osdn.errors import UserError
from osdn.train import checkpoint
from osdn.train.config import Recipe
from osdn.train.logs import RunLog, TrainResult, read_result
from osdn.train.optim import learning_rate, make_optimizer
from osdn.train.setup import export, make_device, make_model, make_rows
from osdn.train.signals import Signals

PATIENCE = 10  # non-finite steps in a row


def train(recipe: Recipe, out: str | Path) -> TrainResult:
    """Train as the recipe says, or go on from the newest checkpoint in the directory `out`.

    out/log.jsonl      a line per logged step and per validation
    out/tensorboard/   the same, as events
    out/checkpoints/   step_N/
    out/model/         at the end: what AutoModelForCausalLM and AutoTokenizer load

    A finished run is not trained again; its result is read from the log.

    Raises:
        UserError: something the user can put right, in one line.
        KeyboardInterrupt, SystemExit(143): Ctrl-C or SIGTERM came; a checkpoint was saved first.
    """
    out = Path(out)
    root, finished = out / "checkpoints", out / "model"
    found = checkpoint.load_newest(root, recipe.resolved(), tell)
    if found is None and finished.exists():
        raise UserError(
            f"{finished} is there without a checkpoint to compare this run with; give the new "
            "run a directory of its own (--out), or move the old one away"
        )
    if found is None or found.state["step"] < recipe.train.steps or not finished.exists():
        run = _Run(recipe, out, found)
        try:
            with Signals() as signals:
                run.complete(signals)
        finally:
            run.close()
        state = run.state()
    else:
        tell(f"{out}: this run is finished; its result is shown again")
        state = found.state
    return read_result(
        out,
        parameters=state["parameters"],
        steps=state["step"],
        nonfinite=state["nonfinite"],
    )


def tell(message: str) -> None:
    """Show a line to the user, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


class _Run:
    """What a run holds while it lasts; `found` is the checkpoint that it goes on from."""

    def __init__(self, recipe: Recipe, out: Path, found: checkpoint.Checkpoint | None) -> None:
        self.recipe, self.out, self.options = recipe, out, recipe.train
        self.device = make_device(self.options.device)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        self.rows, self.validation, self.validation_bytes = make_rows(recipe, self.tokenizer)
        self.model = make_model(recipe, self.tokenizer)
        self.model.to(self.device)  # type: ignore[arg-type]  # a decorator hides its signature
        self.optimizer = make_optimizer(self.model, self.options.optimizer)
        self.step = self.nonfinite = self.in_a_row = 0
        self.saved = 0  # step of the newest checkpoint
        if found is not None:
            self._restore(found)
        if self.options.compile:
            self.model.compile()
        try:  # last, since it cuts the log off behind the checkpoint
            out.mkdir(parents=True, exist_ok=True)
            self.log = RunLog(
                out, step=self.step, tensorboard=recipe.logging.tensorboard, tell=tell
            )
        except OSError as error:
            raise UserError(f"{out}: cannot write there: {error.strerror}") from error

    def complete(self, signals: Signals) -> None:
        """Everything from here to the finished model."""
        options = self.options
        show = self.recipe.logging.progress
        bar = tqdm(
            total=options.steps, initial=self.step, unit="step", disable=None if show else True
        )
        with bar:
            while True:
                due = self.step % options.validate_every == 0 and self.step > 0
                if self.validation and (due or self.step == options.steps):
                    self._validate(signals)
                if signals.received is not None:
                    self._interrupted(signals)
                if self.step == options.steps:
                    break
                bar.set_postfix_str(self._train_step(), refresh=False)
                bar.update()
                last = self.step == options.steps
                if (last or self.step % options.checkpoint_every == 0) and not self.in_a_row:
                    self._save()
        if self.saved < self.step:
            self._save()
        export(self.out, self.model, self.tokenizer)

    def _train_step(self) -> str:
        """One optimiser step, or a skipped one; returns what the progress bar shows."""
        options, began = self.options, time.perf_counter()
        loss, norm = self._gradient()
        self.step += 1
        lr = learning_rate(
            self.step,
            steps=options.steps,
            peak=options.optimizer.lr,
            schedule=options.schedule,
        )
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.nonfinite += not finite

        seconds = time.perf_counter() - began
        speed = options.seq_len * options.rows * options.accumulate / seconds
        if self.step % self.recipe.logging.every == 0 or not finite:
            self.log.write(
                "train",
                self.step,
                loss=loss if math.isfinite(loss) else None,
                grad_norm=norm if math.isfinite(norm) else None,
                lr=lr,
                nonfinite=self.nonfinite,
                seconds=round(seconds, 6),
                tokens_per_s=round(speed, 1),
            )
        if self.in_a_row == PATIENCE:
            kept = f"checkpoint step_{self.saved} is" if self.saved else "no checkpoint was"
            raise UserError(
                f"loss or gradient not finite in {PATIENCE} steps in a row, up to step "
                f"{self.step}; {kept} kept; lower train.optimizer.lr or lengthen the warm-up "
                "(train.schedule.warmup_steps) in a new directory"
            )
        return f"loss {loss:.3f}, {speed:,.0f} tokens/s"

    def _gradient(self) -> tuple[float, float]:
        """Accumulate one step's gradient and clip it: (nats per token, norm before clipping)."""
        options = self.options
        batches = [
            collate([next(self.rows) for _ in range(options.rows)])
            for _ in range(options.accumulate)
        ]
        targets = sum(batch.targets for batch in batches)
        self.model.train()
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = self._loss(batch, targets)
            part.backward()
            loss += part.detach()
        limit = options.optimizer.clip
        norm = clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        return loss.item(), norm.item()

    def _loss(self, batch: Batch, targets: int) -> torch.Tensor:
        """The batch's summed loss over `targets`, so that accumulated parts add up to a mean."""
        device = self.device
        precision = torch.bfloat16 if self.options.precision == "bfloat16" else None
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            return self.model(
                batch.input_ids.to(device),
                labels=batch.labels.to(device),
                cu_seqlens=batch.cu_seqlens.to(device),
                logits_to_keep=1,
                num_items_in_batch=torch.tensor(targets, device=device),
            ).loss

    @torch.no_grad()
    def _validate(self, signals: Signals) -> None:
        """Bits per byte of the held-out text, ends of documents included; a signal cuts it off."""
        began, nats, rows = time.perf_counter(), 0.0, self.options.rows
        self.model.eval()
        for first in range(0, len(self.validation), rows):
            if signals.received is not None:
                return
            nats += self._loss(collate(self.validation[first : first + rows]), 1).item()
        bits = nats / math.log(2) / self.validation_bytes
        seconds = round(time.perf_counter() - began, 6)
        self.log.write(
            "validation",
            self.step,
            bits_per_byte=bits if math.isfinite(bits) else None,
            seconds=seconds,
        )
        tell(f"step {self.step}: {bits:.4f} bits per byte of held-out text")

    def state(self) -> dict[str, Any]:
        """All that decides how the run goes on, the weights apart."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "step": self.step,
            "nonfinite": self.nonfinite,
            "in_a_row": self.in_a_row,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "optimizer": self.optimizer.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "data": self.rows.state_dict(),
        }

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        state = found.state
        load_model(self.model, str(found.directory / checkpoint.WEIGHTS))
        self.optimizer.load_state_dict(state["optimizer"])
        self.rows.load_state_dict(state["data"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        self.step = self.saved = state["step"]
        self.nonfinite, self.in_a_row = state["nonfinite"], state["in_a_row"]
        tell(f"going on from {found.directory}")

    def _save(self) -> bool:
        """Save a checkpoint; a disk that refuses it is told of, and the run goes on."""
        try:
            self.log.sync()
            checkpoint.save(
                self.out / "checkpoints",
                self.step,
                self.model,
                self.state(),
                self.recipe.resolved(),
                keep=self.options.keep_checkpoints,
            )
        except OSError as error:
            last = f"step_{self.saved} is intact" if self.saved else "there is none yet"
            tell(
                f"WARNING: no checkpoint at step {self.step}: {error.strerror}; training goes on, "
                f"and of the earlier checkpoints {last}; make room"
            )
            return False
        self.saved = self.step
        return True

    def _interrupted(self, signals: Signals) -> None:
        if self.step and (self.saved == self.step or self._save()):
            tell(f"saved step {self.step}; give the same command again to go on")
        signals.leave()

    def close(self) -> None:
        """Let go of files."""
        self.rows.close()
        self.log.close()
