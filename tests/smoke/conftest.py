"""A tiny model with a tokenizer of bytes, as a checkpoint that any tool may load."""

import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.data import byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
)


@pytest.fixture
def checkpoint(tmp_path):
    """The directory of a model of both mixers whose predictions are not close to equal."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)
    config = OSDNConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_heads=2, num_hidden_layers=2,
        mixer=["osdn", "attention"], eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = OSDNForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "precond" not in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
