"""Tiny models and token ids for the tests of the language model."""

import torch
from torch.nn.functional import cross_entropy

from osdn import OSDNConfig, OSDNForCausalLM

SIZES = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 61}
MIXERS = [
    "osdn",
    "delta_net",
    "gated_delta_net",
    "attention",
    ["osdn", "attention"],
    ["attention", "delta_net"],
]


def build(mixer="osdn", **fields):
    torch.manual_seed(0)
    model = OSDNForCausalLM(OSDNConfig(**SIZES | {"mixer": mixer} | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "precond" not in name:
                parameter.normal_(std=0.3)
    return model


def tokens(B=2, T=21, seed=1):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def plain_loss(logits, ids):
    """The mean next-token loss of logits [B, T, vocabulary], in float64."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
