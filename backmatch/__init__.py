"""Training deep networks with back-matching propagation."""

from backmatch.coverage import coverage
from backmatch.optimizer import BackMatchSGD

__all__ = ["BackMatchSGD", "coverage"]
__version__ = "0.1.0"
