"""Training and measuring MatryoshkaKV (docs/methods/matryoshka_kv.md).  Start reading at task.py."""

from trainers.matryoshka_kv.build import build_task
from trainers.matryoshka_kv.evaluation import measure
from trainers.matryoshka_kv.task import MatryoshkaTask

__all__ = ["MatryoshkaTask", "build_task", "measure"]
