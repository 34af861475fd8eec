"""Keys of studies: what computes numbers of a paper's theory instead of training."""

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


def _listed(study: Config, *names: str) -> Iterator[str]:
    """Lists that are empty or repeat themselves."""
    for name in names:
        if not study[name] or len(set(study[name])) < len(study[name]):
            yield f"study.{name}={show(study[name])}: must name at least one value, and none twice"


STUDIES: tuple[type[Study], ...] = (Corollary1,)
