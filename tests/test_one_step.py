"""MAML with one inner step in sample space, against dense least squares and `kernel_meta`; tangents of two layers."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from metalearn.random import Key
from metalearn.theory import kernel_meta
from metalearn.theory.one_step import Directions, OneStep
from metalearn.theory.two_layer import TwoLayer

KEY = Key(3, "test_one_step")
RATES = torch.tensor([-0.02, 0.0, 0.01, 0.05, 0.3], dtype=torch.float64)


def drawn(name: str, *shape: int) -> torch.Tensor:
    return KEY.sub(name).normal(torch.Size(shape).numel()).double().view(shape)


def blocks(kernel: torch.Tensor, tasks: int, samples: int) -> torch.Tensor:
    k = kernel.view(tasks, samples, tasks, samples)
    return torch.stack([k[i, :, i] for i in range(tasks)])


def dense(features: torch.Tensor, labels: torch.Tensor, alpha: float) -> torch.Tensor:
    """The shortest minimiser of the losses after an explicit step, by least squares on stacked rows."""
    maps = [torch.eye(len(f)).double() - 2 * alpha / len(f) * f @ f.mT for f in features]
    left = torch.cat([m @ f for m, f in zip(maps, features, strict=True)])
    right = torch.cat([m @ y for m, y in zip(maps, labels, strict=True)])
    return torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize(("tasks", "samples", "width"), [(6, 4, 5), (3, 4, 30), (8, 2, 15)])
def test_minimisers_are_those_of_stacked_least_squares(tasks, samples, width):
    """Under- and over-parameterised, with labels that no w explains."""
    features, labels = drawn("features", tasks, samples, width), drawn("labels", tasks, samples)
    psi = features.flatten(0, 1)
    expected = torch.stack([dense(features, labels, a) for a in RATES.tolist()])
    if width < tasks * samples:
        primal = OneStep.of(features, features @ features.mT, labels).minimisers(RATES)
        assert torch.allclose(primal, expected, atol=1e-8)
    kernel = psi @ psi.mT
    kept = Directions.of(kernel).cut(1e-12)
    assert len(kept.values) == min(width, tasks * samples)
    rows = kept.vectors.unflatten(0, (tasks, samples))
    z = OneStep.of(rows, blocks(kernel, tasks, samples), labels).minimisers(RATES)
    assert torch.allclose(kept.coefficients(z) @ psi, expected, atol=1e-8)
    assert torch.allclose(kernel_meta.coefficients(kernel, labels.flatten(), RATES, [samples] * tasks) @ psi, expected)


def test_the_start_depends_on_alpha_where_features_are_fewer_than_samples_alone():
    """Independent features (N K < d) are interpolated at every rate; features of rank < N K are not, for all d."""
    tasks, samples, width = 4, 3, 40
    labels, full = drawn("labels", tasks, samples), drawn("features", tasks, samples, width)
    low = drawn("few", tasks, samples, 5) @ drawn("to many", 5, width)
    for features, same in ((full, True), (low, False)):
        psi = features.flatten(0, 1)
        c = kernel_meta.coefficients(psi @ psi.mT, labels.flatten(), RATES, [samples] * tasks)
        assert torch.allclose(c @ psi, (c[1] @ psi).expand(len(RATES), -1), atol=1e-8) == same


def test_a_singular_problem_has_the_shortest_solution():
    """Two equal features share what one would have."""
    features, labels = drawn("one", 5, 3, 1), drawn("labels", 5, 3)
    one = OneStep.of(features, features @ features.mT, labels).minimisers(RATES)
    twice = features.expand(-1, -1, 2) / 2**0.5
    two = OneStep.of(twice, features @ features.mT, labels).minimisers(RATES)
    assert torch.allclose(two, one.expand(-1, 2) / 2**0.5)


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_two_layer_features_are_the_gradients_of_a_network(init):
    net = TwoLayer.drawn(KEY, 3, 20, init)
    module = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 1)).double()
    with torch.no_grad():
        module[0].weight.copy_(net.hidden)
        module[0].bias.copy_(net.bias)
        module[2].weight.copy_(net.out[None])
    x = drawn("x", 7, 3)
    parameters = dict(module.named_parameters())
    gradients = vmap(jacrev(lambda p, v: functional_call(module, p, v)[0]), (None, 0))(parameters, x)
    expected = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    features = net.features(x)
    assert features.shape == (7, (3 + 2) * 20 + 1)
    assert torch.allclose(features @ features.mT, expected @ expected.mT)
    assert torch.allclose(features.sort(1).values, expected.sort(1).values)
    assert torch.allclose(net.kernel(x, x[:4]), features @ features[:4].mT)


def test_initialisations_have_their_laws():
    uniform, normal = (TwoLayer.drawn(KEY, 4, 5000, init) for init in ("uniform", "normal"))
    assert uniform.hidden.abs().max() <= 0.5 and uniform.out.abs().max() <= 5000**-0.5
    assert abs(float(uniform.hidden.std()) - 0.5 / 3**0.5) < 0.005
    assert abs(float(uniform.out.std()) - (3 * 5000) ** -0.5) < 0.0003
    assert abs(float(normal.out.std()) - 1) < 0.05 and abs(float(normal.bias.mean())) < 0.05
