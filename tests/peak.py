"""How much memory tensors take at the same time."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile take at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.live = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if sum(size for _, size in self.live.values()) > self.bytes:
            self.live = {k: pair for k, pair in self.live.items() if not pair[0].expired()}
            self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out
