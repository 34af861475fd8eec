"""What is computed instead of training: studies of theory, each with its keys in `metalearn.schema.studies`."""

from metalearn.studies.base import Measured, Study, estimate, exact, over
from metalearn.studies.corollary1 import Corollary1

__all__ = ["Corollary1", "Measured", "Study", "estimate", "exact", "over"]
