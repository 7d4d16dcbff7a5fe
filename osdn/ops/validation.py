"""What the front door refuses, and how it says so: the argument, what was expected, what came."""

from math import inf

import torch
from torch import Tensor
from torch.autograd import forward_ad

from osdn.ops.operands import Operands, Token
from osdn.ops.packing import check_cu_seqlens, has_values


def check_kinds(
    required: dict[str, Tensor], optional: dict[str, Tensor | None], scale: float | None
) -> None:
    """Tensors are floating-point tensors, the optional ones may be None; so may scale, a number."""
    # Before anything looks at a dtype or a shape, which a non-tensor does not have.
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
        if x is None or forward_ad._current_level < 0:  # no level: nothing is in forward mode
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
        # Gates and states may be of another floating dtype: the front door casts them.
        if x.device != q.device:
            raise ValueError(
                f"{name}: expected a tensor on {q.device} like q, got one on {x.device}"
            )
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name}: expected dtype {q.dtype} like q, got {x.dtype}")


def check_shapes(x: Operands) -> int:
    """The number of sequences N, once every shape fits; the states may be None here."""
    _expect_sizes("q", x.q, ("B", "T", "H", "K"))
    _expect_sizes("v", x.v, ("B", "T", "H", "V"))
    # q and v name the sizes; all others must agree with them.
    (B, T, H, K), V = x.q.shape, x.v.shape[-1]
    N = B
    if x.cu_seqlens is not None:
        check_cu_seqlens(x.cu_seqlens, x.q)
        N = x.cu_seqlens.numel() - 1
    _expect("k", x.k, (B, T, H, K), "like q")
    _expect("v", x.v, (B, T, H, V), "[B, T, H, V]")
    for name in ("beta", "log_gamma", "log_alpha"):
        if (gate := getattr(x, name)) is not None:
            _expect(name, gate, (B, T, H), "[B, T, H]")
    # Operands types them as given; here they may still be absent.
    state: Tensor | None = x.initial_state
    precond: Tensor | None = x.initial_precond
    if state is not None:
        _expect("initial_state", state, (N, H, K, V), "[N, H, K, V]")
    if precond is not None and precond.ndim == 2:
        _expect("initial_precond", precond, (H, K), "[H, K], or [N, H, K]")
    elif precond is not None:
        _expect("initial_precond", precond, (N, H, K), "[N, H, K]")
    return N


def check_step_shapes(x: Token) -> None:
    """The shapes of one token. The states are written to, so nothing of them is expanded."""
    _expect_sizes("q", x.q, ("B", "H", "K"))
    _expect_sizes("v", x.v, ("B", "H", "V"))
    (B, H, K), V = x.q.shape, x.v.shape[-1]
    _expect("k", x.k, (B, H, K), "like q")
    _expect("v", x.v, (B, H, V), "[B, H, V]")
    for name in ("beta", "log_gamma", "log_alpha"):
        if (gate := getattr(x, name)) is not None:
            _expect(name, gate, (B, H), "[B, H]")
    # Without slots the states have a row a sequence, with slots any number of places.
    P, kept = B, "B"
    if x.slots is not None:
        _expect_sizes("state", x.state, ("P", "H", "K", "V"))
        P, kept = x.state.shape[0], "P"
        _check_slots("slots", x.slots, x.q, P)
        if x.write_slots is not None:
            _check_slots("write_slots", x.write_slots, x.q, P)
        # After both were checked one by one: it needs places that exist.
        _check_places(x)
    elif x.write_slots is not None:
        raise ValueError("write_slots: expected none without slots, the places to read")
    _expect("state", x.state, (P, H, K, V), f"[{kept}, H, K, V]")
    _expect("precond", x.precond, (P, H, K), f"[{kept}, H, K]")


def _check_slots(name: str, slots: Tensor, q: Tensor, P: int) -> None:
    """[B] integers on q's device; on a CPU, where it is cheap, less than P too."""
    if not isinstance(slots, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(slots).__name__}")
    _expect(name, slots, (len(q),), "[B]")
    if slots.dtype not in (torch.int32, torch.int64) or slots.device != q.device:
        raise ValueError(
            f"{name}: expected int32 or int64 on {q.device} like q, got {slots.dtype} on "
            f"{slots.device}"
        )
    if slots.device.type == "cpu" and has_values(slots) and (most := int(slots.max())) >= P:
        raise ValueError(f"{name}: expected places less than P = {P} of the pool, got {most}")


def _check_places(x: Token) -> None:
    """On a CPU: no two rows write one place, and none reads what another row writes."""
    if x.slots is None or x.slots.device.type != "cpu" or not has_values(x.slots):
        return
    read, write = (places.tolist() for places in x.places())
    writer: dict[int, int] = {}  # place -> the row that writes it
    name = "slots" if x.write_slots is None else "write_slots"
    # Rows run in any order, so two writes to one place, or a read of one, have no order.
    for i, (source, target) in enumerate(zip(read, write)):
        if source >= 0 and target >= 0 and writer.setdefault(target, i) != i:
            raise ValueError(f"{name}: expected distinct places, got {target} more than once")
    # Its own write is fine: the kernels read a row's place before they write it.
    for i, (source, target) in enumerate(zip(read, write)):
        if source >= 0 and target >= 0 and writer.get(source, i) != i:
            raise ValueError(
                f"write_slots: expected places that no other row reads, got {source}, which row "
                f"{writer[source]} writes and row {i} reads"
            )


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
