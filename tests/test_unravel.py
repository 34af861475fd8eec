"""Every experiment on the adaptation learning rate that is a study: runs small, draws, and judges what it should."""

import pytest

from metalearn import shown
from metalearn.cells import expand
from metalearn.ledger import CellDir
from metalearn.results import Result
from metalearn.run import run

SMALL = {
    "corollary1": ("study.tasks=60", "study.samples=[1,10]", "study.widths=[1,5]"),
    "fig5": ("study.tasks=20", "study.new_tasks=50", "study.repetitions=10", "study.steps=[0,1,10,1000,30000]"),
}
"""Keys that make an experiment a matter of a second."""


@pytest.fixture(scope="module")
def shows(tmp_path_factory):
    """What a small form of an experiment shows, and its results."""
    kept = {}

    def call(name):
        if name not in kept:
            output = tmp_path_factory.mktemp(name)
            found = expand([f"experiment=unravel/{name}", *SMALL[name], f"output_dir={output}", "logger=none"])
            for cell in found:
                assert run(cell) == "done"
            folders = [CellDir(output, cell.cell_id) for cell in found]
            results = [Result(d.path, d.result) for d in folders]
            kept[name] = shown.show(f"unravel/{name}", f"metalearn.unravel.{name}", results), results
        return kept[name]

    return call


@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_is_drawn_with_labels_and_judged(shows, name, tmp_path):
    content, _ = shows(name)
    assert content.findings and all(f.measured and f.claim and f.criterion for f in content.findings)
    for figure in content.figures.values():
        assert figure.axes and all(a.get_xlabel() and (a.get_ylabel() or a.get_yticklabels()) for a in figure.axes)
    for file in shown.write(content, tmp_path):
        assert file.stat().st_size > 2000


def test_corollary_1_lower_bound_fails_for_random_designs_alone(shows):
    """One Gaussian feature: alpha*_lim = K / (2 (K + 4)), below the bound 1/2."""
    content, (result,) = shows("corollary1")
    upper, fixed, random = content.findings
    assert (upper.holds, fixed.holds, random.holds) == (True, True, False)
    value, half = shown.scalar(result, "alpha_lim@K=10,d=1,design=gaussian")
    assert abs(value - 10 / 28) < 2 * half < 0.15
    assert shown.scalar(result, "lower@K=10,d=1,design=gaussian")[0] > value + half


def test_fig5_gaps_have_their_expected_size(shows):
    """U(-5, 5), 20 tasks, N(0, 3 I): F_0 gap -0.00748; the new tasks' loss is E x^2 = 25 / 3 times it, at t = 0."""
    _, (result, *_) = shows("fig5")
    gap, half = shown.scalar(result, "distance_gap@t=0")
    assert gap == pytest.approx(-0.00748, abs=2 * half) and half < 0.0005
    loss, wide = shown.scalar(result, "loss_gap@t=0,tasks=new")
    assert loss / 50 == pytest.approx(gap * 25 / 3, abs=2 * (half * 25 / 3 + wide / 50))


def test_fig5_loss_is_higher_before_adaptation_on_the_tasks_of_training_alone(shows):
    """w_r is their least loss by definition; on new tasks with centred features, nearer is better at once."""
    content, results = shows("fig5")
    assert [f.holds for f in content.findings] == [True, False, True, True] * 2
    for result in results:
        own = shown.line(result, "loss_gap", "t", tasks="own").mean
        assert own[0] > 0 > own[2]
    gap = shown.line(results[0], "distance_gap", "t").mean
    least, largest = (shown.scalar(results[0], f"eigenvalue@which={w}")[0] for w in ("least", "largest"))
    assert 0 < least < 25 / 3 < largest
    assert (1 - 2e-5 * largest) ** 2000 < gap[3] / gap[0] < (1 - 2e-5 * least) ** 2000
