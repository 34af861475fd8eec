"""A study, its keys, and what it shows, for tests of studies: means of exponentials of known rate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from metalearn.results import Result, value
from metalearn.schema.keys import key
from metalearn.schema.studies import Study as StudyKeys
from metalearn.shown import Finding, Shown, line
from metalearn.studies import Measured, Study, exact, over

SHOWS = "own_study"


@dataclass
class Keys(StudyKeys):
    target: ClassVar[str] = "own_study.Exponentials"

    draws: int = key(50, "draws of each mean", ge=2)
    base: str = key("one", "what is drawn", choices=("one", "two"))
    start: bool = key(False, "whether the study starts from a trained run")

    @classmethod
    def needs(cls, study):
        if study["start"]:
            yield ["dataset=sinusoid", "algorithm=maml", "trainer.max_steps=2", "trainer.val_episodes=2",
                   "trainer.test_episodes=2", "trainer.meta_batch_size=2", "backbone.hidden=[3]"]  # fmt: skip

    @classmethod
    def problems(cls, study):
        if study["draws"] == 13:
            yield "study.draws=13: must be another number"


class Exponentials(Study):
    title = "means of exponentials"

    def __init__(self, *, draws: int, base: str, start: bool):
        self.draws, self.base, self.start = draws, base, start

    def measure(self, key, starts: Sequence[dict]) -> Iterator[Measured]:
        rates = {"one": 1.0, "two": 2.0}
        yield exact("rate", rates[self.base])
        yield exact("parameters", float(sum(p.numel() for s in starts for p in s.values() if hasattr(p, "numel"))))
        for alpha in (0.1, 0.25, 1.0):
            draws = -key.sub("draw").uniform(self.draws, 0).double().log1p() * alpha / rates[self.base]
            yield over("mean", draws.tolist(), "s", of="draws", alpha=alpha, law="exp")


def show(results: Sequence[Result]) -> Shown:
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    for r in results:
        found = line(r, "mean", "alpha", law="exp")
        axis.errorbar(found.x, found.mean, found.ci95, label=value(r.config, "study.base"))
    finding = Finding("rates differ", "two of them", f"{len(results)} cells", len(results) > 1 or None)
    return Shown("Means of exponentials", {"exponentials": figure}, [finding], ("an example",))
