"""`metalearn report`: its list, its options, and what each report writes."""

import json
import re
from dataclasses import replace

import pytest

from metalearn import cli, reports, shown
from metalearn.bench.workloads import WORKLOADS
from metalearn.reports import speed, table
from metalearn.schema import BadInput
from metalearn.theory.taylor import COEFFICIENTS


@pytest.fixture
def report(tmp_path, capsys, recwarn):
    """`report(name, *options)` runs one into a folder: its numbers, its Markdown and what it printed."""

    def run(*arguments: str) -> tuple[dict, str, str]:
        assert reports.main([*arguments, "--output", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        text = (tmp_path / "out" / "report.md").read_text()
        assert out.strip() in text
        for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (tmp_path / "out" / name).read_bytes()[1:4] == b"PNG"
        return json.loads((tmp_path / "out" / "report.json").read_text()), text, out

    return run


def rows(text: str) -> list[list[str]]:
    """The cells of every table row of a Markdown text."""
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
    ]


def test_every_module_of_the_package_is_a_report(capsys):
    assert {"taylor", "bounds", "speed"} <= set(reports.names())
    for arguments in ([], ["--help"], ["-h"]):
        assert reports.main(arguments) == 0
        out = capsys.readouterr().out
        for name in reports.names():
            assert f"  {name} " in out and reports.load(name).TITLE in out
    for name in reports.names():
        text = reports.parser(name).format_help()
        assert f"outputs/theory/{name}" in text and "--seed" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["taylr"], "report: taylr: must be one of "),
        (["taylr"], "did you mean 'taylor'?"),
        (["taylor", "--tasks", "many"], "report taylor: argument --tasks: many: must be a whole number >= 100"),
        (["taylor", "--tasks", "99"], "99: must be a whole number >= 100"),
        (["bounds", "--sets", "1"], "1: must be a whole number >= 2"),
        (["bounds", "--seed", "-1"], "-1: must be a whole number >= 0"),
        (["unravel", "--only", "fig99"], "--only fig99: must be one of "),
        (["bounds", "--nope"], "unrecognized arguments: --nope; see metalearn report bounds --help"),
    ],
)
def test_bad_options_are_one_message(arguments, message):
    with pytest.raises(BadInput) as error:
        reports.main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_output_that_is_a_file_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(reports.load("taylor"), "run", None)
    with pytest.raises(BadInput, match=r"--output .*file/below: .*file is a file; name a folder"):
        reports.main(["taylor", "--output", str(tmp_path / "file" / "below")])


def test_the_console_knows_the_verb(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["metalearn", "report", "nope"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and capsys.readouterr().err.startswith("metalearn: report: nope: must be one of")


def test_tables_of_sentences_are_not_padded():
    text = table(["a", "b"], [["a long sentence", "x"], ["y", "z"]], padded=False)
    assert text.splitlines() == ["| a   |   b |", "| --- | --: |", "| a long sentence |   x |", "| y   |   z |"]


def test_tables_are_aligned():
    lines = table(["name", "x"], [["a", "1.5"], ["longer", "10"]]).splitlines()
    assert lines == ["| name   |   x |", "| ------ | --: |", "| a      | 1.5 |", "| longer |  10 |"]


def test_the_taylor_report(report):
    data, text, _ = report("taylor", "--tasks", "300", "--seed", "1")
    assert data["header"]["command"].startswith("metalearn report taylor --tasks 300 --seed 1")
    shown = [row for row in rows(text) if len(row) == 9][1:]
    assert [(r[0].lower(), int(r[1])) for r in shown] == [(n, k) for k in (2, 3, 4, 5) for n in COEFFICIENTS]
    for name, k, a, found_a, b, found_b, *_, holds in shown:
        assert (float(a), float(b)) == COEFFICIENTS[name.lower()](int(k))
        own = [r for r in data["coefficients"] if (r["algorithm"], r["k"]) == (name.lower(), int(k))]
        assert [f"{r['measured']:.3f} +- {r['three_se']:.3f}" for r in own[:2]] == [found_a, found_b]
        inside = [abs(r["measured"] - r["theory"]) <= r["three_se"] for r in own]
        assert len(own) == 4 and (holds == "yes") == all(inside) and inside == [r["holds"] for r in own]
    inside = sum(r["holds"] for r in data["coefficients"])
    assert f"{inside} of 48 coefficients lie within" in text and text.count("Outside:") == 48 - inside
    assert all(r["holds"] for r in (*data["orders"], *data["linear"]))


VERDICTS = ["holds", "holds", *["does not hold"] * 3]
"""Of Corollary 1's claims."""


def test_the_report_on_alpha_runs_what_is_missing_and_draws_again(report, tmp_path, monkeypatch, capsys):
    """Claims with their verdicts; a second call computes nothing, and training is not begun unasked."""
    from metalearn import cli

    call = ("unravel", "--only", "corollary1", "--results", str(tmp_path / "results"), "--threads", "1")
    data, text, _ = report(*call)
    found = [row for row in rows(text) if len(row) == 5][1:]
    assert [r[0] for r in found] == ["corollary1"] * 5 and [r[4] for r in found] == VERDICTS
    assert [shown.VERDICTS[f["holds"]] for f in data["items"][0]["findings"]] == VERDICTS
    assert "## Corollary 1" in text and "(corollary1.png)" in text
    assert "The paper's claims: 1 of 4 hold as judged, 3 do not, 0 undecided. Our further claims: 1 of 1" in text
    monkeypatch.setattr(cli, "work", None)
    assert report(*call)[1].splitlines()[:-1] == text.splitlines()[:-1]
    page = tmp_path / "docs" / "page.md"
    report(*call, "--page", str(page))
    assert page.read_text().splitlines()[:-1] == text.replace("(corollary1", "(../out/corollary1").splitlines()[:-1]
    with pytest.raises(BadInput, match=r"report unravel: --page .*: must be a file whose name ends in \.md"):
        report(*call, "--page", str(tmp_path))


def test_the_report_on_alpha_takes_stored_results(report, tmp_path, monkeypatch, capsys):
    """By what they are results of: of data that are not here, too. What is missing is named with its command."""
    from metalearn import cli

    small = ["study.samples=[1,10]", "study.widths=[1,5]"]
    plain = reports.load("unravel").cells_of
    monkeypatch.setattr(reports.load("unravel"), "cells_of", lambda words: plain([*words, *small]))
    call = ("unravel", "--only", "corollary1", "--threads", "1", "--results")
    text = report(*call, str(tmp_path / "first"))[1]
    monkeypatch.setattr(cli, "work", None)
    again = report(*call, str(tmp_path / "second"), "--from", str(tmp_path / "first"))[1]
    assert again.splitlines()[:-1] == text.splitlines()[:-1]
    monkeypatch.setattr(reports.load("unravel"), "cells_of", plain)
    data, text, _ = report("unravel", "--only", "fig3", "--results", str(tmp_path / "results"))
    assert data["items"][0]["missing"] == 15 and "not run: metalearn -m experiment=unravel/fig3" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "corollary1", "--size", "papr"], r"--size papr: corollary1 has paper; did you mean 'paper'\?"),
        (["--only", "fig99"], r"--only fig99: must be one of "),
        (["--from", "nowhere"], r"nowhere: no such folder of results"),
    ],
)
def test_the_report_on_alpha_refuses(arguments, message):
    with pytest.raises(BadInput, match=message):
        reports.main(["unravel", *arguments])


def test_a_coefficient_outside_is_named():
    from metalearn.theory import taylor

    fit = taylor.Fit(taylor.torch.tensor([1.0, 0.5]), taylor.torch.tensor([0.1, 0.1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taylor, "coefficients", lambda *_, **__: {"maml": (fit, fit)})
        verdicts = {r["term"]: r["holds"] for r in taylor._coefficient_rows(taylor.Key(0), 2, 10)}
    assert verdicts == {
        "AvgGrad": True,
        "-alpha AvgGradInner": False,
        "AvgGrad at order alpha": False,
        "AvgGradInner at order 1": False,
    }


def test_the_bounds_report(report):
    data, text, _ = report("bounds", "--tasks", "10", "--sets", "3")
    moved = [r for r in data["theorems"] if r["q"]] + [r for r in data["corollary"] if r["q"] and r["m"] > 1]
    assert len(moved) == 2 * 4 * 5 + 2 * 4 * 4  # m = 1 is among the theorems already
    for name in moved[0]["holds"]:
        true = sum(r["holds"][name] for r in moved)
        assert f"- {name}: in {true} of {len(moved)} cases." in text
    groups = [row for row in rows(text) if row[0] in "12345" and len(row) == 10]
    assert [row[0] for row in groups] == list("12345")
    assert "`metalearn report bounds --tasks 10" in text


def test_the_speed_report(report, monkeypatch):
    tiny = replace(WORKLOADS["W1"], tasks=4, filters=32, image=(1, 16, 16))  # not so tiny that it is compiled
    monkeypatch.setitem(speed.WORKLOADS, "W1", tiny)
    data, text, _ = report("speed", "--rounds", "2", "--workloads", "W1")
    (row,) = data["workloads"]
    assert len(row["ratios"]) == 2 and row["ratio"] > 0 and row["maml_ms"] > 0 and row["cpu_ratio"] > 0
    assert row["operations"] == tiny.flop() / replace(tiny, form="fomaml").flop() > 1
    assert f"{row['ratio']:.2f}" in text and "W1: 16x16x1, 32 filters, 4 x 5-way 1-shot" in text
