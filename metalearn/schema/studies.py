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
    epoch: ClassVar[int] = 3  # 2: random designs are not sampled; 3: examples

    samples: list[int] = key([1, 10, 50, 1000], "numbers of samples K", ge=1)
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
    epoch: ClassVar[int] = 3  # 2: signed differences; 3: nearly dependent features are not cut off

    basis: str = key("matrix", "features of x", choices=("matrix", "gaussian", "polynomial"))
    low: float = key(-5.0, "least x; x is uniform")
    high: float = key(5.0, "largest x")
    samples: int = key(50, "samples K of each task", ge=1)
    width: int = key(20, "features d", ge=1)
    bandwidth: float = key(1.0, "width sigma of Gaussian features", gt=0)
    tasks: list[int] = key([2**i for i in range(1, 14)], "numbers of tasks N", ge=2)
    slope_from: int = key(32, "the slope is of the numbers of tasks from this one on", ge=2)
    repetitions: int = key(40, "draws of the tasks for each N", ge=2)

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _listed(study, "tasks")
        if study["high"] <= study["low"]:
            yield f"study.high={show(study['high'])}: must be > study.low={show(study['low'])}"
        if study["basis"] == "polynomial" and study["width"] > 6:
            yield f"study.width={study['width']}: must be <= 6 for study.basis=polynomial, whose condition explodes"
        if study["tasks"]:
            yield from _overdetermined(study, min(study["tasks"]))
        if sum(n >= study["slope_from"] for n in study["tasks"]) < 2:
            yield f"study.slope_from={study['slope_from']}: must leave two of study.tasks={show(study['tasks'])}"


@dataclass
class FastAdaptation(Study):
    """metalearn.studies.FastAdaptation."""

    target: ClassVar[str] = "metalearn.studies.FastAdaptation"
    epoch: ClassVar[int] = 2  # the share left came later

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

    tasks: int = key(500, "number of tasks", ge=2)
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


@dataclass
class RateCurve(Study):
    """metalearn.studies.RateCurve."""

    target: ClassVar[str] = "metalearn.studies.RateCurve"

    inputs: list[str] = key(["uniform", "-5", "5"], "law of the data, and its numbers")
    optima: list[str] = key(["normal", "0", "3"], "law of each coordinate of the optima, and its numbers")
    tasks: int = key(3000, "tasks N", ge=2)
    samples: int = key(15, "samples K of each task", ge=1)
    width: int = key(10, "Gaussian features d", ge=2)
    reach: float = key(math.sqrt(3), "distance of the outermost centres from the mean of the data, in deviations", gt=0)
    scalar: bool = key(False, "one number for each sample in all features, in the place of one for each feature")
    span: float = key(2.5, "the largest rate, as a multiple of alpha*_lim", gt=1)
    points: int = key(51, "rates from 0 to the largest", ge=5)
    draws: int = key(10, "draws of all tasks", ge=2)

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _laws(study, "inputs", "optima")
        yield from _overdetermined(study, study["tasks"])


@dataclass
class DataVariance(Study):
    """metalearn.studies.DataVariance."""

    target: ClassVar[str] = "metalearn.studies.DataVariance"

    variances: list[float] = key([0.1, 0.5, 1, 2, 5, 10, 15, 20, 30, 40, 50], "variances of the data", gt=0)
    tasks: int = key(1000, "number of tasks", ge=2)
    samples: int = key(15, "samples K of each task", ge=1)
    width: int = key(10, "features d", ge=2)
    centred: list[float] = key([-5, 5, 10 / 9], "lowest and highest centre around 0, and the width", length=3)
    shifted: list[float] = key([5, 10, 5], "lowest and highest centre beside 0, and the width", length=3)
    reach: float = key(math.sqrt(3), "where the basis follows the data: its outermost centres, in deviations", gt=0)
    scalar: bool = key(False, "one number for each sample in all features, in the place of one for each feature")

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _listed(study, "variances")
        if len(study["variances"]) < 2:
            yield f"study.variances={show(study['variances'])}: must name at least two values"
        for name in ("centred", "shifted"):
            if study[name][2] <= 0:
                yield f"study.{name}={show(study[name])}: the width, the last value, must be > 0"


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


@dataclass
class TangentQuadratic(Study):
    """metalearn.studies.TangentQuadratic."""

    target: ClassVar[str] = "metalearn.studies.TangentQuadratic"
    epoch: ClassVar[int] = 2  # cut-offs have names since

    tasks: list[int] = key([50, 85, 68, 112], "numbers of tasks N", ge=2)
    samples: list[int] = key([15, 19, 23, 7], "numbers of samples K, one for each of study.tasks", ge=1)
    init: str = key("uniform", "initialisation of the network", choices=("uniform", "normal"))
    width: int = key(1024, "hidden units h", ge=1)
    inputs: int = key(1, "inputs p", ge=1)
    nu: float = key(0.2, "spread of the tasks, as dataset=quadratic has it", ge=0)
    sigma: float = key(0.2, "standard deviation of the noise", ge=0)
    low: float = key(-3.0, "end of the grid of alpha, times h")
    high: float = key(7.0, "other end")
    points: int = key(41, "rates of the grid", ge=3)
    zoom: float = key(1.0, "above 1: as many rates again from low / zoom to high / zoom", ge=1)
    test_tasks: int = key(300, "new tasks", ge=2)
    queries: int = key(30, "fresh points of each", ge=1)
    cutoffs: list[float] = key(
        [1e-6, 1e-12],
        "least eigenvalues of the kernel kept, as shares of the largest",
        gt=0,
        lt=1,
    )

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _listed(study, "cutoffs")
        yield from _paired(study, "tasks", "samples")
        if study["low"] >= study["high"]:
            yield f"study.low={show(study['low'])}: must be less than study.high={show(study['high'])}"


@dataclass
class SineLastLayer(Study):
    """metalearn.studies.SineLastLayer."""

    target: ClassVar[str] = "metalearn.studies.SineLastLayer"
    epoch: ClassVar[int] = 2  # one network before

    pretrain_steps: int = key(5000, "meta-steps of joint training of each network", ge=1)
    pretrain_seeds: list[int] = key([*range(8)], "seed of that training, one for each network", ge=0)
    shot: int = key(10, "points of a task K", ge=1)
    tasks: int = key(1000, "training tasks of the last layer", ge=2)
    test_tasks: int = key(4000, "new tasks of each network", ge=2)
    queries: int = key(256, "points that these are judged on", ge=1)
    alphas: list[float] = key([0.001, 0.005, 0.01, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5], "the grid", ge=0)

    @classmethod
    def needs(cls, study: Config) -> Iterator[list[str]]:
        for seed in study["pretrain_seeds"]:
            yield [
                *("algorithm=erm", "dataset=sinusoid", "dataset.variant=unravel", f"dataset.shot={study['shot']}"),
                *(f"trainer.max_steps={study['pretrain_steps']}", "trainer.val_every=1000"),
                *("trainer.test_episodes=100", "trainer.threads=1", f"seed={seed}"),  # threads move the bits
            ]

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _listed(study, "alphas", "pretrain_seeds")
        if len(study["alphas"]) < 2:
            yield f"study.alphas={show(study['alphas'])}: must name at least two values"


@dataclass
class TangentVariance(Study):
    """metalearn.studies.TangentVariance."""

    target: ClassVar[str] = "metalearn.studies.TangentVariance"

    variances: list[float] = key(
        [0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 13.0, 16.0, 20.0, 25.0, 30.0],
        "variances of the data",
        gt=0,
    )
    tasks: int = key(300, "tasks of each", ge=2)
    samples: int = key(15, "numbers of samples K", ge=1)
    init: str = key("uniform", "initialisation of the network", choices=("uniform", "normal"))
    width: int = key(1024, "hidden units", ge=1)
    inputs: int = key(1, "inputs p", ge=1)

    @classmethod
    def problems(cls, study: Config) -> Iterator[str]:
        yield from _listed(study, "variances")


def _overdetermined(study: Config, tasks: int) -> Iterator[str]:
    """With no more samples in all than features, one w solves all tasks, and every rate is as good as another."""
    if tasks * study["samples"] <= study["width"]:
        bound = f"study.width={study['width']}, or one w solves all tasks at every rate"
        yield f"study.samples={study['samples']}: times {tasks} tasks, must be > {bound}"


def _listed(study: Config, *names: str) -> Iterator[str]:
    """Lists that are empty or repeat themselves."""
    for name in names:
        if not study[name] or len(set(study[name])) < len(study[name]):
            yield f"study.{name}={show(study[name])}: must name at least one value, and none twice"


def _paired(study: Config, one: str, other: str) -> Iterator[str]:
    """Lists that are empty or not of one length, or name a pair twice."""
    pairs = list(zip(study[one], study[other], strict=False))
    if not pairs or len(study[one]) != len(study[other]) or len(set(pairs)) < len(pairs):
        yield (
            f"study.{one}={show(study[one])}, study.{other}={show(study[other])}: must be as many, at least one, and no"
            " pair twice"
        )


STUDIES: tuple[type[Study], ...] = (
    Bernacchia,
    Corollary1,
    DataVariance,
    EstimationError,
    FastAdaptation,
    PolynomialMoments,
    RateCurve,
    SineLastLayer,
    TangentQuadratic,
    TangentVariance,
    Trajectory,
)
