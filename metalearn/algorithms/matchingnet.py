"""Matching networks (Vinyals et al., NeurIPS 2016, https://arxiv.org/abs/1606.04080)."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalearn.algorithms.metric import Metric
from metalearn.embedding import lstm, lstm_step
from metalearn.episode import Params, Theta
from metalearn.random import Key

TINY = 1e-8


def cosines(z: Tensor, support: Tensor) -> Tensor:
    """Cosine of the angle between queries `[B, n, D]` and support embeddings `[B, S, D]`: `[B, n, S]`."""
    return F.normalize(z, dim=-1) @ F.normalize(support, dim=-1).mT


def attention(cosine: Tensor, y: Tensor, way: int, scale: float) -> Tensor:
    """log p(n|x) = log sum_j softmax_j(scale cos(x, x_j)) [y_j = n] (Vinyals et al. 2016, eq. 1), `[B, n, N]`.

    1e-8 is added to every probability, so that one of zero has a finite loss.
    """
    return ((scale * cosine).softmax(-1) @ F.one_hot(y, way).to(cosine.dtype) + TINY).log()


class MatchingNet(Metric):
    """Classify a query by attention over the support set.

    Args:
        attention: `softmax`: the label distribution of eq. 1; `sum_cos`: the classes' sums of cosines are logits, as in
            the baseline of Ravi & Larochelle's code.
        scale: factor of the cosines (an inverse temperature). The paper has 1, with which attention is nearly uniform:
            no two weights differ by more than e^2.
        context: full context embeddings (section 2.1.2 and appendix A): a bidirectional LSTM over the support
            embeddings in the order of the episode (by class), and `reads` steps of an LSTM with attention over them for
            each query.
        reads: K of the appendix.
        learner: arguments of `MetaLearner`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(
        self,
        *,
        attention: Literal["softmax", "sum_cos"] = "softmax",
        scale: float = 1.0,
        context: bool = False,
        reads: int = 3,
        **learner: Any,
    ):
        super().__init__(**learner)
        self.attention, self.scale, self.reads, self.has_context = attention, scale, reads, context
        if context:  # the library's modules hold the parameters, and are not called: threads share them
            width = self.net.stage("feat").shape[0]
            self.support_lstm = nn.LSTM(width, width, bidirectional=True, batch_first=True)
            self.query_lstm = nn.LSTMCell(2 * width, width)

    def compare(self, theta: Theta, support: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Log-probabilities, or sums of cosines, of the classes."""
        if self.has_context:
            support = self.support_in_context(theta["support_lstm"], support)
            query = self.query_in_context(theta["query_lstm"], query, support)
        cosine, way = cosines(query, support), int(y.max()) + 1
        if self.attention == "sum_cos":
            return self.scale * cosine @ F.one_hot(y, way).to(cosine.dtype)
        return attention(cosine, y, way, self.scale)

    def support_in_context(self, params: Params, z: Tensor) -> Tensor:
        """g(x_j) = g'(x_j) + forward h_j + backward h_j, `[B, S, D]`."""
        return z + lstm(params, z, "_l0") + lstm(params, z.flip(1), "_l0_reverse").flip(1)

    def query_in_context(self, params: Params, z: Tensor, support: Tensor) -> Tensor:
        """h_k = LSTM([f'(x), r_{k-1}], h_{k-1}) + f'(x), r_k = sum_j softmax_j(h_k g_j) g_j; h_K, `[B, n, D]`.

        The read r enters with the input; in the paper it is concatenated to h, which is the same linear map.
        """
        h, c, r = z, torch.zeros_like(z), support.mean(1, keepdim=True).expand_as(z)
        for _ in range(self.reads):
            h, c = lstm_step(params, torch.cat([z, r], -1), h, c)
            h = h + z
            r = (h @ support.mT).softmax(-1) @ support
        return h

    def initialize(self, seed: int) -> None:
        """The LSTMs' weights are uniform in +- 1 / sqrt(D), PyTorch's default."""
        super().initialize(seed)
        if self.has_context:
            for name, p in (*self.support_lstm.named_parameters(), *self.query_lstm.named_parameters(prefix="query")):
                generator = torch.Generator().manual_seed(Key(seed, "init/context").sub(name).integer())
                bound = self.query_lstm.hidden_size**-0.5
                with torch.no_grad():
                    p.uniform_(-bound, bound, generator=generator)
