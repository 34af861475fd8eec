"""`metalearn report key=value`: one page that needs nothing else, and says what there is and what there is not."""

import base64
from html.parser import HTMLParser

import pytest
import stored
from scipy import stats

from metalearn import cells, reports
from metalearn.experiment_report import report
from metalearn.experiment_report.page import Html, page, tag
from metalearn.schema import BadInput
from metalearn.selection import dimensions, select

HOSTILE = "<script>alert('x')</script> & \"quotes\""


class Reader(HTMLParser):
    """Tags with their attributes, the rows of tables, and the text by heading."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.section, self.open = "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "h2":
            self.section = ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well nested

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.section += data
        elif {"td", "th"} & set(self.open):
            self.rows[self.section][-1][-1] += data
        if "style" not in self.open:
            self.texts[self.section] = self.texts.get(self.section, "") + data


MEANS = {0.01: [3.0, 1.0, 2.0], 0.02: [0.5, 0.7, 0.9]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of a sweep in which cells are done, diverged, failed and missing."""
    place = tmp_path_factory.mktemp("report")
    line = ["dataset=sinusoid", f"output_dir={place}", "algorithm.alpha=0.01,0.02,0.03", "seed=0,1,2"]
    for cell in cells.expand(line):
        alpha, seed = cell.config["algorithm"]["alpha"], cell.config["seed"]
        if alpha in MEANS:
            commit = ("b" if seed == 2 else "a") * 40
            value = MEANS[alpha][seed]
            stored.store(
                cell, value, steps=(9.0, 5.0), log=[(5, 2.0), (10, 1.0)], git_commit=commit, git_dirty=seed == 1
            )
        elif seed == 0:
            stored.store(cell, 0.0, error=f"not finite {HOSTILE}")
        elif seed == 1:
            stored.fail(cell, HOSTILE)
    out = place / "page.html"
    assert reports.main([*line, "--output", str(out)]) == 0
    return line, out.read_text(), Reader(out.read_text())


def test_the_page_needs_nothing_outside(made):
    _, text, read = made
    assert read.open == []
    images = [a["src"] for t, a in read.tags if t == "img"]
    assert len(images) == 3  # over alpha, adaptation steps, validation
    for source in images:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)[1:4] == b"PNG"
    assert all(a["href"].startswith("#") for _, a in read.tags if "href" in a)
    assert not {"script", "link", "iframe"} & {t for t, _ in read.tags}
    assert "url(" not in text and "@import" not in text


def test_states_are_counted_and_the_rest_can_be_run(made):
    line, _, read = made
    assert dict(read.rows["Status"][1:]) == {"done": "6", "diverged": "1", "failed": "1", "missing": "1", "all": "9"}
    assert "metalearn sweep run dataset=sinusoid" in read.texts["Status"]


def test_measured_means_are_over_seeds(made):
    head, *rows = made[2].rows["Measured"]
    assert head == ["algorithm.alpha", "mse (target units²)", "seeds", "not in the mean"]
    for row, (alpha, values) in zip(rows, MEANS.items(), strict=False):
        low, high = stats.t.interval(0.95, 2, loc=stats.tmean(values), scale=stats.sem(values))
        mean, half = row[1].split(" ± ")
        assert float(row[0]) == alpha and row[2:] == ["3", ""]
        assert float(mean) == pytest.approx((low + high) / 2, rel=1e-3)
        assert float(half) == pytest.approx((high - low) / 2, rel=0.05)
    assert rows[2] == ["0.03", "", "0", "1 diverged, 1 failed, 1 missing"]


def test_a_mean_says_which_seeds_it_lacks(tmp_path):
    line = ["dataset=sinusoid", f"output_dir={tmp_path}", "algorithm.alpha=0.01,0.02", "seed=0,1,2"]
    for cell in cells.expand(line):
        alpha, seed = cell.config["algorithm"]["alpha"], cell.config["seed"]
        stored.store(cell, None if alpha == 0.02 or seed == 2 else 1.0 + seed)
    out = tmp_path / "page.html"
    assert reports.main([*line, "--output", str(out)]) == 0
    first, second = Reader(out.read_text()).rows["Measured"][1:]
    assert first[1].startswith("1.5 ± ") and first[1].endswith(" (2 of 3 seeds; others not finite)")
    assert second[1] == "not finite"


def test_errors_are_shown_as_text(made):
    _, text, read = made
    assert "<script" not in text
    assert HOSTILE in read.texts["Failures"] and f"not finite {HOSTILE}" in read.texts["Failures"]


def test_differences_of_the_environment_are_marked(made):
    read = made[2]
    assert "Results differ in git_commit, git_dirty." in read.texts["Environment"]
    assert "uncommitted changes" in read.texts["Environment"]
    assert dict(read.rows["Environment"])["torch"] == "2.13.0"
    assert [a for t, a in read.tags if t == "span"] == [{"class": "warn"}] * 2


def test_the_protocol_names_what_varies(made):
    rows = dict(made[2].rows["Protocol"])
    assert rows["algorithm.alpha"] == "0.01 (3 cells); 0.02 (3 cells); 0.03 (3 cells)"
    assert rows["episodes"] == "50" and rows["optimizer.lr"]


def test_every_cell_has_a_row(made):
    line, _, read = made
    assert [r[0] for r in read.rows["Cells"][1:]] == [c.cell_id for c in cells.expand(line)]
    assert "7 cells with a result took 14 s" in read.texts["Cells"]


def test_one_result_alone_and_none(tmp_path):
    (cell,) = cells.expand(["dataset=sinusoid", f"output_dir={tmp_path}"])
    entries = select(["dataset=sinusoid", f"output_dir={tmp_path}"])
    none = Reader(report(entries))
    assert "no cell has finished: 1 missing" in none.texts["Adaptation"] and none.texts["Environment"]
    stored.store(cell, 0.25)
    one = Reader(report(select([], place=tmp_path), place=str(tmp_path)))
    assert one.rows["Measured"][1] == ["0.25 ± 0.01 t", "1", ""]
    assert "Nothing varies besides the seed." in one.texts["Figures"]


def test_settings_are_told_apart_by_what_was_swept(tmp_path):
    """Keys of one algorithm alone count too; those that only follow an algorithm do not."""
    line = ["dataset=sinusoid", f"output_dir={tmp_path}", "algorithm=protonet,maml", "algorithm.alpha=0.01,0.02"]
    assert dimensions(select(line)) == ["algorithm", "algorithm.alpha"]


def test_an_experiments_comment_and_name_are_at_the_top():
    line = ["experiment=overview/speed", "dataset.root=none", "output_dir=nowhere"]
    read = Reader(report(select(line), ["overview/speed"], overrides=line))
    assert "FOMAML saves about a third" in read.texts[""] and "@package" not in read.texts[""]
    assert dict(read.rows["Status"])["impossible"] == "2" and "omniglot" in read.texts["Failures"].lower()


def test_text_is_escaped_and_markup_is_not():
    assert tag("p", HOSTILE, Html("<b>x</b>"), title='"') == (
        '<p title="&quot;">&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quotes&quot;<b>x</b></p>'
    )
    assert "<title>&lt;a&gt;</title>" in page("<a>", [], [])


def test_help_and_bad_input(capsys, tmp_path):
    assert reports.main([]) == 0
    out = capsys.readouterr().out
    assert "metalearn report NAME" in out and "metalearn report experiment=<paper>/<id>" in out
    with pytest.raises(SystemExit):
        reports.main(["experiment=x", "--help"])
    assert "--from FOLDER" in capsys.readouterr().out
    for arguments, message in {
        ("--output", "a.html"): "name an experiment or keys",
        ("--from", str(tmp_path / "no")): "no such folder of results",
        ("seed=0", "dataset=sinusoid", "--output", "a.pdf"): "must end in .html",
    }.items():
        with pytest.raises(BadInput, match=message):
            reports.main([*arguments])


def test_tables_of_the_experiment_stand_beside_published_numbers(tmp_path):
    line = ["experiment=gradagree/fig1", f"output_dir={tmp_path}"]
    read = Reader(report(select(line), ["gradagree/fig1"], overrides=line))
    assert read.open == [] and "h3" in {t for t, _ in read.tags}
    head = read.rows["Tables"][0]
    assert "published" in head and "verdict" in head
    rows = [dict(zip(head, r, strict=True)) for r in read.rows["Tables"][1:] if len(r) == len(head)]
    assert [r["published"] for r in rows] == ["0.13", "0.08"]
    assert all(r["verdict"].startswith("missing") for r in rows)
    assert all(a["href"].startswith("#") for _, a in read.tags if "href" in a)
