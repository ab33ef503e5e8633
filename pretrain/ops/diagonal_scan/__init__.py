"""Linear recurrences without mixing of channels: HGRN, quasi-LSTM, S6, LRU."""

from pretrain.ops.diagonal_scan.dispatch import diagonal_scan

__all__ = ["diagonal_scan"]
