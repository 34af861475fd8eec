"""Tables beside published numbers: definitions, choice of results, known answers, and every format read back."""

import csv
import functools
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from metalearn import listing
from metalearn.cells import expand
from metalearn.composing import members
from metalearn.schema import BadInput
from metalearn.tables import command, definition, make, records, render
from metalearn.tables.definition import load, names
from metalearn.tables.document import document, ranges

PUBLISHED = """paper,table,method,setting,metric,value,ci
mine,t1,MAML,glyphs|1shot,acc,50.0,1.0
mine,t1,MAML,glyphs|5shot,acc,60.0,
mine,t1,ANIL,glyphs|1shot,acc,40.0,0.5
mine,t1,ANIL,glyphs|5shot,acc,2*alpha,
mine,t2,MAML,glyphs|1shot,acc,1,
mine,t2,MAML,glyphs|1shot,mse,2,
mine,t2,ANIL,glyphs|5shot,acc,1,
"""
TABLE = """title: "Mine, Table 1"
published: mine.csv
table: t1
experiment: null
metric: accuracy
scale: 100
margin: 2.0
rows:
  - {method: MAML, where: {algorithm: maml}}
  - {method: ANIL, where: {algorithm: anil}}
columns:
  - {setting: glyphs|1shot, label: 1-shot, where: {dataset: glyphs, dataset.test_shot: 1}}
  - {setting: glyphs|5shot, label: 5-shot, where: {dataset: glyphs, dataset.test_shot: 5}}
protocol: {trainer.max_steps: 100}
notes: ["a remark"]
"""


def write_conf(place: Path, old: str = "", new: str = "") -> list[str]:
    """Write `table/mine/t1.yaml` with a part of it replaced, and return the folders to search."""
    folder = place / "conf" / "table" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.csv").write_text(PUBLISHED)
    assert old in TABLE
    (folder / "t1.yaml").write_text(TABLE.replace(old, new) if old else TABLE)
    return [str(place / "conf")]


@pytest.fixture
def conf(tmp_path):
    """See `write_conf`."""
    return functools.partial(write_conf, tmp_path)


# ---- definitions -------------------------------------------------------------------------------------------------


def test_a_table_is_read_with_its_published_numbers(conf):
    folders = conf()
    table = load("mine/t1", folders)
    assert "mine/t1" in names(folders) and "mine/t1" not in names()
    assert [r.label for r in table.rows] == ["MAML", "ANIL"] and table.margin == 2.0
    (first, second), (maml, anil) = table.columns, table.rows
    assert (table.printed(maml, first).value, table.printed(maml, first).half) == (50.0, 1.0)
    assert table.printed(maml, second).half is None
    assert table.printed(anil, second) == (None, None, "2*alpha", "")
    assert table.uncovered() == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("margin: 2.0", "magrin: 2.0", "magrin: no such key; did you mean 'margin'"),
        ("margin: 2.0", "margin: -1", "margin=-1"),
        ("title:", "notitle:", "notitle: no such key"),
        ('title: "Mine, Table 1"', "", "title is required"),
        ("{method: MAML, ", "{method: MAMML, ", "method=MAMML: not published; did you mean 'MAML'"),
        ("glyphs|5shot", "glyphs|7shot", "setting=glyphs|7shot: not published; did you mean 'glyphs|"),
        ("table: t1", "table: t9", "no such table in mine.csv; it has t1, t2"),
        ("mine.csv", "gradagree_tabel2.csv", "did you mean 'gradagree_table2.csv'"),
        ("label: 5-shot", "label: 1-shot", "two are called '1-shot'"),
        ("dataset.test_shot: 5", "dataset.tset_shot: 5", "did you mean 'dataset.test_shot'"),
        ("{algorithm: anil}", "{algoritm: anil}", "did you mean 'algorithm'"),
        ("trainer.max_steps", "trainer.steps", "trainer.steps=100: no such key"),
        ("metric: accuracy", "metric: accuracy@bm=batch", "at most"),
        ("table: t1", "table: t2", "name published_metric, one of acc, mse"),
        ("label: 5-shot", "label: 5-shot, published_metric: acd", "did you mean 'acc'"),
        ("rows:", "rows: [", "t1.yaml"),
        ('notes: ["a remark"]', "notes: a", "notes=a"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(conf, old, new, message):
    with pytest.raises(BadInput) as error:
        load("mine/t1", conf(old, new))
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_members_to_come_are_let_through_but_not_misspelt_keys_of_present_ones(conf):
    row = load("mine/t1", conf("{algorithm: anil}", "{algorithm: anil, regularizer: nope, regularizer.lam: 0.6}")).rows[
        1
    ]
    assert definition.unavailable("regularizer", row.where["regularizer"])
    assert not definition.unavailable("algorithm", "anil")


def test_a_table_that_is_not_there_has_a_nearest_one():
    with pytest.raises(BadInput, match="did you mean 'gradagree/table2'"):
        load("gradagree/tabel2")


@pytest.mark.parametrize("name", names())
def test_every_table_is_valid_and_its_experiment_is_there(name):
    table = load(name)
    assert table.experiment is None or table.experiment in members("experiment")
    assert table.uncovered() == [] or "/table" not in name  # numbers of running texts need not be results


# ---- results to fill them ----------------------------------------------------------------------------------------


def write(folder: Path, values, *, algorithm="maml", seed=0, shot=1, **changes):
    """A finished run whose test episodes have these values; `changes` are of result.json, dotted ones of the config."""
    config = {
        "seed": seed, "output_dir": str(folder), "rerun": False,
        "algorithm": {"name": algorithm, "alpha": 0.1, "inner_steps": 5},
        "dataset": {"name": "glyphs", "shot": shot, "test_shot": None, "way": 5},
        "backbone": {"name": "conv4"}, "regularizer": {"name": "none"}, "trainer": {"max_steps": 100, "threads": seed},
    }  # fmt: skip
    for key in [k for k in changes if "." in k]:
        group, name = key.split(".")
        config[group][name] = changes.pop(key)
    values = np.asarray(values, "f8")
    score = {"mean": values.mean(), "std": values.std(ddof=1), "n": len(values), "interval": "tasks"}
    score["ci95"] = 1.96 * score["std"] / math.sqrt(len(values))
    protocol = {"bn": "batch", "test_steps": 5, "episodes_id": "e1", "selection": {"checkpoint": "last", "step": 100}}
    data = {
        "cell_id": f"{algorithm[:2]}{shot}{seed}", "seed": seed, "config": config, "status": "done", "steps": 100,
        "seconds": 1.0, "git_commit": "c" * 40, "git_dirty": False, "versions": {"torch": "2"}, "data_hash": "d",
        "protocol": protocol | changes.pop("protocol", {}), "metrics": {"accuracy": score},
    }  # fmt: skip
    data |= changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(data))
    rows = {
        "episode": range(len(values)),
        "bn": "batch",
        "step": 5,
        "metric": "accuracy",
        "value": values,
        "group": None,
    }
    pd.DataFrame(rows).assign(loss=0.0).to_parquet(folder / "episodes.parquet")


TASKS = np.random.default_rng(0).normal(0, 0.02, 400)  # what test tasks bring, common to all runs
OFFSETS = (-0.002, 0.0, 0.002)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three seeds of MAML, as published (50.0) for 1 shot and 10 points above (60.0) for 5; two of ANIL for 1 shot."""
    place = tmp_path_factory.mktemp("finished") / "runs"
    tasks = TASKS - TASKS.mean()
    for seed, offset in enumerate(OFFSETS):
        write(place / f"m1{seed}", 0.5 + offset + tasks, seed=seed)
        write(place / f"m5{seed}", 0.7 + offset + tasks, seed=seed, shot=5)
        if seed < 2:
            write(place / f"a1{seed}", 0.43 - offset + tasks, seed=seed, algorithm="anil")
    return place


@pytest.fixture
def runs(finished, tmp_path):
    """A copy of `finished` that a test may change."""
    return shutil.copytree(finished, tmp_path / "runs")


def entries(filled):
    return {(e.row.label, e.column.label): e for e in filled.entries}


def test_a_table_of_known_results(conf, runs):
    found = entries(make("mine/t1", place=runs, config_dirs=conf()))
    one, five, anil, none = found.values()
    assert one.ours == pytest.approx((50.0, stats.t.ppf(0.975, 2) * 0.2 / math.sqrt(3), 3))
    assert (one.interval, one.seeds, one.tasks, one.verdict) == ("seeds", (0, 1, 2), 400, "reproduced")
    # seeds, tasks (common to all seeds), published
    tasks = stats.t.ppf(0.975, 399) * 100 * TASKS.std(ddof=1) / 20
    assert one.judged.half == pytest.approx(math.sqrt(one.ours.half**2 + tasks**2 + 1.0**2))
    assert (five.verdict, five.detail, five.judged.difference) == ("differs", "better", pytest.approx(10))
    assert math.isnan(five.judged.p) and any("without an interval" in n for n in five.notes)
    assert (anil.verdict, anil.judged.difference, anil.ours.n) == ("under-powered", pytest.approx(3.1), 2)
    assert (anil.judged.seeds, anil.detail) == (3, "needs 3 seeds")
    assert (none.verdict, none.published.text) == ("missing", "2*alpha")


def test_one_seed_has_an_interval_over_tasks_and_says_so(conf, runs):
    e = entries(make("mine/t1", ["seed=1"], place=runs, config_dirs=conf()))["MAML", "1-shot"]
    assert (e.interval, e.ours.n, e.seeds) == ("tasks", 400, (1,))
    assert e.ours.half == pytest.approx(stats.t.ppf(0.975, 399) * 100 * TASKS.std(ddof=1) / 20)
    assert any(n.startswith("one seed") for n in e.notes)


def test_a_baseline_is_compared_on_the_same_episodes_only(conf, runs):
    folders = conf()
    e = entries(make("mine/t1", place=runs, baseline="maml", config_dirs=folders))
    d = e["ANIL", "1-shot"].against.difference
    assert (d.mean, d.seeds, d.tasks, d.over_tasks) == (pytest.approx(-6.8), 2, 400, pytest.approx(0, abs=1e-9))
    by_seed = [100 * (-0.07 - 2 * o) for o in OFFSETS[:2]]
    assert d.over_seeds == pytest.approx(stats.t.ppf(0.975, 1) * np.std(by_seed, ddof=1) / math.sqrt(2))
    assert e["ANIL", "1-shot"].against.p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)
    assert e["MAML", "1-shot"].against is None
    write(runs / "a10", 0.4 + TASKS, algorithm="anil", protocol={"episodes_id": "other"})
    write(runs / "a11", 0.4 + TASKS, algorithm="anil", seed=1, protocol={"episodes_id": "other"})
    other = entries(make("mine/t1", place=runs, baseline="MAML", config_dirs=folders))["ANIL", "1-shot"]
    assert other.against.difference is None and any("other test episodes" in n for n in other.notes)
    with pytest.raises(BadInput, match="did you mean 'MAML'"):
        make("mine/t1", place=runs, baseline="MAMLL", config_dirs=folders)


def test_several_results_of_one_seed_are_refused_with_the_keys_that_tell_them_apart(conf, runs):
    write(runs / "twin", 0.6 + TASKS, seed=1, **{"algorithm.alpha": 0.4, "trainer.threads": 8})
    with pytest.raises(BadInput) as error:
        make("mine/t1", place=runs, config_dirs=conf())
    text = str(error.value)
    assert "MAML, 1-shot, seed 1: 2 runs" in text and "algorithm.alpha (0.1, 0.4)" in text and "threads" not in text
    assert text.endswith("as algorithm.alpha=0.1")
    found = entries(make("mine/t1", ["algorithm.alpha=4e-1"], place=runs, config_dirs=conf()))
    assert found["MAML", "1-shot"].ours.mean == pytest.approx(60, abs=0.2) and found["MAML", "1-shot"].seeds == (1,)
    write(runs / "twin", 0.6 + TASKS, seed=1)
    with pytest.raises(BadInput, match="differ in no key.*--from"):
        make("mine/t1", place=runs, config_dirs=conf())
    with pytest.raises(BadInput, match="did you mean 'algorithm.alpha'"):
        make("mine/t1", ["algorithm.alhpa=1"], place=runs, config_dirs=conf())


def test_seeds_of_other_settings_are_not_averaged(conf, runs):
    shutil.rmtree(runs / "m12")
    write(runs / "other", 0.6 + TASKS, seed=2, **{"algorithm.alpha": 0.4, "trainer.threads": 8})
    with pytest.raises(BadInput) as error:
        make("mine/t1", place=runs, config_dirs=conf())
    assert "MAML, 1-shot: its seeds differ in algorithm.alpha (0.1, 0.4); choose one, as" in str(error.value)
    found = entries(make("mine/t1", ["algorithm.alpha=0.1"], place=runs, config_dirs=conf()))
    assert found["MAML", "1-shot"].seeds == (0, 1)
    data = json.loads((runs / "other" / "result.json").read_text())
    data["config"]["algorithm"] |= {"alpha": 0.1, "key_to_come": 1}  # which older results do not have
    data["config"]["trainer"]["test_episodes"] = 7
    (runs / "other" / "result.json").write_text(json.dumps(data))
    assert entries(make("mine/t1", place=runs, config_dirs=conf()))["MAML", "1-shot"].seeds == (0, 1, 2)


def test_diverged_seeds_are_counted_and_never_averaged(conf, runs):
    write(runs / "m12", 0.9 + TASKS, seed=2, status="diverged", metrics={})
    e = entries(make("mine/t1", place=runs, config_dirs=conf()))["MAML", "1-shot"]
    assert (e.verdict, e.detail, e.seeds) == ("diverged", "1 of 3 seeds", (0, 1))
    assert e.ours.mean == pytest.approx(49.9)
    for seed in (0, 1):
        write(runs / f"m1{seed}", TASKS, seed=seed, status="diverged", metrics={})
    e = entries(make("mine/t1", place=runs, config_dirs=conf()))["MAML", "1-shot"]
    assert (e.verdict, e.ours, e.published.text) == ("diverged", None, "50.0")


def test_differences_from_the_papers_protocol_are_footnotes(conf, runs):
    shorter, best = {"trainer.max_steps": 50}, {"selection": {"checkpoint": "best", "by": "mean accuracy"}}
    write(runs / "m10", 0.5 + TASKS, git_dirty=True, git_commit="b" * 40, **shorter)
    write(runs / "m11", 0.5 + TASKS, seed=1, protocol=best, **shorter)
    write(runs / "m12", 0.5 + TASKS, seed=2, **shorter)
    folders = conf("trainer.max_steps: 100", "trainer.max_steps: 100, algorithm.m: 3")
    found = make("mine/t1", place=runs, config_dirs=folders)
    notes = entries(found)["MAML", "1-shot"].notes
    assert "trainer.max_steps: 50; the paper: 100" in notes
    assert not any("algorithm.m" in n for n in notes)  # MAML has no such key
    assert any("uncommitted" in n for n in notes) and any("transductive" in n for n in notes)
    assert "the best checkpoint was tested, by mean accuracy" in notes and "the last checkpoint was tested" in notes
    assert not any("max_steps" in n for n in entries(found)["ANIL", "1-shot"].notes)
    assert [r for r in found.remarks if r.startswith("results of several commits: cccccccccccc (7), bbbbbbbbbbbb (1)")]


def test_what_does_not_exist_yet_is_not_available_and_shows_the_published_number(conf, runs):
    folders = conf("{algorithm: anil}", "{algorithm: anil, regularizer: trlearnr}")
    e = entries(make("mine/t1", place=runs, config_dirs=folders))["ANIL", "1-shot"]
    assert (e.verdict, e.detail, e.published.value) == ("not available", "regularizer=trlearnr", 40.0)


def test_a_column_may_show_another_metric_mode_step_or_group(conf, runs):
    score = {"mean": 0.3, "std": 0.1, "ci95": 0.01, "n": 400}
    more = {"accuracy@step=0": score, "accuracy@bn=running": score | {"mean": 0.4}}
    write(runs / "m10", 0.5 + TASKS, metrics={"accuracy": score | {"mean": 0.5}, **more})
    for extra, mean in (("metric: accuracy@step=0", 30.0), ("bn: running", 40.0), ("bn: batch", 50.0)):
        folders = conf("label: 1-shot,", f"label: 1-shot, {extra},")
        e = entries(make("mine/t1", ["seed=0"], place=runs, config_dirs=folders))["MAML", "1-shot"]
        assert e.ours.mean == pytest.approx(mean), extra
    e = entries(make("mine/t1", ["seed=0"], place=runs, config_dirs=conf("label: 1-shot,", "group: a, label: 1-shot,")))
    assert (e["MAML", "1-shot"].verdict, e["MAML", "1-shot"].detail) == ("missing", "no result has accuracy@group=a")


# ---- the cells of an experiment ----------------------------------------------------------------------------------

EXPERIMENT = """# @package _global_
grid:
  - {algorithm: [maml], dataset.shot: [1, 5], seed: [0, 1]}
"""


def test_the_cells_of_an_experiment_are_done_missing_or_not_in_it(conf, tmp_path):
    folders = conf("experiment: null", "experiment: mine/x")
    path = Path(folders[0]) / "experiment" / "mine" / "x.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(EXPERIMENT)
    given = ["trainer.max_steps=7", f"output_dir={tmp_path / 'out'}", "logger=none"]
    cells = expand(["experiment=mine/x", *given], folders)
    for cell in cells[:1]:
        write(tmp_path / "out" / "runs" / cell.cell_id, 0.5 + TASKS, config=cell.config)
    filled = make("mine/t1", given, config_dirs=folders)
    found = entries(filled)
    one, five = found["MAML", "1-shot"], found["MAML", "5-shot"]
    assert (one.seeds, one.planned) == ((0,), 2) and any("1 of 2 planned seeds" in n for n in one.notes)
    assert (five.verdict, five.planned, len(five.commands)) == ("missing", 2, 2)
    assert expand(shlex.split(five.commands[0])[3:], folders)[0].cell_id == cells[2].cell_id  # the command runs it
    assert found["ANIL", "1-shot"].detail == "not in experiment=mine/x"
    assert filled.command.startswith(f"metalearn --config-dir {folders[0]} experiment=mine/x trainer.max_steps=7")
    assert filled.command in render(filled) and "can be run: 1;" in render(filled)
    twice = [g for g in given if "max_steps" not in g]
    with pytest.raises(BadInput, match="2 runs.*trainer.max_steps"):
        make("mine/t1", [*twice, "seed=0", "dataset.shot=1", "trainer.max_steps=7,8"], config_dirs=folders)


def test_without_an_experiment_keys_need_a_folder_of_results(conf):
    assert {e.detail for e in make("mine/t1", config_dirs=conf()).entries} == {"no experiment is prepared"}
    with pytest.raises(BadInput, match="needs --from"):
        make("mine/t1", ["seed=0"], config_dirs=conf())


# ---- formats, each read back -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(finished, tmp_path_factory):
    folders = write_conf(tmp_path_factory.mktemp("labels"), "label: 5-shot", 'label: "5|shot_&_<b>%"')
    return make("mine/t1", place=finished, baseline="MAML", config_dirs=folders)


def expected(filled):
    """What readers see, column by column."""
    return [[list(row) for row in grid.rows] for grid in document(filled).grids]


class Cells(HTMLParser):
    """The texts of all tables' body cells, by table and row; and tags that were left open."""

    def __init__(self):
        super().__init__()
        self.tables, self.open, self.links, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.links += [v[1:] for k, v in attrs if k == "href"]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def test_html_reads_back_and_needs_nothing_else(filled):
    text = render(filled, "html")
    parsed = Cells()
    parsed.feed(text)
    assert parsed.open == [] and set(parsed.links) <= set(parsed.ids) and parsed.links
    assert [t[1:] for t in parsed.tables[:2]] == expected(filled)
    assert "http" not in text and "<script" not in text and "<b>" not in text


def test_markdown_reads_back(filled):
    lines = [line for line in render(filled, "markdown").splitlines() if line.startswith("| ")]
    rows = [[re.sub(r"\\(.)", r"\1", t.strip()) for t in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    for grid in expected(filled):
        for row in grid:
            assert [t.replace("±", "+-") for t in row] in rows
    assert len({len(r) for r in rows[:4]}) == 1


def test_latex_reads_back_with_balanced_braces_and_environments(filled):
    text = render(filled, "latex")
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text)
    assert not re.search(r"(?<!\\)[#%_&](?!.*\\usepackage)", re.sub(r"^%.*|(?<!\\) & ", "", text, flags=re.M))
    undo = {r"$\pm$": "±", r"\%": "%", r"\_": "_", r"\&": "&", r"\textless{}": "<", r"\textgreater{}": ">"}
    rows = []
    for line in text.splitlines():
        if line.endswith(r" \\"):
            for code, plain in undo.items():
                line = line.replace(code, plain)
            rows.append(line.removesuffix(r" \\").split(" & "))
    for grid in expected(filled):
        for row in grid:
            assert row in rows


def test_terminal_columns_are_aligned(filled):
    text = render(filled)
    for grid in expected(filled):
        for row in grid:
            (line,) = [x for x in text.splitlines() if x.split("  ")[0] == row[0] and row[3].replace("±", "+-") in x]
            for cell in filter(None, row):
                assert cell.replace("±", "+-") in line
    head = next(x for x in text.splitlines() if x.startswith("method"))
    first = next(x for x in text.splitlines() if x.startswith("MAML"))
    assert first.index("reproduced") == head.index("verdict")


def test_csv_has_one_line_a_cell_and_every_number(filled):
    rows = list(csv.DictReader(io.StringIO(render(filled, "csv"))))
    assert len(rows) == 4 and rows[1]["column"] == "5|shot_&_<b>%"
    for row, record in zip(rows, records(filled), strict=True):
        for key, value in record.items():
            if isinstance(value, float):
                assert row[key] == "" if math.isnan(value) else float(row[key]) == value
            else:
                assert row[key] == ("" if value is None else str(value))
    assert (rows[0]["verdict"], float(rows[0]["mean"]), rows[3]["mean"]) == ("reproduced", pytest.approx(50), "")
    assert float(rows[2]["minus_baseline"]) == pytest.approx(-6.8)


def test_counts_add_up_by_row_column_and_in_all(filled):
    grid = document(filled).counts
    counts = {r[0]: [int(x) for x in r[1:]] for r in grid.rows}
    assert grid.header[1:] == ("reproduced", "differs", "under-powered", "missing")
    assert counts["all"] == [1, 1, 1, 1] and counts["MAML"] == [1, 1, 0, 0] and counts["1-shot"] == [1, 0, 1, 0]


def test_footnotes_are_numbered_once_and_runs_of_marks_joined(filled):
    doc = document(filled)
    assert [mark for mark, _ in doc.notes] == [str(i + 1) for i in range(len(doc.notes))]
    assert len({text for _, text in doc.notes}) == len(doc.notes)
    assert [text for _, text in doc.notes if text.startswith("all: bn=batch")]
    assert (ranges([5, 1, 2, 3]), ranges([])) == ("1-3,5", "")


@pytest.mark.parametrize(("spread", "text"), [(1.0, "50.0 +- 1.0"), (0.01, "50.000 +- 0.010"), (1e-9, "50.000000 +- ")])
def test_an_interval_has_two_digits(conf, tmp_path, spread, text):
    """The published numbers of the first column have one decimal."""
    for seed, offset in enumerate((-1, 0, 1)):
        half = stats.t.ppf(0.975, 2) / math.sqrt(3)
        write(tmp_path / f"{seed}", np.full(4, 0.5 + 0.01 * offset * spread / half), seed=seed)
    assert text in render(make("mine/t1", place=tmp_path, config_dirs=conf()))


def test_results_from_elsewhere_are_not_promised_to_be_left_alone(finished):
    text = render(make("gradagree/fig1", place=finished))
    assert "nothing that is finished" not in text
    assert "missing cells: 2; this runs them, with all others that are not finished in its own output_dir:" in text


# ---- the verbs ---------------------------------------------------------------------------------------------------


def test_the_verb_prints_writes_and_lists(conf, finished, tmp_path, capsys):
    folders = ["--config-dir", *conf()]
    assert command.main(["mine/t1", "--from", str(finished), "seed=0", *folders]) == 0
    assert "Mine, Table 1" in capsys.readouterr().out
    out = tmp_path / "new" / "t.csv"
    assert command.main(["mine/t1", "--from", str(finished), "--output", str(out), *folders]) == 0
    assert len(out.read_text().splitlines()) == 5 and capsys.readouterr().out == ""
    assert command.main(["--from", str(finished), *folders]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"mine/t1 +3 of 4 +- +Mine, Table 1", listed) and re.search(r"gradagree/table2 +0 of 16", listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gradagree/tabel2"], "did you mean 'gradagree/table2'"),
        (["gradagree/table2", "--format", "htm"], "did you mean 'html'"),
        (["gradagree/table2", "gradagree/table1"], "one table at a time"),
        (["seed=0"], "name one of"),
        (["gradagree/table2", "--from", "/nowhere"], "no such folder"),
        (["gradagree/table2", "--form", "csv"], "see metalearn table --help"),
    ],
)
def test_bad_input_of_the_verb(arguments, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        command.main(arguments)


def test_results_are_listed_filtered_sorted_and_read_back(finished, capsys):
    def listed(*arguments):
        assert listing.main(["--from", str(finished), *arguments]) == 0
        return capsys.readouterr().out

    rows = json.loads(listed("algorithm=maml", "seed=0,2", "--format", "json", "--sort", "mean", "--reverse"))
    assert [(r["seed"], round(r["mean"], 3)) for r in rows] == [(2, 0.702), (0, 0.698), (2, 0.502), (0, 0.498)]
    (row,) = csv.DictReader(
        io.StringIO(listed("algorithm=anil", "seed=1", "--columns", "algorithm.alpha", "--format=csv"))
    )
    assert (row["algorithm.alpha"], row["status"], row["n"], row["folder"]) == (
        "0.1",
        "done",
        "400",
        str(finished / "a11"),
    )
    text = listed("dataset.test_shot=5")
    assert text.count("maml") == 3 and "3 results" in text
    assert listed("algorithm=maml", "--format", "markdown").count("\n| ") == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algoritm=maml"], "did you mean 'algorithm'"),
        (["algorithm=protonet"], "none of its 8 results has algorithm=protonet"),
        (["--metric", "acuracy"], "did you mean 'accuracy'"),
        (["--columns", "algorithm.alhpa"], "did you mean 'algorithm.alpha'"),
        (["--sort", "maen"], "did you mean 'mean'"),
        (["--format", "jsn"], "did you mean 'json'"),
        (["maml"], "is not key=value"),
    ],
)
def test_bad_input_of_results(finished, arguments, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        listing.main(["--from", str(finished), *arguments])


def test_tables_and_results_need_no_torch():
    code = (
        "import sys; from metalearn import listing; from metalearn.tables import command; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
