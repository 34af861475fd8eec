"""Inner loops as functions of functions: gradient descent with its own adjoint, and tools around it.

A loss here maps `(phi, context)` to one value per task, `[B]`. Tasks are independent, so the gradient of the sum over
tasks holds every task's own gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree

from metalearn.episode import Params

Loss = Callable[[Params, Any], Tensor]
Trajectory = list[Params]
"""Parameters after 0, 1, ..., K steps."""
Product = Callable[[Params], Params]
"""A linear map of leaves `[B, *shape]`, for each task by itself."""


def per_task(params: Params, tasks: int, shapes: dict[str, torch.Size]) -> Params:
    """Give every leaf a task axis: shared leaves (of the shape in `shapes`) are expanded, others kept."""
    return {k: _ForEachTask.apply(p, tasks) if p.dim() == len(shapes[k]) else p for k, p in params.items()}


class _ForEachTask(Function):
    """`expand` by a first axis; gradients are summed in their own memory order, which may not be that of p."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, tasks: int) -> Tensor:
        return p.expand(tasks, *p.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), strides = grads, grads[0].stride()
        order = sorted(range(1, g.dim()), key=lambda d: -strides[d])
        total = g.permute(0, *order).sum(0)
        return total.permute([order.index(d) for d in range(1, g.dim())]), None


def gradient(loss: Tensor, params: Params, *, create_graph: bool = False) -> Params:
    """d sum(loss) / d params; zeros for a parameter that the loss does not touch."""
    leaves = list(params.values())
    grads = torch.autograd.grad(loss.sum(), leaves, create_graph=create_graph, materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def gradient_descent(
    loss: Loss,
    start: Params,
    context: Any,
    lr: float | Tensor | Params,
    steps: int,
    *,
    first_order: bool = False,
    remember: bool = True,
    clip: float | None = None,
) -> Trajectory:
    """phi <- phi - lr clipped(grad L(phi, context)), `steps` times; differentiable in start, context and lr.

    The derivative is the adjoint recursion v <- v - H (lr v), one Hessian-vector product a step, instead of a graph
    through all steps; where an entry of the gradient is clipped, lr v is zero. Everything that may need a gradient must
    come in through `start`, `context` or `lr`: a tensor that `loss` captures is a constant. The result can be
    differentiated once; `unrolled` can be any number of times.

    Args:
        loss: maps (phi, context) to `[B]`, one value per task.
        start: leaves `[B, *shape]`.
        context: any nested structure of tensors that `loss` needs besides phi.
        lr: step size: a number, a tensor that broadcasts against every leaf, or one for each leaf (Meta-SGD).
        steps: number of steps K >= 0.
        first_order: treat inner gradients as constants (FOMAML): d phi_K / d start = I, none for the context.
        remember: keep each step's graph for the adjoint; False recomputes it (memory constant in K, one more
            forward and backward pass of the support set a step).
        clip: bound on each entry of the gradient; None for none.

    Returns:
        The parameters after 0, 1, ..., K steps.
    """
    rates = lr if isinstance(lr, dict) else dict.fromkeys(start, lr)
    context_leaves, structure = pytree.tree_flatten(context)
    rate_leaves = [rates[k] for k in start]
    call = _Descent(loss, list(start), structure, steps, first_order, remember, clip)
    out = _GradientDescent.apply(call, *start.values(), *rate_leaves, *context_leaves)
    phis = [dict(zip(start, out[i : i + len(start)], strict=True)) for i in range(0, len(out), len(start))]
    return [start, *phis]


def unrolled(
    loss: Loss,
    start: Params,
    context: Any,
    lr: float | Tensor | Params,
    steps: int,
    *,
    first_order: bool = False,
    clip: float | None = None,
) -> Trajectory:
    """`gradient_descent` by ordinary automatic differentiation through all steps: its oracle, slower."""
    trajectory = [start]
    for _ in range(steps):
        phi = trajectory[-1]
        if not any(p.requires_grad for p in phi.values()):
            phi = {k: p.detach().requires_grad_() for k, p in phi.items()}
        with torch.enable_grad():
            g = gradient(loss(phi, context), phi, create_graph=not first_order)
            g = g if clip is None else {k: x.clamp(-clip, clip) for k, x in g.items()}
            trajectory.append({k: p - (lr[k] if isinstance(lr, dict) else lr) * g[k] for k, p in phi.items()})
    return trajectory


class _Descent:
    """The constants of one `gradient_descent` call."""

    def __init__(
        self,
        loss: Loss,
        names: list[str],
        structure: Any,
        steps: int,
        first_order: bool,
        remember: bool,
        clip: float | None = None,
    ):
        self.loss, self.names, self.structure, self.steps = loss, names, structure, steps
        self.first_order, self.remember, self.clip = first_order, remember, clip

    def gradient(self, phi: Sequence[Tensor], context: Sequence[Any], graph: bool) -> tuple[Tensor, ...]:
        """Inner gradients at phi (whose leaves require gradients)."""
        with torch.enable_grad():
            value = self.loss(dict(zip(self.names, phi, strict=True)), pytree.tree_unflatten(context, self.structure))
            return torch.autograd.grad(value.sum(), phi, create_graph=graph, materialize_grads=True)

    def clipped(self, g: Tensor) -> Tensor:
        """What a step follows of the gradient g, a constant."""
        g = g.detach()
        return g if self.clip is None else g.clamp(-self.clip, self.clip)

    def passed(self, v: Tensor, g: Tensor) -> Tensor:
        """The adjoint of `clipped` at g."""
        return v if self.clip is None else v * (g.detach().abs() <= self.clip)


class _GradientDescent(Function):
    @staticmethod
    def forward(ctx: Any, call: _Descent, *leaves: Any) -> tuple[Tensor, ...]:
        n = len(call.names)
        wanted = ctx.needs_input_grad[1:]
        adjoint = any(wanted) and not call.first_order
        rates = [r.detach() if isinstance(r, Tensor) else r for r in leaves[n : 2 * n]]
        context = [
            c.detach().requires_grad_(w and adjoint) if isinstance(c, Tensor) else c
            for c, w in zip(leaves[2 * n :], wanted[2 * n :], strict=True)
        ]
        phi, steps, out = [p.detach() for p in leaves[:n]], [], []
        for _ in range(call.steps):
            at = [p.detach().requires_grad_() for p in phi]
            grads = call.gradient(at, context, graph=adjoint and call.remember)
            # in the gradient's memory order, which is that of the operators that use phi next
            phi = [(call.clipped(g) * -r).add_(p) for p, r, g in zip(phi, rates, grads, strict=True)]
            keep = any(wanted) and (call.remember or call.first_order)
            steps.append((at, grads if keep else None))
            out += phi
        if any(wanted):
            ctx.call, ctx.steps, ctx.rates, ctx.context, ctx.adjoint = call, steps, rates, context, adjoint
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        call, rates, n = ctx.call, ctx.rates, len(ctx.call.names)
        wanted = ctx.needs_input_grad[1:]
        if len(ctx.steps) < call.steps:
            raise RuntimeError("the result of gradient_descent can be differentiated once only; its steps are freed")
        inputs = [c for c, w in zip(ctx.context, wanted[2 * n :], strict=True) if w and ctx.adjoint]
        v: list[Any] = [None] * n
        to_rates: list[Any] = [None] * n
        to_inputs: list[Any] = [None] * len(inputs)
        while ctx.steps:
            k = len(ctx.steps) - 1
            at, grads = ctx.steps.pop()  # frees the step's graph when this iteration ends
            v = _add(v, incoming[k * n : (k + 1) * n])
            if all(x is None for x in v):
                continue
            v = [torch.zeros_like(p) if x is None else x for x, p in zip(v, at, strict=True)]
            if grads is None:
                grads = call.gradient(at, ctx.context, graph=ctx.adjoint)
            if any(wanted[n : 2 * n]):
                more = [_rate_gradient(call.clipped(g), x, r) for g, x, r in zip(grads, v, rates, strict=True)]
                to_rates = _add(to_rates, more)
            if ctx.adjoint:
                cotangents = [call.passed(x * -r, g) for r, x, g in zip(rates, v, grads, strict=True)]
                pulled = _pull_back(grads, cotangents, [*at, *inputs])
                v, to_inputs = _add(v, pulled[:n]), _add(to_inputs, pulled[n:])
        pending = iter(to_inputs)
        to_context = [next(pending) if w and ctx.adjoint else None for w in wanted[2 * n :]]
        to_rates = [x if w else None for x, w in zip(to_rates, wanted[n : 2 * n], strict=True)]
        return None, *v, *to_rates, *to_context


def _add(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _rate_gradient(g: Tensor, v: Tensor, rate: Any) -> Tensor | None:
    return -(g * v).sum_to_size(rate.shape) if isinstance(rate, Tensor) else None


def _pull_back(
    grads: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], *, keep: bool = False
) -> tuple[Any, ...]:
    """Vector-Jacobian product of the inner gradients; None where an input has no influence."""
    live = [(g, c) for g, c in zip(grads, cotangents, strict=True) if g.requires_grad]
    if not live or not inputs:
        return (None,) * len(inputs)
    outputs, weights = zip(*live, strict=True)
    return torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=keep)


# ---- proximal problems and their implicit derivative -------------------------------------------------------------


def proximal_descent(
    loss: Loss, start: Params, context: Any, lr: float, lam: float, steps: int, *, pull_back: bool = False
) -> Iterator[Params]:
    """Gradient steps on L(phi, context) + lam/2 |phi - start|^2 from phi = start, without a graph.

    They converge where lr < 2 / (lambda_max + lam), lambda_max the largest curvature of L. Nothing of a step is kept,
    so memory does not grow with their number unless the caller keeps the iterates.

    Args:
        loss: maps (phi, context) to `[B]`.
        start: leaves `[B, *shape]`.
        context: any nested structure of tensors that `loss` needs besides phi.
        lr: step size.
        lam: weight of the proximal term; 0 for none.
        steps: number of steps K >= 0.
        pull_back: descend L alone, and let each iterate that is given out be one step of the proximal term behind
            (phi - lr lam (phi - start)): the solver of the authors of iMAML.

    Yields:
        The parameters after 0, 1, ..., K steps.
    """
    origin = {k: p.detach() for k, p in start.items()}
    context = pytree.tree_map_only(Tensor, Tensor.detach, context)
    phi = yielded = origin
    yield yielded
    for _ in range(steps):
        at = {k: p.detach().requires_grad_() for k, p in phi.items()}
        with torch.enable_grad():
            grads = gradient(loss(at, context), at)
        with torch.no_grad():
            if lam and not pull_back:
                grads = {k: g + lam * (phi[k] - origin[k]) for k, g in grads.items()}
            phi = {k: (g * -lr).add_(phi[k]) for k, g in grads.items()}  # in the gradient's memory order
            yielded = {k: torch.lerp(p, origin[k], lr * lam) for k, p in phi.items()} if lam and pull_back else phi
        yield yielded


def implicit(loss: Loss, phi: Params, start: Params, context: Any, lam: float, solve: Callable[..., Params]) -> Params:
    """The minimiser phi of L(phi, context) + lam/2 |phi - start|^2 as a differentiable function of start and context.

    By the implicit function theorem a cotangent v of phi becomes g = (I + H / lam)^-1 v in start, H the Hessian of L at
    phi, and minus the derivative of <grad L(phi, context), g> / lam in the context. How phi was found does not matter,
    and nothing of it is kept. The result can be differentiated once.

    Args:
        loss: maps (phi, context) to `[B]`; a tensor that it captures is a constant.
        phi: the minimiser, leaves `[B, *shape]`.
        start: leaves `[B, *shape]`.
        context: any nested structure of tensors.
        lam: weight of the proximal term, > 0.
        solve: maps (v -> H v, v), leaves `[B, *shape]`, to (I + H / lam)^-1 v, or to an approximation of it.

    Returns:
        phi.
    """
    leaves, structure = pytree.tree_flatten(context)
    call = _Descent(loss, list(start), structure, 0, first_order=False, remember=False)
    out = _Implicit.apply(call, list(phi.values()), lam, solve, *start.values(), *leaves)
    return dict(zip(start, out, strict=True))


class _Implicit(Function):
    @staticmethod
    def forward(ctx: Any, call: _Descent, phi: list[Tensor], lam: float, solve: Any, *leaves: Any) -> Any:
        wanted = ctx.needs_input_grad[4 + len(phi) :]
        ctx.context = [
            c.detach().requires_grad_(w) if isinstance(c, Tensor) else c
            for c, w in zip(leaves[len(phi) :], wanted, strict=True)
        ]
        ctx.call, ctx.phi, ctx.lam, ctx.solve, ctx.wanted = call, phi, lam, solve, wanted
        return tuple(p.detach() for p in phi)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        at = [p.detach().requires_grad_() for p in ctx.phi]
        grads = ctx.call.gradient(at, ctx.context, graph=True)
        v = dict(zip(ctx.call.names, incoming, strict=True))
        g = list(ctx.solve(partial(_curve, ctx.call.names, grads, at), v).values())
        inputs = [c for c, w in zip(ctx.context, ctx.wanted, strict=True) if w]
        crossed = iter(_pull_back(grads, [x / -ctx.lam for x in g], inputs))
        return *[None] * 4, *g, *(next(crossed) if w else None for w in ctx.wanted)


def _curve(names: list[str], grads: Sequence[Tensor], at: Sequence[Tensor], v: Params) -> Params:
    """H v, by pulling v back through the gradients' graph, which is kept."""
    pulled = _pull_back(grads, list(v.values()), at, keep=True)
    return {k: torch.zeros_like(p) if x is None else x for k, p, x in zip(names, at, pulled, strict=True)}


def hvp(loss: Loss, phi: Params, context: Any) -> Product:
    """v -> H v with H the Hessian of each task's loss(., context) at phi, by reverse over reverse.

    The gradient's graph is made once and serves every product.
    """
    at = {k: p.detach().requires_grad_() for k, p in phi.items()}
    with torch.enable_grad():
        grads = gradient(loss(at, context), at, create_graph=True)
    return partial(_curve, list(phi), list(grads.values()), list(at.values()))


class Solution(NamedTuple):
    """What conjugate gradient ends at.

    x: leaves `[B, *shape]`. steps: taken by each task, and residual: |A x - b| / |b| (0 if b is 0), and indefinite:
    whether it met p^T A p <= 0, all `[B]`.
    """

    x: Params
    steps: Tensor
    residual: Tensor
    indefinite: Tensor


def conjugate_gradient(product: Product, b: Params, steps: int, *, tolerance: float = 1e-10) -> Solution:
    """Solve A x = b for each task by `steps` steps of conjugate gradient from x = 0 (Hestenes & Stiefel 1952).

    A task stops by itself, and keeps its iterate, when |r|^2 <= tolerance |b|^2 for the residual r, and when the next
    direction p has p^T A p <= 0, so that A is not positive definite and x no minimiser of x^T A x / 2 - x^T b.
    The number of steps, and of products, is the same whatever the tasks do. Numbers that are not finite stay so.

    Args:
        product: v -> A v, A symmetric for each task; leaves `[B, *shape]`.
        b: right-hand sides.
        steps: products to spend; a task of n unknowns needs no more than n, but for rounding.
        tolerance: see above; relative, so that x is proportional to b.
    """
    x = {k: torch.zeros_like(v) for k, v in b.items()}
    r, p = b, b
    size = rr = task_dot(r, r)
    taken, indefinite = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.bool)
    active = ~(rr <= tolerance * size)  # NaN stays active
    for _ in range(steps):
        curved = product(p)
        curvature = task_dot(p, curved)
        indefinite |= active & (curvature <= 0)
        active = active & ~(curvature <= 0)
        step = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0)
        x = {k: x[k] + along_tasks(step, p[k]) * p[k] for k in x}
        r = {k: r[k] - along_tasks(step, p[k]) * curved[k] for k in r}
        before, rr = rr, task_dot(r, r)
        taken = taken + active
        active = active & ~(rr <= tolerance * size)
        beta = torch.where(active, rr / torch.where(active, before, 1.0), 0.0)
        p = {k: r[k] + along_tasks(beta, p[k]) * p[k] for k in p}
    return Solution(x, taken, (rr / torch.where(size == 0, 1.0, size)).sqrt(), indefinite)


def task_dot(a: Params, b: Params) -> Tensor:
    """`[B]`: the inner product of each task's leaves `[B, *shape]`."""
    # the last axis is for leaves of one number a task, whose empty list of axes would mean all
    return torch.stack([(a[k] * b[k]).unsqueeze(-1).sum(tuple(range(1, a[k].dim() + 1))) for k in a]).sum(0)


def along_tasks(value: Tensor, leaf: Tensor) -> Tensor:
    """`[B]`, shaped to broadcast against a leaf `[B, *shape]`."""
    return value.view(-1, *[1] * (leaf.dim() - 1))


def surrogate(value: Tensor, params: Params, grads: Params) -> Tensor:
    """`[B]` equal to `value`, whose gradient in `params` (leaves `[B, *shape]`) is `grads`."""
    terms = [((p - p.detach()) * grads[k].detach()).reshape(len(p), -1).sum(1) for k, p in params.items()]
    return value.detach() + torch.stack(terms).sum(0)
