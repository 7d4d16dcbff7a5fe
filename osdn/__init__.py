"""Online Scaled DeltaNet (arXiv 2605.13473): operator, layer, model, training, measurement.

The public names are imported on first use, so that `import osdn` and `osdn --help` load neither
torch nor transformers. The model is registered with transformers' Auto classes all the same: at
once where they are loaded already, else when they are.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from osdn.layers.osdn import OSDN
    from osdn.model.cache import OSDNCache
    from osdn.model.configuration import OSDNConfig
    from osdn.model.modeling import (
        OSDNForCausalLM,
        OSDNForSequenceClassification,
        OSDNForTokenClassification,
        OSDNModel,
    )
    from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step

__version__ = "0.1.0"

__all__ = [
    "OSDN",
    "OSDNCache",
    "OSDNConfig",
    "OSDNForCausalLM",
    "OSDNForSequenceClassification",
    "OSDNForTokenClassification",
    "OSDNModel",
    "online_scaled_delta_rule",
    "online_scaled_delta_step",
]

_HOMES = {
    "OSDN": "osdn.layers.osdn",
    "OSDNCache": "osdn.model.cache",
    "OSDNConfig": "osdn.model.configuration",
    "OSDNForCausalLM": "osdn.model.modeling",
    "OSDNForSequenceClassification": "osdn.model.modeling",
    "OSDNForTokenClassification": "osdn.model.modeling",
    "OSDNModel": "osdn.model.modeling",
    "online_scaled_delta_rule": "osdn.ops",
    "online_scaled_delta_step": "osdn.ops",
}
_REGISTERS = "osdn.model.modeling"  # its import tells transformers' Auto classes of the model


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        if _HOMES[name] != "osdn.ops":
            import_module(_REGISTERS)
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value  # the next access finds it here
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _importing() -> bool:
    """Whether one of our modules is being imported: it asked for transformers, not the user."""
    specs = [vars(m).get("__spec__") for n, m in [*sys.modules.items()] if n.startswith("osdn.")]
    return any(getattr(spec, "_initializing", False) for spec in specs)


class _Registering:
    """The loader of the package transformers that registers our model once it is loaded.

    Its submodules are imported on first use, so none of them is half imported at that moment.
    """

    def __init__(self, loader: Any):
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if not _importing():
            import_module(_REGISTERS)

    def __getattr__(self, name: str) -> Any:  # create_module, get_source and the like
        return getattr(self.loader, name)


class _Finder:
    """Finds the package transformers as the finders after it do, with a loader that registers."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(cast(Any, self))
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = cast(Any, _Registering(spec.loader))
        return spec


if "transformers" in sys.modules:
    import_module(_REGISTERS)
else:
    sys.meta_path.insert(0, cast(Any, _Finder()))
