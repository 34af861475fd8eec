"""Studies: cells that compute instead of training, with the same files, names, sweeps and refusals."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
from own_study import SHOWS, Keys

from metalearn import cli, shown
from metalearn.cells import expand, from_composed
from metalearn.composing import preset
from metalearn.ledger import CellDir
from metalearn.results import Result, find
from metalearn.run import run
from metalearn.schema import MEMBERS, BadInput, groups_of
from metalearn.sweep.standing import standings

STUDY = f"_target_: {Keys.target}\nname: exponentials\nthreads: 0\ndraws: 50\nbase: one\nstart: false\n"
EXPERIMENT = f"""# @package _global_
defaults:
  - override /study: exponentials
shows: {SHOWS}
sizes:
  paper: {{study.draws: 70}}
  both: {{study.draws: [70, 80], seed: 5}}
grid:
  - {{study.base: [one, two], seed: [0]}}
"""
TRAINED = """# @package _global_
defaults:
  - override /dataset: sinusoid
sizes:
  long: {trainer.max_steps: 9}
grid:
  - {algorithm: [maml, reptile], trainer.max_steps: [3], seed: [0]}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a study and experiments of its own."""
    monkeypatch.setitem(MEMBERS["study"], Keys.target, Keys)
    files = {"study/exponentials": STUDY, "experiment/own/study": EXPERIMENT, "experiment/own/trained": TRAINED}
    for name, content in files.items():
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


@pytest.fixture
def cells(place):
    """`expand` that knows them, with results below the test's folder and no mirror."""

    def call(*overrides, **options):
        more = [f"output_dir={place}/out", "logger=none"]
        return expand([*overrides, *more], [str(place / "conf")], **options)

    return call


def refused(cells, *overrides) -> str:
    with pytest.raises(BadInput) as refusal:
        cells(*overrides)
    return str(refusal.value)


# ---- names -------------------------------------------------------------------------------------------------------


def test_a_study_has_its_own_groups_and_nothing_of_training(cells):
    (cell,) = cells("study=exponentials", "study.draws=7", "seed=3")
    assert groups_of(cell.config) == ("study", "logger")
    assert set(cell.config) == {"seed", "rerun", "output_dir", "study", "logger"}
    assert (cell.config["study"]["draws"], cell.config["seed"]) == (7, 3)


def test_numbers_alone_name_a_study(cells):
    """Values at their defaults, threads and loggers do not enter its id; draws and seeds do."""
    ids = {
        name: cells("study=exponentials", *more)[0].cell_id
        for name, more in {
            "plain": (),
            "default": ("study.draws=50",),
            "threads": ("study.threads=2", "logger.project=mine"),
            "draws": ("study.draws=51",),
            "seed": ("seed=1",),
        }.items()
    }
    assert ids["plain"] == ids["default"] == ids["threads"]
    assert len(set(ids.values())) == 3


def test_ids_of_training_runs_have_not_moved(cells):
    """The group came later than results that are kept."""
    (cell,) = cells("dataset=sinusoid", "algorithm=maml")
    assert "study" not in cell.config
    assert cell.cell_id == expand(["dataset=sinusoid", "algorithm=maml"])[0].cell_id


def test_a_launchers_job_finds_the_same_cell(cells, place):
    """Hydra composes training's groups, too; the cell of what it composed is that of the command line."""
    from hydra import compose, initialize_config_dir

    from metalearn.paths import conf_dir

    (cell,) = cells("study=exponentials", "study.draws=9")
    search = f"hydra.searchpath=['file://{place}/conf']"
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = compose("config", overrides=[search, *cell.overrides])
    assert "algorithm" in composed
    assert from_composed(composed, [str(place / "conf")]).cell_id == cell.cell_id


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["study=exponential"], "study=exponential: no such study; did you mean 'exponentials'?"),
        (["study=exponentials", "algorithm=maml"], "algorithm: no such group for study=exponentials"),
        (["study=exponentials", "trainer.max_steps=3"], "trainer.max_steps: no such key for study=exponentials"),
        (["study=exponentials", "study.drawz=3"], "study.drawz: no such key for study=exponentials; did you mean"),
        (["study=exponentials", "study.draws=1"], "study.draws=1: must be >= 2"),
        (["study=exponentials", "study.draws=13"], "study.draws=13: must be another number"),
        (["study.draws=3"], "study.draws: there is no study; choose one of"),
        (["size=paper"], "size=paper: needs experiment="),
        (["experiment=own/study", "size=papr"], "size=papr: must be one of paper, both; did you mean 'paper'?"),
    ],
)
def test_what_cannot_be_is_refused(cells, overrides, says):
    message = refused(cells, *overrides)
    assert says in message and len(message.splitlines()) <= 3


# ---- experiments' sizes ------------------------------------------------------------------------------------------


def test_a_size_takes_the_place_of_the_grids_values(cells):
    def draws(*overrides):
        return [(c.config["study"]["base"], c.config["study"]["draws"], c.config["seed"]) for c in cells(*overrides)]

    experiment = "experiment=own/study"
    assert draws(experiment) == [("one", 50, 0), ("two", 50, 0)]
    assert draws(experiment, "size=paper") == [("one", 70, 0), ("two", 70, 0)]
    assert draws(experiment, "size=both", "study.base=two") == [("two", 70, 5), ("two", 80, 5)]
    assert draws(experiment, "size=paper", "study.draws=9", "study.base=one") == [("one", 9, 0)]


def test_an_id_without_its_panel_means_all_panels(cells, place):
    for panel in "ab":
        (place / "conf" / "experiment" / "own" / f"fig9{panel}.yaml").write_text(EXPERIMENT)
    both = cells("experiment=own/fig9", "study.base=one")
    assert len(both) == 1  # one cell, which both panels share
    (place / "conf" / "experiment" / "own" / "fig9b.yaml").write_text(EXPERIMENT.replace("seed: [0]", "seed: [1]"))
    both = cells("experiment=own/fig9", "study.base=one")
    assert [c.overrides[0] for c in both] == ["experiment=own/fig9a", "experiment=own/fig9b"]
    assert "no such experiment" in refused(cells, "experiment=own/fig")


def test_a_size_of_training_runs(cells):
    found = cells("experiment=own/trained", "size=long", to_run=False)
    assert [(c.config["algorithm"]["name"], c.config["trainer"]["max_steps"]) for c in found] == [
        ("maml", 9),
        ("reptile", 9),
    ]
    (one,) = cells("experiment=own/trained", "algorithm=maml", to_run=False)
    assert one.config["trainer"]["max_steps"] == 3 and "sizes" not in one.config


# ---- running -----------------------------------------------------------------------------------------------------


def test_a_study_leaves_the_files_of_a_run(cells):
    (cell,) = cells("study=exponentials", "seed=2")
    assert standings([cell])[0].state == "missing"
    assert run(cell) == "done"
    folder = CellDir(cell.config["output_dir"], cell.cell_id).path
    result = json.loads((folder / "result.json").read_text())
    assert standings([cell])[0].state == result["status"] == "done"
    assert list(result["metrics"]) == [
        *("rate", "parameters"),
        *(f"mean@alpha={a},law=exp" for a in ("0.1", "0.25", "1")),
    ]
    rows = pd.read_parquet(folder / "episodes.parquet")
    own = rows[rows["group"] == "alpha=0.25,law=exp"]
    found = result["metrics"]["mean@alpha=0.25,law=exp"]
    assert found["mean"] == pytest.approx(own["value"].mean(), rel=1e-12)
    assert found["ci95"] == pytest.approx(1.96 * own["value"].std(ddof=1) / np.sqrt(50), rel=1e-12)
    assert (found["n"], found["interval"], found["unit"]) == (50, "draws", "s") and len(rows) == 150
    assert (result["metrics"]["rate"]["mean"], result["metrics"]["rate"]["ci95"]) == (1.0, None)
    assert result["protocol"]["episodes"] == 50 and result["versions"]["torch"]
    curve = shown.line(Result(folder, result), "mean", "alpha", law="exp")
    assert curve.x.tolist() == [0.1, 0.25, 1.0] and curve.mean[1] == found["mean"]
    with pytest.raises(KeyError, match="no mean along alpha"):
        shown.line(Result(folder, result), "mean", "alpha", law="other")


def test_seeds_draw_anew_and_equal_seeds_the_same(cells, place):
    means = []
    for more in ([], ["seed=1"], ["rerun=true"]):
        (cell,) = cells("study=exponentials", *more)
        run(cell)
        means.append(CellDir(place / "out", cell.cell_id).result["metrics"]["mean@alpha=1,law=exp"]["mean"])
    assert means[0] == means[2] != means[1]


def test_a_study_starts_from_a_run_that_it_needs(cells, place):
    """The training is a cell of its own, made once."""
    (cell,) = cells("study=exponentials", "study.start=true")
    (need,) = cell.needs
    assert need.config["output_dir"] == str(place / "out") and need.config["logger"]["name"] == "none"
    (plain,) = cells("study=exponentials")
    assert cell.train_id != plain.train_id
    run(cell)
    result = CellDir(place / "out", cell.cell_id).result
    assert result["metrics"]["parameters"]["mean"] >= 2 * 3 + 3 + 1
    assert {r.data["cell_id"] for r in find(place / "out")} == {cell.cell_id, need.cell_id}


# ---- the command line --------------------------------------------------------------------------------------------


def metalearn(monkeypatch, place, *arguments) -> int:
    """`metalearn` on these arguments in this process; its exit code."""
    for name in ("FAILED", "REFUSED", "FLAGS"):
        getattr(cli, name).clear()
    more = [f"--config-dir={place}/conf", f"output_dir={place}/out", "logger=none"]
    return cli._main([*arguments, *more])


def test_one_command_runs_draws_and_judges(monkeypatch, place, capsys):
    monkeypatch.chdir(place)
    assert metalearn(monkeypatch, place, "experiment=own/study") == 0
    out = capsys.readouterr().out
    assert "own/study: holds: rates differ (two of them): 2 cells" in out and "own/study: note: an example" in out
    for kind in ("png", "svg"):
        path = place / "out" / "figures" / "own" / f"exponentials.{kind}"
        assert str(path) in out and path.stat().st_size > 1000
    assert metalearn(monkeypatch, place, "experiment=own/study", "study.base=one") == 0
    assert "own/study: undecided: rates differ" in capsys.readouterr().out
    assert preset("own/study", "shows", [str(place / "conf")]) == SHOWS


def test_a_command_leaves_no_log_open(monkeypatch, place):
    """`metalearn report unravel` runs many in one process."""
    metalearn(monkeypatch, place, "study=exponentials")
    assert not [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]


def test_figures_are_drawn_again_from_the_files(monkeypatch, place, capsys):
    from metalearn.figures import command

    monkeypatch.chdir(place)
    place_of = [f"--config-dir={place}/conf", "experiment=own/study", f"output_dir={place}/out"]
    with pytest.raises(BadInput, match="none of its cells has a result yet"):
        command.main(place_of)
    metalearn(monkeypatch, place, "experiment=own/study", "study.base=one")
    capsys.readouterr()
    assert command.main([*place_of, f"--output={place}/mine.svg"]) == 0
    out = capsys.readouterr().out
    assert "undecided" in out and "1 of its cells have no result" in out
    assert (place / "mine.svg").read_text().count("<svg") == 1 and (place / "mine.png").is_file()
    (drawn,) = (place / "out").rglob("exponentials.svg")
    drawn.unlink()
    assert command.main(place_of) == 0 and drawn.is_file()  # where the run had put it


def test_results_are_listed_with_their_study(monkeypatch, place, capsys):
    from metalearn import listing

    metalearn(monkeypatch, place, "study=exponentials")
    assert "exponentials, seed 0" in capsys.readouterr().out
    listing.main(["--from", str(place / "out"), "study=exponentials"])
    out = capsys.readouterr().out
    assert "exponentials" in out and "algorithm" not in out.splitlines()[0]


def test_a_report_says_which_claims_hold(monkeypatch, place):
    """One HTML file: verdict, the experiment's own picture, every number; no figures of scores that are not there."""
    from metalearn import experiment_report

    metalearn(monkeypatch, place, "experiment=own/study")
    where = [f"output_dir={place}/out", f"--config-dir={place}/conf", f"--output={place}/page.html"]
    assert experiment_report.main(["experiment=own/study", *where]) == 0
    page = (place / "page.html").read_text()
    assert "rates differ" in page and "<td>holds</td>" in page and page.count("<img") == 1
    assert "mean@alpha=0.25,law=exp" in page and "Adaptation" not in page


def test_a_study_has_no_gradient_to_check(place):
    from metalearn.check import command

    with pytest.raises(BadInput, match="study=corollary1 trains nothing"):
        command.main(["grad", "study=corollary1", f"output_dir={place}/out"])


def test_a_plan_leaves_studies_out(cells, place):
    from metalearn.sweep import plan

    with pytest.raises(BadInput, match="study=exponentials trains nothing"):
        plan.main(["study=exponentials", f"output_dir={place}/out", f"--config-dir={place}/conf"])
