"""The optimiser and its schedule."""

import math

import torch
from torch import nn

from osdn.train.config import Optimizer, Schedule


def make_optimizer(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    """AdamW with decay on the matrices of linear and convolution layers, the output's included.

    None on what has fewer than two dimensions (norms, biases), on embeddings (an output layer
    tied to one is one), and on initial_precond, whose neutral value is 1 and not 0.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or id(parameter) in embeddings
        exempt = exempt or name.endswith("initial_precond")
        (others if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True)


def learning_rate(step: int, *, steps: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of step 1..steps.

    lr = peak · step / w                                              step ≤ w = warmup_steps
    lr = peak · (m + (1 − m)(1 + cos(π (step − w)/(steps − w)))/2)    m = min_ratio
    """
    warmup, low = schedule.warmup_steps, schedule.min_ratio
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
