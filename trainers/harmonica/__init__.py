"""Training and measuring HarmoniCa's router (docs/methods/harmonica.md).  Start reading at task.py."""

from trainers.cache_cases import cache_setup as evaluation_setup
from trainers.harmonica.released import convert
from trainers.harmonica.task import HarmoniCaTask, build_task

__all__ = ["HarmoniCaTask", "build_task", "convert", "evaluation_setup"]
