"""Characters in several appearances, each a group of tasks, in place of TSA-MAML's birds, aircraft and fungi."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metalearn.datasets import appearances
from metalearn.datasets.archives import combined_hash
from metalearn.datasets.base import ClassImages, Draw, ImageDataset, Split
from metalearn.datasets.glyphs import Glyphs
from metalearn.datasets.grouped import draw_groups
from metalearn.datasets.omniglot import Omniglot
from metalearn.episode import Episode
from metalearn.random import Key

Appearance = Literal["plain", "blurred", "outlined"]


class Appearances(ImageDataset):
    """Makes of the class that it is put before a set whose tasks look different group by group.

    All pictures of a task are in one appearance: `plain` as the other class has them, `blurred` (dark on a bright
    ground and out of focus) or `outlined` (outlines of thickened strokes, turned by 45 degrees); see `appearances`.
    Everything else is the other class's: splits, classes, and which pictures a task has, so task (s, i) has the same
    ones in every choice of groups. Classes are disjoint between splits, and all groups have all classes of a split.

    A training task's group is drawn uniformly; validation and test episode i is of group i modulo their number. It is
    `latent["group"]`, an index into `groups`.

    Args:
        groups: names of appearances.
        **arguments: those of the other class.
    """

    def __init__(self, *, groups: Sequence[Appearance] = ("plain", "blurred", "outlined"), **arguments: Any):
        super().__init__(**arguments)
        self.groups = tuple(groups)

    def data_hash(self) -> str:
        """Sixteen hex digits over what is pictured and how it is made to look."""
        return combined_hash(appearances.RECIPE, super().data_hash())  # type: ignore[safe-super]  # the other class has it

    def load(self, split: Split) -> ClassImages:
        """The pictures of the groups one after the other; `first` holds for the first group."""
        plain = super().load(split)  # type: ignore[safe-super]
        looks = [torch.from_numpy(appearances.render(name, plain.images.numpy())) for name in self.groups]
        return plain._replace(images=torch.cat(looks))

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        draw = super().draw(split, key, step, task)
        group = draw_groups(split, key, step, task, [1.0] * len(self.groups))
        each = len(self.split(split).images) // len(self.groups)
        return draw | {"group": group, "rows": draw["rows"] + group[..., None, None] * each}

    def fetch(self, split: Split, draw: Draw) -> Episode:
        episode = super().fetch(split, draw)
        return episode._replace(latent=episode.latent | {"group": draw["group"]})


class GroupGlyphs(Appearances, Glyphs):
    """`Glyphs` in several appearances.

    Scripts are no groups here, although each task could be kept within one: the scripts of validation and test are
    other ones than those of training, so a learner's clusters of training tasks could not be compared with them.

    Args:
        **arguments: those of `Appearances` and `Glyphs`.
    """


class GroupOmniglot(Appearances, Omniglot):
    """`Omniglot` in several appearances.

    Args:
        **arguments: those of `Appearances` and `Omniglot`; ink must be bright.

    Raises:
        ValueError: for `invert=False`, and as `Omniglot`.
    """

    def __init__(self, *, invert: bool = True, **arguments: Any):
        if not invert:
            raise ValueError("dataset.invert = false: must be true, because appearances are made of bright ink")
        super().__init__(invert=invert, **arguments)
