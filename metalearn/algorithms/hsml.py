"""Hierarchically structured meta-learning (HSML).

Yao, Wei, Huang & Li, ICML 2019, https://arxiv.org/abs/1905.05301, in the form of the authors' code.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metalearn.algorithms.maml import MAML
from metalearn.embedding import (
    Affine,
    MeanAutoencoder,
    RecurrentAutoencoder,
    by_shot,
    picture_network,
    targets,
    vector_network,
)
from metalearn.episode import Episode, Examples, Params, TaskOutput, Theta
from metalearn.parameters import Drawn
from metalearn.random import Key, TaskKey


class Tree(Drawn):
    """Soft clustering of a task embedding g by a tree of clusters, from the leaves to the root.

    Leaf c has p_c = softmax_c(-|g - mu_c|^2 / (2 s)) and the value p_c tanh(g U_c + b_c). Each value x of a layer goes
    to the parents p with weights softmax_p(x v_p + b'_p), and a parent's value is the weighted sum of tanh(x U'_p +
    b''_p). The authors' root has a sum without weights, which is the same thing: a softmax over one parent.

    Args:
        hidden: width h of g and of all values.
        widths: clusters of each layer, leaves first; the last is 1, the root.
        sigma: s.
    """

    def __init__(self, hidden: int, widths: Sequence[int], sigma: float):
        super().__init__()
        self.sigma, self.layers = sigma, len(widths) - 1
        self.centres = nn.Parameter(torch.empty(widths[0], hidden))
        self.leaf_weight = nn.Parameter(torch.empty(widths[0], hidden, hidden))
        self.leaf_bias = nn.Parameter(torch.empty(widths[0], hidden))
        for i, parents in enumerate(widths[1:], 1):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.empty(parents, hidden, hidden)))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.empty(parents, hidden)))
            if parents > 1:
                self.register_parameter(f"assign_weight{i}", nn.Parameter(torch.empty(parents, hidden)))
                self.register_parameter(f"assign_bias{i}", nn.Parameter(torch.empty(parents)))

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Xavier uniform for each cluster by itself; offsets of tanh too, as in the authors' code."""
        fans = sum(parameter.shape[1:]) if parameter.dim() > 2 else 1 + parameter.shape[-1]
        parameter.uniform_(-((6 / fans) ** 0.5), (6 / fans) ** 0.5, generator=generator)

    def forward(self, params: Params, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`[B, h]` to the root's value `[B, h]`, and the assignments: p `[B, C]`, then `[B, children, parents]`."""
        g = g.unsqueeze(1)
        soft = (-(g - params["centres"]).square().sum(-1) / (2 * self.sigma)).softmax(-1)
        value = torch.tanh((g.unsqueeze(1) @ params["leaf_weight"]).squeeze(2) + params["leaf_bias"])
        x, assignments = soft.unsqueeze(-1) * value, [soft]
        for i in range(1, self.layers + 1):
            value = torch.tanh(x.unsqueeze(1) @ params[f"weight{i}"] + params[f"bias{i}"].unsqueeze(-2))
            soft = x.new_ones(*x.shape[:2], 1)
            if f"assign_weight{i}" in params:
                logits = x @ params[f"assign_weight{i}"].mT + params[f"assign_bias{i}"].unsqueeze(-2)
                soft = logits.softmax(-1)
            x = (soft.mT.unsqueeze(-1) * value).sum(2)
            assignments.append(soft)
        return x.squeeze(1), assignments


class Gates(Affine):
    """One affine map for each gated tensor, side by side."""

    def __init__(self, inputs: int, sizes: list[int], bias: float):
        super().__init__(inputs, sum(sizes))
        self.sizes, self.initial_bias = sizes, bias

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name == "bias":
            parameter.fill_(self.initial_bias)
        else:
            for block in parameter.split(self.sizes):
                nn.init.xavier_uniform_(block, generator=generator)


class HSML(MAML):
    """MAML from theta_i = theta * eta_i, where the gates eta_i come from a clustering of the task's support set.

    Support examples are embedded with their targets; an autoencoder makes of them a task embedding g, a tree of
    clusters makes of g a vector h, and eta = sigmoid(W [g; h] + b) gates every parameter that inner loops may move.
    theta and everything else descend L_Q + xi L_r, L_r being the autoencoder's mean squared error.

    With `encoder=rnn` g depends on the order of the support set, which is: one example of each class in the order of
    labels, then a second one of each, and so on (numbers: as they come). The authors shuffle the classes each time.

    Departures from the authors' code: a proper one-hot label; pooling pads both sides; biases in the example
    embedding's dense layers start at 0 and all weights but the tree's are Xavier uniform; the mean encoder's error has
    no factor 1/2, and its inner widths are h.

    Args:
        alpha: inner learning rate.
        hidden: width h of the task embedding (authors: 128 for pictures, 40 for regression).
        tree: clusters of each layer, from the leaves to the root.
        sigma: s of the leaves' assignments (authors: 10 for pictures, 2 for regression).
        encoder: `rnn` (GRU autoencoder) or `mean` (the order of the support set does not matter).
        embedded: how many support examples the task embedding sees, in the order above; None for all.
        xi: weight of the reconstruction error.
        gate_bias: initial b. 0 halves every weight at the start, which only matters without batch norm; 2 keeps 0.88.
        example_filters: filters of the two convolutions that embed a picture.
        example_widths: widths of the dense layers that embed an example.
        learner: other arguments of `MAML`.
    """

    def __init__(
        self,
        *,
        alpha: float,
        hidden: int = 128,
        tree: Sequence[int] = (4, 2, 1),
        sigma: float = 10.0,
        encoder: Literal["rnn", "mean"] = "rnn",
        embedded: int | None = None,
        xi: float = 0.01,
        gate_bias: float = 0.0,
        example_filters: int = 32,
        example_widths: Sequence[int] = (384, 64),
        **learner: Any,
    ):
        super().__init__(alpha=alpha, **learner)
        self.embedded, self.xi = embedded, xi
        self.outputs = self.net.stage(self.net.stages[-1]).shape[0]
        shape = self.net.input_shape
        self.pictures = len(shape) == 3
        if self.pictures:
            self.examples = picture_network(shape, example_filters, example_widths)
        else:
            self.examples = vector_network(torch.Size(shape).numel() + self.outputs, example_widths)
        width = example_widths[-1] + (self.outputs if self.pictures else 0)
        self.autoencoder = {"rnn": RecurrentAutoencoder, "mean": MeanAutoencoder}[encoder](width, hidden)
        self.tree = Tree(hidden, tree, sigma)
        self.gated = {k: shape for k, shape in self.shapes.items() if self.net.adapts(k)}
        self.gates = Gates(2 * hidden, [shape.numel() for shape in self.gated.values()], gate_bias)

    def initialize(self, seed: int) -> None:
        super().initialize(seed)
        for name in ("examples", "autoencoder", "tree", "gates"):
            getattr(self, name).reset(Key(seed, "init").sub(name))

    def origin(self, theta: Theta, support: Examples, key: TaskKey | None) -> Params:
        """Theta * eta_i."""
        return self.start(theta, support)[0]

    def task_loss(self, theta: Theta, episodes: Episode, key: TaskKey | None = None) -> TaskOutput:
        """L_Q + xi L_r; reports L_r and the entropy of the leaves' assignment in nats."""
        start, error, leaves = self.start(theta, episodes.support)
        phi = self.descend(start, episodes.support, self.inner_steps, self.inner_rate(theta, key))[-1]
        entropy = -torch.special.xlogy(leaves, leaves).sum(-1)
        aux = {"reconstruction": error.detach(), "leaf_entropy": entropy.detach()}
        out = self.query_output(theta, phi, episodes, aux)
        return out._replace(loss=out.loss + self.xi * error)

    def start(self, theta: Theta, support: Examples) -> tuple[Params, Tensor, Tensor]:
        """What the network starts from, theta * eta_i where gated; L_r `[B]`; assignment to the leaves `[B, C]`."""
        g, error = self.autoencoder(theta["autoencoder"], self.embed(theta, support))
        h, assignments = self.tree(theta["tree"], g)
        eta = torch.sigmoid(self.gates(theta["gates"], torch.cat([g, h], -1).unsqueeze(1))).squeeze(1)
        start, parts = self.network(theta), eta.split(self.gates.sizes, 1)
        gated = {
            k: start[k] * part.unflatten(1, shape) if shape else start[k] * part.squeeze(1)
            for (k, shape), part in zip(self.gated.items(), parts, strict=True)
        }
        return start | gated, error, assignments[0]

    def embed(self, theta: Theta, support: Examples) -> Tensor:
        """Support examples with their targets, `[B, n, width]`."""
        ordered = by_shot(support, self.outputs)
        x, y = (t[:, : self.embedded] for t in ordered)
        target = targets(y, self.outputs, x.dtype)
        if self.pictures:
            return torch.cat([self.examples.run(theta["examples"], x), target], -1)
        return self.examples.run(theta["examples"], torch.cat([x.flatten(2), target], -1))
