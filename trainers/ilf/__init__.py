"""Training and measuring Inner Loop Feedback (docs/methods/ilf.md).  Start reading at task.py."""

from trainers.ilf.evaluation import evaluation_setup
from trainers.ilf.task import ILFTask, build_task

__all__ = ["ILFTask", "build_task", "evaluation_setup"]
