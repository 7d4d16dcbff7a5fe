"""The example that fine-tunes with transformers' Trainer, on a checkpoint of FLA's own classes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from osdn.data import byte_tokenizer
from osdn.layers import OSDN

TEXT = "the delta rule writes what memory does not know yet. "


def load(path: Path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_trainer_finetunes_a_converted_checkpoint(tmp_path, monkeypatch):
    models = pytest.importorskip("fla.models", reason="needs flash-linear-attention")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 258}
    models.DeltaNetForCausalLM(models.DeltaNetConfig(**sizes)).save_pretrained(tmp_path / "fla")
    byte_tokenizer().save_pretrained(tmp_path / "fla")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT[i % 20 :]}) + "\n" for i in range(64)))

    example = load(Path("examples/finetune_trainer.py"))
    trainer = example.finetune(tmp_path / "fla", texts, tmp_path / "out", steps=30, lr=1e-2)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 30 and losses[-1] < losses[0] - 2

    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name).eval()
        for name in ("converted", "finetuned")
    )
    mixers = [module for module in after.modules() if isinstance(module, OSDN)]
    assert len(mixers) == 2 and all(mixer.adaptive for mixer in mixers)
    assert any((mixer.initial_precond != 1).any() for mixer in mixers)  # d_1 is trained too
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "finetuned")
    ids = torch.tensor([[256, *TEXT.encode(), 256]])
    assert tokenizer.decode(ids[0, 1:-1]) == TEXT
    with torch.no_grad():
        nats = [model(ids, labels=ids).loss.item() for model in (before, after)]
    assert nats[1] < nats[0] - 2
