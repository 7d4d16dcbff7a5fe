"""Each backend as torch.library custom operators, which torch.compile sees without a graph break.

A backend is a module with four functions over plain tensors (shapes as in osdn.ops.interface; the
gates, initial_state [N, H, K, V] and initial_precond [N, H, K] contiguous and in the accumulation
dtype, float32, or float64 for float64 input):

    forward(q, k, v, beta, log_gamma, initial_state, initial_precond, cu_seqlens, rule, save)
        -> (o, final_state, final_precond, saved)     saved: what backward wants; used if save
    saved_like(q, k, v, beta, log_gamma, initial_state, initial_precond, cu_seqlens, rule, save)
        -> empty tensors of the shapes and dtypes of saved, of no data-dependent size
    backward(do, dfinal_state, dfinal_precond, *the eight tensors above*, saved, rule)
        -> [dq, dk, dv, dbeta, dinitial_state, dinitial_precond] + [dlog_gamma] if it was given
    step(q, k, v, beta, log_gamma, state, precond, rule) -> o; state and precond change in place;
        one that takes `slots` too is in interface.TAKE_SLOTS

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

from osdn.ops.operands import Rule


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
    rule.register_autograd(
        lambda ctx, *gradients: differentiate(ctx, *gradients[:3]),
        setup_context=lambda ctx, inputs, output: _keep(ctx, inputs, output[3]),
    )
    return Backend(rule, _eager_rule(name, module), *_step(name, module))


def _rule(name: str, module: Module) -> CustomOpDef:
    def rule_op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_gamma: Tensor | None,
        initial_state: Tensor,
        initial_precond: Tensor,
        cu_seqlens: Tensor | None,
        eta: float,
        beta_aware: bool,
        precond_min: float | None,
        precond_max: float | None,
        scale: float,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        tensors = (q, k, v, beta, log_gamma, initial_state, initial_precond, cu_seqlens)
        rule = Rule(eta, beta_aware, precond_min, precond_max, scale)
        return module().forward(*tensors, rule, save)

    rule = torch.library.custom_op(f"osdn::{name}", rule_op, mutates_args=())

    @rule.register_fake
    def _(q, k, v, beta, log_gamma, initial_state, initial_precond, cu_seqlens, *rest):
        tensors = (q, k, v, beta, log_gamma, initial_state, initial_precond, cu_seqlens)
        *numbers, save = rest
        saved = module().saved_like(*tensors, Rule(*numbers), save)
        final_states = torch.empty_like(initial_state), torch.empty_like(initial_precond)
        return v.new_empty(v.shape), *final_states, saved

    return rule


def _backward(name: str, module: Module) -> CustomOpDef:
    def backward_op(
        do: Tensor,
        dfinal_state: Tensor,
        dfinal_precond: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_gamma: Tensor | None,
        initial_state: Tensor,
        initial_precond: Tensor,
        cu_seqlens: Tensor | None,
        saved: list[Tensor],
        eta: float,
        beta_aware: bool,
        precond_min: float | None,
        precond_max: float | None,
        scale: float,
    ) -> list[Tensor]:
        tensors = (q, k, v, beta, log_gamma, initial_state, initial_precond, cu_seqlens)
        rule = Rule(eta, beta_aware, precond_min, precond_max, scale)
        return module().backward(do, dfinal_state, dfinal_precond, *tensors, saved, rule)

    backward = torch.library.custom_op(f"osdn::{name}_backward", backward_op, mutates_args=())

    @backward.register_fake
    def _(do, dS, dd, q, k, v, beta, log_gamma, initial_state, initial_precond, *rest):
        wanted = [q, k, v, beta, initial_state, initial_precond]
        wanted += [] if log_gamma is None else [log_gamma]
        return [x.new_empty(x.shape) for x in wanted]

    return backward


def _step(name: str, module: Module) -> tuple[CustomOpDef, Callable[..., Tensor]]:
    """The operator, and the same without PyTorch's dispatcher."""

    def step_op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_gamma: Tensor | None,
        state: Tensor,
        precond: Tensor,
        slots: Tensor | None,
        eta: float,
        beta_aware: bool,
        precond_min: float | None,
        precond_max: float | None,
        scale: float,
    ) -> Tensor:
        rule = Rule(eta, beta_aware, precond_min, precond_max, scale)
        options = () if slots is None else (slots,)
        return module().step(q, k, v, beta, log_gamma, state, precond, rule, *options)

    step = torch.library.custom_op(f"osdn::{name}_step", step_op, mutates_args=("state", "precond"))

    @step.register_fake
    def _(q, k, v, *rest):
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

    what = f"online_scaled_delta_rule: backend={name!r}, unlike 'reference',"

    def run_backward(*arguments: Any) -> list[Tensor]:
        return module().backward(*arguments[:-5], Rule(*arguments[-5:]))

    class EagerRule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
            *results, saved = module().forward(*inputs[:8], Rule(*inputs[8:13]), inputs[13])
            _keep(ctx, inputs, saved)
            return results[0], results[1], results[2]

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                found = _differentiate(run_backward, ctx, *gradients)
            return once(what, ctx, gradients, found)

    return EagerRule.apply


def _keep(ctx: Any, inputs: tuple, saved: list[Tensor]) -> None:
    # Nobody differentiates through what is saved: zeros for it would cost as much as it does.
    ctx.set_materialize_grads(False)
    ctx.has_gamma = inputs[4] is not None
    ctx.rule, ctx.tensors_given = inputs[8:13], [x is not None for x in inputs[:8]]
    ctx.save_for_backward(*(x for x in inputs[:8] if x is not None), *saved)


def _differentiate(
    backward: Callable[..., list[Tensor]],
    ctx: Any,
    do: Tensor | None,
    dfinal_state: Tensor | None,
    dfinal_precond: Tensor | None,
) -> tuple[Tensor | None, ...]:
    kept = iter(ctx.saved_tensors)
    tensors: list[Any] = [next(kept) if given else None for given in ctx.tensors_given]
    results = (tensors[2], do), (tensors[5], dfinal_state), (tensors[6], dfinal_precond)
    given = [torch.zeros_like(like) if x is None else x for like, x in results]
    gradients = backward(*given, *tensors, list(kept), *ctx.rule)
    dq, dk, dv, dbeta, dstate, dprecond, *dlog_gamma = gradients
    dgamma = dlog_gamma[0] if ctx.has_gamma else None
    return dq, dk, dv, dbeta, dgamma, dstate, dprecond, None, *[None] * 6
