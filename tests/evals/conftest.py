"""Checkpoints that the evaluations are tried on: ours with every kind of mixer, and a Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.data import byte_tokenizer


def spread(model):
    """Larger random weights, so that outputs differ from prompt to prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A directory with a model of osdn, delta_net and attention layers and the byte tokenizer."""
    torch.manual_seed(0)
    config = OSDNConfig(
        vocab_size=258,
        hidden_size=32,
        num_heads=2,
        num_hidden_layers=3,
        intermediate_size=48,
        mixer=["osdn", "delta_net", "attention"],
        forgetting="data",
        beta_aware=True,
        precond_min=0.0,
        precond_max=2.0,
        max_position_embeddings=64,
        eos_token_id=256,
        bos_token_id=256,
        pad_token_id=257,
    )
    path = tmp_path_factory.mktemp("osdn")
    spread(OSDNForCausalLM(config)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A Hugging Face baseline with a limit of 96 positions and the byte tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        eos_token_id=256,
        bos_token_id=256,
        pad_token_id=257,
    )
    path = tmp_path_factory.mktemp("llama")
    spread(LlamaForCausalLM(config)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The checkpoint as evaluations see it."""
    from osdn.evals.models import load_model

    return load_model(str(checkpoint), device="cpu")
