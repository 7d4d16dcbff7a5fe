"""transformers' own Gated DeltaNet models on a CPU, by this library's operator.

transformers' gated models (Qwen3-Next, Qwen3.5, OLMo-Hybrid) compute the gated delta rule on a CPU
with a PyTorch loop over chunks. Where flash-linear-attention is installed they call its GPU kernels
instead, and fail on a CPU. `accelerate` replaces three functions of each model's module:

    torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule
        by functions.rule, the gated delta rule by this library's operator
    causal_conv1d_fn
        by functions.convolution

Tensors on other devices take transformers' own functions, unchanged.
"""

import inspect
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

from torch import Tensor

from osdn.integrations.transformers.functions import SIGNATURES, convolution, known_modules, rule


class accelerate:
    """Replace transformers' functions at once; restore them at the end of a `with`, or by hand.

    Doing it twice changes nothing, and what was replaced is restored only by the one that did it.

    Raises:
        RuntimeError: the functions of the installed transformers have another signature. Nothing
            is changed then.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[ModuleType, str, Callable[..., Any]]] = []
        for module in known_modules():
            for name in SIGNATURES:
                original = getattr(module, name)
                if not hasattr(original, "osdn_original"):
                    self._replaced.append((module, name, original))
        for module, name, original in self._replaced:
            ours = convolution if name == "causal_conv1d_fn" else rule
            setattr(module, name, _on_cpu(ours, original))

    def restore(self) -> None:
        """Put transformers' own functions back."""
        for module, name, original in self._replaced:
            setattr(module, name, original)
        self._replaced = []

    def __enter__(self) -> "accelerate":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def _on_cpu(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` where the first tensor is on a CPU, else transformers' function."""

    name = next(iter(inspect.signature(original).parameters))

    def choose(*args: Any, **kwargs: Any) -> Any:
        first: Tensor = args[0] if args else kwargs[name]
        function = ours if first.device.type == "cpu" else original
        return function(*args, **kwargs)

    choose.osdn_original = original  # type: ignore[attr-defined]
    choose.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return choose
