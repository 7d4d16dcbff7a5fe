"""MQAR's optimiser step; on a GPU recorded once, as a CUDA graph, and replayed.

A step of so small a model is hundreds of kernels of microseconds each: launched one by one they
keep a processor busy and leave the GPU idle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osdn.train.optim import make_optimizer
from osdn.train.recipe import Optimizer

WARM_UP = 3  # steps launched one by one before the recording: kernels compile, moments are made


class Updates:
    """Optimiser steps on chosen rows of a training set that lies on the model's device.

    Args:
        model: called with inputs and `at`, gives logits [B n, vocabulary].
        inputs: [examples, T] int64.  at: [examples, n] which tokens are asked.
        expected: [examples, n] what is right there.
        optimizer: AdamW and the clipping.
    """

    def __init__(
        self, model: nn.Module, inputs: Tensor, at: Tensor, expected: Tensor, optimizer: Optimizer
    ):
        device = next(model.parameters()).device
        self.model, self.clip = model, optimizer.clip
        self.data = [one.to(device) for one in (inputs, at, expected)]
        self.adamw = make_optimizer(model, optimizer)
        # Counted on the device: reading a loss at each step would wait for it.
        self._finite = torch.zeros((), dtype=torch.int64, device=device)
        self._good = torch.ones((), dtype=torch.bool, device=device)
        self._launched = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            # A graph reads addresses: the rate is a tensor, written before each replay.
            self._rate = torch.zeros((), device=device)
            self._stream = torch.cuda.Stream(device)
            for group in self.adamw.param_groups:
                group["lr"], group["capturable"] = self._rate, True

    @property
    def finite(self) -> int:
        """Steps before the first whose loss was not finite; waits for the GPU."""
        return int(self._finite)

    def __call__(self, rows: Tensor, rate: float) -> None:
        """One step on the examples `rows` at that learning rate."""
        if self._finite.device.type == "cpu":
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self._launch(rows)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._rate.fill_(rate)
            rows = rows.to(self._rate.device)
            if self._graph is None and self._launched >= WARM_UP:
                self._record(rows)
            # The last batch of an epoch may be smaller; it is launched one by one.
            if self._graph is None or rows.shape != self._rows.shape:
                self._launch(rows)
                self._launched += 1
            else:
                self._rows.copy_(rows)
                self._graph.replay()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, rows: Tensor) -> None:
        """Record a step on as many rows; nothing is computed yet."""
        self._rows = rows.clone()
        self._graph = torch.cuda.CUDAGraph()
        self.adamw.zero_grad(set_to_none=True)
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._update(self._rows)

    def _launch(self, rows: Tensor) -> None:
        self.adamw.zero_grad(set_to_none=True)
        self._update(rows)

    def _update(self, rows: Tensor) -> None:
        """One step; the gradients are None before it, so that a replay writes and does not add."""
        inputs, at, expected = (one.index_select(0, rows) for one in self.data)
        loss = F.cross_entropy(self.model(inputs, at), expected.flatten())
        self._good &= loss.detach().isfinite()  # false from the first loss on that is not finite
        self._finite += self._good
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.adamw.step()
