"""Training and measuring Medusa (docs/methods/medusa.md).  Start reading at task.py."""

from trainers.medusa.build import build_task
from trainers.medusa.convert import convert
from trainers.medusa.evaluation import measure
from trainers.medusa.task import MedusaTask

__all__ = ["MedusaTask", "build_task", "convert", "measure"]
