"""Multimodal model-agnostic meta-learning (MMAML): task-aware modulation by FiLM.

Vuorio, Sun, Hu & Lim, NeurIPS 2019, https://arxiv.org/abs/1910.13616.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from metalearn.algorithms.maml import MAML
from metalearn.backbones import MLP, Backbone, Conv4
from metalearn.embedding import GRU, Affine, targets
from metalearn.episode import Examples, Params, Theta
from metalearn.random import Key, TaskKey
from metalearn.schema import BadInput


class MMAML(MAML):
    """MAML in a network whose hidden layers a task's support set modulates, x -> (1 + gamma) x + beta (FiLM).

    A modulation network makes tau = (gamma, beta) of the support set, once; the inner loop moves the main network with
    tau fixed. FiLM acts on the input of each hidden non-linearity, so after batch norm where there is one (the authors'
    has no scale and offset of its own; if it has, they are adapted like any other parameter). It is folded into the
    weight and bias of the affine map before it. tau is among the task's parameters: `film.<stage>.gamma` and `.beta`.

    Pictures are embedded without their labels, by four convolutions of stride 2 whose filters double, batch norm with
    batch statistics and ReLU, and the mean over pixels; vectors with their targets. With `encoder=mean` a dense ReLU
    layer and the mean over the support set follow; with `rnn` the last states of two GRUs, one for each direction.

    Departures: for regression the authors have an LSTM of two layers in each direction; pictures keep their size (the
    authors' many data sets come in 84x84). Their two Adams have equal rates, so that one Adam does the same.

    Args:
        alpha: inner learning rate.
        hidden: width of the task embedding, of each direction for `rnn` (authors: 128 for pictures, 40 for regression).
        encoder: `mean` (the order of the support set does not matter) or `rnn`.
        example_filters: filters of the first convolution that embeds a picture.
        learner: other arguments of `MAML`.

    Raises:
        BadInput: for a network without layers that can be modulated.
    """

    def __init__(
        self,
        *,
        alpha: float,
        hidden: int = 128,
        encoder: Literal["mean", "rnn"] = "mean",
        example_filters: int = 32,
        **learner: Any,
    ):
        super().__init__(alpha=alpha, **learner)
        stages = [self.net.stage(name) for name in self.net.stages if name != "head"]
        self.modulated = {stage.name: stage.affine for stage in stages if stage.affine}
        if not self.modulated:
            raise BadInput("algorithm=mmaml: needs a backbone whose hidden layers are known, such as conv4 or mlp")
        self.film = {
            f"film.{stage.name}.{what}": stage.shape[0]
            for stage in stages
            if stage.affine
            for what in ("gamma", "beta")
        }
        self.shapes |= {name: torch.Size([channels]) for name, channels in self.film.items()}
        self.outputs = self.net.stage(self.net.stages[-1]).shape[0]
        shape, self.pictures, self.recurrent = self.net.input_shape, len(self.net.input_shape) == 3, encoder == "rnn"
        outputs = 0 if self.recurrent else hidden
        self.examples: Backbone
        if self.pictures:
            self.examples = Conv4(
                input_shape=shape,
                outputs=outputs,
                width=example_filters,
                growth=2,
                downsample="stride",
                readout="mean",
            )
        else:
            inputs = torch.Size(shape).numel() + self.outputs
            self.examples = MLP(input_shape=(inputs,), outputs=outputs, hidden=[] if self.recurrent else [hidden])
        if self.recurrent:
            features = self.examples.stage("feat").shape[0]
            self.forwards, self.backwards = GRU(features, hidden), GRU(features, hidden)
        self.heads = Affine(2 * hidden if self.recurrent else hidden, sum(self.film.values()))

    def initialize(self, seed: int) -> None:
        super().initialize(seed)
        for name in ("examples", "forwards", "backwards", "heads"):
            if hasattr(self, name):
                getattr(self, name).reset(Key(seed, "init").sub(name))

    def origin(self, theta: Theta, support: Examples, key: TaskKey | None) -> Params:
        """Theta, and tau_i, which modulates the network and is not adapted."""
        return self.network(theta) | self.modulation(theta, support)

    def modulation(self, theta: Theta, support: Examples) -> Params:
        """tau_i from the support set: gamma and beta of each hidden layer, `[B, C]`."""
        tau = self.heads(theta["heads"], self.embed(theta, support).unsqueeze(1)).squeeze(1)
        return dict(zip(self.film, tau.split(list(self.film.values()), 1), strict=True))

    def embed(self, theta: Theta, support: Examples) -> Tensor:
        """The support set as a vector `[B, width]`."""
        x = support.x
        if not self.pictures:
            x = torch.cat([x.flatten(2), targets(support.y, self.outputs, x.dtype)], -1)
        z = self.examples.run(theta.get("examples", {}), x)
        if not self.recurrent:
            return torch.relu(z).mean(1)
        states = self.forwards(theta["forwards"], z), self.backwards(theta["backwards"], z.flip(1))
        return torch.cat([s[:, -1] for s in states], -1)

    def run_net(self, params: Params, h: Tensor, **where: Any) -> Tensor:
        """The network, modulated: W -> (1 + gamma) W and b -> (1 + gamma) b + beta in each hidden affine map."""
        folded = {}
        for stage, (weight, bias) in self.modulated.items():
            scale, beta = 1 + params[f"film.{stage}.gamma"], params[f"film.{stage}.beta"]
            w, b = params.get(weight), params.get(bias)
            axes = [1] * (len(self.shapes[weight]) - 1) if w is not None else []
            folded[weight] = scale if w is None else scale.unflatten(1, (-1, *axes)) * w
            folded[bias] = beta if b is None else scale * b + beta
        return super().run_net(params | folded, h, **where)
