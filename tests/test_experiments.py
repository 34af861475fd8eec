"""Prepared sweeps and tables: they compose, hang together, and leave out no published number."""

import csv
import functools
import re
from pathlib import Path

import pytest
import runs
import yaml
from small_data import small_files

import metalearn
from metalearn.cells import Cell, expand
from metalearn.composing import members
from metalearn.paths import conf_dir
from metalearn.results import matches, value
from metalearn.run import build, build_data, build_learner, run
from metalearn.schema import is_study
from metalearn.tables.definition import load, names, unavailable

CELLS = {  # of one seed, and seeds
    "gradagree/corrupted": (4, 10),
    "gradagree/corrupted_omniglot": (8, 3),
    "gradagree/fig1": (2, 10),
    "gradagree/table2": (16, 3),
    "overview/speed": (2, 1),
    "own/alpha_glyphs": (10, 3),
    "own/alpha_sinusoid_agreement": (10, 3),
    "own/m_group_regression": (7, 3),
    "trlearner/fig10_sinusoid": (4, 5),
    "trlearner/table1": (24, 5),
    "trlearner/table2": (8, 5),
    "trlearner/table6": (20, 5),
    "trlearner/table9": (12, 5),
    "tsa/fig2": (4, 3),
    "tsa/fig3_group_omniglot": (3, 3),
    "tsa/fig3_group_regression": (1, 3),
    "tsa/fig4": (5, 3),
    "tsa/fig5": (5, 3),
    "tsa/table1_group_omniglot": (7, 3),
    "tsa/table1_group_regression": (7, 3),
    "tsa/table2": (36, 3),
    "tsa/table5": (16, 3),
    "unravel/corollary1": (1, 1),
    "unravel/fig1": (1, 1),
    "unravel/fig10a": (15, 3),
    "unravel/fig10b": (15, 3),
    "unravel/fig11": (1, 1),
    "unravel/fig12": (13, 3),
    "unravel/fig3": (5, 3),
    "unravel/fig4a": (1, 1),
    "unravel/fig5": (3, 1),
    "unravel/fig6": (1, 1),
    "unravel/fig7": (2, 1),
    "unravel/fig8": (3, 1),
    "unravel/fig2": (2, 1),
    "unravel/fig4b": (1, 1),
    "unravel/table2": (1, 1),
    "unravel/fig9": (5, 1),
}
COMPOSED_SLOWLY = {
    *("tsa/table1_group_omniglot", "tsa/table1_group_regression", "tsa/table5", "tsa/fig5"),
    *("trlearner/table1", "trlearner/table6"),
}
"""Of many members, or much like another."""
NO_FILES = [  # an experiment that needs no data files, and how to make the algorithms in it tiny
    pytest.param("gradagree/corrupted", (), marks=pytest.mark.slow),
    ("gradagree/fig1", ()),
    pytest.param("own/alpha_glyphs", (), marks=pytest.mark.slow),
    ("own/alpha_sinusoid_agreement", ()),
    ("own/m_group_regression", ()),
    ("trlearner/fig10_sinusoid", ()),
    ("trlearner/table1", ("dataset=harmonic",)),
    pytest.param("trlearner/table9", (), marks=pytest.mark.slow),
    ("tsa/fig3_group_regression", ("algorithm.pretrain_steps=1", "algorithm.tasks=9")),
    ("tsa/table1_group_regression", ("algorithm=reptile",)),
    ("unravel/fig10a", ()),
    ("unravel/fig10b", ()),
    ("unravel/fig12", ()),
]
LEFT_OUT = {  # published numbers that are no cell of a table, and why
    (
        "overview_coefficients.csv",
        "*",
    ): "coefficients and a speed-up: `metalearn report taylor` and `speed` measure them",
    ("trlearner_text.csv", "*"): "sizes, rates, claimed differences, and scores of an external sampler",
    ("tsa_text.csv", "sec5.2_text"): "differences between cells of Tables 2 and 3",
    ("unravel_text.csv", "fig4a_text"): "the constant of an example curve",
    ("unravel_text.csv", "sec5.1_text"): "widths and lengths",
    ("unravel_text.csv", "sec5.2_text"): "a width",
    ("unravel_text.csv", "sec5.3_text"): "rates and a number of tasks",
    ("unravel_text.csv", "H.3_text"): "a number of parameters, and the weights of an average",
}


@functools.cache
def one_seed(experiment: str) -> list[Cell]:
    """The cells of an experiment's first seed, to be shown only."""
    return expand([f"experiment={experiment}", "seed=0"], to_run=False)


def file_of(experiment: str) -> Path:
    return Path(conf_dir(), "experiment", f"{experiment}.yaml")


def grid_of(experiment: str) -> list[dict]:
    return yaml.safe_load(file_of(experiment).read_text())["grid"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Small files that pass for the published ones until pictures are read."""
    with small_files(tmp_path_factory.mktemp("data")) as roots:
        yield roots


# ---- experiments -------------------------------------------------------------------------------------------------


def test_every_experiment_is_counted_here():
    assert members("experiment") == sorted(CELLS)


@pytest.mark.parametrize(
    "experiment", [pytest.param(e, marks=[pytest.mark.slow] * (e in COMPOSED_SLOWLY)) for e in CELLS]
)
def test_an_experiment_composes_into_its_cells(experiment):
    """As many as stated, valid, every value of the grid in one of them at least, and a comment with their command."""
    found = one_seed(experiment)  # once for all that follows: composing takes long
    assert len({c.cell_id for c in found}) == len(found) == CELLS[experiment][0]
    grid = grid_of(experiment)
    assert {len(block["seed"]) for block in grid} == {CELLS[experiment][1]}
    used = {o.split("=")[0] for c in found for o in c.overrides}
    assert {key for block in grid for key in block} <= used
    for key, wanted in ((k, v) for block in grid for k, vs in block.items() if k != "seed" for v in vs):
        assert any(matches(c.config, {key: wanted}) for c in found), (key, wanted)
    has_comment(experiment, needs_root="root" in found[0].config.get("dataset", {}))


def has_comment(experiment: str, *, needs_root: bool) -> None:
    """A comment that says more than the command, which it ends with."""
    lines = file_of(experiment).read_text().splitlines()
    comment = " ".join(line for line in lines if line.startswith("# "))
    assert lines[0] == "# @package _global_" and max(map(len, lines)) <= 120
    assert re.search(rf"#   metalearn (-m )?experiment={experiment}( |$)", comment) and len(comment) > 200
    assert needs_root == ("dataset.root=<" in comment)


@pytest.mark.parametrize(("experiment", "tiny"), NO_FILES)
def test_an_experiment_that_needs_no_files_runs_two_steps(experiment, tiny, tmp_path):
    """One of its cells to a result, whatever else it asks for."""
    short = ["trainer.max_steps=2", "trainer.val_every=0", "trainer.test_episodes=6", "trainer.meta_batch_size=5"]
    quiet = ["logger=none", "trainer.threads=1", "trainer.compile=never", f"output_dir={tmp_path}"]
    cell = expand([f"experiment={experiment}", "seed=0", *tiny, *short, *quiet])[0]
    assert run(cell) == "done"
    found = runs.result(tmp_path, cell)
    metric = "mse" if "mse" in found["metrics"] else "accuracy"
    assert found["steps"] == 2 and found["metrics"][metric]["n"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("experiment", CELLS)
def test_all_cells_of_an_experiment_can_be_built(experiment, places):
    """With data hashes and names: every cell of the first seed, its network and learner, and the count of all seeds."""
    roots = {value(c.config, "dataset") for c in one_seed(experiment)} & set(places)
    data = [f"dataset.root={places[r]}" for r in roots] + ["dataset.checksum=off"] * bool(roots)
    for cell in expand([f"experiment={experiment}", "seed=0", *data]):
        if is_study(cell.config):
            assert build("study", cell.config["study"]).title
            continue
        dataset = build("dataset", cell.config["dataset"])
        learner = build_learner(cell.config, dataset)
        assert dataset.kind in learner.kinds and learner.configure_optimizers().param_groups
        assert build_data(cell.config, dataset).sampler.tasks(5).tolist() == [0, 1, 2, 3, 4]
    count, seeds = CELLS[experiment]
    assert len(expand([f"experiment={experiment}"], to_run=False)) == count * seeds


def train_ids(cells: list[Cell]) -> set[str]:
    return {c.train_id for c in cells}


def test_what_two_experiments_have_in_common_is_trained_once(places):
    """Figures of TSA-MAML only test what its tables train; its first phase is the table's MAML, whatever m is."""
    data = [f"dataset.root={places['cifar_fs']}", "dataset.checksum=off", "seed=0"]
    both = ["algorithm=maml,tsa_maml", "dataset.shot=1"]
    table = expand(["experiment=tsa/table2", *both, *data])
    assert train_ids(expand(["experiment=tsa/fig2", *both, *data])) <= train_ids(table)
    assert train_ids(expand(["experiment=tsa/fig4", "algorithm.m=5", *data])) <= train_ids(table)
    maml = train_ids([c for c in table if value(c.config, "algorithm") == "maml"])
    assert train_ids([n for c in table for n in c.needs]) == maml and len(maml) == 2
    groups = expand(["experiment=tsa/table1_group_regression", "algorithm=tsa_maml", "seed=0"])
    assert train_ids(expand(["experiment=tsa/fig3_group_regression", "seed=0"])) == train_ids(groups)
    curves = expand(["experiment=trlearner/table1", "dataset=sinusoid", "algorithm=maml,anil", "seed=0"])
    assert {c.cell_id for c in curves} == {
        c.cell_id for c in expand(["experiment=trlearner/table9", "algorithm=maml,anil", "seed=0"])
    }
    own = expand(["experiment=own/m_group_regression", "algorithm=tsa_maml", "seed=0"])
    assert len({n.train_id for c in own for n in c.needs}) == 1 < len(own)


# ---- tables ------------------------------------------------------------------------------------------------------


def published() -> dict[tuple[str, str], list[dict]]:
    """All printed numbers, by file and table."""
    found: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(Path(metalearn.__file__).with_name("published").glob("*.csv")):
        with path.open(newline="") as lines:
            for row in csv.DictReader(lines):
                found.setdefault((path.name, row["table"]), []).append(row)
    return found


@functools.cache
def source_of(table: str) -> tuple[str, str]:
    """The csv file of a table's published numbers, and the value of its `table` column."""
    given = yaml.safe_load(Path(conf_dir(), "table", f"{table}.yaml").read_text())
    return given["published"], given["table"]


def test_every_published_table_has_a_file():
    have = {source_of(name) for name in names()}
    for (file, table), rows in published().items():
        reason = LEFT_OUT.get((file, table)) or LEFT_OUT.get((file, "*"))
        assert ((file, table) in have) != bool(reason), (file, table, len(rows))


@pytest.mark.parametrize("name", names())
def test_a_table_leaves_out_nothing_and_invents_nothing(name):
    """Rows by columns name every number of the csv file (claimed gains are no cells); each row and column has one."""
    table = load(name)
    assert [k for k in table.uncovered() if not k[2].startswith("claimed_")] == []
    for row in table.rows:
        assert any(table.printed(row, column) for column in table.columns), row
    for column in table.columns:
        assert any(table.printed(row, column) for row in table.rows), column


def test_known_numbers_stand_in_their_cells():
    """As printed in the papers, at the ends of tables."""
    for name, row, column, text in (
        ("tsa/table1", "TSA-MAML", "aircraft (of aircraft+bird+fungi)", "72.84"),
        ("tsa/table2", "Matching Net", "10-way 1-shot non-tr.", "15.02"),
        ("tsa/table3", "Reptile", "5-way 1-shot non-tr.", "49.12"),
        ("gradagree/fig1", "Gradient Agreement (Reptile)", "after 5 steps", "0.08"),
        ("gradagree/table1", "Gradient Agreement (MAML)", "5-way 5-shot", "73.27"),
        ("unravel/table2", "MAML last layer on frozen ERM features", "0.1 post", "797"),
        ("unravel/alpha_lim", "estimator eq3.3", "alpha*", "0.10319"),
        ("trlearner/table1", "ANIL+TRLEARNER", "sine 5-shot, b a phase", "0.471"),
        ("trlearner/table3", "MAML", "group 1: > 0.3", "52"),
        ("trlearner/table11", "PROTO.NET+METACRL", "in domain", "44.27"),
    ):
        table = load(name)
        (found_row,) = (r for r in table.rows if r.label == row)
        (found_column,) = (c for c in table.columns if c.label == column)
        assert table.printed(found_row, found_column).text == text, name


@pytest.mark.parametrize("name", [n for n in names() if load(n).experiment])
def test_a_tables_experiment_fills_each_of_its_cells_once(name):
    """No two cells of one seed fall into the same place of a table, and none falls beside it."""
    table = load(name)
    assert table.experiment in CELLS
    fills: dict[tuple[str, str], int] = {}
    for cell in one_seed(table.experiment):
        spots = [
            (row, column)
            for row in table.rows
            for column in table.columns
            if matches(cell.config, {**row.where, **column.where})
        ]
        numbers = [(column.metric, column.bn, column.group, column.step) for _, column in spots]
        assert len(set(numbers)) == len(numbers), (cell.overrides, numbers)
        assert {column.bn for _, column in spots} == {column.bn for column in table.columns}, cell.overrides
        for row, column in spots:
            fills[row.label, column.label] = fills.get((row.label, column.label), 0) + 1
    assert fills and set(fills.values()) == {1}


@pytest.mark.parametrize("name", [n for n in names() if load(n).experiment is None])
def test_a_table_without_an_experiment_says_what_is_not_there(name):
    """Otherwise it can be run, and should have one."""
    table = load(name)
    for row in table.rows:
        for column in table.columns:
            assert any(unavailable(k, v) for k, v in {**row.where, **column.where}.items()), (row, column)


def test_a_mixture_is_not_there_if_one_of_its_members_is_not():
    assert not unavailable("dataset.members", ["glyphs", "group_glyphs"])
    assert unavailable("dataset.members", ["glyphs", "aircraft"])
