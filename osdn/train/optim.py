"""The optimizer and its schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from osdn.train.muon import Muon, MuonWithAdamW, block_matrices
from osdn.train.recipe import Optimizer, Schedule

TrainOptimizer = torch.optim.AdamW | MuonWithAdamW


def make_optimizer(model: nn.Module, options: Optimizer) -> TrainOptimizer:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

    Decay falls on the matrices of linear and convolution layers, the output's included: none on
    what has fewer than two dimensions (norms, biases), on embeddings (an output layer tied to one
    is one), and on initial_precond, whose neutral value is 1 and not 0. Sharded parameters and
    whole ones are in groups of their own, since no kernel takes both at once.
    """
    # By identity: a tied output layer has the embedding's weight under a name of its own.
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = block_matrices(model) if options.name == "muon" else set()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter in matrices:
            continue
        exempt = parameter.ndim < 2 or id(parameter) in embeddings
        # Decay would pull d_1 to 0, which mutes a head's first writes.
        exempt = exempt or name.endswith("initial_precond")
        (others if exempt else decayed).append(parameter)
    # Four groups at most: with decay and without, each sharded and whole.
    groups: list[dict[str, Any]] = []
    for parameters, decay in ((decayed, options.weight_decay), (others, 0.0)):
        # Empty groups are left out: the optimizer's state has no entries for them.
        for sharded in (False, True):
            kind = [p for p in parameters if isinstance(p, DTensor) is sharded]
            if kind:
                groups.append({"params": kind, "weight_decay": decay})
    betas = (options.beta1, options.beta2)
    # fused: one launch for all parameters, and it can leave out a step (found_inf).
    adamw = torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True)
    if not matrices:
        return adamw
    muon = Muon(
        [parameter for parameter in model.parameters() if parameter in matrices],
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonWithAdamW(muon, adamw)


def _parts(optimizer: TrainOptimizer) -> tuple[torch.optim.Optimizer, ...]:
    return optimizer.parts if isinstance(optimizer, MuonWithAdamW) else (optimizer,)


def fill_state(optimizer: TrainOptimizer, updates: int) -> None:
    """Give every parameter its moments, 0, as after `updates` updates; a load fills them."""
    for part in _parts(optimizer):
        for group in part.param_groups:
            for parameter in group["params"]:
                if isinstance(part, Muon):
                    part.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
                    continue
                part.state[parameter] = {
                    # float32, as fused AdamW keeps it
                    "step": torch.full((), float(updates), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def named_state(model: nn.Module, optimizer: TrainOptimizer) -> dict[str, Tensor]:
    """Parameters and moments under flat names, sharing their memory."""
    state = {p: moments for part in _parts(optimizer) for p, moments in part.state.items()}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        # The memory itself, not a copy: loading a checkpoint writes into it.
        tensors[f"model.{name}"] = parameter.detach()
        for moment, value in state[parameter].items():
            if moment != "step":
                tensors[f"{moment}.{name}"] = value
    return tensors


def learning_rate(step: int, *, steps: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of step 1..steps.

    lr = peak · step / w                                              step ≤ w = warmup_steps
    lr = peak · (m + (1 − m)(1 + cos(π (step − w)/(steps − w)))/2)    m = min_ratio
    """
    # From 1: step 0 would have the rate 0, and do nothing.
    warmup, low = schedule.warmup_steps, schedule.min_ratio
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
