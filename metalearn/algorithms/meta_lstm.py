"""Meta-LSTM (Ravi & Larochelle, ICLR 2017, https://openreview.net/forum?id=rJY0-Kcll)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metalearn.algorithms.pools import minibatches, take
from metalearn.episode import Episode, Examples, Params, Theta
from metalearn.functional import Trajectory, gradient, per_task
from metalearn.learner import MetaLearner
from metalearn.ops import Normalization, Statistics
from metalearn.ops.norm import Moments
from metalearn.parameters import Parameters
from metalearn.random import Key, TaskKey


def preprocess(x: Tensor, p: float = 10.0) -> tuple[Tensor, Tensor]:
    """Magnitude and sign apart: (log|x| / p, sign x) if |x| >= e^-p, else (-1, e^p x), of x's shape each.

    Of the paper's section on parameter sharing and preprocessing; zero takes the second branch.
    """
    return x.abs().clamp(min=math.exp(-p)).log() / p, (x * math.exp(p)).clamp(-1, 1)


class State(NamedTuple):
    """Of the optimizer: hidden state and memory of its LSTM `[B, hidden, P]`, its gates before sigmoid `[B, 2, P]`."""

    hidden: Tensor
    memory: Tensor
    gates: Tensor


def update(cell: Params, c: Tensor, g: Tensor, features: Tensor, state: State) -> tuple[Tensor, State]:
    """c <- sigmoid(f) c - sigmoid(i) g, every coordinate by itself with the same cell.

    The gates f and i are W [h, c, the gate's own value before] + b, with h the LSTM's hidden state.

    Args:
        cell: parameters of the optimizer.
        c: `[B, P]`, the learner's parameters.
        g: `[B, P]`, their gradient.
        features: `[B, 4, P]`, what the LSTM sees: loss and gradient, preprocessed.
        state: what the last step left.
    """
    weight, bias = cell["lstm.weight"].expand(len(c), -1, -1), cell["lstm.bias"].unsqueeze(-1)
    i, f, u, o = torch.baddbmm(bias, weight, torch.cat([features, state.hidden], 1)).chunk(4, 1)
    memory = f.sigmoid() * state.memory + i.sigmoid() * u.tanh()
    hidden = o.sigmoid() * memory.tanh()
    by_hidden, by_c, by_gate = cell["gates.weight"].split([hidden.shape[1], 1, 1], -1)
    gates = by_hidden @ hidden + by_c * c.unsqueeze(1) + by_gate * state.gates + cell["gates.bias"].unsqueeze(-1)
    forget, enter = gates.sigmoid().unbind(1)
    return forget * c - enter * g, State(hidden, memory, gates)


class MetaLSTM(MetaLearner):
    """The learner's parameters are the memory c of an LSTM, whose gates another LSTM opens: a learned optimizer.

    Both are shared by all coordinates. theta is c_0, the parameters of the network, and the cell; it descends the mean
    query loss of c_T. Losses and gradients of the learner are constants to the optimizer (no second derivatives).

    Batch norm: support sets are forwarded with the statistics of each minibatch, which are averaged along the episode,
    from mean 0 and variance 1 on. These averages are part of a task's parameters, and mode `running` uses them (not
    averages over meta-training), as the authors' evaluation does; before the first step they are 0 and 1.

    Args:
        hidden: width of the LSTM.
        inner_batch: examples of a minibatch; None for the whole support set. The authors' e epochs of minibatches of
            size m are `inner_steps` = e S / m.
        divide_grad_by_batch: divide the gradient of the mean loss once more by the size of the minibatch, as the
            released code does.
        preprocess_p: p of `preprocess`.
        bn_momentum: weight of the newest minibatch in an episode's running averages (with the unbiased variance).
        learner: arguments of `MetaLearner`; `recompute` keeps a step's inputs instead of everything in it.
    """

    def __init__(
        self,
        *,
        hidden: int = 20,
        inner_batch: int | None = None,
        divide_grad_by_batch: bool = False,
        preprocess_p: float = 10.0,
        bn_momentum: float = 0.9,
        **learner: Any,
    ):
        super().__init__(**learner)
        self.hidden, self.inner_batch, self.divide_grad_by_batch = hidden, inner_batch, divide_grad_by_batch
        self.preprocess_p, self.bn_momentum = preprocess_p, bn_momentum
        lstm = {"lstm.weight": (4 * hidden, 4 + hidden), "lstm.bias": (4 * hidden,)}
        shapes = {**lstm, "gates.weight": (2, hidden + 2), "gates.bias": (2,)}
        self.cell = Parameters({name: torch.zeros(shape) for name, shape in shapes.items()})
        for layer, width in self.running.layers.items():
            self.shapes |= dict.fromkeys(_averages(layer), torch.Size([width]))

    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """c_0, ..., c_T, each with the episode's running averages of batch norm by then."""
        phi = per_task(theta["net"], len(support.x), self.shapes)
        moving = {k: p for k, p in phi.items() if self.net.adapts(k)}
        c = torch.cat([p.flatten(1) for p in moving.values()], 1)
        tasks, coordinates = c.shape
        wide = c.new_zeros(tasks, self.hidden, coordinates)
        state = State(wide, wide, c.new_zeros(tasks, 2, coordinates))
        for layer, width in self.running.layers.items():
            phi |= zip(_averages(layer), (c.new_zeros(tasks, width), c.new_ones(tasks, width)), strict=True)
        trajectory = [phi]
        rows = None
        if key is not None and self.inner_batch is not None:
            rows = minibatches(key.sub("minibatch"), support.x.shape[1], self.inner_batch, steps)
        for step in range(steps):
            batch = support if rows is None else Examples(*take(support, rows[:, step]))
            g, features, statistics = self._observe(self.network(theta), phi, list(moving), batch)
            if self.recompute and torch.is_grad_enabled():
                arguments = theta["cell"], c, g, features, state
                c, state = checkpoint(update, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                c, state = update(theta["cell"], c, g, features, state)
            phi = phi | statistics | self._apart(c, moving)
            trajectory.append(phi)
        return trajectory

    def predict(
        self, theta: Theta, phi: Params, x: Tensor, *, support: Examples, bn: str, record: Normalization | None = None
    ) -> Tensor:
        """As any learner; in mode `running` with the running averages of the episode."""
        if bn != "running":
            return super().predict(theta, phi, x, support=support, bn=bn, record=record)
        named = {layer: _averages(layer) for layer in self.running.layers}
        own = {layer: Moments(phi[mean], phi[var], 0) for layer, (mean, var) in named.items()}
        return self.run_net(self.network(theta) | phi, x, when="query", norm=Normalization(given=own))

    def task_bytes(self, episodes: Episode, modes: Any = ()) -> int:
        """Besides activations, what the optimizer's steps hold for their derivative (counted in the tests)."""
        coordinates = sum(shape.numel() for name, shape in self.shapes.items() if self.net.adapts(name))
        size = next(self.parameters()).element_size()
        inside, between, passing = 8 * self.hidden + 10, 2 * self.hidden + 8, 6 * self.hidden
        steps = 0 if modes else self.inner_steps
        held = inside + steps * between if self.recompute or modes else steps * inside
        return super().task_bytes(episodes, modes) + coordinates * size * (passing + held)

    @property
    def exact(self) -> bool:
        """Losses and gradients that the optimizer sees are taken as constants."""
        return self.inner_steps == 0

    def initialize(self, seed: int) -> None:
        """Draw also the cell: U(-0.01, 0.01), but the gates' biases so that it starts as descent with steps of 0.01."""
        super().initialize(seed)
        key = Key(seed, "init").sub("cell")
        with torch.no_grad():
            for name, parameter in self.cell.named_parameters():
                generator = torch.Generator().manual_seed(key.sub(name).integer())
                nn.init.uniform_(parameter, -0.01, 0.01, generator=generator)
                if name == "gates.bias":  # from U(-0.01, 0.01) to U(4, 6) and U(-5, -4)
                    parameter.copy_(parameter * parameter.new_tensor([100, 50]) + parameter.new_tensor([5, -4.5]))

    def _observe(self, own: Params, phi: Params, moving: list[str], batch: Examples) -> tuple[Tensor, Tensor, Params]:
        """What a step sees, all constants: the gradient `[B, P]`, the cell's features `[B, 4, P]`, new averages."""
        norm = Normalization(record=True)
        with torch.enable_grad():
            at = {k: phi[k].detach().requires_grad_() for k in moving}
            fixed = {k: p.detach() for k, p in (own | phi).items()}
            loss = self.inner_loss(self.run_net(fixed | at, batch.x, when="inner", norm=norm), batch.y)
            grads = gradient(loss, at)
        g = torch.cat([v.flatten(1) for v in grads.values()], 1)
        g = g / batch.y.shape[1] if self.divide_grad_by_batch else g
        seen = (part.unsqueeze(-1).expand_as(g) for part in preprocess(loss.detach(), self.preprocess_p))
        features = torch.stack([*seen, *preprocess(g, self.preprocess_p)], 1)
        return g, features, self._average(phi, norm.seen)

    def _average(self, phi: Params, seen: Statistics) -> Params:
        """The episode's running averages after one more minibatch."""
        out = {}
        for layer, (mean, var, size) in seen.items():
            for k, value in zip(_averages(layer), (mean, var * (size / max(1, size - 1))), strict=True):
                out[k] = torch.lerp(phi[k], value.detach(), self.bn_momentum)
        return out

    def _apart(self, c: Tensor, like: Params) -> Params:
        """`[B, P]` as leaves again."""
        parts = c.split([p[0].numel() for p in like.values()], 1)
        return {k: part.reshape(len(part), *self.shapes[k]) for k, part in zip(like, parts, strict=True)}


def _averages(layer: str) -> tuple[str, str]:
    """Names of a layer's running mean and variance among a task's parameters."""
    return f"running.{layer}.mean", f"running.{layer}.var"
