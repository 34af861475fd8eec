"""Clustering through the Gram matrix against float64 formulas, scikit-learn on full vectors, and planted clusters."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from metalearn import clustering
from metalearn.clustering import (
    Vectors,
    centroids,
    cluster,
    distances,
    gram_matrix,
    lloyd,
    principal_coordinates,
    purity,
    silhouette,
)

ROOT = Path(__file__).parents[1]


def stored(x, theta=None, stack=None):
    """The rows of x in a store, handed over in stacks of a size."""
    vectors = Vectors(torch.zeros(x.shape[1]) if theta is None else theta, len(x))
    for phi in x.split(stack or len(x)):
        vectors.add(phi)
    return vectors


def planted(n, d, m, separation, seed=0):
    """m centres of norm `separation`, noise of standard deviation 1 in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(m, d, generator=generator)) * separation
    truth = torch.arange(n) % m
    return centres[truth] + torch.randn(n, d, generator=generator), truth


def clouds(seed=0, n=90, d=40, m=4, separation=2.5):
    """Overlapping clusters where Lloyd's algorithm takes several steps, in numbers that the store keeps exactly."""
    x, truth = planted(n, d, m, separation, seed)
    return x.half().float(), truth


def exact_gram(x):
    x = x.double() - x.double().mean(0)
    return x @ x.T


# ---- the store -------------------------------------------------------------------------------------------------------


def test_differences_from_theta_keep_float16_precision_at_any_scale():
    """2^-11 of each entry, or 2^-39 of the vector's largest one, or float32's end, although theta is far larger."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5000, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 5000, generator=generator, dtype=torch.float64)
    x *= torch.tensor([1e-4, 1e-12, 1.0, 1e6, 0.0, 1e-36])[:, None]
    for start in (theta, torch.zeros_like(theta)):
        back = torch.cat([block for _, block in stored(start + x, start).columns()], 1)
        difference = ((start + x) - start).float()
        bound = 2**-11 * difference.abs() + 2**-39 * difference.abs().amax(1, keepdim=True) + 2**-125
        assert ((back - difference).abs() <= bound).all()


def test_vectors_that_are_not_finite_are_named_and_leave_the_store_as_it_was():
    vectors = Vectors(torch.zeros(3), 20)
    vectors.add(torch.ones(5, 3))
    bad = torch.ones(4, 3)
    bad[1, 2], bad[3, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"not finite in vectors 6, 8: lower algorithm.alpha"):
        vectors.add(bad)
    with pytest.raises(ValueError, match=r"not finite in vectors 6:"):
        vectors.add(torch.tensor([[1e18] * 3, [1e20] * 3]))
    with pytest.raises(ValueError, match=r"vectors 5, 6, .*, 12 and 4 more"):
        vectors.add(torch.full((12, 3), float("nan")))
    assert len(vectors) == 5


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[d\], not \[2, 3\]"):
        Vectors(torch.zeros(2, 3), 5)
    vectors = Vectors(torch.zeros(3), 5)
    with pytest.raises(ValueError, match=r"\[b, 3\], not \[2, 4\]"):
        vectors.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\[b, 3\], not \[3\]"):
        vectors.add(torch.zeros(3))
    with pytest.raises(ValueError, match="6 vectors exceed the capacity of 5"):
        vectors.add(torch.zeros(6, 3))


# ---- the Gram matrix -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in each direction, the last ones incomplete."""
    monkeypatch.setattr(clustering, "COLUMNS", 96)
    monkeypatch.setattr(clustering, "ROWS", 32)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-11), (torch.bfloat16, 2**-8)])
def test_gram_is_the_float64_one_within_half_precision(small_blocks, dtype, bound):
    """Relative to |x_i| |x_j|: unit roundoff of float16 (the store) or bfloat16 (factors), averaged over d entries."""
    x, _ = planted(75, 1000, 3, 5.0)
    gram, exact = gram_matrix(stored(x), dtype=dtype), exact_gram(x)
    norms = exact.diagonal().sqrt()
    error = (gram.double() - exact) / (norms[:, None] * norms)
    assert gram.dtype == torch.float32
    assert torch.equal(gram, gram.T)
    assert error.square().mean().sqrt() < bound / 1000**0.5
    assert error.diagonal().abs().max() < 2**-13  # squared norms are never bfloat16


def test_products_are_bfloat16_where_that_is_fast(monkeypatch):
    vectors = stored(planted(40, 500, 3, 5.0)[0])
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(clustering, "_fast_bfloat16", lambda device, fast=fast: fast)
        assert torch.equal(gram_matrix(vectors), gram_matrix(vectors, dtype=dtype))


def test_centring_comes_before_rounding():
    """A common part 300 times the differences costs stored digits, but is not multiplied out in bfloat16."""
    x, _ = planted(60, 800, 3, 5.0)
    common = 300 * torch.randn(800, generator=torch.Generator().manual_seed(1))
    near, far = gram_matrix(stored(x)), gram_matrix(stored(x + common, common))
    torch.testing.assert_close(near, far, rtol=0, atol=1.0)  # of diagonals of 800
    torch.testing.assert_close(gram_matrix(stored(x + common)), near, rtol=0, atol=25.0)  # without a reference


def test_stacks_and_blocks_change_nothing(small_blocks):
    x, _ = planted(75, 1000, 3, 12.0)
    one = cluster(stored(x), 3)
    for stack in (1, 7, 74):
        other = cluster(stored(x, stack=stack), 3)
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))


# ---- distances, Lloyd's steps and silhouettes in the span of the data ------------------------------------------------


def test_distances_are_those_of_the_full_vectors():
    x, labels = clouds()
    means = torch.stack([x[labels == k].mean(0) for k in range(4)])
    got = distances(gram_matrix(stored(x), dtype=torch.float32), labels, 4)
    torch.testing.assert_close(got, torch.cdist(x.double(), means.double()).square().float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_lloyd_is_scikit_learns_on_the_full_vectors(seed):
    """From the means of the same random partition to the same fixed point, in several steps."""
    x, _ = clouds(seed)
    start = torch.randint(4, (len(x),), generator=torch.Generator().manual_seed(seed))
    means = torch.stack([x[start == k].mean(0) for k in range(4)]).numpy()
    full = KMeans(4, init=means, n_init=1, tol=0, algorithm="lloyd").fit(x.numpy())
    labels = lloyd(gram_matrix(stored(x), dtype=torch.float32), start, 4)
    assert full.n_iter_ > 3
    assert labels.tolist() == full.labels_.tolist()


def test_lloyd_refills_a_cluster_that_runs_empty():
    """With the vector farthest from its mean: the outlier."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [30.0]])
    labels = lloyd(gram_matrix(stored(x)), torch.zeros(5, dtype=torch.int64), 2)
    assert labels.tolist() == [0, 0, 0, 0, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 40), d=st.integers(1, 60), m=st.integers(1, 4))
def test_lloyds_steps_never_raise_the_inertia_and_end_where_every_mean_is_nearest(seed, n, d, m):
    x, _ = planted(n, d, m, 2.0, seed)
    gram = gram_matrix(stored(x), dtype=torch.float32)

    def inertia(labels):
        return float(distances(gram, labels, m).gather(1, labels[:, None]).sum())

    labels = torch.arange(n) % m
    for _ in range(20):
        after = lloyd(gram, labels, m, steps=1)
        assert inertia(after) <= inertia(labels) * (1 + 1e-5) + 1e-4
        labels = after
    end = lloyd(gram, labels, m)
    reached = distances(gram, end, m)
    assert (reached.gather(1, end[:, None])[:, 0] <= reached.amin(1) + 1e-4).all()


def test_silhouette_is_scikit_learns():
    x, labels = clouds(separation=6.0)
    x, labels = torch.cat([x, 2 * x[:1]]), torch.cat([labels, torch.tensor([4])])  # one cluster of one member
    got = silhouette(gram_matrix(stored(x), dtype=torch.float32), labels, 5)
    np.testing.assert_allclose(got, silhouette_samples(x.numpy(), labels.numpy()), atol=1e-4)


@pytest.mark.parametrize("n", [60, 700])
def test_principal_coordinates_are_the_projections_on_the_top_singular_vectors(n):
    """Both ways to get them: diagonalisation and Lanczos iterations."""
    x, _ = planted(n, 900, 4, 25.0)
    gram = exact_gram(x)
    u, s, _ = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    got = principal_coordinates(gram.float(), 3)
    assert got.shape == (n, 3)
    # up to the signs of the directions
    torch.testing.assert_close(got @ got.T, (u * s.square())[:, :3] @ u[:, :3].T, rtol=0, atol=1e-3 * float(s[0] ** 2))
    assert (got.square().sum(0).diff() < 0).all()
    assert torch.equal(got, principal_coordinates(gram.float(), 3))


# ---- whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_weak_clusters_are_recovered_where_plain_k_means_fails(seed):
    """d / n = 67: a vector's share 1/100 of its mean, 2 d / 100 = 400, outweighs the centres' 2 * 100."""
    x, truth = planted(300, 20_000, 3, 10.0, seed)
    plain = KMeans(3, n_init=3, random_state=0).fit(x.numpy())
    ours = cluster(stored(x), 3)
    assert adjusted_rand_score(truth, plain.labels_) <= 0.2
    assert adjusted_rand_score(truth, ours.labels) == 1.0
    assert ours.inertia < plain.inertia_


def test_easy_clusters_are_those_of_plain_k_means():
    x, truth = planted(120, 500, 4, 15.0)
    plain = KMeans(4, n_init=10, random_state=0).fit(x.numpy())
    ours = cluster(stored(x), 4)
    assert adjusted_rand_score(plain.labels_, ours.labels) == adjusted_rand_score(truth, ours.labels) == 1.0
    assert ours.inertia == pytest.approx(plain.inertia_, rel=1e-5)
    assert ours.refined == 0


@pytest.mark.parametrize(("m", "power"), [(3, 0.75), (6, 0.75), (3, 0.1)])
def test_no_worse_than_plain_k_means_where_there_are_no_clusters(m, power):
    """Spectra that fall and one that is nearly flat: the best of the proposals is kept."""
    x = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 301) ** -power
    plain = KMeans(m, n_init=10, random_state=0).fit(x.numpy())
    few, many = (cluster(stored(x), m, directions=[r]).inertia for r in (m - 1, 4 * m))
    best = cluster(stored(x), m)
    assert few != many
    assert best.inertia == min(few, many)
    assert best.directions == (m - 1 if few < many else 4 * m)
    assert best.inertia <= plain.inertia_ * 1.001


def test_clusters_are_numbered_by_size():
    sizes, (x, _) = [10, 50, 15, 25], planted(4, 300, 4, 20.0)
    truth = torch.arange(4).repeat_interleave(torch.tensor(sizes))[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    x = x[truth] + 0.3 * torch.randn(100, 300, generator=torch.Generator().manual_seed(1))
    number = torch.tensor([3, 0, 2, 1])
    assert torch.equal(cluster(stored(x), 4).labels, number[truth])


def test_result_is_a_fixed_point_of_plain_k_means():
    x, _ = clouds(separation=1.0, n=200)
    ours = cluster(stored(x), 4)
    full = KMeans(4, init=ours.centroids.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(x.numpy())
    assert ours.labels.tolist() == full.labels_.tolist()
    raw = cluster(stored(x), 4, directions=[3], refine=False)
    assert raw.inertia > cluster(stored(x), 4, directions=[3]).inertia


def test_centroids_are_the_means_of_the_members():
    """With theta added back, in its own type; inertia is the sum of squared distances from them."""
    x, _ = planted(90, 700, 3, 12.0)
    theta = torch.randn(700, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = cluster(stored(theta + x, theta), 3)
    means = torch.stack([(theta + x)[ours.labels == k].mean(0) for k in range(3)])
    assert ours.centroids.dtype == torch.float64
    torch.testing.assert_close(ours.centroids, means, rtol=0, atol=2e-3 * 30**-0.5)
    assert ours.inertia == pytest.approx(float((theta + x - means[ours.labels]).square().sum()), rel=1e-5)
    sizes = ours.labels.bincount()
    assert (sizes.diff() <= 0).all()
    assert (sizes > 0).all()


def test_one_cluster_is_the_mean_of_all():
    """TSA-MAML with m = 1 (algorithms.md 14, TS1)."""
    x, _ = planted(50, 300, 3, 5.0)
    ours = cluster(stored(x), 1)
    assert not ours.labels.any()
    assert not ours.silhouette.any()
    torch.testing.assert_close(ours.centroids[0], x.mean(0), rtol=0, atol=1e-3)
    assert ours.inertia == pytest.approx(float(exact_gram(x).trace()), rel=1e-5)


def test_as_many_clusters_as_vectors():
    x, _ = planted(6, 50, 3, 5.0)
    ours = cluster(stored(x), 6)
    assert sorted(ours.labels.tolist()) == list(range(6))
    assert ours.inertia == pytest.approx(0, abs=1e-6)


def test_a_common_shift_changes_nothing():
    """Clustering phi or phi - theta (algorithms.md 14, TS2); without a reference only digits are lost."""
    x, _ = clouds(separation=8.0)
    shift = 5 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    here = cluster(stored(x), 4)
    for there in (cluster(stored(x + shift, shift), 4), cluster(stored(x + shift), 4)):
        assert torch.equal(here.labels, there.labels)
        torch.testing.assert_close(there.centroids, here.centroids + shift, rtol=0, atol=5e-3)
        assert there.inertia == pytest.approx(here.inertia, rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_of_the_vectors_does_not_matter(seed):
    x, _ = planted(97, 2000, 3, 12.0, seed % 7)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    here, there = cluster(stored(x), 3), cluster(stored(x[order]), 3)
    assert adjusted_rand_score(here.labels[order], there.labels) == 1.0
    torch.testing.assert_close(here.inertia, there.inertia, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [90, 600])
def test_equal_seeds_give_equal_bits(n):
    x, _ = clouds(n=n, separation=0.5)
    one, two = cluster(stored(x), 4, seed=5), cluster(stored(x), 4, seed=5)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, two, strict=True))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    cluster(stored(x), 4, seed=6)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state()[1].tolist()


def test_one_gram_matrix_serves_several_m():
    x, _ = clouds()
    vectors = stored(x)
    gram = gram_matrix(vectors)
    for m in (2, 3, 5):
        assert torch.equal(cluster(vectors, m, gram=gram).labels, cluster(vectors, m).labels)


def test_settings_that_cannot_work_are_refused():
    vectors = stored(clouds(n=5)[0])
    with pytest.raises(ValueError, match="algorithm.m = 0 clusters: must be at least 1"):
        cluster(vectors, 0)
    with pytest.raises(ValueError, match="5 vectors cannot form 6 clusters: sample more tasks or lower algorithm.m"):
        cluster(vectors, 6)
    with pytest.raises(ValueError, match=r"directions = \[1, 9\]: 3 clusters need at least 2"):
        cluster(vectors, 3, directions=[1, 9])


@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize("different", [1, 2, 4])
def test_fewer_different_vectors_than_clusters_are_refused(n, different):
    x = clouds(n=different)[0][torch.arange(n) % different]
    for start in (x, 0 * x):
        with pytest.raises(ValueError, match="fewer than 5 of the"):
            cluster(stored(start), 5)
    if different > 1:
        assert adjusted_rand_score(torch.arange(n) % different, cluster(stored(x), different).labels) == 1.0


def test_purity_by_hand():
    labels, truth = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([5, 5, 3, 3, 3, 5])
    assert purity(labels, truth) == pytest.approx(5 / 6)
    assert purity(truth, truth) == 1.0


def test_centroids_of_given_labels():
    x, labels = clouds()
    means, _ = centroids(stored(x), labels, 4)
    torch.testing.assert_close(means, torch.stack([x[labels == k].mean(0) for k in range(4)]), rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_cuda_gives_the_same_clusters():
    x, truth = planted(700, 20_000, 3, 12.0)
    ours = cluster(stored(x.cuda(), torch.zeros(20_000, device="cuda")), 3)
    assert all(t.is_cuda for t in (ours.labels, ours.centroids, ours.silhouette))
    assert adjusted_rand_score(truth, ours.labels.cpu()) == 1.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_conv4_vectors_fit_in_8_gb_and_a_few_minutes():
    """n = 10,000 of d = 112,000 in a process of its own: peak memory, time and recovery, as the script prints them."""
    command = [sys.executable, str(ROOT / "scripts/bench_clustering.py"), "--separation", "9", "--peer-n", "0"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    print(run.stdout)
    total = next(line for line in run.stdout.splitlines() if line.startswith("total")).split()
    assert float(total[total.index("GB") - 1]) < 8
    assert float(total[total.index("s") - 1]) < 600
    assert "adjusted Rand index 1.000" in run.stdout
