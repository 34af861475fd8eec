"""Tasks from several data sets: whose they are, that they are the members' own, how members are named and checked."""

import json

import pytest
import tiny_omniglot
import torch
from hydra import compose
from runs import cell_of, folder, result
from scipy.stats import chisquare
from test_data import Numbered, draw, episodes, flat, same

from metalearn import composing
from metalearn.cells import expand, from_composed
from metalearn.datasets.mixture import Mixture
from metalearn.datasets.sinusoid import Sinusoid
from metalearn.objects import build
from metalearn.record import episodes_id, versions
from metalearn.run import run
from metalearn.schema import BadInput
from metalearn.schema.datasets import Sinusoid as SinusoidKeys

CURVES = {
    "sinusoid": {"_target_": "metalearn.datasets.sinusoid.Sinusoid", "queries": 4, "test_queries": 6},
    "harmonic": {"_target_": "metalearn.datasets.harmonic.Harmonic", "queries": 4, "test_queries": 6},
    "families": {"_target_": "metalearn.datasets.group_regression.GroupRegression", "queries": 4, "test_queries": 6},
}
NUMBERED = {"_target_": "test_data.Numbered", "way": 3, "shot": 2, "queries": 4}
PICTURES = {"one": NUMBERED, "fixed": NUMBERED | {"label_assignment": "fixed_label"}}


class Square(Numbered):
    """Pictures of another shape."""

    input_shape = (1, 2, 1)


def mixture(arguments: dict, **more) -> Mixture:
    """A mixture of all of these."""
    return Mixture(members=list(arguments), arguments=arguments, **more)


def without_latent(tasks: list[dict]) -> list[dict]:
    return [{k: v for k, v in t.items() if k.startswith(("key", "support", "query"))} for t in tasks]


# ---- whose tasks they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [CURVES, PICTURES], ids=["curves", "pictures"])
def test_a_task_is_its_members_task_at_the_same_coordinates(arguments):
    """Bit for bit, in the training stream and among frozen episodes."""
    mixed, own = mixture(arguments), [build("dataset", a) for a in arguments.values()]
    for stream in (lambda d: d.training(0, 20), lambda d: d.evaluation("val"), lambda d: d.evaluation("test")):
        found = flat(list(stream(episodes(mixed, meta_batch_size=8))))
        each = [flat(list(stream(episodes(d, meta_batch_size=8)))) for d in own]
        groups = [int(task["group"]) for task in found]
        assert set(groups) == set(range(len(own)))
        expected = [each[g][i] for i, g in enumerate(groups)]
        assert same(without_latent(found), without_latent(expected))


@pytest.mark.parametrize("name", [*CURVES, *PICTURES])
def test_a_mixture_of_one_is_its_member(name):
    section = (CURVES | PICTURES)[name]
    for split in ("train", "val", "test"):
        a, b = (draw(d, split)[1] for d in (mixture({name: section}), build("dataset", section)))
        for one, other in zip((*a.support, *a.query), (*b.support, *b.query), strict=True):
            assert torch.equal(one, other)
        assert (a.latent["group"] == 0).all()


def test_members_are_drawn_by_weight_and_tested_in_turn():
    mixed = mixture(CURVES, weights=[0.5, 0, 1.5])
    counts = torch.bincount(draw(mixed, "train", tasks=8000)[1].latent["group"], minlength=3).numpy()
    assert counts[1] == 0 and chisquare(counts[[0, 2]], [2000, 6000]).pvalue > 1e-3
    frozen = flat(list(episodes(mixed).evaluation("test")))
    assert [int(task["group"]) for task in frozen] == [i % 3 for i in range(13)]
    even = torch.bincount(draw(mixture(CURVES), "train", tasks=6000)[1].latent["group"]).numpy()
    assert chisquare(even).pvalue > 1e-3


def test_order_within_a_stack_is_that_of_the_tasks():
    """Any subset of a draw gives the same tasks."""
    mixed = mixture(CURVES)
    drawn, whole = draw(mixed, "train", tasks=40)
    for part in (torch.tensor([7]), torch.arange(39, -1, -3), torch.arange(10, 20)):
        few = mixed.fetch("train", {k: v[part] for k, v in drawn.items()})
        again = whole.select(part)
        assert all(
            torch.equal(a, b) for a, b in zip((*few.support, *few.query), (*again.support, *again.query), strict=True)
        )
        assert torch.equal(few.latent["group"], again.latent["group"])


def test_shared_keys_hold_for_all_members():
    mixed = mixture(PICTURES, way=2, test_way=4, shot=1, queries=2, test_queries=3, label_assignment="fixed_label")
    sizes = {s: (mixed.outputs(s), *(p.x.shape[1] for p in draw(mixed, s)[1][:2])) for s in ("train", "test")}
    assert sizes == {"train": (2, 2, 4), "test": (4, 4, 12)}
    assert (mixed.label_space, mixture(PICTURES).label_space) == ("shared", "permuted")
    assert [m.seed for m in mixture(CURVES, seed=5).members] == [5, 5, 5]
    assert (mixed.kind, mixture(CURVES).kind) == ("classification", "regression")
    assert mixed.groups == ("one", "fixed") and mixed.input_shape == (2, 1, 1)


def test_members_must_go_together():
    """Where only the constructor knows it."""
    with pytest.raises(BadInput, match=r"must be of one kind, .* \(a regression, b classification\)"):
        mixture({"a": CURVES["sinusoid"], "b": NUMBERED})
    other = NUMBERED | {"_target_": "test_mixture.Square"}
    with pytest.raises(BadInput, match=r"one shape of inputs, .* \(a \(2, 1, 1\), b \(1, 2, 1\)\)"):
        mixture({"a": NUMBERED, "b": other})
    with pytest.raises(BadInput, match="one width of outputs in split 'test'"):
        mixture({"a": NUMBERED, "b": NUMBERED | {"test_way": 2}}).outputs("test")


def test_hashes_of_mixtures():
    """Of the members' contents in their order, whatever the members are called."""
    glyphs = [
        {"_target_": "metalearn.datasets.glyphs.Glyphs", "way": 3, "shot": 2, "queries": 4, "seed": s} for s in (0, 1)
    ]
    reference = mixture({"a": glyphs[0], "b": glyphs[1]}).data_hash()
    assert len(reference) == 16 and reference == mixture({"x": glyphs[0], "y": glyphs[1]}).data_hash()
    others = [{"b": glyphs[1], "a": glyphs[0]}, {"a": glyphs[0]}, {"a": glyphs[0], "b": glyphs[0]}]
    assert len({reference, *(mixture(o).data_hash() for o in others)}) == 4


# ---- from a command line -----------------------------------------------------------------------------------------


def one(*arguments: str):
    (cell,) = expand(["dataset=mixture", *arguments])
    return cell


GLYPHS = ("dataset.members=[glyphs,group_glyphs]",)
MIXED = ("dataset.members=[sinusoid,harmonic]", "backbone=mlp_sine")


def test_sections_are_composed_from_the_members_files():
    """Complete, with what was given, and with the shared keys on both levels."""

    def section(*arguments):
        return expand(arguments, to_run=False)[0].config["dataset"]

    found = section("dataset=mixture", *GLYPHS, "dataset.arguments.glyphs.drawings=24", "dataset.way=7")
    assert list(found["arguments"]) == found["members"] == ["glyphs", "group_glyphs"]
    glyphs, groups = found["arguments"].values()
    assert glyphs == section("dataset=glyphs", "dataset.drawings=24", "dataset.way=7")
    assert groups == section("dataset=group_glyphs", "dataset.way=7")
    sizes = {"way": 7, "shot": 1, "queries": 5, "test_way": None, "test_shot": None, "test_queries": 15}
    assert sizes.items() <= found.items()
    assert (found["seed"], found["label_assignment"]) == (0, "mutually_exclusive")


def test_one_data_set_twice_under_other_names():
    cell = one("dataset.members=[slow,fast]", "backbone=mlp_sine", "dataset.arguments.slow.dataset=sinusoid",
               "dataset.arguments.fast={dataset: sinusoid, variant: reptile}")  # fmt: skip
    dataset = build("dataset", cell.config["dataset"])
    assert dataset.groups == ("slow", "fast")
    assert [type(m) for m in dataset.members] == [Sinusoid, Sinusoid] and dataset.members[0].law != dataset.members[
        1
    ].law


@pytest.mark.parametrize(
    "arguments", [GLYPHS, (*MIXED, "dataset.arguments.harmonic={noise_std: 0.2}", "dataset.shot=5")]
)
def test_hydras_job_has_the_same_cell(arguments):
    """From the overrides that a launcher hands on, and from the finished configuration."""
    cell = one(*arguments)
    with composing.composer([]):
        job = from_composed(compose("config", overrides=list(cell.overrides)))
    assert (job.cell_id, job.config) == (cell.cell_id, cell.config)
    assert from_composed(composing.OmegaConf.create(cell.config)).cell_id == cell.cell_id


def test_what_names_a_mixture(tmp_path, monkeypatch):
    """Members' keys, targets, epochs and contents, wherever their files are; not what changes no number."""
    tiny_omniglot.pretend(monkeypatch)
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    roots = {place: tiny_omniglot.archives(tmp_path / place) for place in ("here", "there")}

    def ids(*more, place="here", members=("omniglot", "group_omniglot")):
        keys = [f"dataset.arguments.{m}.{k}" for m in members for k in (f"root={roots[place]}", "checksum=off")]
        cell = one(f"dataset.members=[{','.join(members)}]", *keys, *more)
        return cell.cell_id, episodes_id(cell), cell.data_hash

    reference = ids()
    assert ids(place="there") == reference
    assert ids("dataset.arguments.omniglot.download=false") == reference
    assert ids("dataset.way=5", "dataset.arguments.group_omniglot.test_queries=15") == reference
    others = [ids("dataset.arguments.omniglot.invert=false"), ids("dataset.arguments.group_omniglot.groups=[plain]"),
              ids(members=("group_omniglot", "omniglot")), ids(members=("omniglot",))]  # fmt: skip
    for i in (0, 1):
        assert len({reference[i], *(o[i] for o in others)}) == 5
    weighted, wider = ids("dataset.weights=[1,2]"), ids("dataset.way=6")
    assert weighted[0] != reference[0] and weighted[1:] == reference[1:]
    assert wider[1] != reference[1] and wider[2] == reference[2]
    curves = one(*MIXED)
    monkeypatch.setattr(SinusoidKeys, "epoch", 2)
    assert one(*MIXED).cell_id != curves.cell_id


def test_a_file_of_ones_own_composes_members(tmp_path):
    """As any group is composed; keys can still be set."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "waves.yaml").write_text(
        "defaults: [/schema/dataset/mixture@_here_, /dataset/sinusoid@arguments.low, /dataset/sinusoid@arguments.high,"
        " _self_]\nname: waves\nmembers: [low, high]\narguments: {high: {variant: reptile}}\n"
    )
    arguments = ["dataset=waves", "backbone=mlp_sine", "dataset.arguments.low.variant=unravel", "dataset.shot=3"]
    (cell,) = expand(arguments, [str(tmp_path)])
    parts = cell.config["dataset"]["arguments"]
    assert [(p["variant"], p["shot"]) for p in (parts["low"], parts["high"])] == [("unravel", 3), ("reptile", 3)]
    (tmp_path / "dataset" / "mine.yaml").write_text("defaults: [/schema/dataset/sinusoid@_here_, _self_]\nshot: 4\n")
    (cell,) = expand(["dataset=mixture", "backbone=mlp_sine", "dataset.members=[mine]"], [str(tmp_path)])
    assert cell.config["dataset"]["shot"] == 4


GLYPHS_ONLY, SINE = "dataset.members=[glyphs]", "dataset.members=[sinusoid] backbone=mlp_sine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "dataset.members is required"),
        ("dataset.members=[]", r"dataset.members=\[\]: must name at least one data set, and none twice"),
        ("dataset.members=[glyphs,glyphs]", r"members=\[glyphs,glyphs\]: must name .* none twice"),
        ("dataset.members=[glyph]", "dataset.members: no dataset 'glyph'; did you mean 'glyphs'"),
        ("dataset.members=[a-b]", "dataset.members: 'a-b' must be of letters, digits and underscores"),
        ("dataset.members=[mixture]", "dataset.members: mixture is a mixture itself"),
        ("dataset.members=[a] dataset.arguments.a.dataset=glyph", "dataset.arguments.a.dataset: no dataset 'glyph'"),
        (f"{GLYPHS_ONLY} dataset.arguments.glyph.seed=1", "dataset.arguments.glyph: no such member; did you mean"),
        (f"{GLYPHS_ONLY} dataset.arguments.glyphs=3", "dataset.arguments.glyphs=3: must be a mapping"),
        (f"{GLYPHS_ONLY} dataset.arguments.glyphs.sed=1", "dataset.arguments.glyphs.sed: no such key; did you mean"),
        (f"{GLYPHS_ONLY} dataset.arguments.glyphs.drawings=1", "dataset.arguments.glyphs.drawings=1: must be >= 2"),
        (f"{GLYPHS_ONLY} dataset.arguments.glyphs.drawings=9", "dataset.test_queries = 16: must be <= 9, the pictures"),
        (f"{GLYPHS_ONLY} dataset.arguments.glyphs.way=4 dataset.way=5", "glyphs.way=4: dataset.way=5 holds for all"),
        ("dataset.members=[group_glyphs] dataset.arguments.group_glyphs.groups=[]", "arguments.group_glyphs.groups="),
        ("dataset.members=[omniglot]", "dataset.arguments.omniglot.root is required"),
        ("dataset.members=[omniglot] dataset.arguments.omniglot.root=/no", "Set dataset.arguments.omniglot.root to"),
        ("dataset.members=[glyphs,sinusoid]", r"of one kind, .* \(glyphs classification, sinusoid regression\)"),
        ("dataset.members=[sinusoid,glyphs]", "must be of one kind"),
        (
            "dataset.members=[glyphs,omniglot] dataset.arguments.omniglot.root=x dataset.arguments.omniglot.size=32",
            r"must be of one size of pictures, .* \(glyphs 28 pixels, omniglot 32 pixels\)",
        ),
        (
            "dataset.members=[glyphs,group_glyphs] dataset.arguments.glyphs.way=4",
            r"dataset.way: members disagree \(glyphs 4, group_glyphs 5\); set dataset.way for all of them",
        ),
        ("dataset.members=[sinusoid,group_regression] backbone=mlp_sine", "dataset.test_queries: members disagree"),
        (f"{SINE} dataset.way=5", "dataset.way=5: sinusoid has no such key"),
        (f"{GLYPHS_ONLY} dataset.weights=[1,2]", "dataset.weights=.* must be one for each of 1 members"),
        (f"{GLYPHS_ONLY} dataset.weights=[0]", "and not all 0"),
        (f"{GLYPHS_ONLY} dataset.weights=[-1]", "dataset.weights=.*: must be >= 0"),
        (f"{SINE} algorithm=matchingnet", "only for classification, .* is regression"),
        (f"{SINE} algorithm.inner_loss_reduction=sum_over_shots", "only for classification"),
        ("dataset.members=[sinusoid]", "needs pictures, and this data set has none"),
        (f"{GLYPHS_ONLY} dataset.way=7 dataset.test_way=5", "dataset.test_way=5: must equal dataset.way=7"),
    ],
)
def test_bad_mixtures_are_refused_before_torch_is_needed(arguments, message):
    with pytest.raises(BadInput, match=message):
        one(*arguments.split())


def test_an_incomplete_mixture_can_be_shown():
    (cell,) = expand(["dataset=mixture"], to_run=False)
    assert cell.config["dataset"]["arguments"] == {}
    (cell,) = expand(["dataset=mixture", "dataset.members=[omniglot]"], to_run=False)
    assert cell.config["dataset"]["arguments"]["omniglot"]["way"] == 5


def test_a_sweep_drops_a_mixtures_axis_where_there_is_none():
    arguments = ["dataset=sinusoid,mixture", "backbone=mlp_sine", "dataset.members=[sinusoid]"]
    found = expand([*arguments, "dataset.arguments.sinusoid.variant=finn,unravel"])
    assert [c.config["dataset"]["name"] for c in found] == ["sinusoid", "mixture", "mixture"]


def test_a_run_of_a_mixture(tmp_path):
    """Results are split by member, and say how episodes were made."""
    cell = cell_of(tmp_path, "dataset=mixture", *MIXED, "dataset.test_queries=5", "trainer.max_steps=2",
                   "trainer.val_every=1", "algorithm.alpha=0.001", "trainer.compile=never")  # fmt: skip
    assert run(cell) == "done"
    found = result(tmp_path, cell)
    entries = {name: found["metrics"][name]["n"] for name in found["metrics"] if "group" in name}
    assert entries == {"mse@group=sinusoid": 5, "mse@group=harmonic": 4}
    assert found["data_hash"] == cell.data_hash == build("dataset", cell.config["dataset"]).data_hash()
    assert {k: found["protocol"][k] for k in ("way", "shot", "queries")} == {"way": None, "shot": 10, "queries": 5}
    saved = json.loads((folder(tmp_path, cell) / "result.json").read_text())["config"]["dataset"]["arguments"]
    assert list(saved) == ["sinusoid", "harmonic"] and saved["harmonic"]["test_queries"] == 5


def test_versions_name_the_member():
    glyphs = expand(["dataset=glyphs"])[0].config["dataset"]
    mixed = versions(one(*GLYPHS).config["dataset"])
    assert (
        mixed["glyphs.class_list_hash"] == mixed["group_glyphs.class_list_hash"] == versions(glyphs)["class_list_hash"]
    )
