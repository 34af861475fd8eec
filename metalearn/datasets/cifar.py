"""CIFAR-FS and FC100: the 60,000 pictures of CIFAR-100 (Krizhevsky 2009) with two splits of its 100 classes."""

from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metalearn.datasets import cifar_files
from metalearn.datasets.archives import Checksum
from metalearn.datasets.base import ClassImages, Draw, ImageDataset, Split, one_of
from metalearn.datasets.cifar_files import CLASSES, SUPERCLASS, SUPERCLASSES, classes_of
from metalearn.datasets.grouped import draw_groups
from metalearn.episode import Episode, Examples
from metalearn.random import Key

Groups = Literal["none", "superclass"]

MEAN = (129.37731888, 124.10583864, 112.47758569)
DEVIATION = (68.20947949, 65.43124043, 70.45866994)
"""Of red, green and blue over all 60,000 pictures, in 0..255, as Lee et al. 2019 (MetaOptNet) use them."""


class Superclasses(NamedTuple):
    """The superclasses that tasks of a split can be drawn from.

    ids: int64 `[G]`, their numbers in `SUPERCLASSES`; sizes: int64 `[G]`, their classes in the split.
    classes: int64 `[G, largest]`, these classes as rows of the split's names; rows end in zeros.
    """

    ids: Tensor
    sizes: Tensor
    classes: Tensor


class CIFAR100(ImageDataset):
    """Few-shot classification of CIFAR-100's pictures, 600 a class, in RGB of `[3, 32, 32]`.

    Nothing is fetched unless `download` is set. Pictures are decoded once and kept as an .npy file beside the data, or
    in `metalearn.datasets.archives.cache_dir()` if that folder cannot be written. The order of a class's pictures there
    depends on the pictures alone, so that every container gives the same episodes.

    Episodes have `latent["superclass_ids"]` `[B, way]`, the published number (0..19) of each class's superclass.

    Args:
        root: folder of `cifar-100-python.tar.gz`, of the published few-shot sets (`cifar100.zip`, `FC100.zip` or the
            pickles `CIFAR_FS_*.pickle`), of the re-pack `cifar100_600.zip`, or of the unpacked tree of one of these;
            they may also be in its folder `cifar100`.
        groups: `none`: tasks are drawn from all classes of a split. `superclass`: a task has one superclass (of those
            with at least `way` classes in the split; by chance in training, in turn in validation and test), and its
            classes are drawn from these; `latent["group"]` `[B]` is its number, and results are split by it.
        flip: whether each support picture of a training task is mirrored with probability 1/2.
        test_flip: the same for validation and test tasks; the code of TSA-MAML has both.
        normalize: subtract `MEAN` and divide by `DEVIATION` after scaling to 0..1 (both taken over test classes, too).
        download: whether to fetch the official archive into `root` if nothing is there (169 MB).
        checksum: what to do about files that differ from the published ones: official files by md5, others by their
            decoded pictures. Classes and pictures are counted in any case.
        **episodes: see `ImageDataset`.

    Raises:
        FileNotFoundError: if files are missing; the message says where to get them.
        ValueError: for values out of range, other pictures (`checksum="error"`), incomplete ones, or, at the first use
            of a split, if no superclass has `way` classes in it.
        metalearn.datasets.archives.DownloadError: if the download fails.
    """

    lists: ClassVar[str]
    """Which of the package's lists of classes."""
    input_shape = (3, cifar_files.SIDE, cifar_files.SIDE)

    def __init__(
        self,
        *,
        root: str | Path,
        groups: Groups = "none",
        flip: bool = False,
        test_flip: bool = False,
        normalize: bool = False,
        download: bool = False,
        checksum: Checksum = "warn",
        **episodes: Any,
    ):
        super().__init__(**episodes)
        one_of("groups", groups, Groups)
        one_of("checksum", checksum, Checksum)
        if groups == "superclass" and self.label_assignment == "fixed_label":
            raise ValueError("dataset.groups = 'superclass' needs dataset.label_assignment = 'mutually_exclusive'")
        self.root, self.normalize = root, normalize
        self.groups = SUPERCLASSES if groups == "superclass" else ()
        self._flips = {"train": flip, "val": test_flip, "test": test_flip}
        self._superclass_ids = {s: _superclass_ids(c) for s, c in classes_of(self.lists).items()}
        self._superclasses: dict[str, Superclasses] = {}
        cifar_files.prepare(root, download=download, checksum=checksum)

    def data_hash(self) -> str:
        """Sixteen hex digits that name the pictures of all classes, whatever they are packed in."""
        return cifar_files.data_hash(self.root)

    def classes(self, split: Split) -> int:
        return len(classes_of(self.lists)[split])

    def load(self, split: Split) -> ClassImages:
        """The pictures of a split, classes in the order of their names."""
        names = classes_of(self.lists)[split]
        images = np.load(cifar_files.pictures(self.root), mmap_mode="r")
        chosen = torch.from_numpy(images[[CLASSES.index(name) for name in names]])
        count = torch.full((len(names),), chosen.shape[1])
        return ClassImages(chosen.flatten(0, 1), count.cumsum(0) - count, count, tuple(names))

    def superclasses(self, split: Split) -> Superclasses:
        """The superclasses that have at least `way` classes in a split.

        Raises:
            ValueError: if there is none.
        """
        if split not in self._superclasses:
            way, ids = self._sizes[split][0], self._superclass_ids[split]
            counts = ids.bincount(minlength=len(SUPERCLASSES))
            enough = (counts >= way).nonzero()[:, 0]
            if not len(enough):
                raise ValueError(
                    f"{self._keys[split][0]} = {way} exceeds the {int(counts.max())} classes that a superclass has at "
                    f"most in split '{split}' (dataset.groups = 'superclass')"
                )
            rows = [(ids == i).nonzero()[:, 0] for i in enough]
            classes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            self._superclasses[split] = Superclasses(enough, counts[enough], classes)
        return self._superclasses[split]

    def _classes(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Tensor:
        if not self.groups:
            return super()._classes(split, key, step, task)
        found = self.superclasses(split)
        group = draw_groups(split, key, step, task, [1.0] * len(found.ids))
        pick = key.sub("classes").choice(self._sizes[split][0], step, task, size=found.sizes[group])
        return found.classes[group].gather(-1, pick)

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        draw = super().draw(split, key, step, task)
        draw["superclass_ids"] = self._superclass_ids[split][draw["class_ids"]]
        if self._flips[split]:
            way, shot, _ = self._sizes[split]
            draw["mirrored"] = key.sub("flip").words(way * shot, step, task) % 2 == 1
        return draw

    def fetch(self, split: Split, draw: Draw) -> Episode:
        support, query, latent = super().fetch(split, draw)
        latent["superclass_ids"] = draw["superclass_ids"]
        if self.groups:
            latent["group"] = draw["superclass_ids"][:, 0]
        if "mirrored" in draw:
            mirrored = draw["mirrored"].to(self.device)[..., None, None, None]
            support = Examples(torch.where(mirrored, support.x.flip(-1), support.x), support.y)
        if self.normalize:
            mean, deviation = (torch.tensor(v, device=self.device)[:, None, None] / 255 for v in (MEAN, DEVIATION))
            support, query = (Examples((part.x - mean) / deviation, part.y) for part in (support, query))
        return Episode(support, query, latent)


def _superclass_ids(classes: list[str]) -> Tensor:
    return torch.tensor([SUPERCLASSES.index(SUPERCLASS[name]) for name in classes])


class CIFARFS(CIFAR100):
    """64/16/20 classes for training/validation/test (Bertinetto et al. 2019); splits share superclasses."""

    lists = "cifar_fs"


class FC100(CIFAR100):
    """60/20/20 classes: all of 12/4/4 superclasses, hence no superclass in two splits (Oreshkin et al. 2018)."""

    lists = "fc100"
