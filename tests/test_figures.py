"""`metalearn figure`: its numbers against an independent computation, and that nothing disappears silently."""

import csv
import io
import subprocess
import sys

import pytest
import stored
from scipy import stats

from metalearn import cells
from metalearn.figures import command, draw, series
from metalearn.figures.series import Mark, Request
from metalearn.schema import BadInput
from metalearn.schema.keys import few
from metalearn.selection import select


@pytest.fixture
def sweep(tmp_path):
    """`sweep(*overrides)` are the cells of a sweep on sinusoids whose results lie in a temporary folder."""

    def make(*overrides: str) -> tuple[list[str], list[cells.Cell]]:
        line = ["dataset=sinusoid", f"output_dir={tmp_path}", *overrides]
        return line, cells.expand(line)

    return make


def plot(line, **request):
    return series.plot(select(line), Request(**request))


def rows(drawn) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(series.csv_text(drawn))))


def words(picture) -> str:
    """All text of a picture."""
    from matplotlib.text import Text

    return "\n".join(t.get_text() for t in picture.findobj(Text) if t.get_visible())


VALUES = {("maml", 0.01): [3.0, 1.0, 2.0], ("maml", 0.2): [0.5, 0.7, 0.9], ("fomaml", 0.01): [2.0, 2.0, 2.3]}


@pytest.fixture
def alphas(sweep):
    line, found = sweep("algorithm=maml,fomaml", "algorithm.alpha=0.01,0.2", "seed=0,1,2")
    for cell in found:
        own = VALUES.get((cell.config["algorithm"]["name"], cell.config["algorithm"]["alpha"]))
        if own:
            value = own[cell.config["seed"]]
            stored.store(cell, value, validation=value + 1, steps=(9.0, value + 0.5))
    return line


def test_means_and_intervals_over_seeds_are_students(alphas):
    drawn = plot(alphas)
    assert (drawn.x, drawn.hue, drawn.metric) == ("algorithm.alpha", ("algorithm",), "mse")
    found = {(r["line"], float(r["algorithm.alpha"])): r for r in rows(drawn)}
    for where, values in VALUES.items():
        low, high = stats.t.interval(0.95, 2, loc=stats.tmean(values), scale=stats.sem(values))
        r = found[where]
        assert float(r["mean"]) == pytest.approx((low + high) / 2)
        assert float(r["half_width_95"]) == pytest.approx((high - low) / 2)
        assert (r["interval_over"], r["seeds"], r["unit"]) == ("seeds", "3", "target units squared")
        assert dict(p.split(":") for p in r["seed_means"].split()) == {str(i): repr(v) for i, v in enumerate(values)}


def test_cells_without_a_result_are_named_and_counted(alphas):
    drawn = plot(alphas)
    (gap,) = (r for r in rows(drawn) if r["line"] == "fomaml" and r["algorithm.alpha"] == "0.2")
    assert (gap["mean"], gap["missing"], gap["seeds"]) == ("", "3", "0")
    assert len(drawn.absent["missing"]) == 3
    assert "missing: algorithm=fomaml algorithm.alpha=0.2 seed=0, algorithm=fomaml" in command.text(drawn)
    assert "Without a value, missing: " in words(draw.figure(drawn))


def test_the_best_on_validation_is_that_of_the_lowest_error(alphas):
    best = {p.place.hue: p.place.x for p in plot(alphas).points if p.best}
    assert best == {"maml": 0.2}  # of fomaml one value alone has finished


def test_failures_say_why(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02", "seed=0")
    stored.store(found[0], 1.0)
    stored.fail(found[1], "RuntimeError: out of memory\nmore lines")
    drawn = plot(line, x="algorithm.alpha")
    assert list(drawn.absent) == ["failed: RuntimeError: out of memory"]


def test_a_number_that_is_not_finite_is_called_that(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02", "seed=0")
    stored.store(found[0], 1.0)
    stored.store(found[1], None)
    drawn = plot(line, x="algorithm.alpha")
    assert drawn.absent == {"mse is not finite": ["algorithm.alpha=0.02"]}


def test_diverged_runs_are_crosses_with_their_number(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02", "seed=0,1,2")
    for cell in found:
        lost = cell.config["algorithm"]["alpha"] == 0.02 and cell.config["seed"] != 1
        stored.store(cell, 0.5, error="outer gradient is not finite at meta-step 3" if lost else None, validation=1.0)
    drawn = plot(line)
    last = drawn.points[-1]
    assert (last.place.x, last.diverged, last.seeds, last.interval) == (0.02, 2, {1: 0.5}, "tasks")
    assert not any(p.best for p in drawn.points)
    picture = draw.figure(drawn)
    text = words(picture)
    assert "2 of 3" in text and "diverged" in text and "outer gradient is not finite" in text
    crosses = [ln for ln in picture.axes[0].lines if ln.get_marker() == "x"]
    assert [tuple(ln.get_xdata()) for ln in crosses] == [(0.02,)]
    assert crosses[0].get_ydata()[0] > draw._Drawing(drawn, "").high  # above everything that is drawn


def test_a_value_without_a_mean_interrupts_the_line(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02,0.03", "seed=0")
    for cell in (found[0], found[2]):
        stored.store(cell, 0.5)
    (drawn,) = (ln for ln in draw.figure(plot(line)).axes[0].lines if ln.get_marker() == "o")
    assert [y == y for y in drawn.get_ydata()] == [True, False, True]


def test_a_point_between_gaps_has_a_bar(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02,0.03", "seed=0,1")
    for cell in (found[0], found[1], found[4], found[5]):
        stored.store(cell, 0.5 + 0.1 * cell.config["seed"])
    (bars,) = (c for c in draw.figure(plot(line)).axes[0].collections if type(c).__name__ == "LineCollection")
    half = stats.t.ppf(0.975, 1) * 0.05
    assert [s[:, 1].tolist() for s in bars.get_segments()] == [pytest.approx([0.55 - half, 0.55 + half])] * 2


def test_all_diverged_is_a_picture_too(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02", "seed=0")
    for cell in found:
        stored.store(cell, 0.5, error="loss is not finite")
    drawn = plot(line)
    assert "1 of 1" in words(draw.figure(drawn)) and [r["mean"] for r in rows(drawn)] == ["", ""]


def test_one_seed_has_the_interval_over_tasks(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02", "seed=3")
    for cell in found:
        stored.store(cell, 0.5)
    drawn = plot(line)
    assert {(p.half, p.interval, p.tasks) for p in drawn.points} == {(0.01, "tasks", 50)}
    assert "over tasks (n = 50 tasks)" in drawn.notes[0] and "seeds" not in drawn.notes[0]


def test_one_point_alone(sweep):
    line, found = sweep("seed=0")
    stored.store(found[0], 0.5)
    drawn = plot(line, x="algorithm.alpha")
    assert len(drawn.points) == 1 and draw.encoded(draw.figure(drawn), "png")[1:4] == b"PNG"
    with pytest.raises(BadInput, match="no numeric key varies"):
        plot(line)


def test_a_message_names_the_first_of_many():
    assert few("ab") == "a, b" and few(map(str, range(20))).endswith("10, 11 and 8 more")


def test_what_is_not_clear_is_refused_with_the_candidates(alphas, sweep):
    with pytest.raises(BadInput, match="differ in algorithm.alpha; name it as --hue or --panel"):
        plot(alphas, x="optimizer.lr")
    line, found = sweep("algorithm.alpha=0.01,0.02", "optimizer.lr=0.1,0.2")
    for cell in found:
        stored.store(cell, 0.5)
    with pytest.raises(BadInput, match="2 keys vary: algorithm.alpha, optimizer.lr"):
        plot(line)
    drawn = plot(line, hue=["optimizer.lr"])
    assert drawn.hues == ["0.1", "0.2"] and drawn.x == "algorithm.alpha"
    with pytest.raises(BadInput, match="algorithm.alhpa.*did you mean 'algorithm.alpha'"):
        plot(line, x="algorithm.alhpa")
    with pytest.raises(BadInput, match="accuracy: no result has it; there are mse"):
        plot(line, hue=["optimizer.lr"], metric="accuracy")


def test_cells_are_named_by_what_tells_them_apart(sweep):
    """Not by keys that follow the algorithm."""
    line, found = sweep("algorithm=maml,anil", "seed=0,1", "trainer.max_steps=7")
    assert [e.name for e in select(line)][1:3] == ["algorithm=maml seed=1", "algorithm=anil seed=0"]
    stored.store(found[0], 0.5)
    drawn = plot(line, x="algorithm")
    assert drawn.hue == () and [p.place.x for p in drawn.points] == ["anil", "maml"]


def test_nothing_finished_is_said(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02")
    with pytest.raises(BadInput, match="no cell has finished: 2 missing"):
        plot(line)


def test_runs_without_the_key_are_horizontal(sweep):
    line, found = sweep("algorithm=protonet,maml", "algorithm.alpha=0.01,0.02")
    for cell in found:
        stored.store(cell, 0.5)
    drawn = plot(line)
    assert [(p.place.hue, p.place.x) for p in drawn.points] == [("maml", 0.01), ("maml", 0.02), ("protonet", None)]
    assert "Horizontal: runs without algorithm.alpha." in drawn.notes
    picture = draw.figure(drawn)
    (level,) = (ln for ln in picture.axes[0].lines if ln.get_linestyle() == "-.")
    assert list(level.get_ydata()) == [0.5, 0.5]


def test_adaptation_steps(alphas):
    drawn = plot(alphas, x="step", hue=["algorithm", "algorithm.alpha"])
    own = [p for p in drawn.points if p.place.hue == "maml, alpha=0.2"]
    assert [p.place.x for p in own] == [0.0, 1.0, 2.0]
    assert [p.mean for p in own] == pytest.approx([9.0, 1.2, 0.7])


def test_validation_log(sweep):
    line, found = sweep("seed=0,1")
    for cell in found:
        stored.store(cell, 0.5, log=[(10, 2.0 + cell.config["seed"]), (20, 1.0)])
    drawn = plot(line, x="meta_step")
    assert [(p.place.x, p.mean) for p in drawn.points] == [(10.0, 2.5), (20.0, 1.0)] and drawn.split == "validation"
    with pytest.raises(BadInput, match=r"no result has val_accuracy or accuracy in its metrics.jsonl"):
        plot(line, x="meta_step", metric="accuracy")


def test_alpha_star_and_marks(sweep):
    line, found = sweep("algorithm.alpha=0.01,0.02", "seed=0,1")
    for cell in found:
        alpha = stored.score(0.03 + 0.02 * cell.config["seed"], unit="1")
        stored.store(cell, 0.5, metrics={"mse": stored.score(0.5), "alpha_star": alpha})
    drawn = plot(line, marks=[Mark("theory", 0.5)])
    assert [(m.name, m.value) for m in drawn.marks] == [("$\\alpha^*$", pytest.approx(0.04)), ("theory", 0.5)]
    picture = draw.figure(drawn)
    assert picture.axes[0].get_xscale() == "log"  # marks count: 0.01 to 0.5
    assert "theory = 0.5" in words(picture) and "= 0.04" in words(picture)


@pytest.mark.parametrize(
    ("values", "wanted", "zero", "name"),
    [
        ([0.01, 0.1], False, True, "linear"),
        ([0.01, 0.2], False, True, "log"),
        ([0.0, 0.01, 0.2], False, True, "symlog"),
        ([0.0, 0.01, 0.2], False, False, "linear"),
        ([1.0, 2.0], True, True, "log"),
        ([-1.0, 20.0], True, True, "linear"),
    ],
)
def test_axes_are_logarithmic_beyond_a_decade(values, wanted, zero, name):
    assert draw.scale_of(values, wanted, zero_too=zero).name == name


def test_words_on_the_axis(sweep):
    line, found = sweep("optimizer.schedule=constant,cosine", "seed=0,1")
    for cell in found:
        stored.store(cell, 0.5)
    drawn = plot(line, x="optimizer.schedule")
    assert "cosine" in words(draw.figure(drawn))
    with pytest.raises(BadInput, match="values that are no numbers"):
        plot(line, x="optimizer.schedule", marks=[Mark("a", 1.0)])


def test_accuracy_is_in_percent_and_names_its_mode(tmp_path):
    (cell,) = cells.expand(["dataset=sinusoid", f"output_dir={tmp_path}"])
    folder = stored.store(cell, 0.75, metric="accuracy", protocol=stored.PROTOCOL | MODE)
    drawn = series.plot(select([], place=folder.parent), Request(x="algorithm.alpha"))
    picture = draw.figure(drawn)
    assert picture.axes[0].get_ylabel() == "test accuracy (%)"
    assert picture.axes[0].lines[0].get_ydata()[0] == pytest.approx(75.0)
    assert "bn=batch (transductive)" in words(picture)
    assert rows(drawn)[0]["mean"] == "0.75"


MODE = {"bn": "batch", "test_steps": 1, "way": 5, "shot": 1, "selection": {"checkpoint": "last", "step": 1}}


@pytest.mark.parametrize("kind", draw.FORMATS)
def test_the_command_writes_equal_bytes_again(sweep, tmp_path, capsys, kind):
    line, found = sweep("algorithm.alpha=0.01,0.02")
    stored.store(found[0], 0.5)
    out = tmp_path / f"a.{kind}"
    twice = []
    for _ in range(2):
        assert command.main([*line, "--output", str(out)]) == 0
        twice.append(out.read_bytes())
    assert twice[0] == twice[1]
    assert out.with_suffix(".csv").read_text() == series.csv_text(plot(line))
    assert "Without a value, missing" in capsys.readouterr().out


def test_a_folder_of_results_is_chosen_from_by_keys(alphas, tmp_path, capsys):
    out = str(tmp_path / "a.png")
    assert command.main(["--from", str(tmp_path / "runs"), "algorithm=maml", "seed=0,2", "--output", out]) == 0
    assert capsys.readouterr().out.startswith("maml on sinusoid, 10 shots\n")
    for wrong, message in {
        "algorithm.alhpa=1": "no result in .* has this key; did you mean 'algorithm.alpha'",
        "algorithm=reptile": "none of its 9 results has algorithm=reptile",
    }.items():
        with pytest.raises(BadInput, match=message):
            command.main(["--from", str(tmp_path / "runs"), wrong])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "a.gif"], "a.gif: must end in .png, .svg, .pdf"),
        (["--mark", "a=b"], "a=b: must be NAME=VALUE with a finite number"),
        (["--log", "z"], "invalid choice: 'z'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(BadInput, match=message):
        command.main(options)


def test_copies_of_a_result_count_once(sweep, tmp_path):
    _, (cell,) = sweep("seed=0")
    for place in ("a", "b"):
        stored.store(cell, 0.5, place=tmp_path / place)
    drawn = series.plot(select([], place=tmp_path), Request(x="algorithm.alpha"))
    assert drawn.points[0].seeds == {0: 0.5}
    stored.store(cell, 0.6, place=tmp_path / "b")
    with pytest.raises(BadInput, match="one cell with different results"):
        series.plot(select([], place=tmp_path), Request(x="algorithm.alpha"))


def test_cells_whose_data_are_elsewhere_find_their_results(tmp_path):
    """The id of a cell needs its data; where they are not, equal configurations are enough."""
    (cell,) = cells.expand(["dataset=omniglot", f"output_dir={tmp_path}", "dataset.root=none"], tolerant=True)
    assert cell.problem is not None
    stored.store(cell._replace(cell_id="ffffffffffff"), 0.5, metric="accuracy")
    (entry,) = select(["dataset=omniglot", f"output_dir={tmp_path}", "dataset.root=other"])
    assert entry.state == "done" and entry.result is not None
    (other,) = select(["dataset=omniglot", f"output_dir={tmp_path}", "dataset.root=other", "seed=1"])
    assert other.state == "impossible" and other.error


def test_no_torch_and_no_window():
    heavy = "{'torch', 'matplotlib.pyplot'} & {*sys.modules}"
    code = f"import sys\nfrom metalearn.figures import command, draw\nassert not {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)
