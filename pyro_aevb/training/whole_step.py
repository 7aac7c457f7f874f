r"""An optimisation step as one graph: loss, gradient, clipping and Adam, compiled together, with no Python between.

Adam (Kingma & Ba 2014, arXiv 1412.6980, Algorithm 1) for a parameter :math:`\theta` with gradient g at its t-th step:

.. math::
    m \leftarrow m + (1 - \beta_1)(g - m), \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
    \theta \leftarrow \theta - \frac{\alpha}{1 - \beta_1^t} \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

Where loss or gradient is not finite, nothing changes. Parameters, buffers and the optimizer's state are
written in place, so that an eager step can follow at any time.
"""

import functools
import math
from collections.abc import Callable, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim import optimizer as torch_optimizer

from pyro_aevb.program.compiling import compile_graph, count_operations, reading, signature, trace
from pyro_aevb.program.staging import is_close
from pyro_aevb.randomness import seeded

__all__ = ["WholeStep", "can_be_whole"]

_UNUSUAL = ("amsgrad", "maximize", "differentiable")
"""Settings of Adam that make another rule of it, as does ``decoupled_weight_decay``, which older ones lack."""
_held_settings = itemgetter("betas", "eps", "weight_decay", *_UNUSUAL)


def can_be_whole(graph: nn.Module, optimizer: Optimizer) -> bool:
    """Tell whether a whole step knows the optimizer, torch's Adam in its usual form, of everything that a graph trains.

    A whole step works on real tensors without gaps between their entries, and trains all that the optimizer has. Parameters that
    get a gradient and are not the optimizer's count in the gradient's norm, which would have to be computed for that alone.
    """
    if type(optimizer) is not Adam or len(optimizer.param_groups) != 1:
        return False
    settings = optimizer.param_groups[0]
    own = {id(item) for item in settings["params"]}
    return (
        not any(settings.get(name) for name in (*_UNUSUAL, "decoupled_weight_decay"))
        and not _has_hooks(optimizer)
        and all(item.requires_grad for item in settings["params"])
        and all(id(item) in own for item in graph.parameters() if item.requires_grad)
        and all(
            torch.empty_like(item).stride() == item.stride() and not item.is_complex()
            for item in (*settings["params"], *graph.parameters(), *graph.buffers())
        )
    )


def _has_hooks(optimizer: Optimizer) -> bool:
    """Tell whether anything is called at a step or at a parameter's gradient, which a whole step would pass by."""
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everywhere = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    # Fabric and schedules wrap the method instead, and are told of steps otherwise
    parameters: list[Any] = optimizer.param_groups[0]["params"]
    return (
        any(own)
        or any(everywhere)
        or any(item._backward_hooks or item._post_accumulate_grad_hooks for item in parameters)
    )


def _dense(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return a batch in a row, its tensors without gaps, as a graph takes them."""
    items = (*args, *kwargs.values())
    return [item.contiguous() if isinstance(item, Tensor) else item for item in items]


class _Tensors(NamedTuple):
    """What a step reads and writes.

    Attributes:
        parameters: Trained parameters.
        averages: Adam's m of each.
        squares: Adam's v of each.
        step_size: The learning rate over 1 - beta_1^t.
        correction: The root of 1 - beta_2^t.
        frozen: Parameters that are not trained, and tensors from outside of modules.
        buffers: Buffers of model and guide.
    """

    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    step_size: Tensor
    correction: Tensor
    frozen: list[Tensor]
    buffers: list[Tensor]

    def flat(self) -> list[Tensor]:
        """Return them in a row."""
        lists = [item if isinstance(item, list) else [item] for item in self]
        return [tensor for part in lists for tensor in part]

    def like(self, tensors: Sequence[Tensor]) -> "_Tensors":
        """Read others off a row, in this order."""
        pending = iter(tensors)
        parts: Any = ([next(pending) for _ in part] if isinstance(part, list) else next(pending) for part in self)
        return _Tensors(*parts)


class WholeStep:
    """One optimisation step on a batch of fixed shape.

    Args:
        graph: A recorded run whose call returns loss and bound per row.
        optimizer: A plain Adam of its parameters (:func:`can_be_whole`).
        args: The batch to record on, as positional arguments.
        kwargs: The batch to record on, as keyword arguments.
        clip_norm: Largest norm of the gradient over all parameters.

    Attributes:
        num_operations: Operations of the graph.
        difference: What the compiled step's numbers differ in from the recorded run's; empty where they agree.
    """

    def __init__(
        self,
        graph: nn.Module,
        optimizer: Adam,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        clip_norm: float | None = None,
    ) -> None:
        self.graph, self.optimizer, self.clip_norm = graph, optimizer, clip_norm
        self.names = tuple(kwargs)
        batch = _dense(args, kwargs)
        self.signature = signature(batch)
        self.num_args = len(args)
        self.settings = optimizer.param_groups[0]
        self.tensors = self._gather(self.settings["params"])
        self.used = [True] * len(self.tensors.parameters)
        self.constants = self._constants()
        self._num_steps: int | None = None  # since the optimizer was told
        copies = [tensor.detach().clone() for tensor in (*self.tensors.flat(), *batch)]
        with seeded(0):
            traced = trace(self._step, *copies)
            self.num_operations = count_operations(traced)
            self.run = compile_graph(traced, *copies)
        self.difference = self._compare(batch)
        self._hold_state()

    def _gather(self, parameters: list[Tensor]) -> _Tensors:
        graph: Any = self.graph
        trained, outside = ({id(item) for item in items} for items in (parameters, graph.meta["outside"]))
        buffers = {id(buffer): buffer for buffer in graph.buffers()}
        dtype = functools.reduce(torch.promote_types, [parameter.dtype for parameter in parameters])
        one = torch.ones((), device=parameters[0].device, dtype=dtype)
        return _Tensors(
            parameters=list(parameters),
            averages=[torch.zeros_like(parameter) for parameter in parameters],
            squares=[torch.zeros_like(parameter) for parameter in parameters],
            step_size=one,
            correction=one.clone(),
            frozen=[*(item for item in graph.parameters() if id(item) not in trained), *graph.meta["outside"]],
            buffers=[buffer for key, buffer in buffers.items() if key not in outside],
        )

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a batch has the shapes that the step was recorded on, and the optimizer is as it was."""
        is_like = tuple(kwargs) == self.names and signature(_dense(args, kwargs)) == self.signature
        return (
            is_like
            and self._owns_state()
            and self._constants() == self.constants
            and not _has_hooks(self.optimizer)
            and (self._num_steps is not None or self._is_in_step())
        )

    def _owns_state(self) -> bool:
        """Tell whether the optimizer still has the settings and the state that the graph writes: loading a state replaces them."""
        groups, own = self.optimizer.param_groups, self.tensors.parameters
        if len(groups) != 1 or len(groups[0]["params"]) != len(own) or not all(map(is_, groups[0]["params"], own)):
            return False
        first = self.used.index(True)
        state = self.optimizer.state.get(self.tensors.parameters[first], {})
        return self.optimizer.param_groups[0] is self.settings and state.get("exp_avg") is self.tensors.averages[first]

    def _constants(self) -> tuple[Any, ...]:
        """Return what of Adam's settings the graph holds; a schedule may change them."""
        return _held_settings(self.settings)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """Take a step and return the bound in nats per row; ``None`` where nothing was changed."""
        if self._num_steps is None:
            self._num_steps = int(self._steps()[0])
        beta1, beta2 = self.settings["betas"]
        number = self._num_steps + 1
        self.tensors.step_size.fill_(float(self.settings["lr"]) / (1 - beta1**number))
        self.tensors.correction.fill_(math.sqrt(1 - beta2**number))
        bound, is_finite = self.run(*self.flat, *_dense(args, kwargs))
        if not is_finite:
            return None
        self._num_steps = number
        return float(bound)

    def _hold_state(self) -> None:
        """Keep the state where the optimizer looks for it; what it has from earlier steps is taken over."""
        for parameter, average, square, is_used in zip(*self.tensors[:3], self.used, strict=True):
            state = self.optimizer.state[parameter]
            if state:
                average.copy_(state["exp_avg"])
                square.copy_(state["exp_avg_sq"])
            if is_used:
                # of the type that torch makes
                dtype = torch.float32 if self.settings.get("fused") else torch.get_default_dtype()
                state.setdefault("step", torch.zeros((), device=parameter.device, dtype=dtype))
                state["exp_avg"], state["exp_avg_sq"] = average, square
            elif not state:
                del self.optimizer.state[parameter]
        self.flat = self.tensors.flat()

    def _steps(self) -> list[Tensor]:
        """Return the numbers of steps behind the parameters that have gradients."""
        used = [parameter for parameter, is_used in zip(self.tensors.parameters, self.used, strict=True) if is_used]
        states = [self.optimizer.state.get(parameter, {}) for parameter in used]
        return [state["step"] for state in states if "step" in state]

    def _is_in_step(self) -> bool:
        """Tell whether all parameters have as many steps behind them; those that were frozen for a while have fewer."""
        steps = self._steps()
        return len(steps) == sum(self.used) and len(set(map(float, steps))) == 1

    def leave(self) -> None:
        """Tell the optimizer how many steps were taken, before it takes one itself or its state is read."""
        if self._num_steps is not None and self._owns_state():
            for step in self._steps():
                step.fill_(self._num_steps)
        self._num_steps = None

    def _step(self, *flat: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step, written in operations that can be traced."""
        state, batch = self.tensors.like(flat), flat[len(self.tensors.flat()) :]
        saved = [buffer.clone() for buffer in state.buffers]
        loss, bound, gradients = self._differentiate(state, batch)
        present = [gradient for gradient in gradients if gradient is not None]
        self.used = [gradient is not None for gradient in gradients]
        norm, factor = self._clipping(present)
        # a reduction: it is computed once, where a product of two flags would be computed anew for each entry of a parameter
        is_finite = torch.stack([loss.to(norm), norm]).isfinite().all()
        update = self._adam(state.step_size, state.correction)
        for parameter, average, square, gradient in zip(*state[:3], gradients, strict=True):
            if gradient is not None:
                for old, new in zip(
                    (parameter, average, square), update(parameter, average, square, factor * gradient), strict=True
                ):
                    old.copy_(torch.where(is_finite, new, old))
        for buffer, old in zip(state.buffers, saved, strict=True):
            buffer.copy_(torch.where(is_finite, buffer, old))
        return bound.clone(), is_finite

    def _differentiate(self, state: _Tensors, batch: Sequence[Any]) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Run the recorded graph at other tensors in the place of its own; return loss, bound and gradients."""
        live = [parameter.detach().requires_grad_() for parameter in state.parameters]
        own = self.tensors
        others = {id(a): b for a, b in zip(own.parameters + own.frozen, live + state.frozen, strict=True)}
        others |= {id(a): b for a, b in zip(own.buffers, state.buffers, strict=True)}
        args, kwargs = batch[: self.num_args], dict(zip(self.names, batch[self.num_args :], strict=True))
        with reading(self.graph, others), torch.enable_grad():
            loss, bound = self.graph(*args, **kwargs)
            gradients = torch.autograd.grad(loss, live, allow_unused=True)
        return loss, bound.detach(), gradients

    def _adam(self, step_size: Tensor, correction: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """Return Adam's rule at one step, from (parameter, m, v, gradient) to the first three anew."""
        (beta1, beta2), eps, decay, *_ = self._constants()

        def update(
            parameter: Tensor, average: Tensor, square: Tensor, gradient: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            gradient = gradient + decay * parameter if decay else gradient
            average = average + (1 - beta1) * (gradient - average)
            square = beta2 * square + (1 - beta2) * gradient.square()
            denominator = square.sqrt() / correction.to(square) + eps
            return parameter - step_size.to(parameter) * average / denominator, average, square

        return update

    def _compare(self, batch: Sequence[Any]) -> str:
        """Take one compiled step on copies, and hold its bound and its m / (1 - beta_1) against a recorded run under one seed.

        The rows are those of the batch in reverse, so that no number of the batch can have got into the graph.
        """
        batch = [item.flip(0) if isinstance(item, Tensor) and item.dim() else item for item in batch]
        copies = self.tensors.like([tensor.detach().clone() for tensor in self.tensors.flat()])
        with seeded(0):
            bound, is_finite = self.run(*copies.flat(), *batch)
        again = self.tensors.like([tensor.detach().clone() for tensor in self.tensors.flat()])
        with seeded(0), torch.no_grad():
            _, expected, gradients = self._differentiate(again, batch)
        if not is_finite:
            return ""  # a first batch that is skipped tells nothing, and every step is told whether it is
        if not is_close(expected, bound):
            return f"the compiled bound is {bound.item():.6g}, the recorded one {expected.item():.6g}"
        for name, average, gradient in zip(self._names(), copies.averages, self._expected(gradients), strict=True):
            if gradient is not None and not is_close(
                gradient, average / (1 - self.settings["betas"][0]), like=gradients
            ):
                return f"the compiled gradient of parameter {name!r} is not the recorded one"
        return ""

    def _names(self) -> list[str]:
        known = {id(parameter): name for name, parameter in self.graph.named_parameters()}
        return [known.get(id(parameter), "") for parameter in self.tensors.parameters]

    def _expected(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return what Adam averages: gradients, clipped, and with the weights' decay."""
        factor = self._clipping([gradient for gradient in gradients if gradient is not None])[1]
        decay = self.settings["weight_decay"]
        pairs = zip(gradients, self.tensors.parameters, strict=True)
        return [None if gradient is None else factor * gradient + decay * p.detach() for gradient, p in pairs]

    def _clipping(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor | float]:
        """Return the norm of a gradient over all parameters, and what it is multiplied by."""
        norm = nn.utils.get_total_norm(gradients, foreach=False)
        if self.clip_norm is None:
            return norm, 1.0
        # the lesser of two as a reduction, which is computed once
        return norm, torch.stack([self.clip_norm / (norm + 1e-6), torch.ones_like(norm)]).amin()
