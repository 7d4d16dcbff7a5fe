"""The short convolution of a layer's queries, keys and values, with the SiLU and the norm after it.

Two implementations of one operator: plain PyTorch here, which is its definition, and kernels in
osdn/ops/triton/convolution.py for a GPU. Both make the sums again in the backward: a compiler
would keep, and an eager run would write and read, several float32 copies of the input.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from osdn.ops.interface import HAS_TRITON
from osdn.ops.packing import check_cu_seqlens, remember
from osdn.ops.registration import dispatched, once

# As in flash-linear-attention's l2norm, whose checkpoints must give the same outputs.
L2_EPS = 1e-6
# What the kernels accumulate in float32; float64 input takes the definition.
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    head_dim: int | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """Causal depthwise convolution over time, SiLU, and with head_dim each head's unit vector.

        u_t = Σ_j w_j ⊙ x_{t−W+1+j},   z_t = silu(u_t),   y_t = z_t / sqrt(Σ_head z_t² + 1e-6)

    In float32 (float64 for float64 input), rounded once at the end; what lies before a sequence's
    start is its history, or zero. Once differentiable, in x, weight and history; by torch.func and
    in forward mode too, through the definition.

    Args:
        x: [B, T, D], any floating dtype.
        weight: [D, W], any floating dtype; w_{W−1} is the token's own.
        cu_seqlens: [N + 1] offsets of sequences packed along T; none sees its neighbour.
        head_dim: how many features in a row make a head, a divisor of D; None: no norm, y = z.
        history: [N, D, W−1] the inputs before each sequence, the latest last; N = B, or the number
            of sequences in cu_seqlens. `next_history` gives those for the tokens that follow.

    Returns:
        [B, T, D] in x's dtype.

    Raises:
        ValueError: a history of another shape; with a history, wrong offsets.
    """
    # Earlier inputs are put in front, convolved too, and their places dropped: one code path.
    if history is not None:
        past = _Past.of(x, weight.shape[1], cu_seqlens)
        extended = past.prepend(history, x)
        y = short_convolution(extended, weight, past.offsets, head_dim=head_dim)
        return past.drop(y)
    # functorch and forward mode need an expression they can see through.
    # PyTorch has no public way to ask for either.
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):  # which go through the definition alone
        return forward(x, weight, cu_seqlens, head_dim)
    run = _operator if dispatched(x) else _Eager.apply
    return run(x, weight, cu_seqlens, head_dim)


def next_history(
    x: Tensor, width: int, cu_seqlens: Tensor | None = None, history: Tensor | None = None
) -> Tensor:
    """[N, D, width − 1]: the last inputs of each sequence, from its history where it is short.

    x, cu_seqlens and history as in `short_convolution`; a history of None is of zeros.
    """
    past = _Past.of(x, width, cu_seqlens)
    if history is None:
        history = x.new_zeros(past.sequences, x.shape[2], width - 1)
    return past.last(past.prepend(history, x))


class _Past(NamedTuple):
    """How sequences are stored with W−1 earlier inputs before each of them.

    order: [T + N (W−1)], which of the tokens and then of all histories stands at each place.
    tokens: [T], the place of each token.  ends: [N (W−1)], the places of each sequence's last.
    offsets: [N + 1].  All are None without cu_seqlens: then the histories stand first.
    """

    gap: int
    sequences: int
    order: Tensor | None = None
    tokens: Tensor | None = None
    ends: Tensor | None = None
    offsets: Tensor | None = None

    @staticmethod
    def of(x: Tensor, width: int, cu_seqlens: Tensor | None) -> "_Past":
        # Without a pack the histories are W − 1 tokens in front of every row.
        B, T = x.shape[:2]
        if cu_seqlens is None:
            return _Past(width - 1, B)
        check_cu_seqlens(cu_seqlens, x, "x")
        key = "convolution history", T, width
        return remember(cu_seqlens, key, lambda: _Past._packed(cu_seqlens, T, width - 1))

    @staticmethod
    def _packed(cu_seqlens: Tensor, T: int, gap: int) -> "_Past":
        N, device = len(cu_seqlens) - 1, cu_seqlens.device
        # [N + 1], [T]
        number, token = torch.arange(N + 1, device=device), torch.arange(T, device=device)
        offsets = cu_seqlens.long() + gap * number  # sequence n is preceded by n + 1 histories
        # [T], the sequence of each token
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        tokens = token + gap * (sequence + 1)
        before = torch.arange(gap, device=device)
        histories = (offsets[:-1, None] + before).flatten()  # [N · gap]
        order = torch.empty(T + N * gap, dtype=torch.int64, device=device)
        # Where it comes from, for each place: tokens are numbered 0 .. T−1, histories from T on.
        order[tokens] = token
        order[histories] = torch.arange(T, T + N * gap, device=device)
        return _Past(gap, N, order, tokens, (offsets[1:, None] - gap + before).flatten(), offsets)

    def prepend(self, history: Tensor, x: Tensor) -> Tensor:
        """[B, T, D] and [N, D, W−1] -> one tensor of both."""
        expected = (self.sequences, x.shape[2], self.gap)
        if history.shape != expected:
            raise ValueError(
                f"history: expected shape {expected} ([N, D, W - 1]), got {tuple(history.shape)}"
            )
        # The sequence's time is dimension 1 in x and 2 in a history, which a step shifts.
        earlier = history.transpose(1, 2).to(x.dtype)  # [N, W−1, D]
        if self.order is None:
            return torch.cat([earlier, x], 1)
        return torch.cat([x, earlier.flatten(0, 1)[None]], 1).index_select(1, self.order)

    def drop(self, y: Tensor) -> Tensor:
        """What `prepend` made a place for, without the histories' places: [B, T, D]."""
        return y[:, self.gap :] if self.tokens is None else y.index_select(1, self.tokens)

    def last(self, extended: Tensor) -> Tensor:
        """The last W−1 inputs of every sequence, [N, D, W−1]."""
        if self.ends is None:
            return extended[:, extended.shape[1] - self.gap :].transpose(1, 2)
        ends = extended.index_select(1, self.ends)
        return ends.view(self.sequences, self.gap, extended.shape[2]).transpose(1, 2)


def starts_of(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """[T] int8, 1 at every packed sequence's first token; scattered, with no search."""
    if cu_seqlens is None:
        return None
    at = cu_seqlens.long()  # an empty sequence at the end starts at T
    return torch.zeros(T + 1, dtype=torch.int8, device=at.device).index_fill_(0, at, 1)[:T]


def forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None) -> Tensor:
    """y, by PyTorch."""
    x_wide, w, inside = _prepare(x, weight, cu_seqlens)  # [B, T, D], [D, W], W masks [T − back, 1]
    z = F.silu(_sums(x_wide, w, inside))  # [B, T, D]
    if head_dim is not None:
        z = _unit(z.unflatten(-1, (-1, head_dim))).flatten(-2)  # by head, [B, T, H, head_dim]
    return z.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype and dweight in weight's, by PyTorch."""
    x_wide, w, inside = _prepare(x, weight, cu_seqlens)
    # Again, in place of keeping u and z: memory is read less than it would be.
    u = _sums(x_wide, w, inside)
    sigmoid = u.sigmoid()
    dz = dy.to(u.dtype)
    # y = z / n has the gradient (dy − ⟨dy, y⟩ y) / n in z.
    if head_dim is not None:
        z, dz = ((one.unflatten(-1, (-1, head_dim))) for one in (u * sigmoid, dz))
        y = _unit(z)
        along = (dz * y).sum(-1, keepdim=True)  # [B, T, H, 1]
        dz = (torch.addcmul(dz, y, along, value=-1) * _inverse_norm(z)).flatten(-2)
    du = dz * sigmoid * (1 + u * (1 - sigmoid))  # silu'(u) = σ + u σ (1 − σ)
    T, W = x.shape[1], w.shape[1]
    # The token's own weight, then each earlier one: token t feeds t + back.
    dx = du * w[:, -1]
    dweight = [(x_wide * du).sum((0, 1))]  # W times [D]
    for back in range(1, W):
        # du of tokens whose sequence reaches back that far, [B, T − back, D]
        later = _where(inside[back], du[:, back:])
        dx[:, : max(0, T - back)].addcmul_(later, w[:, -1 - back])
        dweight.append((x_wide[:, : max(0, T - back)] * later).sum((0, 1)))
    return dx.to(x.dtype), torch.stack(dweight[::-1], 1).to(weight.dtype)


def _prepare(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """x and w in the dtype of the sums; and which tokens t ≥ back see t − back, for every back."""
    wide = torch.promote_types(x.dtype, torch.float32)
    T, W = x.shape[1], weight.shape[1]
    inside: list[Tensor | None] = [None] * W
    if (starts := starts_of(cu_seqlens, T)) is not None:
        outside = torch.zeros_like(starts)  # [T], whether a start lies in the last `back` tokens
        for back in range(1, W):
            # A token sees `back` tokens back unless a sequence starts in between.
            outside[back - 1 :] |= starts[: max(0, T - back + 1)]
            inside[back] = outside[back:, None] == 0
    return x.to(wide), weight.to(wide), inside


def _sums(x: Tensor, w: Tensor, inside: list[Tensor | None]) -> Tensor:
    # One shifted product a weight; W is 4 in published models.
    u, T = x * w[:, -1], x.shape[1]
    for back in range(1, len(inside)):
        u[:, back:].addcmul_(_where(inside[back], x[:, : max(0, T - back)]), w[:, -1 - back])
    return u


def _where(inside: Tensor | None, x: Tensor) -> Tensor:
    # where and not a product: 0 times a neighbour's NaN would be NaN.
    return x if inside is None else torch.where(inside, x, 0)


def _inverse_norm(z: Tensor) -> Tensor:
    return torch.rsqrt(z.square().sum(-1, keepdim=True) + L2_EPS)


def _unit(z: Tensor) -> Tensor:
    return z * _inverse_norm(z)


def _module(x: Tensor) -> Any:
    """The module whose forward and backward serve x."""
    kernels = x.is_cuda and HAS_TRITON and x.dtype in TRITON_DTYPES
    return import_module("osdn.ops.triton.convolution" if kernels else __name__)


class _Eager(torch.autograd.Function):
    """The operator without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        # The input is kept, and nothing that is computed from it.
        _keep(ctx, inputs, None)
        return _module(inputs[0]).forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *cu_seqlens = ctx.saved_tensors
        given = (x, weight, cu_seqlens[0] if cu_seqlens else None, ctx.head_dim)
        with torch.no_grad():
            dx, dweight = _module(x).backward(dy, *given)
        # A second derivative is an error and never zeros.
        return once("short_convolution", ctx, (dy,), (dx, dweight, None, None))


@torch.library.custom_op("osdn::short_convolution", mutates_args=())
def _operator(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None) -> Tensor:
    return _module(x).forward(x, weight, cu_seqlens, head_dim)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("osdn::short_convolution_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None
) -> tuple[Tensor, Tensor]:
    return _module(x).backward(dy, x, weight, cu_seqlens, head_dim)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    x, weight, cu_seqlens, ctx.head_dim = inputs
    ctx.save_for_backward(x, weight, *([] if cu_seqlens is None else [cu_seqlens]))


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *cu_seqlens = ctx.saved_tensors
    given = (x, weight, cu_seqlens[0] if cu_seqlens else None, ctx.head_dim)
    return *_backward(dy, *given), None, None


_operator.register_autograd(_differentiate, setup_context=_keep)
