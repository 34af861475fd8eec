"""Laws, bases and the combinatorics of polynomial moments: scipy's moments, quadrature, enumeration, samples."""

import itertools
import math

import pytest
import scipy.stats
import torch
from oracles import generator, normal
from scipy.integrate import quad
from torch import Tensor

from metalearn.theory import designs
from metalearn.theory.alpha_star import corollary1, iid_limit, limit
from metalearn.theory.designs import Law, g1, g2, g3, polynomial_limit, polynomial_traces

LAWS = [
    (designs.normal(1.0, 2.0), scipy.stats.norm(1, 2)),
    (designs.uniform(-5, 5), scipy.stats.uniform(-5, 10)),
    (designs.uniform(1, 4), scipy.stats.uniform(1, 3)),
    (designs.exponential(0.5), scipy.stats.expon(scale=2)),
    (designs.chi2(7), scipy.stats.chi2(7)),
    (designs.zipf(1.5, 50), scipy.stats.zipfian(1.5, 50)),
]
laws = pytest.mark.parametrize(("law", "other"), LAWS, ids=lambda x: x.name if isinstance(x, Law) else "")


def exact(value: float) -> float:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


# ---- laws --------------------------------------------------------------------------------------------------------


@laws
def test_moments_are_those_of_scipy(law, other):
    assert law.moments() == pytest.approx([1.0, *(float(other.moment(p)) for p in range(1, 7))], rel=1e-7, abs=1e-9)
    assert (law.mean, law.variance) == (exact(other.mean()), exact(other.var()))


@laws
def test_draws_follow_the_law(law, other):
    """Kolmogorov-Smirnov; for whole numbers the frequencies."""
    x = law.draw(20, 200, generator=generator(0))
    assert x.dtype == torch.float64 and x.shape == (20, 200)
    if "Zipf" in law.name:
        for k in (1, 2, 10):
            chance = other.pmf(k)
            share = float((x == k).double().mean())
            assert abs(share - chance) < 4 * math.sqrt(chance / x.numel())
        assert x.min() >= 1 and x.max() <= 50 and (x == x.round()).all()
    else:
        assert scipy.stats.kstest(x.flatten().numpy(), other.cdf).pvalue > 1e-3


@laws
def test_equal_seeds_equal_draws(law, other):
    x = [law.draw(3, 4, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(x[0], x[1]) and not torch.equal(x[0], x[2])


@laws
def test_centred_laws(law, other):
    """First four central moments from mean, variance, skewness and excess."""
    centred = law.centred()
    mean, variance, skewness, excess = (float(value) for value in other.stats(moments="mvsk"))
    found = [1, 0, variance, skewness * variance**1.5, (excess + 3) * variance**2]
    assert centred.moments(4) == pytest.approx(found, rel=1e-9, abs=1e-9)
    assert centred.name == f"{law.name} - {mean:g}" and centred.centred().moments() == centred.moments()
    x, y = (one.draw(5, generator=generator(0)) for one in (law, centred))
    assert torch.equal(x - law.mean, y)


def test_laws_of_one_deviation():
    found = designs.of_deviation(3.0)
    assert [law.variance for law in found] == [exact(9.0)] * 3
    assert [law.mean for law in found] == [0, 0, exact(3.0)]


# ---- bases -------------------------------------------------------------------------------------------------------


def test_designs_are_bases_of_their_laws():
    """The same generator gives the data that the features are of."""
    law, c = designs.uniform(-1, 2), torch.tensor([0.0, 0.5, 1.0]).double()
    assert torch.equal(
        designs.random_matrix(law, 3).draw(4, 5, generator(0)), law.draw(4, 5, 3, generator=generator(0))
    )
    x = law.draw(4, 5, 1, generator=generator(0))
    found = designs.polynomial(law, 3, [1, 2, 3]).draw(4, 5, generator(0))
    torch.testing.assert_close(found, torch.cat([torch.ones_like(x), 2 * x, 3 * x * x], 2))
    torch.testing.assert_close(designs.polynomial(law, 3).draw(4, 5, generator(0)), found / torch.tensor([1, 2, 3]))
    expected = torch.stack([torch.exp(-((x[..., 0] - m) ** 2) / (2 * 0.25)) for m in c], 2)
    scalar = designs.gaussian(law, c, c * 0 + 0.5, scalar=True)
    torch.testing.assert_close(scalar.draw(4, 5, generator(0)), expected)
    own = designs.gaussian(law, c, c * 0 + 0.5).draw(4, 5, generator(0))
    x = law.draw(4, 5, 3, generator=generator(0))
    torch.testing.assert_close(own, torch.exp(-((x - c) ** 2) / 0.5))
    with pytest.raises(ValueError, match="2 coefficients for 3 powers"):
        designs.polynomial(law, 3, [1, 2])
    assert designs.taylor_coefficients(4) == [1, 1, 0.5, exact(1 / 6)]


def test_even_centres_fill_the_range():
    centres, widths = designs.even_centres(5, -2, 2)
    assert centres.tolist() == [-2, -1, 0, 1, 2] and widths.tolist() == [1] * 5


def test_moments_of_a_gaussian_feature_are_integrals():
    law = scipy.stats.norm(0.3, 1.7)
    for p in (1, 2, 3):
        integral, _ = quad(lambda x, p=p: law.pdf(x) * math.exp(-p * (x + 0.4) ** 2 / (2 * 0.25)), -20, 20)
        assert designs.gaussian_basis_moment(p, -0.4, 0.5, 0.3, 1.7) == pytest.approx(integral, rel=1e-8)


def test_alpha_star_of_a_gaussian_basis_against_the_variance_of_the_data():
    """C-9: with fixed widths it grows, with widths in proportion to the data it is constant."""
    centres, widths = torch.zeros(4).double(), torch.ones(4).double()
    fixed, scaled = [], []
    for deviation in (1.0, 3.0, 7.0):
        law = designs.normal(0, deviation)
        fixed.append(limit(designs.gaussian(law, centres, widths).draw(400, 15, generator(0))).value)
        scaled.append(limit(designs.gaussian(law, centres, deviation * widths).draw(400, 15, generator(0))).value)
    assert fixed[0] < 0.7 * fixed[1] < 0.5 * fixed[2]
    assert scaled == [pytest.approx(scaled[0], rel=1e-9)] * 3


# ---- polynomial moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_index_sums_are_counted(d):
    """Every tuple in turn; the closed form of g1; sum rules."""
    for found, multiples in ((g1(d), (1, 1)), (g2(d), (1, 1, 1)), (g3(d), (1, 2, 1))):
        counts = [0] * len(found)
        for index in itertools.product(range(d), repeat=len(multiples)):
            counts[sum(m * i for m, i in zip(multiples, index, strict=True))] += 1
        assert found.tolist() == counts
    assert g1(d).tolist() == [(i + 1) - 2 * max(0, i - d + 1) for i in range(2 * d - 1)]


def test_index_sums_at_the_width_of_the_figure():
    d = 50
    n = torch.arange(3 * d - 2)

    def pairs(x: Tensor) -> Tensor:
        return torch.where(x >= 2, x * (x - 1) // 2, 0)

    assert (int(g1(d).sum()), int(g2(d).sum()), int(g3(d).sum())) == (d**2, d**3, d**3)
    assert torch.equal(g2(d), pairs(n + 2) - 3 * pairs(n - d + 2) + 3 * pairs(n - 2 * d + 2) - pairs(n - 3 * d + 2))
    assert all(torch.equal(g, g.flip(0)) for g in (g1(d), g2(d), g3(d)))
    assert int(g1(d).argmax()) == d - 1 and int(g1(d).max()) == d


@pytest.mark.parametrize(("K", "d"), [(1, 3), (2, 3), (3, 2), (4, 4)])
def test_polynomial_traces_are_exact_on_an_enumerated_law(K, d):
    """x = -0.5 or 2, all 2^K samples with their probabilities; plain and weighted powers."""
    points, chances = torch.tensor([-0.5, 2.0]).double(), torch.tensor([0.7, 0.3]).double()
    which = torch.cartesian_prod(*[torch.arange(2)] * K).view(-1, K)
    weight = chances[which].prod(1)
    moments = [float((chances * points**p).sum()) for p in range(6 * d - 5)]
    for c in (None, [1.5, -0.5, 2.0, 0.3][:d]):
        phi = points[which][..., None] ** torch.arange(d) * (1 if c is None else torch.tensor(c, dtype=torch.float64))
        g = phi.mT @ phi
        expected = [
            float((weight * torch.linalg.matrix_power(g, p).diagonal(dim1=1, dim2=2).sum(1)).sum()) for p in (1, 2, 3)
        ]
        assert list(polynomial_traces(K, d, moments, c)) == [exact(value) for value in expected]
        assert polynomial_limit(K, d, moments, c) == exact(K * expected[1] / (2 * expected[2]))


def test_polynomial_traces_are_sums_of_the_coefficients():
    """tr E[G^2] by g1, and both traces of a single sample by g1 and g2."""
    law, d = designs.exponential(2.0), 4
    m = law.moments(6 * (d - 1))
    for K in (1, 7):
        second = sum(int(g) * (K * m[2 * n] + K * (K - 1) * m[n] ** 2) for n, g in enumerate(g1(d)))
        assert polynomial_traces(K, d, m)[1] == exact(second)
    third = sum(int(g) * m[2 * n] for n, g in enumerate(g2(d)))
    assert polynomial_traces(1, d, m)[2] == exact(third)


def test_polynomial_limit_agrees_with_samples():
    law = designs.uniform(-1, 1)
    found = limit(designs.polynomial(law, 4).draw(20000, 6, generator(0)))
    assert abs(found.value - polynomial_limit(6, 4, law.moments(18))) < 4 * found.se


def test_random_matrix_agrees_with_samples():
    law = designs.exponential(1.0)
    found = limit(designs.random_matrix(law, 3).draw(30000, 6, generator(0)))
    assert abs(found.value - iid_limit(6, 3, law.moments())) < 4 * found.se


def test_corollary_1_lower_bound_fails_for_polynomials():
    """C-10: five powers of N(0, s^2): 4 to 28 times too large for K = 10, 50, about 250 to 290 for K = 1."""
    for s in (1.0, 2.0):
        moments = designs.normal(0, s).moments(24)
        ratio = {}
        for K in (1, 10, 50, 1000):
            variance = polynomial_traces(K, 5, moments)[0] / K
            ratio[K] = 1 / (2 * 5 * variance) / polynomial_limit(K, 5, moments)
            assert polynomial_limit(K, 5, moments) < 5 / (2 * variance)
        assert 245 < ratio[1] < 290 and 4 < ratio[50] < ratio[10] < 28 and ratio[1000] < 1


def test_corollary_1_lower_bound_in_a_sample():
    phi = normal(5000, 10, 1, seed=0) ** torch.arange(5)
    assert limit(phi).value < corollary1(phi).low / 4
