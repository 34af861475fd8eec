"""The one base class of all meta-algorithms: pure methods on tensors, and the meta-step that uses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import parallel
from metalearn.backbones import Backbone
from metalearn.bn import RunningStatistics
from metalearn.bn import predict as bn_predict
from metalearn.compiled import Compiler
from metalearn.episode import Episode, Examples, MetaBatch, Params, TaskOutput, Theta
from metalearn.functional import Trajectory
from metalearn.meta_gradient import MetaGradient, bad_tasks, meta_gradient
from metalearn.ops import Normalization
from metalearn.ops.layout import same_layout
from metalearn.optim import OuterOptimizer, clipped
from metalearn.outer import Combine
from metalearn.phases import Phase, Piece
from metalearn.random import Key, TaskKey
from metalearn.regularizers import Regularizer

if TYPE_CHECKING:
    from metalearn.analysis import Analysis
    from metalearn.data import Episodes
    from metalearn.datasets.base import Dataset
    from metalearn.enlarge import Enlarged

T = TypeVar("T")
CHUNK_BYTES = {"cpu": 12 * 2**20, "gpu": 2 * 2**30}  # what stays in a CPU's caches; what keeps a GPU busy
OWN = "regularizer."  # prefix of a regularizer's parameters among those of the network
When = Literal["inner", "query"]
Scores = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""(batch-norm mode, step) -> metric and loss of each task, `[B]` each."""


class Diverged(RuntimeError):
    """A loss or gradient stopped being finite; the message names meta-step, task and inner rate."""


class MetaLearner(pl.LightningModule, ABC):
    """A map from a support set to a predictor, and how its meta-parameters are learned.

    An algorithm implements `adapt` and overrides one to three other methods. All of them take the task axis B first
    and loop over nothing.

    Args:
        net: the network; its parameters become `theta["net"]`.
        kind: `classification` (cross-entropy) or `regression` (mean squared error, no factor 1/2).
        regularizer: acts at the hooks of `metalearn.regularizers`; None for none.
        inner_steps, test_steps: steps of adaptation in training and in validation and test.
        inner_loss_reduction: `mean` over examples, or `sum_over_shots`: the sum divided by the shots, which is N
            times the mean (the code of Finn et al.); classification only.
        chunk_bytes: activations of one chunk of tasks; bounds memory, changes nothing but rounding. 0 for `CHUNK_BYTES`
            of the kind of device.
        recompute: compute the inner steps again for the outer gradient instead of keeping them: memory for activations
            does not grow with their number, and each costs one more forward and backward pass of the support set.
        combine: how the tasks' outer gradients become one; None for their mean.
    """

    needs_head: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    """Whether `task_loss` takes meta-parameters with a task axis, leaf by leaf; if not, the gradients of single tasks
    (see `combine`, and `Regularizer.task_gradients`) are computed one task at a time."""
    latent_reads: ClassVar[tuple[str, ...]] = ()
    """What `task_loss` reads of `latent`: what `updates` put there, found from support sets alone; or `class_ids`,
    where they are the labels that are learned."""
    kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")

    def __init__(
        self,
        *,
        net: Backbone,
        kind: Literal["classification", "regression"],
        regularizer: Regularizer | None = None,
        inner_steps: int = 0,
        test_steps: int = 0,
        inner_loss_reduction: Literal["mean", "sum_over_shots"] = "mean",
        chunk_bytes: int = 0,
        recompute: bool = False,
        combine: Combine | None = None,
    ):
        super().__init__()
        self.net, self.kind, self.regularizer = net, kind, regularizer or Regularizer()
        self.inner_steps, self.test_steps = inner_steps, test_steps
        self.inner_loss_reduction = inner_loss_reduction
        self.chunk_bytes, self.recompute, self.combine = chunk_bytes, recompute, combine
        self.running = RunningStatistics(net)
        self.shapes = net.shapes()
        self.meta_steps = 0
        self.rate, self.train_loss = 0.0, torch.tensor(torch.nan)
        self.optimizer_state: dict[str, Any] | None = None
        self.compiler: Compiler | None = None
        self.enlarged: Enlarged | None = None
        self.aux: dict[str, Tensor] = {}
        self._traced: list[tuple[int, dict[str, Tensor]]] = []
        self.automatic_optimization = False
        self.watch(["batch"], "headline")
        rewrites = self.regularizer.overrides("task_gradients")
        if self.couples_tasks and (rewrites or combine is not None):
            who = f"{type(self.regularizer).__name__}.task_gradients" if rewrites else type(combine).__name__
            raise ValueError(
                f"{who} needs an outer objective that is a mean over tasks, "
                "and `outer` or `penalty` makes it another; use one or the other"
            )

    # ---- what an algorithm defines -------------------------------------------------------------------------------

    @abstractmethod
    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """Task parameters phi after 0, 1, ..., `steps` steps on the support sets, leaves `[B, *shape]`."""

    def predict(
        self, theta: Theta, phi: Params, x: Tensor, *, support: Examples, bn: str, record: Normalization | None = None
    ) -> Tensor:
        """Outputs `[B, n, outputs]` for the inputs x `[B, n, *input]` of tasks with parameters phi.

        Args:
            theta: meta-parameters; those that phi does not replace are used as they are.
            phi: adapted parameters.
            x: inputs.
            support: the tasks' support sets, for the batch-norm modes that need them.
            bn: `batch`, `support_plus_one`, `support_only` or `running` (contract: batch norm).
            record: filled with the batch statistics of this pass (mode `batch` only).
        """

        def forward(z: Tensor, norm: Normalization) -> Tensor:
            return self.run_net(self.network(theta) | phi, z, when="query", norm=norm)

        return bn_predict(forward, x, support.x, bn, self.running.statistics(), record)

    def task_loss(self, theta: Theta, episodes: Episode, key: TaskKey | None = None) -> TaskOutput:
        """Default: the query loss of the adapted parameters, with batch statistics."""
        return self.query_output(
            theta, self.adapt(theta, episodes.support, steps=self.inner_steps, key=key)[-1], episodes
        )

    def outer(self, theta: Theta, episodes: Episode, out: TaskOutput) -> Tensor:
        """The outer objective from all tasks' outputs: their mean."""
        return out.loss.mean()

    @property
    def couples_tasks(self) -> bool:
        """Whether the outer objective is more than a mean of what each task contributes by itself."""
        return type(self).outer is not MetaLearner.outer or self.regularizer.overrides("penalty")

    @property
    def exact(self) -> bool:
        """Whether the outer gradient is the slope of the outer objective; first-order methods' is not."""
        return True

    def updates(self, batch: MetaBatch) -> list[MetaBatch]:
        """The outer updates that one meta-step makes, in order: one over all its tasks."""
        return [batch]

    def observe(self, batch: MetaBatch) -> None:
        """Take in what the tasks of an update show, before it is computed; default: nothing."""

    def forget(self) -> None:
        """Undo `observe`: the update was refused."""

    def touched(self, result: MetaGradient) -> Collection[str] | None:
        """Names of the parameters that an update may move; None for all.

        The others keep their values, and what the outer optimizer knows of them.
        """
        return None

    def absorb(self, state: dict[str, Any]) -> None:
        """Keep what a meta-step leaves in the learner's state (task means of `TaskOutput.state`)."""

    def reports(self) -> dict[str, float]:
        """What a log line says besides loss and rate: task means of the last meta-step's `aux`, and of its weights."""
        found = {k: float(v.double().mean()) for k, v in self.aux.items() if k != "weight"}
        return found | (self.combine.reports(self.aux["weight"]) if self.combine and "weight" in self.aux else {})

    def traces(self) -> dict[str, Tensor]:
        """Numbers that the log has of every meta-step, however far apart its lines are; default: none."""
        return {}

    def take_traces(self) -> dict[int, dict[str, float]]:
        """`traces` of the meta-steps since the last call, by meta-step; read from the device at once."""
        taken, self._traced = self._traced, []
        values = torch.stack([torch.stack(list(v.values())) for _, v in taken]).tolist() if taken else []
        return {step: dict(zip(v, row, strict=True)) for (step, v), row in zip(taken, values, strict=True)}

    def findings(self) -> dict[str, dict[str, Any]]:
        """Metrics of a result that are of what was learned, and no scores of tasks; default: none."""
        return {}

    def hint(self) -> str:
        """What a message about divergence says of this algorithm's own reasons for it."""
        return ""

    # ---- before the first meta-step ------------------------------------------------------------------------------

    def settle(self, data: Episodes) -> dict[str, float]:
        """Decide from training tasks, at the drawn parameters, what a run decides once; returns what to log of it.

        What is decided is part of the learner's state. Default: nothing.
        """
        return {}

    def inherit(self, states: Sequence[dict[str, Any]]) -> None:
        """Start from what the cells that this run needs ended with: their learners' state, in the order of the needs.

        Raises:
            BadInput: if it does not fit.
            TypeError: for an algorithm whose schema needs no other run; those that do override this.
        """
        raise TypeError(f"{type(self).__name__} starts from no other run")

    def phases(self, data: Episodes) -> Sequence[Phase]:
        """What a run does before its first meta-step, and does not repeat when it is killed; default: nothing."""
        return []

    def begin(self, pieces: Iterator[Piece]) -> dict[str, float]:
        """Take in the pieces of the last phase; returns what the log says of them."""
        return {}

    def analyse(self, data: Episodes) -> Analysis | None:
        """What a run says at its end of the trained parameters, beyond scores; default: nothing."""
        return None

    @classmethod
    def head_width(cls, dataset: Dataset, arguments: dict[str, Any]) -> int:
        """Outputs of the network for a learner of these arguments on a data set's training tasks; 0 for no head."""
        return dataset.outputs("train") if cls.needs_head else 0

    # ---- shared pieces -------------------------------------------------------------------------------------------

    def theta(self) -> Theta:
        """All meta-parameters, grouped by the attribute that owns them."""
        groups: Theta = {}
        for name, parameter in self.named_parameters():
            group, rest = name.split(".", 1)
            groups.setdefault(group, {})[rest] = parameter
        return groups

    def constants(self) -> Theta:
        """`theta`, recording no gradients."""
        return {group: {k: p.detach() for k, p in params.items()} for group, params in self.theta().items()}

    def network(self, theta: Theta) -> Params:
        """What a pass through the network depends on: its parameters, and those of a regularizer that acts inside."""
        return theta["net"] | {OWN + k: p for k, p in theta.get("regularizer", {}).items()}

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """`[B]`: mean cross-entropy of logits `[B, n, N]`, or mean squared error of `[B, n, outputs]`."""
        if self.kind == "regression":
            return (prediction - y).square().flatten(1).mean(1)
        flat = F.cross_entropy(prediction.flatten(0, 1), y.flatten(), reduction="none")
        return flat.unflatten(0, y.shape).mean(1)

    def inner_loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """`[B]`: the loss that inner loops descend, see `inner_loss_reduction`."""
        return self.loss(prediction, y) * self.inner_loss_scale(prediction)

    def inner_loss_scale(self, prediction: Tensor) -> int:
        """How many times the mean loss of these predictions the inner loss is."""
        return prediction.shape[-1] if self.inner_loss_reduction == "sum_over_shots" else 1

    def metric(self, prediction: Tensor, y: Tensor) -> Tensor:
        """`[B]`: accuracy (a fraction), or mean squared error in the target's units squared."""
        if self.kind == "regression":
            return self.loss(prediction, y)
        return (prediction.argmax(-1) == y).float().mean(1)

    @property
    def metric_name(self) -> str:
        """Name of `metric` in results."""
        return "mse" if self.kind == "regression" else "accuracy"

    def query_output(
        self, theta: Theta, phi: Params, episodes: Episode, aux: dict[str, Tensor] | None = None
    ) -> TaskOutput:
        """The query loss of task parameters phi, with batch statistics, as what `task_loss` returns."""
        norm = Normalization(record=True)
        prediction = self.predict(theta, phi, episodes.query.x, support=episodes.support, bn="batch", record=norm)
        loss = self.loss(prediction, episodes.query.y)
        return TaskOutput(loss, prediction, phi, {} if aux is None else aux, norm.seen, {})

    def run_net(
        self,
        params: Params,
        h: Tensor,
        *,
        when: When,
        start: str = "input",
        stop: str | None = None,
        norm: Normalization | None = None,
    ) -> Tensor:
        """The network between two sites, with the regularizer's feature hook at each site (`params`: see `network`)."""
        on_site = None
        if self.regularizer.overrides("features"):
            own = {k.removeprefix(OWN): p for k, p in params.items() if k.startswith(OWN)}
            on_site = partial(self.regularizer.features, when=when, own=own)
        return self.net.run(params, h, start, stop, norm=norm, on_site=on_site)

    def chunks(self, episodes: Episode, modes: Collection[str] = ()) -> list[slice]:
        """Equal ranges of tasks that take no more than `chunk_bytes` each (at least one task); see `task_bytes`."""
        limit = self.chunk_bytes or CHUNK_BYTES["cpu" if episodes.support.x.is_cpu else "gpu"]
        fits = max(1, limit // max(1, self.task_bytes(episodes, modes)))
        count = -(-episodes.tasks // fits)
        bounds = [i * episodes.tasks // count for i in range(count + 1)]
        return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]

    def in_chunks(self, work: Callable[[slice], T], episodes: Episode, modes: Collection[str] = ()) -> list[T]:
        """`work` of each chunk, in their order, without recording gradients."""

        def plain(chunk: slice) -> T:
            with torch.no_grad():  # a setting of the thread
                return work(chunk)

        return list(parallel.over(plain, self.chunks(episodes, modes), episodes.support.x.device))

    def task_bytes(self, episodes: Episode, modes: Collection[str] = ()) -> int:
        """Bytes of activations that one task takes: in training, or in predictions under these batch-norm modes."""
        support, queries = episodes.support.x.shape[1], episodes.query.x.shape[1]
        return self.net.activation_bytes(
            queries * (support + 1) if "support_plus_one" in modes else max(support, queries)
        )

    # ---- the meta-step -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The outer optimizer, built by the attached `OuterOptimizer`."""
        return self.outer_optimizer.build(list(self.parameters()))

    def attach(self, optimizer: OuterOptimizer, max_steps: int) -> None:
        """Say how theta is updated, and over how many meta-steps schedules run."""
        self.outer_optimizer, self.max_steps = optimizer, max_steps

    def meta_step(self, batch: MetaBatch, optimizer: torch.optim.Optimizer) -> MetaGradient | None:
        """One outer update, or those of `updates`; the gradient of the last of them, None if there was none."""
        result = None
        self.rate = self.outer_optimizer.rate(self.meta_steps, self.max_steps)
        for part in self.updates(batch):
            self.observe(part)
            result = meta_gradient(self, part)
            self._guard(result, part)
            self.aux = result.aux
            if "weight" in result.aux and not result.aux["weight"].any():
                continue  # nothing to agree on
            moving = self._moving(result, optimizer)
            grads = clipped([grad for _, grad in moving], self.outer_optimizer)
            for (parameter, _), grad in zip(moving, grads, strict=True):
                # in the parameter's own layout: torch's fused Adam pairs memory, not entries
                parameter.grad = same_layout(grad, parameter)
            for group in optimizer.param_groups:
                group["lr"] = self.rate
            optimizer.step()
            self.running.absorb(result.seen)
            self.absorb(result.state)
        self.meta_steps += 1
        if traced := self.traces():
            self._traced.append((self.meta_steps, {k: v.detach().clone() for k, v in traced.items()}))
        return result

    def _moving(self, result: MetaGradient, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
        """The parameters that the update moves, with their gradients; the optimizer passes over the others."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        pairs = list(zip(parameters, result.grads, strict=True))
        names = self.touched(result)
        if names is None:
            return pairs
        optimizer.zero_grad(set_to_none=True)
        return [pair for pair, (name, _) in zip(pairs, self.named_parameters(), strict=True) if name in names]

    def _guard(self, result: MetaGradient, batch: MetaBatch) -> None:
        """Refuse to update theta from a loss or gradient that is not finite."""
        if result.finite:
            return
        tasks = bad_tasks(result.loss, batch)
        what = f"query loss of task {', '.join(map(str, tasks[:5]))}" if tasks else "outer gradient"
        rate = getattr(self, "alpha", None)
        alpha = "" if rate is None else f", algorithm.alpha = {float(rate)}"
        place = f"{what} is not finite at meta-step {batch.step}{alpha}, optimizer.lr = {self.outer_optimizer.lr}"
        hint = self.hint()
        self.forget()
        raise Diverged(place + hint)

    def training_step(self, batch: list[MetaBatch], batch_idx: int) -> None:
        """Lightning's hook: several meta-steps in one call, so that its overhead is paid once."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        last = None
        for part in batch:
            last = self.meta_step(part, optimizer) or last
        if last is not None:
            self.train_loss = last.loss.nanmean()  # only a dropped task's is NaN

    def on_train_start(self) -> None:
        """Lightning's hook: continue with the optimizer state of a resumed run."""
        if self.optimizer_state is not None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def watch(self, modes: list[str], steps: str) -> None:
        """Say what validation and test score: see `evaluation.bn_modes` and `evaluation.steps`."""
        every, last = list(range(self.test_steps + 1)), [-1]
        first = every if steps in ("headline", "all") else last
        self.val_points = {modes[0]: last}
        self.test_points = {bn: first if i == 0 else every if steps == "all" else last for i, bn in enumerate(modes)}

    def validation_step(self, batch: MetaBatch, batch_idx: int) -> Any:
        """Lightning's hook: scores of frozen validation episodes."""
        return self.evaluate(batch, self.val_points)

    def test_step(self, batch: MetaBatch, batch_idx: int) -> Any:
        """Lightning's hook: scores of frozen test episodes."""
        return self.evaluate(batch, self.test_points)

    def evaluate(self, batch: MetaBatch, points: dict[str, list[int]]) -> Scores:
        """Adapt to frozen tasks and score them; theta is not changed and no graph is kept.

        Args:
            batch: tasks with the coordinates that their draws are made by.
            points: for each batch-norm mode the numbers of steps to score; negative counts from the last.

        Returns:
            (mode, step) -> (metric `[B]`, loss `[B]`).
        """
        theta = self.constants()

        def score(chunk: slice) -> Scores:
            return self._score(theta, batch.episodes.select(chunk), batch.key.select(chunk), points)

        parts = self.in_chunks(score, batch.episodes, points)
        return {p: (torch.cat([s[p][0] for s in parts]), torch.cat([s[p][1] for s in parts])) for p in parts[0]}

    def _score(self, theta: Theta, episodes: Episode, key: TaskKey, points: dict[str, list[int]]) -> Scores:
        trajectory = self.adapt(theta, episodes.support, steps=self.test_steps, key=key)
        scores = {}
        for bn, steps in points.items():
            for step in sorted({range(len(trajectory))[s] for s in steps if -len(trajectory) <= s < len(trajectory)}):
                prediction = self.predict(theta, trajectory[step], episodes.query.x, support=episodes.support, bn=bn)
                y = episodes.query.y
                scores[bn, step] = self.metric(prediction, y), self.loss(prediction, y)
        return scores

    def initialize(self, seed: int) -> None:
        """Draw the initial meta-parameters from the run's seed."""
        self.net.reset(Key(seed, "init"))
