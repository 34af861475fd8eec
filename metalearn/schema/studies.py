"""Keys of studies: what computes numbers of a paper's theory instead of training."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from metalearn.schema.keys import key, show

Config = dict[str, Any]


@dataclass
class Study:
    """What all studies share; see `metalearn.studies.base.Study`."""

    target: ClassVar[str]
    epoch: ClassVar[int] = 1

    name: str = key("", "name in tables and logs", touches="none")
    threads: int = key(0, "CPU threads; 0 leaves the library's choice", ge=0, touches="none")

    @classmethod
    def needs(cls, study: Config) -> Iterator[list[str]]:
        """The training runs whose parameters the study starts from, as command lines."""
        yield from ()

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        """Combinations of keys that cannot be."""
        yield from ()


@dataclass
class Corollary1(Study):
    """metalearn.studies.Corollary1."""

    target: ClassVar[str] = "metalearn.studies.Corollary1"

    tasks: int = key(2000, "tasks of each design", ge=2)
    samples: list[int] = key([1, 10, 50], "numbers of samples K", ge=1)
    widths: list[int] = key([1, 5, 20], "numbers of features d of the Gaussian designs", ge=1)

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _listed(study, "samples", "widths")


LAWS = {
    "normal": ("mean", "deviation"),
    "uniform": ("low", "high"),
    "exponential": ("mean",),
    "chi2": ("degrees",),
    "zipf": ("exponent", "largest"),
}
"""Laws of single numbers and what has to be said of each, in that order."""


@dataclass
class Bernacchia(Study):
    """metalearn.studies.Bernacchia."""

    target: ClassVar[str] = "metalearn.studies.Bernacchia"

    tasks: int = key(40, "tasks m of training", ge=2)
    support: int = key(5, "support samples n_t in training", ge=1)
    query: int = key(25, "query samples n_v in training", ge=1)
    test_support: int = key(10, "support samples n_r in tests", ge=1)
    width: int = key(30, "parameters p", ge=1)
    noise: float = key(0.2, "standard deviation sigma of the labels' noise", ge=0)
    spread: float = key(0.2, "root of the mean squared distance nu of tasks from their centre", gt=0)
    low: float = key(-0.4, "least rate of training; losses have the factor 1/2")
    high: float = key(0.6, "largest rate of training")
    points: int = key(51, "rates from low to high", ge=5)
    fixed_rate: float = key(0.2, "rate of tests where it is not that of training")
    runs: int = key(300, "draws of the training tasks", ge=10)

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        if study["high"] <= study["low"]:
            yield f"study.high={show(study['high'])}: must be > study.low={show(study['low'])}"


@dataclass
class EstimationError(Study):
    """metalearn.studies.EstimationError."""

    target: ClassVar[str] = "metalearn.studies.EstimationError"

    basis: str = key("matrix", "features of x", choices=("matrix", "gaussian", "polynomial"))
    low: float = key(-5.0, "least x; x is uniform")
    high: float = key(5.0, "largest x")
    samples: int = key(50, "samples K of each task", ge=1)
    width: int = key(20, "features d", ge=1)
    bandwidth: float = key(1.0, "width sigma of Gaussian features", gt=0)
    tasks: list[int] = key([2**i for i in range(1, 14)], "numbers of tasks N", ge=2)
    slope_from: int = key(32, "the slope is of the numbers of tasks from this one on", ge=2)
    repetitions: int = key(10, "draws of the tasks for each N", ge=2)

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _listed(study, "tasks")
        if study["high"] <= study["low"]:
            yield f"study.high={show(study['high'])}: must be > study.low={show(study['low'])}"
        if study["basis"] == "polynomial" and study["width"] > 6:
            yield f"study.width={study['width']}: must be <= 6 for study.basis=polynomial, whose condition explodes"
        if sum(n >= study["slope_from"] for n in study["tasks"]) < 2:
            yield f"study.slope_from={study['slope_from']}: must leave two of study.tasks={show(study['tasks'])}"


@dataclass
class FastAdaptation(Study):
    """metalearn.studies.FastAdaptation."""

    target: ClassVar[str] = "metalearn.studies.FastAdaptation"

    inputs: list[str] = key(["uniform", "-5", "5"], "law of each entry of the features, and its numbers")
    samples: int = key(50, "samples K of each task", ge=1)
    width: int = key(20, "features d", ge=1)
    tasks: int = key(5000, "tasks of training", ge=2)
    new_tasks: int = key(5000, "new tasks", ge=2)
    alpha: float = key(1e-4, "rate of MAML", gt=0)
    eta: float = key(1e-5, "rate of adaptation", gt=0)
    variance: float = key(3.0, "variance of each entry of the optima", gt=0)
    steps: list[int] = key(
        [*range(11), 15, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 30000], "steps t of adaptation", ge=0
    )
    repetitions: int = key(8, "draws of all tasks", ge=2)

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _laws(study, "inputs")
        yield from _listed(study, "steps")


@dataclass
class Trajectory(Study):
    """metalearn.studies.Trajectory."""

    target: ClassVar[str] = "metalearn.studies.Trajectory"

    tasks: int = key(500, "tasks", ge=2)
    samples: int = key(10, "samples K of each task", ge=2)
    inputs: list[str] = key(["uniform", "-5", "5"], "law of each of the two features, and its numbers")
    optima: list[str] = key(["uniform", "-5", "5"], "law of each coordinate of the optima, and its numbers")
    far_tasks: int = key(25, "tasks of the far cluster", ge=1)
    far: float = key(15.0, "both coordinates of the middle of the far cluster")
    far_deviation: float = key(0.5, "standard deviation of the optima of the far cluster", ge=0)
    penalty: float = key(20.0, "factor of the losses of the far cluster", gt=0)
    penalties: list[float] = key([2, 5, 10, 20, 50, 100], "such factors for which the nearest rate is sought", gt=0)
    span: float = key(2.0, "the largest rate, as a multiple of alpha*_lim", gt=1)
    points: int = key(81, "rates from 0 to the largest", ge=5)
    draws: int = key(20, "draws of all tasks; the first is drawn", ge=2)

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _listed(study, "penalties")
        yield from _laws(study, "inputs", "optima")


@dataclass
class PolynomialMoments(Study):
    """metalearn.studies.PolynomialMoments."""

    target: ClassVar[str] = "metalearn.studies.PolynomialMoments"

    width: int = key(50, "features d, powers 0 to d - 1", ge=1, le=100)
    samples: int = key(50, "samples K of the traces", ge=1)
    inputs: list[str] = key(["uniform", "-1", "1"], "law of x in the traces, and its numbers")

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _laws(study, "inputs")


def _laws(study: Config, *names: str) -> Iterator[str]:
    """Texts that are no law with its numbers."""
    for name in names:
        law, *numbers = study[name] or [""]
        if law not in LAWS or len(numbers) != len(LAWS[law]) or not all(map(_finite, numbers)):
            allowed = ", ".join(f"[{','.join((n, *p))}]" for n, p in LAWS.items())
            yield f"study.{name}={show(study[name])}: must be one of {allowed}, with finite numbers"


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _listed(study: Config, *names: str) -> Iterator[str]:
    """Lists that are empty or repeat themselves."""
    for name in names:
        if not study[name] or len(set(study[name])) < len(study[name]):
            yield f"study.{name}={show(study[name])}: must name at least one value, and none twice"


STUDIES: tuple[type[Study], ...] = (
    Bernacchia,
    Corollary1,
    EstimationError,
    FastAdaptation,
    PolynomialMoments,
    Trajectory,
)
