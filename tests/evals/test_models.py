"""Models under evaluation: what is measured is the checkpoint, whole, decoded as we say."""

import json
import os
import shutil

import pytest
import torch
from transformers.utils import logging

from osdn.errors import UserError
from osdn.evals.models import load_model

STEERED = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "min_new_tokens": 5,
           "suppress_tokens": list(range(97, 123)), "max_length": 3}  # fmt: skip


@pytest.fixture
def steered(checkpoint, tmp_path):
    """The checkpoint with a generation_config.json that decodes in its own way."""
    shutil.copytree(checkpoint, tmp_path / "steered")
    path = tmp_path / "steered" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | STEERED))
    return tmp_path / "steered"


def greedy(model, ids, count):
    """By argmax of the logits, and nothing else."""
    line = []
    for _ in range(count):
        with torch.no_grad():
            logits = model.model(torch.tensor([ids + line]), use_cache=False).logits
        line.append(logits[0, -1].argmax().item())
        if line[-1] == 256 or "\n" in model.decode(line):
            break
    return model.decode(line).partition("\n")[0]


def test_greedy_is_the_argmax_whatever_the_checkpoint_says(steered):
    model = load_model(str(steered), device="cpu")
    for text in ("Version: 1.2", "hello world, Package: foo", "abc"):
        ids = model.encode(text)
        assert model.continue_line([ids], max_new_tokens=20) == [greedy(model, ids, 20)]
    assert model.model.generation_config.eos_token_id == 256


def test_the_log_level_is_put_back_after_an_error(loaded, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded.model, "generate", fail)
    before = logging.get_verbosity()
    with pytest.raises(RuntimeError, match="out of memory"):
        loaded.continue_line([[1, 2]])
    assert logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("num_hidden_layers", r"weights missing: model\.layers\.3\..* …$"),
        ("intermediate_size", "no model to load"),
        (None, "no model to load"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(checkpoint, tmp_path, field, message):
    """Missing, of another shape, and cut off: never random ones in their place."""
    shutil.copytree(checkpoint, tmp_path / "wrong")
    if field is None:
        os.truncate(tmp_path / "wrong" / "model.safetensors", 1000)
    else:
        path = tmp_path / "wrong" / "config.json"
        config = json.loads(path.read_text())
        mixer = [*config["mixer"], *config["mixer"]]
        more = {"mixer": mixer} if field == "num_hidden_layers" else {}
        path.write_text(json.dumps(config | {field: 2 * config[field]} | more))
    with pytest.raises(UserError, match=message) as error:
        load_model(str(tmp_path / "wrong"), device="cpu")
    assert "\n" not in str(error.value)
