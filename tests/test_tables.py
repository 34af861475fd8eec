"""Tables beside published numbers: definitions, choice of results, known answers, and every format read back."""

import pytest

from metalearn.schema import BadInput
from metalearn.tables import definition
from metalearn.tables.definition import load, names

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


@pytest.fixture
def conf(tmp_path):
    """Write `table/mine/t1.yaml` with a part of it replaced, and return the folders to search."""

    def write(old: str = "", new: str = "") -> list[str]:
        folder = tmp_path / "conf" / "table" / "mine"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.csv").write_text(PUBLISHED)
        assert old in TABLE
        (folder / "t1.yaml").write_text(TABLE.replace(old, new) if old else TABLE)
        return [str(tmp_path / "conf")]

    return write


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
def test_every_table_is_valid_and_names_every_published_number(name):
    table = load(name)
    assert table.uncovered() == []
