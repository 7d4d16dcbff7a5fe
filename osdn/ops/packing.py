"""cu_seqlens, the offsets of sequences packed along T: checked and kept here, for everyone.

Every layer of a model is handed the same offsets, and each needs something made of them: the
check, a table of chunks, a mask. `remember` keeps these with the offsets' tensor until its values
change or it is freed. Reading the offsets synchronizes with a GPU; this way it happens once.
"""

from collections.abc import Callable, Hashable
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")

# tensor of offsets -> (its mark when the rest was made, what was made by key)
# By identity, not by value: comparing values would synchronize with a GPU.
kept: Any = WeakIdKeyDictionary()


def remember(cu_seqlens: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """make(), called once for these offsets and this key until the offsets change.

    What is made must not refer to the tensor `cu_seqlens` itself, which could never be freed then.
    Nothing is kept under torch.compile, nor of offsets that do not tell when they change, nor
    while a CUDA graph is captured: the graph must make everything itself, to follow offsets that
    change before a replay, and its memory must not outlive it.
    """
    # None: nothing tells when these offsets change, so nothing may be kept.
    mark = None if torch.compiler.is_compiling() else _mark(cu_seqlens)
    if mark is None or capturing(cu_seqlens):
        return make()
    # Offsets that have changed take everything that was made of them along.
    known, made = kept.get(cu_seqlens, (None, None))
    if made is None or known != mark:
        made = {}
        kept[cu_seqlens] = mark, made
    place = key, torch.is_inference_mode_enabled()  # autograd refuses tensors that were made there
    if place not in made:
        made[place] = make()
    return made[place]


def _mark(cu_seqlens: Tensor) -> list[int] | int | None:
    """What tells whether offsets have changed; None: nothing does.

    On a CPU their values, which NumPy or `.data` change without PyTorch's notice. On a GPU, where
    reading them synchronizes, the tensor's version.
    """
    # tolist and not the version: NumPy writes to the same memory and tells nobody.
    if cu_seqlens.device.type == "cpu":
        return cu_seqlens.tolist() if has_values(cu_seqlens) else None
    # Inference tensors have no version.
    return None if cu_seqlens.is_inference() else cu_seqlens._version


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, on x's kind of device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def has_values(x: Tensor) -> bool:
    """Whether values can be read: not while a graph is made, nor of a tensor that has none."""
    shape_alone = torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)
    return not (shape_alone or capturing(x))


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, name: str = "q") -> None:
    """Offsets from 0 to T, strictly increasing, on the device of x [1, T, ...], called `name`.

    The values are not read inside torch.compile, of tensors without values, and while a CUDA graph
    is captured: nobody checks the values that the graph is replayed with.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    # What needs no values comes first, and is checked on every call.
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens: expected N + 1 offsets in a vector, got {tuple(cu_seqlens.shape)}"
        )
    B, T = x.shape[:2]
    if B != 1:
        raise ValueError(
            f"{name}: expected B = 1 with cu_seqlens, got B = {B}; pack along T instead"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"cu_seqlens: expected a tensor on {x.device} like {name}, got one on "
            f"{cu_seqlens.device}"
        )
    if has_values(cu_seqlens):
        remember(cu_seqlens, ("checked", T), partial(_check_values, cu_seqlens, T))


def _check_values(cu_seqlens: Tensor, T: int) -> bool:
    """True, for `remember`; or a ValueError."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != T:
        raise ValueError(
            f"cu_seqlens: expected offsets from 0 to T = {T}, got {offsets[0]} to {offsets[-1]}"
        )
    for n, (start, end) in enumerate(pairwise(offsets)):
        if end <= start:
            raise ValueError(
                f"cu_seqlens: expected increasing offsets, got {start} then {end} at index {n}; "
                "drop empty sequences"
            )
    return True
