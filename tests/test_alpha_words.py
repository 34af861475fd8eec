"""`algorithm.alpha` may be a word: what reads it as a number without training."""

import json
import re

import pytest
import stored

from metalearn import cells, listing, results
from metalearn.figures import draw, series
from metalearn.figures.series import Mark, Request
from metalearn.schema import MEMBERS, BadInput, algorithms, fields_of
from metalearn.selection import select
from metalearn.sweep.speed import signature

SINE = ["dataset=sinusoid", "algorithm=anil"]


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """Results of ANIL over rates and words, whether or not it takes all words."""
    monkeypatch.setattr(algorithms.MAML, "alpha_words", frozenset(algorithms.ALPHA_WORDS))
    line = [*SINE, f"output_dir={tmp_path}", "algorithm.alpha=online,0.1,auto,0.02", "seed=0,1"]
    found = cells.expand(line)
    means = {"online": 0.4, 0.1: 0.6, "auto": 0.5, 0.02: 0.9}
    for cell in found:
        stored.store(cell, means[cell.config["algorithm"]["alpha"]])
    return line, found


def test_words_are_values_of_their_own(mixed):
    _, found = mixed
    assert [c.config["algorithm"]["alpha"] for c in found[::2]] == ["online", 0.1, "auto", 0.02]
    assert len({c.train_id for c in found}) == len(found) == 8


@pytest.mark.parametrize("schema", [s for s in MEMBERS["algorithm"].values() if "alpha" in fields_of(s)])
def test_a_word_is_refused_unless_the_algorithm_takes_it(schema):
    assert schema.alpha_words <= set(algorithms.ALPHA_WORDS)
    (cell,) = cells.expand(SINE)
    given = {name: field.default for name, field in fields_of(schema).items()} | {"name": "that"}
    for word in set(algorithms.ALPHA_WORDS) - schema.alpha_words:
        found = next(schema.problems(given | {"alpha": word}, cell.config))
        assert found.startswith(f"algorithm.alpha={word}: must be a number") and found.endswith("with algorithm=that")


def test_a_word_sets_the_speed_apart_and_rates_do_not(mixed):
    _, found = mixed
    kinds = {json.dumps(signature(c.config), sort_keys=True) for c in found}
    assert len(kinds) == 3


def test_results_are_chosen_and_sorted_by_word(mixed, tmp_path):
    chosen = select(["algorithm.alpha=online,0.10"], place=tmp_path)
    assert {e.config["algorithm"]["alpha"] for e in chosen} == {"online", 0.1}
    listed = listing.table(results.find(tmp_path), keys=["algorithm.alpha"])
    rising = [r["algorithm.alpha"] for r in listing.ordered(listed, "algorithm.alpha").rows]
    assert rising[::2] == [0.02, 0.1, "auto", "online"]
    falling = [r["algorithm.alpha"] for r in listing.ordered(listed, "algorithm.alpha", reverse=True).rows]
    assert falling == rising[::-1]


def test_a_figure_has_numbers_by_size_and_then_words(mixed):
    line, found = mixed
    drawn = series.plot(select(line), Request())  # alpha is found to be what varies
    assert drawn.x == "algorithm.alpha"
    assert [(p.place.x, p.mean) for p in drawn.points] == [(0.02, 0.9), (0.1, 0.6), ("auto", 0.5), ("online", 0.4)]
    (axis,) = draw.figure(drawn).axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.02", "0.1", "auto", "online"]
    assert list(axis.lines[0].get_xdata()) == [0, 1, 2, 3]
    rows = series.csv_text(drawn).splitlines()
    assert [re.split(",", r)[2] for r in rows] == ["algorithm.alpha", "0.02", "0.1", "auto", "online"]


def test_a_word_alone_beside_one_rate_is_swept(mixed, tmp_path):
    chosen = select(["algorithm.alpha=online,0.1"], place=tmp_path)
    assert series.plot(chosen, Request()).x == "algorithm.alpha"


def test_lines_in_different_order_share_the_order_of_the_axis(tmp_path, mixed):
    line, found = mixed
    entries = select([a for a in line if "alpha" not in a], place=tmp_path)
    entries = [e for e in entries if (e.config["seed"], e.config["algorithm"]["alpha"]) not in [(0, 0.02), (1, 0.1)]]
    drawn = series.plot(entries, Request(x="algorithm.alpha", hue=["seed"]))
    (axis,) = draw.figure(drawn).axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.02", "0.1", "auto", "online"]


def test_alpha_star_has_no_place_among_words(mixed):
    line, found = mixed
    for cell in found:
        metrics = {"mse": stored.score(0.5), "alpha_star": stored.score(0.0321, unit="1")}
        stored.store(cell, 0.5, metrics=metrics)
    drawn = series.plot(select(line), Request())
    assert drawn.marks == [] and any("alpha* (0.0321) has no place" in n for n in drawn.notes)
    with pytest.raises(BadInput, match="values that are no numbers"):
        series.plot(select(line), Request(marks=[Mark("a", 0.1)]))
