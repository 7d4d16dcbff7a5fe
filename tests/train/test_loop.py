"""The run as a whole: it learns, it repeats, it resumes bit for bit, it ends in a usable model."""

import itertools
import json
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

from osdn.data import encode_document, held_out_texts, open_corpus
from osdn.data.tokenizers import byte_tokenizer
from osdn.errors import UserError
from osdn.train import Recipe, loop, train
from osdn.train.distributed.sharding import Sharded
from osdn.train.log.speed import Moment
from osdn.train.step import Stepper
from tests.train.tiny import curve, fields, recipe, write_texts


def test_it_learns_and_says_how_it_went(finished):
    losses = [loss for _, loss in finished.loss]
    assert [step for step, _ in finished.loss] == list(range(1, 13))
    assert losses[0] == pytest.approx(math.log(258), abs=0.3) and losses[-1] < losses[0] - 1.5
    assert [step for step, _ in finished.validation] == [4, 8, 12]
    assert finished.bits_per_byte == finished.validation[-1][1] < finished.validation[0][1]
    assert finished.nonfinite == 0 and finished.tokens_per_s > 0
    kept = sorted(p.name for p in (finished.out / "checkpoints").iterdir())
    assert kept == ["step_10", "step_12"]


def test_the_finished_model_loads_and_has_the_bits_per_byte_of_the_log(finished, texts):
    model = AutoModelForCausalLM.from_pretrained(finished.out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.out / "model")
    assert sum(p.numel() for p in model.parameters()) == finished.parameters
    modes = {path.stat().st_mode for path in (finished.out / "model").iterdir()}
    assert len(modes) == 1  # whoever may read one file may load the model
    assert model.config.max_position_embeddings == 48 and model.config.eos_token_id == 256
    nats, size, used = 0.0, 0, 0
    for text in held_out_texts(open_corpus(texts), fraction=0.2, limit=600):
        tokens = encode_document(tokenizer, text)
        size += len(text.encode())
        at = 0
        while at < len(tokens):  # every part alone, cut where a row of 48 tokens is full
            piece = torch.tensor([tokens[at : at + 48 - used % 48]])
            logits = model(piece).logits[0, :-1].log_softmax(-1)
            nats -= logits.gather(1, piece[0, 1:, None]).sum().item()
            used += piece.shape[1]
            at += piece.shape[1]
            at -= at < len(tokens)  # the next part begins with this one's last token
    assert size == 600
    assert nats / math.log(2) / size == pytest.approx(finished.bits_per_byte, rel=1e-4)


def test_the_finished_model_has_a_card_and_a_users_card_outlives_a_second_export(
    finished, texts, tmp_path
):
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True)
    card = tmp_path / "model" / "README.md"
    assert f"12 steps, {12 * 48 * 4:,} tokens" in card.read_text()
    assert f"{finished.bits_per_byte:.4f} bits per byte of 600 bytes" in card.read_text()
    for own in (None, "# Mine\n"):
        if own:
            card.write_text(own)
        shutil.rmtree(tmp_path / "checkpoints" / "step_12")  # the last two steps come again
        train(recipe(texts), tmp_path)
        assert card.read_text() == own or (own is None and "12 steps" in card.read_text())


def test_the_same_recipe_gives_the_same_curve_and_another_seed_another(finished, texts, tmp_path):
    assert curve(train(recipe(texts), tmp_path / "same").out) == curve(finished.out)
    other = train(recipe(texts, seed=1), tmp_path / "other")
    assert other.loss != finished.loss


def test_accumulated_passes_make_the_same_step_as_one(finished, texts, tmp_path):
    together = train(recipe(texts, rows=4), tmp_path)
    for (_, a), (_, b) in zip(finished.loss, together.loss):
        assert a == pytest.approx(b, rel=2e-4)


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


@pytest.mark.parametrize(
    ("where", "call"),
    # A run has 6 checkpoints of 7 synced files each, and 7 renames, of which the model's is last.
    [
        *(("os.fsync", call) for call in range(1, 40, 5)),
        *(("os.rename", call) for call in (1, 4, 7)),
    ],
)
def test_a_stop_at_any_system_call_of_a_save_loses_nothing(
    where, call, finished, texts, tmp_path, monkeypatch
):
    import os

    name = where.removeprefix("os.")
    original, calls = getattr(os, name), []

    def stop(*args):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args)

    monkeypatch.setattr(os, name, stop)
    with pytest.raises(Killed):
        train(recipe(texts), tmp_path)
    monkeypatch.undo()
    train(recipe(texts), tmp_path)
    assert curve(tmp_path) == curve(finished.out)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        finished.out / "model" / "model.safetensors"
    ).read_bytes()
    assert not list(tmp_path.rglob(".writing-*"))


def test_a_finished_run_is_read_and_not_repeated(finished, texts, monkeypatch):
    monkeypatch.setattr(loop, "Trainer", None)
    assert train(recipe(texts), finished.out) == finished


def test_other_settings_are_refused_by_name_and_harmless_ones_are_not(finished, texts):
    for changes, expected in (
        ({"batch_rows": 8}, r"train\.batch_rows: .*step_12 was made with 4, and .* asks for 8"),
        ({"steps": 20}, r"train\.steps: "),
        ({"optimizer": {"lr": 1e-3}}, r"train\.optimizer\.lr: "),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            train(recipe(texts, **changes), finished.out)
        assert "\n" not in str(caught.value)
    free = recipe(texts, checkpoint_every=5, keep_checkpoints=9, validate_every=3, rows=1)
    assert train(free, finished.out) == finished


@pytest.mark.parametrize("what", ["data.tokenizer", "data.validation"])
def test_what_changed_behind_its_name_is_refused(what, texts, tmp_path):
    tokenizer, held_out = tmp_path / "tokenizer", tmp_path / "held_out"
    byte_tokenizer().save_pretrained(tokenizer)
    write_texts(held_out, documents=5)
    plain = fields(texts, steps=4)
    plain["data"] |= {"tokenizer": str(tokenizer), "validation": str(held_out)}
    asked, out = Recipe.model_validate(plain), tmp_path / "run"
    train(asked, out)
    shutil.rmtree(out / "model")  # so that it is taken up again
    train(asked, out)
    shutil.rmtree(out / "model")
    if what == "data.validation":
        (held_out / "more.txt").write_text("what the delta rule does not know")
    else:
        changed = byte_tokenizer()
        changed.add_tokens(["delta"])
        changed.save_pretrained(tokenizer)
    with pytest.raises(UserError, match=rf"^{what}: .* the checkpoint was saved; restore"):
        train(asked, out)


def diverge(monkeypatch, steps):
    """Make the loss of the given optimiser steps NaN (each has two forward passes)."""
    original, passes = Sharded.__call__, [0]

    def lossy(self, *inputs):
        loss = original(self, *inputs)
        passes[0] += 1
        return loss * math.nan if (passes[0] + 1) // 2 in steps else loss

    monkeypatch.setattr(Sharded, "__call__", lossy)


def test_a_step_that_is_not_finite_is_skipped_and_counted(texts, finished, tmp_path, monkeypatch):
    diverge(monkeypatch, {5, 9})
    result = train(recipe(texts), tmp_path)
    assert result.nonfinite == 2 and result.steps == 12
    assert [step for step, loss in result.loss if loss is None] == [5, 9]
    assert result.loss[:4] == finished.loss[:4]
    assert all(math.isfinite(loss) for _, loss in result.loss if loss is not None)


def test_ten_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(texts, tmp_path, monkeypatch):
    diverge(monkeypatch, range(5, 100))
    with pytest.raises(UserError, match=r"10 steps in a row, up to step 14; .*step_4 is kept"):
        train(recipe(texts, steps=30), tmp_path)
    newest = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert newest == ["step_2", "step_4"]
    monkeypatch.undo()
    assert train(recipe(texts, steps=30), tmp_path).nonfinite == 0  # it was sound


def test_a_stop_within_a_streak_saves_nothing(texts, tmp_path, monkeypatch, capsys):
    diverge(monkeypatch, range(5, 100))
    original = Stepper.__call__

    def stopped(self, step, *args, **options):
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        return original(self, step, *args, **options)

    monkeypatch.setattr(Stepper, "__call__", stopped)
    with pytest.raises(SystemExit):
        train(recipe(texts, steps=30), tmp_path)
    assert "step 7 was not finite: not saved" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_4"]


@pytest.fixture
def read_late(monkeypatch):
    """Steps are read when the next one is launched, as a GPU's are."""
    original = Moment.__init__

    def unfinished(self, device):
        original(self, device)
        self.event = SimpleNamespace(
            time=self.time,
            synchronize=lambda: None,
            elapsed_time=lambda later: 1000 * (later.time - self.time),
        )

    monkeypatch.setattr(Moment, "__init__", unfinished)


def test_steps_that_are_read_late_change_nothing(texts, finished, tmp_path, monkeypatch, read_late):
    # A clock that ticks once a look: a step whose time was taken too late would have no tick.
    ticks = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("osdn.train.log.speed.time", ticks)
    assert curve(train(recipe(texts), tmp_path / "same").out) == curve(finished.out)
    lines = map(json.loads, (tmp_path / "same" / "log.jsonl").read_text().splitlines())
    times = [line["seconds"] for line in lines if line["kind"] == "train"]
    # The steps before a checkpoint are read right after the ones before them.
    assert min(times) >= 1
    diverge(monkeypatch, range(5, 100))
    with pytest.raises(UserError, match=r"10 steps in a row, up to step 14; .*step_4 is kept"):
        train(recipe(texts, steps=30), tmp_path / "late")
    kept = sorted(p.name for p in (tmp_path / "late" / "checkpoints").iterdir())
    assert kept == ["step_2", "step_4"]


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"device": "auto"}])
def test_autocast_learns_too(options, texts, tmp_path):
    result = train(recipe(texts, **options), tmp_path)
    assert result.loss[-1][1] < result.loss[0][1] - 1.5


def test_a_compiled_model_has_the_same_losses(texts, finished, tmp_path, monkeypatch):
    compiled, original = [], torch.compile

    def traced(function):  # torch.compile's tracing, without the slow part
        compiled.append(function)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    result = train(recipe(texts, compile=True, steps=3, schedule={"warmup_steps": 3}), tmp_path)
    assert len(compiled) == 2  # blocks
    # Training, whatever the number of documents; validation, and its last, shorter rows.
    assert counters["stats"]["unique_graphs"] == 3
    for (_, a), (_, b) in zip(result.loss, finished.loss):
        assert a == pytest.approx(b, rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 32


def test_log_and_tensorboard_agree(texts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base = recipe(texts, steps=4)
    both = base.model_copy(
        update={"logging": base.logging.model_copy(update={"tensorboard": True, "every": 2})}
    )
    result = train(both, tmp_path)
    assert [step for step, _ in result.loss] == [2, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    drawn = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert drawn == [(s, pytest.approx(loss)) for s, loss in result.loss]
    assert events.Scalars("validation/bits_per_byte")[-1].value == pytest.approx(
        result.bits_per_byte
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "nonfinite"} <= set(lines[0])


def test_too_small_an_embedding_and_an_unknown_device(texts, tmp_path):
    small = recipe(texts)
    small = small.model_copy(update={"model": {**small.model, "vocab_size": 200}})
    with pytest.raises(UserError, match=r"model\.vocab_size: 200 is too small for the 258 tokens"):
        train(small, tmp_path / "a")
    padded = recipe(texts)
    padded = padded.model_copy(update={"model": {**padded.model, "pad_token_id": 9999}})
    with pytest.raises(
        UserError, match=r"model: pad_token_id: expected None, or an integer from 0"
    ):
        train(padded, tmp_path / "a")
    for device in ("gpu", "mps", "meta", "cuda:99"):
        with pytest.raises(UserError, match=r"train\.device: "):
            train(recipe(texts, device=device), tmp_path / "b")
    assert not list(tmp_path.iterdir())  # nothing was begun
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write there: Not a directory"):
        train(recipe(texts), tmp_path / "file" / "run")
