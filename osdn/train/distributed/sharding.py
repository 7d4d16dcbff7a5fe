"""An objective over several processes: DDP, FSDP2 or HSDP, by the mesh; and what depends on it.

    shard = 1           every process holds everything; DDP averages the gradients
    shard = processes   FSDP2: each block is gathered when it is needed, and its gradient scattered
    between             HSDP: FSDP2 within each group of `shard`, averaged over the groups

Small parameters that must not be rounded to bfloat16 in compute (KEPT) are not sharded: FSDP2 casts
a group's parameters alike. Each process holds them whole, and their gradients are averaged here.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from osdn.layers.osdn import OSDN
from osdn.model.modeling import OSDNForCausalLM
from osdn.train.distributed.parallel import Parallel
from osdn.train.initial import Initializer
from osdn.train.objective import Objective


def kept_whole(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are float32 in compute: d_1, the gate's bias near 6.9, A_log and dt_bias.

    In bfloat16 d_1 near 1 moves in steps of 1/128, more than a step of the optimizer changes it,
    and log γ = logsigmoid(6.9) has a relative error of 1.6%, which 4,096 tokens make 7% of γ^4096.
    Of A_log and dt_bias the same holds: they are exponents of the decay of a whole row.
    """
    mixers = [module for module in model.modules() if isinstance(module, OSDN)]
    found: list[nn.Parameter | None] = []
    for mixer in mixers:
        found += [mixer.initial_precond, mixer.A_log, mixer.dt_bias]
        found.append(None if mixer.gamma_proj is None else mixer.gamma_proj.bias)
    return [parameter for parameter in found if parameter is not None]


class Sharded:
    """The objective with its parallel form.

    Args:
        objective: its model on the meta device; it leaves with the values of `initializer`.
        parallel: the processes.
        bfloat16: compute in it, where the form has an own way to (else autocast does).
    """

    def __init__(
        self, objective: Objective, initializer: Initializer, parallel: Parallel, *, bfloat16: bool
    ) -> None:
        self.objective, self.parallel = objective, parallel
        self.model: OSDNForCausalLM = objective.model
        self.ddp: DistributedDataParallel | None = None
        self.kept: list[nn.Parameter] = []
        if parallel.shard > 1:
            self._shard(initializer, bfloat16)
            return
        # Equal in every process, since values depend on names and the seed alone.
        initializer.fill(objective)
        if parallel.size > 1:
            # as_bucket_view: gradients live in the buckets, not beside them
            self.ddp = DistributedDataParallel(objective, gradient_as_bucket_view=True)

    def _shard(self, initializer: Initializer, bfloat16: bool) -> None:
        mesh = self.parallel.mesh
        assert mesh is not None
        # Gradients are summed in float32: in bfloat16 many processes lose the small ones.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32
        )
        # A mesh of one dimension shards; one of two also replicates.
        whole = self.parallel.shard == self.parallel.size
        options: dict[str, Any] = {"mesh": mesh["shard"] if whole else mesh, "mp_policy": policy}
        # Values first, then shares of them: no process ever holds more than one block whole.
        for block in (*self.model.model.layers, self.objective):
            initializer.fill(block)
            kept = kept_whole(block)
            fully_shard(block, **options, ignored_params=set(kept))
        self.kept = kept_whole(self.model)

    def __call__(self, *inputs: Any) -> Tensor:
        return (self.ddp or self.objective)(*inputs)

    def evaluate(self, *inputs: Any) -> Tensor:
        """The objective without a backward; afterwards the parameters are the shares again."""
        loss = self.objective(*inputs)
        if self.parallel.shard > 1:
            self.objective.reshard()  # type: ignore[operator]  # FSDP2 leaves the root gathered
        return loss

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around one micro-batch's forward and backward; gradients are exchanged in the last."""
        if self.ddp is not None and not last:
            # The sums of several passes are exchanged once.
            return self.ddp.no_sync()
        if self.parallel.shard > 1:
            self.objective.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def clip(self, limit: float) -> Tensor:
        """Scale the whole gradient down to the norm `limit`; returns the norm before, a scalar."""
        self._average_kept()  # before the norm, which counts them once
        parts = self.parameters_by_kind()
        # FSDP2's norms are partial sums until full_tensor; whole parameters have theirs already.
        norms = [get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
        whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in norms]
        norm = whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))
        for part in parts:
            # By the norm of all, not of each part: the direction must stay.
            clip_grads_with_norm_(part, limit, norm)
        return norm

    def parameters_by_kind(self) -> list[list[nn.Parameter]]:
        """Sharded and whole parameters apart, for functions that cannot take both at once."""
        kinds: dict[bool, list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
        return list(kinds.values())

    def _average_kept(self) -> None:
        gradients = [p.grad for p in self.kept if p.grad is not None]
        if gradients:
            # One exchange for all: they are a few thousand numbers.
            flat = torch.cat([x.flatten() for x in gradients])
            dist.all_reduce(flat)
            flat /= self.parallel.size
            for gradient, part in zip(gradients, flat.split([x.numel() for x in gradients])):
                gradient.copy_(part.view_as(gradient))

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and full value on the CPU of every parameter, one after another, in rank 0.

        All processes must go through it together; the others get empty tensors.
        """
        for name, parameter in self.model.named_parameters():
            value = parameter.detach()
            if isinstance(value, DTensor):
                value = value.full_tensor()  # collective
            yield name, value.cpu() if self.parallel.main else torch.empty(0)
