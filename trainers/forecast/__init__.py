"""Training and measuring the learned forecast (docs/methods/forecast.md).  Start reading at task.py."""

from trainers.cache_cases import cache_setup as evaluation_setup
from trainers.forecast.task import ForecastTask, build_task

__all__ = ["ForecastTask", "build_task", "evaluation_setup"]
