"""What the front door refuses, and how it says so: the argument, what was expected, what came."""

from math import inf

import torch
from torch import Tensor
from torch.autograd import forward_ad

from osdn.ops.packing import check_cu_seqlens, has_values


def check_kinds(
    required: dict[str, Tensor], optional: dict[str, Tensor | None], scale: float | None
) -> None:
    """Tensors are floating-point tensors, the optional ones may be None; so may scale, a number."""
    for name, x in {**required, **optional}.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    _check_numbers(scale=scale)


def check_reverse_mode(backend: str, **tensors: Tensor | None) -> None:
    """No forward-mode tangent and no transform of torch.func, but with the reference."""
    if backend == "reference":
        return
    for name, x in tensors.items():
        if x is None or forward_ad._current_level < 0:
            continue
        if forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{name}: expected no forward-mode tangent, which only the reference carries on; "
                "differentiate in reverse mode, or use backend='reference'"
            )
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise ValueError(
            "backend: expected 'reference' inside a transform of torch.func (grad, vmap, ...), got "
            f"{backend!r}; use backend='reference', or torch.autograd"
        )


def _check_numbers(**numbers: float | None) -> None:
    """Finite; None stands for a default, but for eta, which has none of that kind."""
    for name, value in numbers.items():
        if (value is not None or name == "eta") and (
            not isinstance(value, int | float) or not -inf < value < inf
        ):  # compared, since math.isfinite takes no number that torch.compile traces
            raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_sizes(**sizes: int | None) -> None:
    """Positive integers; head_dim and head_v_dim may be None, which stands for their defaults."""
    for name, value in sizes.items():
        if name in ("head_dim", "head_v_dim") and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_tensors(q: Tensor, **others: Tensor | None) -> None:
    """On the device of q; k and v of its dtype."""
    for name, x in others.items():
        if x is None:
            continue
        if x.device != q.device:
            raise ValueError(
                f"{name}: expected a tensor on {q.device} like q, got one on {x.device}"
            )
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name}: expected dtype {q.dtype} like q, got {x.dtype}")


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    state: Tensor | None,
    precond: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """The number of sequences N, once every shape fits."""
    _expect_sizes("q", q, ("B", "T", "H", "K"))
    _expect_sizes("v", v, ("B", "T", "H", "V"))
    (B, T, H, K), V = q.shape, v.shape[-1]
    N = B
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
        N = cu_seqlens.numel() - 1
    _expect("k", k, (B, T, H, K), "like q")
    _expect("v", v, (B, T, H, V), "[B, T, H, V]")
    _expect("beta", beta, (B, T, H), "[B, T, H]")
    if log_gamma is not None:
        _expect("log_gamma", log_gamma, (B, T, H), "[B, T, H]")
    if state is not None:
        _expect("initial_state", state, (N, H, K, V), "[N, H, K, V]")
    if precond is not None and precond.ndim == 2:
        _expect("initial_precond", precond, (H, K), "[H, K], or [N, H, K]")
    elif precond is not None:
        _expect("initial_precond", precond, (N, H, K), "[N, H, K]")
    return N


def check_step_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    state: Tensor,
    precond: Tensor,
    slots: Tensor | None,
) -> None:
    """The shapes of one token. The states are written to, so nothing of them is expanded."""
    _expect_sizes("q", q, ("B", "H", "K"))
    _expect_sizes("v", v, ("B", "H", "V"))
    (B, H, K), V = q.shape, v.shape[-1]
    _expect("k", k, (B, H, K), "like q")
    _expect("v", v, (B, H, V), "[B, H, V]")
    _expect("beta", beta, (B, H), "[B, H]")
    if log_gamma is not None:
        _expect("log_gamma", log_gamma, (B, H), "[B, H]")
    P, kept = B, "B"
    if slots is not None:
        _expect_sizes("state", state, ("P", "H", "K", "V"))
        P, kept = state.shape[0], "P"
        _check_slots(slots, q, P)
    _expect("state", state, (P, H, K, V), f"[{kept}, H, K, V]")
    _expect("precond", precond, (P, H, K), f"[{kept}, H, K]")


def _check_slots(slots: Tensor, q: Tensor, P: int) -> None:
    """[B] integers on q's device; on a CPU, where a look is cheap, distinct and less than P too."""
    if not isinstance(slots, Tensor):
        raise ValueError(f"slots: expected a tensor, got {type(slots).__name__}")
    _expect("slots", slots, (len(q),), "[B]")
    if slots.dtype not in (torch.int32, torch.int64) or slots.device != q.device:
        raise ValueError(
            f"slots: expected int32 or int64 on {q.device} like q, got {slots.dtype} on "
            f"{slots.device}"
        )
    if slots.device.type != "cpu" or not has_values(slots):
        return
    used = [slot for slot in slots.tolist() if slot >= 0]
    if used and (most := max(used)) >= P:
        raise ValueError(f"slots: expected places less than P = {P} of the pool, got {most}")
    if len(set(used)) < len(used):
        twice = next(slot for slot in used if used.count(slot) > 1)
        raise ValueError(f"slots: expected distinct places, got {twice} more than once")


def check_box_holds_one(precond_min: float | None, precond_max: float | None) -> None:
    """A layer's d starts at 1, so its box must hold 1; else no gradient would reach d_1."""
    if precond_min is not None and precond_max is not None and not precond_min <= 1 <= precond_max:
        raise ValueError(
            "precond_min, precond_max: expected a box that holds 1, where d starts, "
            f"got [{precond_min}, {precond_max}]"
        )


def check_rule(
    eta: float, precond_min: float | None, precond_max: float | None, beta_aware: bool = False
) -> None:
    """η in [0, 2]; both bounds or neither, finite and in order; beta_aware a bool."""
    _check_numbers(eta=eta, precond_min=precond_min, precond_max=precond_max)
    if not isinstance(beta_aware, bool):
        raise ValueError(f"beta_aware: expected True or False, got {beta_aware!r}")
    if not 0 <= eta <= 2:
        raise ValueError(f"eta: expected a step size in [0, 2], got {eta}")
    if (precond_min is None) != (precond_max is None):
        raise ValueError(
            f"precond_min, precond_max: expected both or neither, got {precond_min}, {precond_max}"
        )
    if precond_min is not None and precond_max is not None and not precond_min <= precond_max:
        raise ValueError(
            f"precond_min: expected at most precond_max = {precond_max}, got {precond_min}"
        )


def _expect_sizes(name: str, x: Tensor, sizes: tuple[str, ...]) -> None:
    if x.ndim != len(sizes):
        raise ValueError(
            f"{name}: expected {len(sizes)} dimensions [{', '.join(sizes)}], "
            f"got shape {tuple(x.shape)}"
        )
    if min(x.shape) < 1:
        raise ValueError(
            f"{name}: expected {', '.join(sizes[:-1])} and {sizes[-1]} of at least 1, "
            f"got shape {tuple(x.shape)}"
        )


def _expect(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape} ({meaning}), got {tuple(x.shape)}")
