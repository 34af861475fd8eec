"""What is computed instead of training: studies of theory, each with its keys in `metalearn.schema.studies`."""

from metalearn.studies.base import Measured, Study, estimate, exact, over, repeated
from metalearn.studies.bernacchia import Bernacchia
from metalearn.studies.corollary1 import Corollary1
from metalearn.studies.data_variance import DataVariance
from metalearn.studies.estimation_error import EstimationError
from metalearn.studies.fast_adaptation import FastAdaptation
from metalearn.studies.polynomial_moments import PolynomialMoments
from metalearn.studies.rate_curve import RateCurve
from metalearn.studies.sine_last_layer import SineLastLayer
from metalearn.studies.tangent_quadratic import TangentQuadratic
from metalearn.studies.tangent_variance import TangentVariance
from metalearn.studies.trajectory import Trajectory

__all__ = [
    "Bernacchia",
    "Corollary1",
    "DataVariance",
    "EstimationError",
    "FastAdaptation",
    "Measured",
    "PolynomialMoments",
    "RateCurve",
    "SineLastLayer",
    "Study",
    "TangentQuadratic",
    "TangentVariance",
    "Trajectory",
    "estimate",
    "exact",
    "over",
    "repeated",
]
