"""Tasks from several data sets, each task from one of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metalearn.datasets.archives import combined_hash
from metalearn.datasets.base import Dataset, Draw, Split
from metalearn.datasets.grouped import draw_groups
from metalearn.episode import Episode, Examples
from metalearn.objects import build
from metalearn.random import Key
from metalearn.schema import BadInput


class Mixture(Dataset):
    """Each task is one of a member's own: the task that the member has at the same coordinates.

    A training task's member is drawn by the weights; validation and test episode i is of member i modulo their number.
    It is `latent["group"]`, an index into `groups`, and all that `latent` has. Labels mean nothing across members: slot
    c of one and slot c of another are unrelated classes.

    All members must be of one kind, with inputs of one shape and equal way, shot and queries, so that their tasks
    stack. Groups of a member's own are not told apart.

    Args:
        members: names of the members, which become the groups.
        arguments: for each of them the section of its data set, `_target_` and keys.
        weights: odds of the members in training; empty for equal ones.
        way, shot, queries, test_way, test_shot, test_queries, label_assignment, seed: in place of each member's own;
            None for these.

    Raises:
        BadInput: for members that do not go together.
    """

    def __init__(
        self,
        *,
        members: Sequence[str],
        arguments: Mapping[str, dict[str, Any]],
        weights: Sequence[float] = (),
        way: int | None = None,
        shot: int | None = None,
        queries: int | None = None,
        test_way: int | None = None,
        test_shot: int | None = None,
        test_queries: int | None = None,
        label_assignment: Literal["mutually_exclusive", "fixed_label"] | None = None,
        seed: int | None = None,
    ):
        sizes: dict[str, Any] = {"way": way, "shot": shot, "queries": queries}
        sizes |= {"test_way": test_way, "test_shot": test_shot, "test_queries": test_queries}
        shared = sizes | {"label_assignment": label_assignment, "seed": seed}
        given = {k: v for k, v in shared.items() if v is not None}
        self.groups = tuple(members)
        self.members: list[Dataset] = [build("dataset", arguments[name] | given) for name in members]
        self.weights = tuple(weights) or (1.0,) * len(self.members)
        self.kind = self._common("kind", [m.kind for m in self.members])
        self.input_shape = self._common("shape of inputs", [m.input_shape for m in self.members])
        shared_labels = all(m.label_space == "shared" for m in self.members)
        self.label_space = "shared" if shared_labels else "permuted"

    def _common(self, what: str, found: list[Any]) -> Any:
        if any(value != found[0] for value in found):
            listed = ", ".join(f"{name} {value}" for name, value in zip(self.groups, found, strict=True))
            raise BadInput(f"dataset.members: must be of one {what}, and are of several ({listed})")
        return found[0]

    def outputs(self, split: Split) -> int:
        return self._common(f"width of outputs in split '{split}'", [m.outputs(split) for m in self.members])

    def data_hash(self) -> str:
        """Sixteen hex digits over the members' hashes, in their order."""
        return combined_hash(*(m.data_hash() for m in self.members))

    def to(self, device: torch.device | str) -> "Mixture":
        self.members = [m.to(device) for m in self.members]
        return self

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        """What every member draws at these coordinates, its tensors' names led by its number, and who is taken."""
        draw = {"group": draw_groups(split, key, step, task, self.weights)}
        for i, member in enumerate(self.members):
            draw |= {f"{i} {name}": value for name, value in member.draw(split, key, step, task).items()}
        return draw

    def fetch(self, split: Split, draw: Draw) -> Episode:
        """Each member's tasks are fetched together and put back in the order of the tasks."""
        group, parts = draw["group"], []
        for i, member in enumerate(self.members):
            tasks = (group == i).nonzero()[:, 0]
            if len(tasks):
                own = {k.partition(" ")[2]: v[tasks] for k, v in draw.items() if k.startswith(f"{i} ")}
                parts.append((tasks, member.fetch(split, own)))
        order = torch.cat([tasks for tasks, _ in parts]).argsort()

        def stacked(examples: list[Examples]) -> Examples:
            return Examples(
                *(torch.cat(tensors)[order.to(tensors[0].device)] for tensors in zip(*examples, strict=True))
            )

        episodes = [e for _, e in parts]
        return Episode(stacked([e.support for e in episodes]), stacked([e.query for e in episodes]), {"group": group})
