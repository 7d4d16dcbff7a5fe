"""The short convolution of a layer's queries, keys and values, with the SiLU and the norm after it.

Two implementations of one operator: plain PyTorch here, which is its definition, and kernels in
osdn/ops/triton/convolution.py for a GPU. Both make the sums again in the backward: a compiler
would keep, and an eager run would write and read, several float32 copies of the input.
"""

from collections.abc import Callable, Sequence
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
    return short_convolutions(x, [weight], cu_seqlens, head_dims=[head_dim])[0]


def short_convolutions(
    x: Tensor,
    weights: Sequence[Tensor],
    cu_seqlens: Tensor | None = None,
    *,
    head_dims: Sequence[int | None],
) -> list[Tensor]:
    """`short_convolution` of neighbouring columns of x, as one product of several layers gives it.

    Args:
        x: [B, T, D_1 + D_2 + … + R].
        weights: [D_i, W_i], of the columns in their order.
        head_dims: one for each weight.

    Returns:
        A contiguous [B, T, D_i] for each weight, and the last R columns as they are if R > 0.
    """
    sizes = [size or 0 for size in head_dims]  # operators take no list of optional numbers
    # functorch and forward mode need an expression they can see through.
    # PyTorch has no public way to ask for either.
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):  # which go through the definition alone
        return _forward(x, weights, cu_seqlens, sizes, forward)
    if dispatched(x):
        return _operator(x, list(weights), cu_seqlens, sizes)
    return list(_Eager.apply(x, cu_seqlens, sizes, *weights))


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


def ages_of(cu_seqlens: Tensor | None, T: int, width: int) -> Tensor | None:
    """[T] int32: how many tokens of its own sequence stand before a token, at most width − 1.

    Token t reads t − j where that is at least j. Scattered, with no search.
    """
    if cu_seqlens is None:
        return None
    at = cu_seqlens.long()  # an empty sequence at the end starts at T
    ages = torch.full((T + width,), width - 1, dtype=torch.int32, device=at.device)
    for age in reversed(range(width - 1)):  # the nearest start is written last
        ages.index_fill_(0, at + age, age)
    return ages[:T]


def forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None) -> Tensor:
    """y, by PyTorch."""
    x_wide, w, inside = _prepare(x, weight, cu_seqlens)  # [B, T, D], [D, W], W masks [T − back, 1]
    z = F.silu(_sums(x_wide, w, inside))  # [B, T, D]
    if head_dim is not None:
        by_head = z.unflatten(-1, (-1, head_dim))  # [B, T, H, head_dim]
        z = (by_head * _inverse_norm(by_head)).flatten(-2)
    return z.to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None,
    head_dim: int | None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, written to the tensor given, and dweight in weight's, by PyTorch."""
    x_wide, w, inside = _prepare(x, weight, cu_seqlens)
    # Again, in place of keeping u and z: memory is read less than it would be.
    u = _sums(x_wide, w, inside)
    sigmoid = u.sigmoid()
    dz = dy.to(u.dtype)
    # y = z / n has the gradient (dy − ⟨dy, y⟩ y) / n in z.
    if head_dim is not None:
        z, dz = ((one.unflatten(-1, (-1, head_dim))) for one in (u * sigmoid, dz))
        inverse = _inverse_norm(z)  # [B, T, H, 1]
        y = z * inverse
        along = (dz * y).sum(-1, keepdim=True)  # [B, T, H, 1]
        dz = (torch.addcmul(dz, y, along, value=-1) * inverse).flatten(-2)
    du = dz * sigmoid * (1 + u * (1 - sigmoid))  # silu'(u) = σ + u σ (1 − σ)
    T, W = x.shape[1], w.shape[1]
    # The token's own weight, then each earlier one: token t feeds t + back.
    total = du * w[:, -1]
    dweight = [(x_wide * du).sum((0, 1))]  # W times [D]
    for back in range(1, W):
        # du of tokens whose sequence reaches back that far, [B, T − back, D]
        later = _where(inside[back], du[:, back:])
        total[:, : max(0, T - back)].addcmul_(later, w[:, -1 - back])
        dweight.append((x_wide[:, : max(0, T - back)] * later).sum((0, 1)))
    dx = total.to(x.dtype) if dx is None else dx.copy_(total)
    return dx, torch.stack(dweight[::-1], 1).to(weight.dtype)


def _prepare(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """x and w in the dtype of the sums; and which tokens t ≥ back see t − back, for every back."""
    wide = torch.promote_types(x.dtype, torch.float32)
    T, W = x.shape[1], weight.shape[1]
    ages = ages_of(cu_seqlens, T, W)
    # A token sees `back` tokens back unless a sequence starts in between: [T − back, 1].
    inside = [None if ages is None else ages[back:, None] >= back for back in range(W)]
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
    # vector_norm makes no tensor of squares.
    return torch.rsqrt(torch.linalg.vector_norm(z, dim=-1, keepdim=True).square() + L2_EPS)


def _module(x: Tensor) -> Any:
    """The module whose forward and backward serve x."""
    kernels = x.is_cuda and HAS_TRITON and x.dtype in TRITON_DTYPES
    return import_module("osdn.ops.triton.convolution" if kernels else __name__)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    head_dims: Sequence[int],
    one: Callable[..., Tensor],
) -> list[Tensor]:
    """Each part of x by `one`, a module's forward, and the columns that are left."""
    *parts, rest = x.split(_columns(x, weights), dim=-1)
    made = [one(p, w, cu_seqlens, size or None) for p, w, size in zip(parts, weights, head_dims)]
    return [*made, rest.clone(memory_format=torch.contiguous_format)] if rest.shape[-1] else made


def _backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    head_dims: Sequence[int],
) -> tuple[Tensor, list[Tensor]]:
    """(dx, dweights) from the gradients of what `_forward` gives."""
    columns, dx = _columns(x, weights), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    places, dweights = dx.split(columns, dim=-1), []
    for i, part in enumerate(x.split(columns, dim=-1)[:-1]):
        given = dys[i], part, weights[i], cu_seqlens, head_dims[i] or None
        dweights.append(_module(x).backward(*given, places[i])[1])
    if columns[-1]:
        places[-1].copy_(dys[-1])
    return dx, dweights


def _columns(x: Tensor, weights: Sequence[Tensor]) -> list[int]:
    """D_1, D_2, …, and R, which may be 0."""
    sizes = [len(weight) for weight in weights]
    return [*sizes, x.shape[-1] - sum(sizes)]


class _Eager(torch.autograd.Function):
    """The operator without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor | None, head_dims: list[int],
                *weights: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        # The inputs are kept, and nothing that is computed from them.
        _keep(ctx, (x, list(weights), cu_seqlens, head_dims), None)
        return tuple(_forward(x, weights, cu_seqlens, head_dims, _module(x).forward))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            dx, dweights = _backward(dys, *_kept(ctx))
        # A second derivative is an error and never zeros.
        return once("short_convolution", ctx, dys, (dx, None, None, *dweights))


@torch.library.custom_op("osdn::short_convolution", mutates_args=())
def _operator(
    x: Tensor, weights: list[Tensor], cu_seqlens: Tensor | None, head_dims: list[int]
) -> list[Tensor]:
    return _forward(x, weights, cu_seqlens, head_dims, _module(x).forward)


@_operator.register_fake
def _(
    x: Tensor, weights: list[Tensor], cu_seqlens: Tensor | None, head_dims: list[int]
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], size) for size in _columns(x, weights) if size]


@torch.library.custom_op("osdn::short_convolution_backward", mutates_args=())
def _backward_operator(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    cu_seqlens: Tensor | None,
    head_dims: list[int],
) -> tuple[Tensor, list[Tensor]]:
    return _backward(dys, x, weights, cu_seqlens, head_dims)


@_backward_operator.register_fake
def _(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    cu_seqlens: Tensor | None,
    head_dims: list[int],
) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape), [weight.new_empty(weight.shape) for weight in weights]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, cu_seqlens, ctx.head_dims = inputs
    ctx.weights = len(weights)
    ctx.save_for_backward(x, *weights, *([] if cu_seqlens is None else [cu_seqlens]))


def _kept(ctx: Any) -> tuple[Tensor, list[Tensor], Tensor | None, list[int]]:
    """The operator's inputs."""
    x, *others = ctx.saved_tensors
    weights, offsets = others[: ctx.weights], others[ctx.weights :]
    return x, weights, offsets[0] if offsets else None, ctx.head_dims


def _differentiate(ctx: Any, dys: list[Tensor]) -> tuple[Any, ...]:
    dx, dweights = _backward_operator(list(dys), *_kept(ctx))
    return dx, dweights, None, None


_operator.register_autograd(_differentiate, setup_context=_keep)
