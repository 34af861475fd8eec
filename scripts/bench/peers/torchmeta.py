"""torchmeta's modules, which take their parameters as an argument, and its gradient_update_parameters."""

# ruff: noqa: D101, D102, D103

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from peers.networks import Subject, build_by_form
from peers.parts import open_packages

open_packages("torchmeta", "utils")  # its data sets want torchvision and h5py
from torchmeta.modules import MetaBatchNorm2d, MetaConv2d, MetaLinear, MetaModule, MetaSequential  # noqa: E402
from torchmeta.utils.gradient_based import gradient_update_parameters  # noqa: E402


class Network(MetaModule):
    """The body and the head, as in torchmeta's examples; the names are mapped to the common ones."""

    def __init__(self, w: dict):
        super().__init__()
        layers, inputs = [], 1 if w["net"] == "mlp" else w["image"][0]
        for width in w["hidden"] if w["net"] == "mlp" else [w["filters"]] * 4:
            if w["net"] == "mlp":
                parts = [("linear", MetaLinear(inputs, width)), ("relu", nn.ReLU())]
            else:
                parts = [
                    ("conv", MetaConv2d(inputs, width, 3, padding=1, bias=False)),
                    ("norm", MetaBatchNorm2d(width, track_running_stats=False)),
                    ("relu", nn.ReLU()),
                    ("pool", nn.MaxPool2d(2)),
                ]
            layers.append((f"layer{len(layers) + 1}", MetaSequential(OrderedDict(parts))))
            inputs = width
        self.features = MetaSequential(OrderedDict(layers))
        width = w["hidden"][-1] if w["net"] == "mlp" else w["features"]
        self.head = MetaLinear(width, 1 if w["net"] == "mlp" else w["way"])

    def forward(self, x: Tensor, params: OrderedDict | None = None) -> Tensor:
        h = self.features(x, params=self.get_subdict(params, "features"))
        return self.head(h.flatten(1), params=self.get_subdict(params, "head"))


def common(name: str) -> str:
    """`features.layer2.conv.weight` is `block2.conv.weight`, `features.layer2.linear.weight` is `h2.weight`."""
    if name.startswith("head."):
        return name
    layer, kind, leaf = name.removeprefix("features.layer").split(".")
    return f"h{layer}.{leaf}" if kind == "linear" else f"block{layer}.{kind}.{leaf}"


class MAML(Subject):
    def network(self) -> nn.Module:
        return Network(self.workload)

    def load(self, params: dict[str, Tensor]) -> None:
        self.net.load_state_dict({k: params[common(k)] for k in self.net.state_dict()})

    def outer(self) -> Tensor:
        total, first_order = 0.0, self.workload["form"] == "fomaml"
        for xs, ys, xq, yq in self.each_task():
            params = None
            for _ in range(self.steps):
                loss = self.criterion(self.net(xs, params=params), ys)
                params = gradient_update_parameters(
                    self.net, loss, params=params, step_size=self.alpha, first_order=first_order
                )
            loss = self.criterion(self.net(xq, params=params), yq) / self.tasks
            loss.backward()
            total += loss.detach()
        return total

    def gradient(self) -> dict:
        return {common(k): v for k, v in super().gradient().items()}


def build(workload: dict, arrays: dict, device: str, variant: str) -> Subject:
    return build_by_form({"maml": MAML, "fomaml": MAML}, workload, arrays, device, variant)
