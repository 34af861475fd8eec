"""Meta-algorithms, one file each."""

from metalearn.algorithms.erm import ERM
from metalearn.algorithms.hsml import HSML
from metalearn.algorithms.imaml import IMAML
from metalearn.algorithms.maml import MAML
from metalearn.algorithms.matchingnet import MatchingNet
from metalearn.algorithms.meta_lstm import MetaLSTM
from metalearn.algorithms.meta_sgd import MetaSGD
from metalearn.algorithms.mmaml import MMAML
from metalearn.algorithms.protonet import ProtoNet
from metalearn.algorithms.reptile import Reptile
from metalearn.algorithms.tnet import MTNet, TNet
from metalearn.algorithms.tsa_maml import TSAMAML

__all__ = [
    "ERM",
    "HSML",
    "IMAML",
    "MAML",
    "MMAML",
    "TSAMAML",
    "MTNet",
    "MatchingNet",
    "MetaLSTM",
    "MetaSGD",
    "ProtoNet",
    "Reptile",
    "TNet",
]
