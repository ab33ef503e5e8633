"""Linear time-invariant systems, one for each channel: S4D, S4."""

from pretrain.ops.lti.dispatch import dense_lti, lti

__all__ = ["dense_lti", "lti"]
