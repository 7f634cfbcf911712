"""Training and measuring Locret (docs/methods/locret.md).  Start reading at task.py."""

from trainers.locret.build import build_task
from trainers.locret.evaluation import measure
from trainers.locret.task import LocretTask

__all__ = ["LocretTask", "build_task", "measure"]
