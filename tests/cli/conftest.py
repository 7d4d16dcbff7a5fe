"""A tiny model for the commands."""

import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.data import byte_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random model with the byte tokenizer beside it."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2}
    OSDNForCausalLM(OSDNConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
