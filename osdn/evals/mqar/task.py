"""Multi-query associative recall (MQAR, arXiv 2312.04927): the task, a small model, one training.

A sequence lists `pairs` key-value pairs and then asks for the keys again; at each repeated key the
model must say its value. The task is zoology's generator; what a mixer can score is set by how many
pairs its state can hold.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osdn.evals.mqar.steps import Updates
from osdn.layers.attention import Attention
from osdn.layers.convolution import ShortConvolution
from osdn.layers.osdn import OSDN
from osdn.model.loss import IGNORED
from osdn.train.optim import learning_rate
from osdn.train.recipe import Optimizer, Schedule

TRAIN, TEST = 0, 1  # which of a seed's two streams; they never meet


class Task(NamedTuple):
    """What one MQAR sequence is.

    length: tokens.  pairs: key-value pairs in it, each asked for once.
    vocab_size: keys are 1 .. vocab_size/2 − 1, values vocab_size/2 .. vocab_size − 1.
    power: a of the gap law p ∝ i^(a−1).
    random_filler: tokens between the queries are drawn from the vocabulary, else they are 0.
    """

    length: int
    pairs: int
    vocab_size: int = 8192
    power: float = 0.01
    random_filler: bool = False


def check_task(task: Task) -> None:
    """Raise ValueError, naming the field, for a task that has no instance."""
    if task.length % 2 or task.length < 4:
        raise ValueError(f"length: expected an even number of tokens ≥ 4, got {task.length}")
    if not 1 <= task.pairs <= task.length // 4:
        raise ValueError(
            f"pairs: expected 1 to length / 4 = {task.length // 4} (each pair needs two tokens and "
            f"a place of two for its query), got {task.pairs}"
        )
    if task.vocab_size % 2 or task.vocab_size // 2 - 1 < task.pairs:
        raise ValueError(
            f"vocab_size: expected an even number ≥ 2 (pairs + 1) = {2 * task.pairs + 2}, "
            f"got {task.vocab_size}"
        )


def generate(task: Task, examples: int, *, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """(inputs, labels), both [examples, length] int64; labels are −100 where nothing is asked.

    Keys and values are drawn without replacement and interleaved at the start; the query for pair n
    stands at 2 pairs + 2 g_n, where the gaps g are drawn without replacement from
    p_i ∝ (i + 1)^(a−1), i = 0 .. (length − 2 pairs)/2 − 1; its label stands at the same place.

    Args:
        seed: of the whole experiment.  stream: TRAIN or TEST; their generators are independent.

    Raises:
        ValueError: a task that has no instance.
    """
    check_task(task)
    # Two streams of one seed: training and test sequences never meet.
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream,)))
    half, context = task.vocab_size // 2, 2 * task.pairs
    keys = 1 + _choices(rng, examples, np.zeros(half - 1), task.pairs)
    values = half + _choices(rng, examples, np.zeros(half), task.pairs)
    space = (task.length - context) // 2  # places for queries: every second token after the pairs
    # a small power: most queries come soon, some late
    log_p = (task.power - 1) * np.log(np.arange(1, space + 1))
    at = context + 2 * _choices(rng, examples, log_p, task.pairs)  # [examples, pairs]

    inputs = np.zeros((examples, task.length), dtype=np.int64)
    if task.random_filler:
        inputs[:] = rng.integers(task.vocab_size, size=inputs.shape)
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    labels = np.full_like(inputs, IGNORED)
    np.put_along_axis(inputs, at, keys, axis=1)
    np.put_along_axis(labels, at, values, axis=1)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def _choices(rng: np.random.Generator, rows: int, log_p: np.ndarray, size: int) -> np.ndarray:
    """[rows, size] draws without replacement, p ∝ exp(log_p), one after another in each row.

    The `size` largest of log p + Gumbel noise, in falling order, have the law of successive draws
    without replacement (Gumbel-top-k; Vieira 2014, arXiv 1903.06059).
    """
    out = np.empty((rows, size), dtype=np.int64)
    # Rows at a time: 4 million noises, 32 MB.
    block = max(1, 2**22 // len(log_p))
    for start in range(0, rows, block):
        noisy = log_p + rng.gumbel(size=(len(out[start : start + block]), len(log_p)))
        # The `size` largest, in no order.
        best = np.argpartition(-noisy, size - 1, axis=1)[:, :size]
        # And now in falling order.
        order = np.argsort(-np.take_along_axis(noisy, best, axis=1), axis=1)
        out[start : start + block] = np.take_along_axis(best, order, axis=1)
    return out


class Convolution(nn.Module):
    """y = W_o silu(conv(W_i x)): the causal depthwise convolution alone, as a token mixer.

    A first layer that lets each token see the few before it, so that attention, too, can bind a
    value to its key (the role of BaseConv in arXiv 2402.18668).
    """

    def __init__(self, hidden_size: int, width: int = 4):
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.conv1d = ShortConvolution(hidden_size, width)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        """Numbers that a sequence's memory holds: the last inputs of the convolution."""
        return self.conv1d.in_channels * (self.conv1d.kernel_size[0] - 1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        """[B, T, D] -> ([B, T, D],)."""
        return (self.out_proj(self.conv1d(self.in_proj(hidden_states))[0]),)


class MQARModel(nn.Module):
    """Embedding, blocks of x ← x + mixer(norm(x)) with no MLP, norm, output tied to the embedding.

    Args:
        vocab_size, width: sizes; width is the residual stream's.
        layers: what each layer is, "mixer" or "convolution".
        mixer: "osdn", "delta_net", "gated_delta_net" or "attention": what the layers called
            "mixer" are.
        options: keyword arguments of osdn.layers.osdn.OSDN or osdn.layers.attention.Attention.
        init_std: standard deviation of the linear layers' and the embedding's initial weights.
        autocast: compute in bfloat16 what torch.autocast says.

    Raises:
        ValueError: from the mixer, about one of its options.
        TypeError: an option that the mixer does not have.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: Sequence[str],
        mixer: str,
        options: dict[str, Any],
        init_std: float = 0.02,
        autocast: bool = False,
    ):
        super().__init__()
        self.autocast = autocast
        self.embedding = nn.Embedding(vocab_size, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in layers)
        self.mixers = nn.ModuleList()
        # No MLP: what is compared is the mixer, and nothing else can remember.
        for layer in layers:
            if layer == "convolution":
                self.mixers.append(Convolution(width))
            elif mixer == "attention":
                self.mixers.append(Attention(width, **options))
            else:
                if mixer == "gated_delta_net":
                    options = {**options, "state_decay": "data"}
                self.mixers.append(OSDN(width, adaptive=mixer == "osdn", **options))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        # zoology's initial values, then the special ones of our layers, which these overwrote.
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=init_std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, OSDN):
                module.reset_special_parameters()

    def forward(self, inputs: Tensor, at: Tensor) -> Tensor:
        """Logits [B n, vocabulary] of inputs [B, T], after the n tokens `at` [B, n] of each row."""
        B, T = inputs.shape
        # [B n], places in the flattened rows
        at = (at + T * torch.arange(B, device=at.device)[:, None]).flatten()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast):
            x = self.embedding(inputs)
            for norm, mixer in zip(self.norms, self.mixers):
                x = x + mixer(norm(x))[0]  # [B, T, D]
            # Only at the queries: logits of all tokens would be most of the work.
            x = self.norm(x.flatten(0, 1).index_select(0, at))
            return F.linear(x, self.embedding.weight).float()

    def state_size(self, length: int) -> int:
        """Numbers that all layers keep of a sequence of that length."""
        total = 0
        for mixer in self.mixers:
            if isinstance(mixer, Attention):
                # Keys and values of every token.
                total += 2 * length * mixer.num_heads * mixer.head_dim
            else:
                assert isinstance(mixer, OSDN | Convolution)
                total += mixer.state_size
        return total


@torch.no_grad()
def answers_right(model: nn.Module, inputs: Tensor, labels: Tensor, batch: int) -> Tensor:
    """1 where an answer is right, [examples, pairs] float64, in the order in which the rows give
    the pairs; the answer is the argmax over the vocabulary.
    """
    device = next(model.parameters()).device
    found = []
    for x, y in zip(inputs.split(batch), labels.split(batch)):
        at, expected = asked(y)
        best = model(x.to(device), at.to(device)).argmax(-1).cpu()  # [B n]
        right = (best.view_as(expected) == expected).double()
        # Queries come in any order. Ranks of values give each answer's pair in the row's order.
        values = x[:, 1 : 2 * expected.shape[1] : 2]
        found.append(right.gather(1, expected.argsort(1).gather(1, values.argsort(1).argsort(1))))
    return torch.cat(found)


def asked(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(which tokens of each row ask something, what is right there), [B, pairs] each."""
    at = (labels != IGNORED).nonzero()[:, 1].view(len(labels), -1)  # equally many in each row
    return at, labels.gather(1, at)


class Outcome(NamedTuple):
    """accuracy: share of right answers in the test set.  by_pair: the same of the first pair of
    the rows, the second, and so on.

    steps: optimiser steps done.  diverged: the loss became infinite or not a number.
    """

    accuracy: float
    by_pair: list[float]
    steps: int
    diverged: bool


def train(
    model: MQARModel,
    task: Task,
    *,
    optimizer: Optimizer,
    schedule: Schedule,
    examples: int,
    test_examples: int,
    batch_size: int,
    epochs: int,
    stop_at: float,
    seed: int,
) -> Outcome:
    """Train the model on the task and measure it after every epoch; the last measure counts.

    A loss that is not finite ends the training with its epoch, and counts as no step.

    Args:
        optimizer, schedule: AdamW with its learning rate, and the rate's course over the steps.
        examples, test_examples: sequences in the two sets, from the seed's two streams.
        batch_size: sequences in a step.
        epochs: passes over the training set, at most, each in a new order.
        stop_at: share of right answers in the test set at which training ends before that.
    """
    test = generate(task, test_examples, seed=seed, stream=TEST)
    inputs, labels = generate(task, examples, seed=seed, stream=TRAIN)
    updates = Updates(model, inputs, *asked(labels), optimizer)
    steps = math.ceil(examples / batch_size) * epochs
    order = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        # a new order each epoch, from the seed
        for rows in torch.randperm(examples, generator=order).split(batch_size):
            step += 1
            updates(rows, learning_rate(step, steps=steps, peak=optimizer.lr, schedule=schedule))
        right = answers_right(model, *test, batch_size)
        # Read once an epoch: the only wait for the device.
        if (diverged := updates.finite < step) or right.mean() >= stop_at:
            break
    return Outcome(float(right.mean()), right.mean(0).tolist(), updates.finite, diverged)
