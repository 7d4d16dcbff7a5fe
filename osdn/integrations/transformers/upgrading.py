"""transformers' own Gated DeltaNet models with OSDN's preconditioner in their linear layers.

    model = upgrade(AutoModelForCausalLM.from_pretrained(...))   # the same function
    Trainer(model, ...).train()                                  # d_1 is trained with the rest
    model.save_pretrained("DIR")
    model = load_upgraded("DIR")

The operator gets keys of length 1, so with d_1 = 1 the preconditioner stays at 1
(docs/explanation/operator.md, fact 3) until training moves d_1. An upgraded model has a model_type
of its own, osdn_ and transformers' name: transformers alone refuses it, where it would otherwise
leave the preconditioners out without an error.
"""

import copy
import inspect
import json
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from osdn.errors import UserError
from osdn.integrations.transformers.functions import Preconditioned, known_modules, rule
from osdn.ops.validation import check_box_holds_one, check_rule

PREFIX = "osdn_"  # of an upgraded model's model_type
RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def upgrade(
    model: PreTrainedModel,
    *,
    eta: float = 1.0,
    precond_min: float | None = None,
    precond_max: float | None = None,
) -> PreTrainedModel:
    """Give each linear layer of the model a preconditioner, in place; returns the model.

    Its function stays as it is up to rounding. Each layer gets the parameter `initial_precond`
    [value heads, K], d_1, which starts at 1; caches hold d beside the memory.

    Args:
        model: one of transformers' gated models, such as Qwen3_5ForCausalLM.
        eta, precond_min, precond_max: of online_scaled_delta_rule, for all layers.

    Raises:
        ValueError: a model without gated linear layers, or an upgraded one; an option outside its
            range.
        RuntimeError: the functions of the installed transformers have another signature.
    """
    check_rule(eta, precond_min, precond_max)
    check_box_holds_one(precond_min, precond_max)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a model of transformers, got {type(model).__name__}")
    if model.config.model_type.startswith(PREFIX):
        raise ValueError("model: expected one that is not upgraded yet, got an upgraded one")
    options = {"eta": eta, "precond_min": precond_min, "precond_max": precond_max}
    _upgrade_layers(model, options)
    _give_own_config(model)
    original: Any = type(model)
    config: Any = model.config
    original_config: Any = type(config)
    upgraded = _model_class(original, original_config)
    config.__class__ = upgraded.config_class
    # A configuration that was read from a file has its model_type itself, over its class's.
    config.model_type, config.osdn = upgraded.config_class.model_type, options
    model.__class__ = upgraded
    # What from_pretrained renamed and joined for the original model_type is saved as it is now: the
    # new model_type has no such conversion, and would not find the weights again.
    vars(model).pop("_weight_conversions", None)
    return model


def _give_own_config(model: PreTrainedModel) -> None:
    """A copy of the configuration for this model only; others may be built from the same one."""
    copies: dict[int, Any] = {}  # id of the configuration, or of one inside it -> its copy
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        if (own := copies.get(id(vars(module).get("config")))) is not None:
            module.config = own


def load_upgraded(directory: str | Path, **options: Any) -> PreTrainedModel:
    """The upgraded model that was saved in a directory.

    options: of transformers' from_pretrained, such as dtype and device_map.

    Raises:
        UserError: no upgraded model there, or one without its weights or a part of them.
    """
    path = Path(directory) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        name, kind = str(found["architectures"][0]), str(found["model_type"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: expected the configuration of a model: {error}") from error
    original, plain = name.removeprefix(CLASS_PREFIX), kind.removeprefix(PREFIX)
    classes = [vars(module)[original] for module in known_modules() if original in vars(module)]
    if plain == kind or plain not in CONFIG_MAPPING or original == name or not classes:
        raise UserError(
            f"{path}: expected an upgraded model, saved by osdn, got a {name} of type {kind}; "
            "use AutoModelForCausalLM, and upgrade(model)"
        )
    config: Any = CONFIG_MAPPING[plain]
    loader: Any = _model_class(classes[0], config)
    try:
        model, told = loader.from_pretrained(directory, **options, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: no weights to load: {error}") from error
    if missing := sorted(told["missing_keys"]):
        raise UserError(f"{directory}: weights missing: {', '.join(missing[:3])}")
    return model


CLASS_PREFIX = "OSDN"  # of an upgraded model's class


@cache
def _config_class(original: Any) -> Any:
    """The class of an upgraded model's configuration, one for all models that have the original."""
    body = {"model_type": f"{PREFIX}{original.model_type}", "__module__": __name__, "osdn": None}
    made: Any = type(f"{CLASS_PREFIX}{original.__name__}", (original,), body)
    AutoConfig.register(made.model_type, made, exist_ok=True)
    return made


@cache
def _model_class(original: Any, original_config: Any) -> Any:
    """The class of an upgraded model: transformers' own, whose linear layers are upgraded."""
    config_class = _config_class(original_config)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # Classifiers make their model with AutoModel, which knows the original configuration.
        config.__class__ = original_config
        try:
            original.__init__(self, config, *args, **kwargs)
        finally:
            config.__class__ = config_class
        _upgrade_layers(self, config.osdn)

    body = {
        "config_class": config_class,
        "__init__": __init__,
        "__module__": __name__,
        # In bfloat16 a d_1 near 1 moves in steps of 1/128.
        "_keep_in_fp32_modules_strict": {
            *(original._keep_in_fp32_modules_strict or ()), "initial_precond",
        },
    }  # fmt: skip
    made = type(f"{CLASS_PREFIX}{original.__name__}", (original,), body)
    if original.__name__.endswith("ForCausalLM"):
        AutoModelForCausalLM.register(config_class, made, exist_ok=True)
    return made


def _upgrade_layers(model: nn.Module, options: dict[str, Any]) -> None:
    """Make every linear layer of the model an upgraded one, with d_1 = 1."""
    modules = {module.__name__: module for module in known_modules()}
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if type(layer).__module__ in modules and type(layer).__name__.endswith("GatedDeltaNet")
    ]
    if not layers:
        raise ValueError(
            f"model: expected one with Gated DeltaNet layers of transformers, got a "
            f"{type(model).__name__}, which has none"
        )
    for layer in layers:
        shape, device = (layer.num_v_heads, layer.head_k_dim), layer.A_log.device
        layer.initial_precond = nn.Parameter(torch.ones(shape, device=device))  # float32
        layer.osdn = options
        original: Any = type(layer)
        layer.__class__ = _layer_class(original, modules[original.__module__])


@cache
def _layer_class(original: Any, module: ModuleType) -> Any:
    """transformers' layer, whose forward calls our rule with the layer's own d_1.

    Its forward's code runs as it is, with other functions under three of its global names. What it
    hands on as keyword arguments reaches all three.
    """

    def convolution(*args: Any, preconditioned: Preconditioned, **kwargs: Any) -> Tensor:
        return module.causal_conv1d_fn(*args, **kwargs)  # whichever is there now

    code: Any = inspect.unwrap(original.forward)
    names = {**vars(module), **dict.fromkeys(RULES, rule), "causal_conv1d_fn": convolution}
    inner: Any = FunctionType(code.__code__, names, code.__name__, code.__defaults__)
    inner.__kwdefaults__ = code.__kwdefaults__
    if hooks := names.get("force_accelerate_hooks"):
        inner = hooks("conv1d")(inner)

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        low, high = self.osdn["precond_min"], self.osdn["precond_max"]
        start = self.initial_precond if low is None else self.initial_precond.clamp(low, high)
        given = Preconditioned(start, self.osdn)
        return inner(self, hidden_states, *args, preconditioned=given, **kwargs)

    body = {"forward": forward, "__module__": __name__}
    return type(f"{CLASS_PREFIX}{original.__name__}", (original,), body)
