"""What a run of TSA-MAML says at its end: usage, purities, silhouettes, adaptation curves, pictures."""

import json

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from oracles import normal
from PIL import Image
from runs import cell_of, folder, result
from sklearn.metrics import silhouette_score
from sklearn.metrics.cluster import contingency_matrix
from table import create

from metalearn.analysis import adaptation, adaptation_figure, table_figure
from metalearn.clustering import majority, purity
from metalearn.episode import MetaBatch
from metalearn.evaluation import routing
from metalearn.ledger import CellDir
from metalearn.record import table
from metalearn.run import run

TSA = (
    *(
        "algorithm=tsa_maml",
        "algorithm.m=2",
        "algorithm.tasks=80",
        "algorithm.pretrain_steps=2",
        "algorithm.id_steps=2",
    ),
    *("algorithm.alpha=0.01", "algorithm.test_steps=2", "trainer.max_steps=2", "trainer.test_episodes=30"),
)


def analysis(output, cell) -> dict:
    return json.loads((folder(output, cell) / "analysis.json").read_text())


def test_a_run_on_groups_counts_them(tmp_path):
    cell = cell_of(tmp_path, *TSA, "dataset=group_regression")
    assert run(cell) == "done"
    found, metrics = analysis(tmp_path, cell), result(tmp_path, cell)["metrics"]
    counts = np.array(found["usage"]["counts"])
    assert found["usage"]["groups"] == ["sine", "line", "quadratic"]
    assert counts.shape == (3, 2) and counts.sum(1).tolist() == [10, 10, 10]  # test groups are balanced
    assert metrics["routing_purity"]["mean"] == pytest.approx(counts.max(0).sum() / 30)
    assert metrics["routing_purity"]["n"] == 30 and metrics["cluster_purity"]["n"] == metrics["silhouette"]["n"] == 80
    assert sum(found["cluster_sizes"]) == 80 and list(metrics)[0] == "mse"
    assert metrics["silhouette"] == {"unit": "1", "interval": "tasks"} | metrics["silhouette"]
    assert set(found["similarity"]) == {"support_means", "from_star", "from_routed", "moved_from_routed"}
    for name in ("usage", "adaptation"):
        with Image.open(folder(tmp_path, cell) / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 150
    shown = table(result(tmp_path, cell), CellDir(tmp_path, cell.cell_id)).splitlines()
    assert [row.split()[0] for row in shown if row.startswith(("routing_purity", "silhouette"))] == [
        "silhouette",
        "routing_purity",
    ]

    again = cell_of(tmp_path, *TSA, "dataset=group_regression", "trainer.test_episodes=31")  # from the same checkpoint
    assert again.train_id == cell.train_id and run(again) == "done"
    for name in ("silhouette", "cluster_purity"):
        assert result(tmp_path, again)["metrics"][name] == metrics[name]


def test_without_groups_there_is_usage_and_no_purity(tmp_path):
    cell = cell_of(tmp_path, *TSA)
    assert run(cell) == "done"
    found, metrics = analysis(tmp_path, cell), result(tmp_path, cell)["metrics"]
    assert found["usage"]["groups"] is None and np.sum(found["usage"]["counts"]) == 30
    assert {"silhouette"} == {name for name in metrics if "mse" not in name}
    assert found["similarity"]["from_star"]["silhouette"] is None
    assert -1 <= found["similarity"]["from_star"]["kmeans_silhouette"] <= 1
    assert not (folder(tmp_path, cell.needs[0]) / "analysis.json").exists()


class Frozen:
    """Test tasks of pictures with groups, in stacks."""

    def __init__(self, tasks: int):
        self.frozen, self.evaluation_key = {"test": tasks}, oracles.Key(0, "evaluation")
        self.dataset = type("Grouped", (), {"groups": ("a", "b")})
        self.episodes = oracles.pictures(tasks)
        self.group = torch.arange(tasks) % 2
        self.episodes.support.x[self.group == 1] += 3 * normal(2, 6, 6, seed=3)

    def evaluation(self, split: str):
        for rows in torch.arange(len(self.group)).split(7):
            episodes = self.episodes.select(rows)._replace(latent={"group": self.group[rows]})
            yield MetaBatch(0, len(self.group), episodes, None)


def test_similarities_are_those_of_plain_vectors():
    """Every space by a loop over tasks in float64. Tolerance: vectors are kept in 11 bits, products in bfloat16."""
    learner, data = create(("tsa_maml", "classification"), id_steps=3), Frozen(20)
    found = routing.analyse(learner, data).data["similarity"]
    star = {k: p.detach().clone() for k, p in learner.net.named_parameters()}
    own = {k: p.detach().clone() for k, p in learner.groups.named_parameters()}
    chosen = learner.route(learner.theta(), data.episodes.support)
    rows: dict[str, list] = {name: [] for name in found}
    for i in range(20):
        task = type(data.episodes.support)(data.episodes.support.x[i], data.episodes.support.y[i])
        start = {k: own[f"{int(chosen[i])}.{k}"] for k in star}
        ends = []
        for origin in (star, start):
            leaves = {k: p.clone().requires_grad_() for k, p in origin.items()}
            ends.append(oracles.descend(learner.net, leaves, task, learner.alpha, 3, list(star), True))
        for name, (end, origin) in zip(
            ("from_star", "from_routed", "moved_from_routed"),
            ((ends[0], star), (ends[1], star), (ends[1], start)),
            strict=True,
        ):
            rows[name].append(torch.cat([(end[k] - origin[k]).detach().flatten() for k in star]).numpy())
        rows["support_means"].append(task.x.mean(0).flatten().numpy())
    for name, vectors in rows.items():
        expected = silhouette_score(np.stack(vectors), data.group.numpy())
        assert found[name]["silhouette"] == pytest.approx(expected, abs=5e-3)
    assert found["support_means"]["silhouette"] > 0.3 and found["support_means"]["kmeans_purity"] == 1


def test_only_the_first_tasks_are_compared(monkeypatch):
    monkeypatch.setattr(routing, "COMPARED", 9)
    learner, data = create(("tsa_maml", "classification")), Frozen(20)
    seen = routing.similarities(learner, data)
    first = Frozen(20)
    first.frozen = {"test": 9}
    first.group = first.group[:9]
    assert seen == routing.similarities(learner, first)


def test_purity_is_the_share_of_the_most_frequent_group():
    labels, truth = (torch.randint(n, (200,), generator=oracles.generator(n)) for n in (4, 3))
    counts = contingency_matrix(truth, labels)
    assert purity(labels, truth) == pytest.approx(counts.max(0).sum() / 200) == float(majority(labels, truth).mean())


def test_adaptation_curves_are_means_over_tasks():
    frame = pd.DataFrame(
        {
            "episode": [0, 1, 2, 3] * 2,
            "bn": "batch",
            "step": [0] * 4 + [1] * 4,
            "metric": "accuracy",
            "value": [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1.0],
            "loss": [2.0, 1.0, 2.0, 1.0, 1.0, 1.0, float("inf"), 1.0],
            "group": ["a", "a", "b", "b"] * 2,
        }
    )
    records = {(r["step"], r["group"]): r for r in adaptation(frame)}
    assert len(records) == 6 and records[0, None]["metric"] == 0.5 and records[1, "b"]["metric"] == 0.75
    assert records[0, None]["metric_ci95"] == pytest.approx(1.96 * np.std([0, 1, 0, 1], ddof=1) / 2)
    assert records[1, "b"]["loss"] is None and records[1, "a"]["loss_ci95"] == 0
    assert len(adaptation_figure(list(records.values()), "accuracy").axes) == 2
    same = [r | {"loss": r["metric"]} for r in records.values()]
    assert len(adaptation_figure(same, "mse").axes) == 1


def test_a_row_without_tasks_is_drawn():
    figure = table_figure([[3, 1], [0, 0]], ["a", "b"], ["x", "y"], "title")
    assert {t.get_text() for t in figure.axes[0].texts} == {"0.75\n(3)", "0.25\n(1)", "0.00\n(0)"}
