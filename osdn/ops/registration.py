"""Each backend as torch.library custom operators, which torch.compile sees without a graph break.

A backend is a module with four functions over the tuples of osdn.ops.operands:

    forward(operands, options, save) -> (o, final_state, final_precond, saved)
        saved: what backward wants; its content counts only if save
    saved_like(operands, options, save) -> empty tensors of the shapes and dtypes of saved; their
        sizes depend on no values
    backward(do, dfinal_state, dfinal_precond, operands, saved, options) -> gradients, in the order
        of operands.differentiable()
    step(token, options) -> o; token.state and token.precond change in place

No output may alias an input. `register` is all there is to adding one; its module is imported at
the first call, so that a backend's dependencies (numba, Triton) cost nothing until then.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from osdn.ops.operands import Operands, Options, Token


class Backend(NamedTuple):
    """The operators of one backend; see the interface for what they compute.

    The eager ones do without PyTorch's dispatcher for custom operators, which takes longer than a
    small step or several kernel launches do. They give what the others give, but for `saved`.
    """

    rule: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]
    eager_rule: Callable[..., tuple[Tensor, Tensor, Tensor]]
    step: Callable[..., Tensor]
    eager_step: Callable[..., Tensor]


Module = Callable[[], Any]
_OPERANDS, _TOKEN = len(Operands._fields), len(Token._fields)


def _unflatten(flat: Sequence[Any]) -> tuple[Operands, Options]:
    """The arguments of an operator, which takes no tuples, as the backends take them."""
    return Operands(*flat[:_OPERANDS]), Options(*flat[_OPERANDS:])


def dispatched(x: Tensor) -> bool:
    """Whether operators are looked at as they are called: by a tracer, a tensor subclass or a mode
    (a counter of operations, a policy of activation checkpointing), or on the meta device."""
    seen = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return seen or type(x) is not Tensor or x.is_meta


def register(name: str, module_name: str) -> Backend:
    """Define osdn::{name}, its _backward and its _step over the module's functions."""
    module = partial(import_module, module_name)
    rule, backward = _rule(name, module), _backward(name, module)
    differentiate = partial(_differentiate, backward)
    # autograd for the operator that a tracer sees; eager_rule below brings its own.
    rule.register_autograd(
        lambda ctx, *gradients: differentiate(ctx, *gradients[:3]),
        setup_context=lambda ctx, inputs, output: _keep(ctx, inputs, output[3]),
    )
    return Backend(rule, _eager_rule(name, module), *_step(name, module))


# PyTorch's names for the types of the fields of Operands, Token and Options.
_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float",
          float | None: "float?"}  # fmt: skip


def _arguments(*tuples: Any, written: Sequence[str] = ()) -> str:
    """The fields of named tuples as arguments in a schema; `written`: the ones it writes to."""
    # In the order of the fields, since the tuples are passed flat: schemas know no tuples.
    fields = [field for one in tuples for field in one.__annotations__.items()]
    marks = {name: f"Tensor({chr(97 + i)}!)" for i, name in enumerate(written)}
    return ", ".join(f"{marks.get(name, _KINDS[kind])} {name}" for name, kind in fields)


def _rule(name: str, module: Module) -> CustomOpDef:
    """osdn::{name}, of the operands, the options and `save`."""

    def rule_op(*flat: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        *given, save = flat
        return module().forward(*_unflatten(given), save)

    schema = f"({_arguments(Operands, Options)}, bool save) -> (Tensor, Tensor, Tensor, Tensor[])"
    rule = torch.library.custom_op(f"osdn::{name}", rule_op, mutates_args=(), schema=schema)

    # Shapes only, for tracers. Inside torch.compile nothing reads the offsets' values.
    @rule.register_fake
    def _(*flat: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        *given, save = flat
        operands, options = _unflatten(given)
        S, d, v = operands.initial_state, operands.initial_precond, operands.v
        saved = module().saved_like(operands, options, save)
        return v.new_empty(v.shape), torch.empty_like(S), torch.empty_like(d), saved

    return rule


def _backward(name: str, module: Module) -> CustomOpDef:
    """osdn::{name}_backward, of the three cotangents, the operands, the options and `saved`."""

    def backward_op(do: Tensor, dS: Tensor, dd: Tensor, *flat: Any) -> list[Tensor]:
        *given, saved = flat
        operands, options = _unflatten(given)
        return module().backward(do, dS, dd, operands, saved, options)

    arguments = _arguments(Operands, Options)
    schema = f"(Tensor do, Tensor dS, Tensor dd, {arguments}, Tensor[] saved) -> Tensor[]"
    backward = torch.library.custom_op(
        f"osdn::{name}_backward", backward_op, mutates_args=(), schema=schema
    )

    @backward.register_fake
    def _(do: Tensor, dS: Tensor, dd: Tensor, *flat: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in _unflatten(flat[:-1])[0].differentiable()]

    return backward


def _step(name: str, module: Module) -> tuple[CustomOpDef, Callable[..., Tensor]]:
    """osdn::{name}_step, of a token and the options, and the same without the dispatcher."""

    def step_op(*flat: Any) -> Tensor:
        return module().step(Token(*flat[:_TOKEN]), Options(*flat[_TOKEN:]))

    written = ("state", "precond")
    schema = f"({_arguments(Token, Options, written=written)}) -> Tensor"
    step = torch.library.custom_op(
        f"osdn::{name}_step", step_op, mutates_args=written, schema=schema
    )

    @step.register_fake
    def _(*flat: Any) -> Tensor:
        v = Token(*flat[:_TOKEN]).v
        return v.new_empty(v.shape)

    return step, step_op


class _Once(torch.autograd.Function):
    """Gradients as they are, in a graph that leads to what they depend on by way of an error."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor | None) -> tuple:
        ctx.what = what
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple:
        raise RuntimeError(f"{ctx.what} can be differentiated once, not twice")


def once(
    what: str, ctx: Any, cotangents: Sequence[Tensor | None], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What the backward of `what` returns, so that to differentiate it again is an error.

    PyTorch's once_differentiable leaves it without a graph where no cotangent needs a gradient, as
    a sum's does not, and where only an input is asked for: second derivatives come out as zeros.
    """
    if not torch.is_grad_enabled():  # nobody asked for create_graph
        return gradients
    depends_on = (*ctx.saved_tensors, *cotangents)
    return _Once.apply(what, len(gradients), *gradients, *depends_on)


def _eager_rule(name: str, module: Module) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The rule and its backward as a plain autograd function over the module's."""

    # No dispatcher, so no fake tensors and no compile: those take the operator above.
    what = f"online_scaled_delta_rule: backend={name!r}, unlike 'reference',"

    def run_backward(do: Tensor, dS: Tensor, dd: Tensor, *flat: Any) -> list[Tensor]:
        *given, saved = flat
        operands, options = _unflatten(given)
        return module().backward(do, dS, dd, operands, saved, options)

    class EagerRule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
            *given, save = flat
            o, S, d, saved = module().forward(*_unflatten(given), save)
            # The operands themselves are saved and no copies, with what the backend wants besides.
            _keep(ctx, flat, saved)
            return o, S, d

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            # Under create_graph autograd would record the backward, whose graph nobody may use.
            with torch.no_grad():
                found = _differentiate(run_backward, ctx, *gradients)
            return once(what, ctx, gradients, found)

    return EagerRule.apply


def _keep(ctx: Any, flat: tuple, saved: list[Tensor]) -> None:
    """Save the operands that are given, then `saved`."""
    # Nobody differentiates through what is saved: zeros for it would cost as much as it does.
    ctx.set_materialize_grads(False)
    operands, ctx.options = _unflatten(flat[:-1])
    ctx.given = [x is not None for x in operands]
    ctx.save_for_backward(*(x for x in operands if x is not None), *saved)


def _differentiate(
    backward: Callable[..., list[Tensor]],
    ctx: Any,
    do: Tensor | None,
    dfinal_state: Tensor | None,
    dfinal_precond: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradient of every argument of the operator; None for what has none."""
    kept = iter(ctx.saved_tensors)
    # save_for_backward takes no None: which were given is in ctx.given.
    tensors: list[Any] = [next(kept) if given else None for given in ctx.given]
    operands = Operands(*tensors)
    results = (
        (operands.v, do),
        (operands.initial_state, dfinal_state),
        (operands.initial_precond, dfinal_precond),
    )
    # A result that the loss did not use has no gradient: zeros, made only now.
    cotangents = [torch.zeros_like(like) if x is None else x for like, x in results]
    # Back to one entry an argument: None for absent operands, offsets and options.
    found = iter(backward(*cotangents, *operands, *ctx.options, list(kept)))
    gradients = [next(found) if given else None for given in ctx.given[:-1]]
    return *gradients, None, *[None] * len(ctx.options), None  # cu_seqlens, options, save
