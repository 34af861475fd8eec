"""Every experiment on the adaptation learning rate that is a study: runs small, draws, and judges what it should."""

import pytest

from metalearn import shown
from metalearn.cells import expand
from metalearn.ledger import CellDir
from metalearn.results import Result
from metalearn.run import run

SMALL = {"corollary1": ("study.tasks=60", "study.samples=[1,10]", "study.widths=[1,5]")}
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
