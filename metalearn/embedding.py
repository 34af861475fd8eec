"""From a task's support set to a vector: networks beside the main one, pure in their parameters.

As in the main network every leaf is shared, `[*shape]`, or one per task, `[B, *shape]`. Nothing here is adapted by an
inner loop.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalearn.backbones import Backbone, Stage
from metalearn.backbones.mlp import Hidden
from metalearn.episode import Examples, Params
from metalearn.ops import Normalization, conv2d, linear
from metalearn.parameters import Drawn


def targets(y: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    """Labels `[B, n]` as one-hot vectors `[B, n, outputs]`; numbers `[B, n, outputs]` as they are."""
    if y.is_floating_point():
        return y
    return (y.unsqueeze(-1) == torch.arange(outputs, device=y.device)).to(dtype)


def by_shot(support: Examples, way: int) -> Examples:
    """The support set with one example of each class after another (labels 0..way-1, then again); numbers stay."""
    if support.y.is_floating_point():
        return support
    member = targets(support.y, way, torch.int64)
    shot = (member.cumsum(1) * member).sum(-1)
    order = (shot * way + support.y).argsort(stable=True, dim=1)
    task = torch.arange(len(order), device=order.device)[:, None]
    return Examples(support.x[task, order], support.y[task, order])


def part(params: Params, name: str) -> Params:
    """The parameters of a submodule."""
    return {k.removeprefix(f"{name}."): p for k, p in params.items() if k.startswith(f"{name}.")}


class Affine(Drawn):
    """x -> W x + b."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """`[B, n, inputs]` to `[B, n, outputs]`."""
        return linear(x, params["weight"], params["bias"])


class GRU(Drawn):
    """Gated recurrent unit (Cho et al. 2014), the form in which the reset gate acts before the matrix product.

    r, u = sigmoid(W [x; h] + b), c = tanh(V [x; r h] + d), h <- u h + (1 - u) c. Gates start with b = 1.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.gates_weight = nn.Parameter(torch.empty(2 * hidden, inputs + hidden))
        self.gates_bias = nn.Parameter(torch.empty(2 * hidden))
        self.candidate_weight = nn.Parameter(torch.empty(hidden, inputs + hidden))
        self.candidate_bias = nn.Parameter(torch.empty(hidden))

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        super().initialize(name, parameter, generator)
        if name == "gates_bias":
            parameter.fill_(1.0)

    def step(self, params: Params, x: Tensor, h: Tensor) -> Tensor:
        """The state `[B, 1, hidden]` after input `[B, 1, inputs]`."""
        gates = torch.sigmoid(linear(torch.cat([x, h], -1), params["gates_weight"], params["gates_bias"]))
        r, u = gates.chunk(2, -1)
        candidate = linear(torch.cat([x, r * h], -1), params["candidate_weight"], params["candidate_bias"])
        return u * h + (1 - u) * torch.tanh(candidate)

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """The states `[B, n, hidden]` after each input of `[B, n, inputs]`, from zero."""
        h, states = x.new_zeros(len(x), 1, self.hidden), []
        for t in range(x.shape[1]):
            h = self.step(params, x[:, t : t + 1], h)
            states.append(h)
        return torch.cat(states, 1)


def lstm_step(params: Params, x: Tensor, h: Tensor, c: Tensor, suffix: str = "") -> tuple[Tensor, Tensor]:
    """State and cell `[B, n, hidden]` after inputs `[B, n, inputs]`; parameters as `nn.LSTM` and `nn.LSTMCell` have."""
    gates = linear(x, params[f"weight_ih{suffix}"], params[f"bias_ih{suffix}"])
    gates = gates + linear(h, params[f"weight_hh{suffix}"], params[f"bias_hh{suffix}"])
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm(params: Params, x: Tensor, suffix: str) -> Tensor:
    """The states `[B, n, hidden]` after each input of `[B, n, inputs]`, from zero."""
    h = c = x.new_zeros(len(x), 1, params[f"weight_hh{suffix}"].shape[-1])
    states = []
    for t in range(x.shape[1]):
        h, c = lstm_step(params, x[:, t : t + 1], h, c, suffix)
        states.append(h)
    return torch.cat(states, 1)


class RecurrentAutoencoder(Drawn):
    """g is the mean of a GRU's states; a second one, from the last state, gives the sequence back, last example first.

    The decoder's inputs are its own outputs, from zero (the code of Yao et al. 2019). g depends on the order.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.encoder, self.decoder = GRU(inputs, hidden), GRU(inputs, hidden)
        self.readout = Affine(hidden, inputs)

    def forward(self, params: Params, z: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, n, inputs]` to g `[B, hidden]`, and the mean squared error of the reconstruction `[B]`."""
        encoder, decoder, readout = (part(params, name) for name in ("encoder", "decoder", "readout"))
        states = self.encoder(encoder, z)
        h, given, errors = states[:, -1:], torch.zeros_like(z[:, :1]), []
        for t in reversed(range(z.shape[1])):
            h = self.decoder.step(decoder, given, h)
            given = self.readout(readout, h)
            errors.append(z[:, t : t + 1] - given)
        return states.mean(1), torch.cat(errors, 1).square().flatten(1).mean(1)


class MeanAutoencoder(Drawn):
    """g = relu(W mean(code) + b), and every example is reconstructed from its own code; the order does not matter."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.encoder = Backbone([Hidden("h1", inputs, hidden, "relu"), Hidden("h2", hidden, hidden, "relu")])
        self.decoder = Backbone([Hidden("h1", hidden, hidden, "relu"), Hidden("h2", hidden, inputs, "none")])
        self.pool = Affine(hidden, hidden)

    def forward(self, params: Params, z: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, n, inputs]` to g `[B, hidden]`, and the mean squared error of the reconstruction `[B]`."""
        code = self.encoder.run(part(params, "encoder"), z)
        error = z - self.decoder.run(part(params, "decoder"), code)
        g = torch.relu(self.pool(part(params, "pool"), code.mean(1, keepdim=True)))
        return g.squeeze(1), error.square().flatten(1).mean(1)


class _Filters(Stage):
    """5x5 convolution and ReLU, then 3x3 max-pooling of stride 2 and local response normalisation, in either order."""

    def __init__(self, name: str, shape: Sequence[int], width: int, *, pool_first: bool):
        super().__init__()
        self.name, self.pool_first = name, pool_first
        self.shape = (width, (shape[1] + 1) // 2, (shape[2] + 1) // 2)
        self.weight = nn.Parameter(torch.empty(width, shape[0], 5, 5))

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        h = torch.relu(conv2d(h, params[f"{self.name}.weight"], padding=2))
        flat = h.flatten(0, 1)
        flat = F.max_pool2d(flat, 3, 2, padding=1) if self.pool_first else _local_response(flat)
        flat = _local_response(flat) if self.pool_first else F.max_pool2d(flat, 3, 2, padding=1)
        return flat.unflatten(0, h.shape[:2])


def _local_response(h: Tensor) -> Tensor:
    return F.local_response_norm(h, size=9, alpha=1e-3, beta=0.75, k=1.0)


def picture_network(input_shape: Sequence[int], filters: int, widths: Sequence[int]) -> Backbone:
    """The example embedding of Yao et al. 2019: two convolutions, then fully connected ReLU layers."""
    first = _Filters("conv1", input_shape, filters, pool_first=True)
    second = _Filters("conv2", first.shape, filters, pool_first=False)
    inputs = [second.shape[0] * second.shape[1] * second.shape[2], *widths]
    dense = [Hidden(f"fc{i + 1}", inputs[i], width, "relu") for i, width in enumerate(widths)]
    return Backbone([first, second, *dense], input_shape=tuple(input_shape))


def vector_network(inputs: int, widths: Sequence[int]) -> Backbone:
    """Fully connected ReLU layers, the last one without ReLU."""
    sizes, last = [inputs, *widths], len(widths) - 1
    dense = [Hidden(f"fc{i + 1}", sizes[i], width, "relu" if i < last else "none") for i, width in enumerate(widths)]
    return Backbone(list(dense), input_shape=(inputs,))
