"""Tasks and their data. `Task` says how to write one."""

from sparse_flash.experiments.data.dataset import Split, Splits, Task

__all__ = ["Split", "Splits", "Task"]
