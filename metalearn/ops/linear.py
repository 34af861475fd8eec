"""Task-batched affine map."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y = x W^T + b for each task.

    Args:
        x: `[B, n, D]`.
        weight: `[O, D]` shared, or `[B, O, D]` one per task.
        bias: `[O]` or `[B, O]`; may be shared where the weight is not, and the other way round.

    Returns:
        `[B, n, O]`.
    """
    if weight.dim() == 2:
        return F.linear(x, weight) + bias.unsqueeze(-2) if bias.dim() == 2 else F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
