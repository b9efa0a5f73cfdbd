"""The whole method on several tasks, from heads to overlap, and its tables: what `hones reproduce` does."""

from hones_lens.reproduction.result import Reproduction, TaskResults
from hones_lens.reproduction.running import RANKINGS, RATIOS, STEERING, reproduce

__all__ = ["RANKINGS", "RATIOS", "STEERING", "Reproduction", "TaskResults", "reproduce"]
