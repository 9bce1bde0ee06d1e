"""Training deep networks with back-matching propagation."""

from backmatch.coverage import coverage
from backmatch.ladder import BackMatch
from backmatch.optimizer import BackMatchSGD

__all__ = ["BackMatch", "BackMatchSGD", "coverage"]
__version__ = "0.1.0"
