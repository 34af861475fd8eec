"""How long cells take when some run at once: the order and the waiting of a sweep, without its work. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Job(NamedTuple):
    """Seconds of one cell: of its process's start, of its training with what surrounds it, and of its test.

    train: name of its training. needs: trainings that it starts from.
    """

    train: str
    start: float
    training: float
    testing: float
    needs: tuple[str, ...] = ()


class Course(NamedTuple):
    """Seconds until the last of some jobs ends, and of work in all of them together (waiting is none)."""

    wall: float
    work: float


def course(jobs: Sequence[Job], needed: Mapping[str, Job], width: int, trained: Sequence[str] = ()) -> Course:
    """Run jobs in their order, each as soon as one of `width` places is free.

    As cells do, a job whose training another job has completed by then only tests; what it needs is trained in its own
    place if nobody has begun to, and waited for there otherwise.

    Args:
        jobs: in order.
        needed: the jobs of needed trainings, by name.
        width: places.
        trained: names of trainings that are there already.
    """
    done = dict.fromkeys(trained, 0.0)  # when each training is there
    places = [0.0] * width
    work = end = 0.0

    def run(job: Job, now: float) -> float:
        nonlocal work
        for name in job.needs:
            now = max(now, done[name]) if name in done else run(needed[name]._replace(start=0.0), now)
        training = 0.0 if done.get(job.train, float("inf")) <= now + job.start else job.training
        done[job.train] = min(done.get(job.train, float("inf")), now + job.start + training)
        work += job.start + training + job.testing
        return now + job.start + training + job.testing

    for job in jobs:
        now = run(job, heapq.heappop(places))
        end = max(end, now)
        heapq.heappush(places, now)
    return Course(end, work)
