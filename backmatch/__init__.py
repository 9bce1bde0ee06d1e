"""Training deep networks with back-matching propagation."""

from backmatch.optimizer import BackMatchSGD

__all__ = ["BackMatchSGD"]
__version__ = "0.1.0"
