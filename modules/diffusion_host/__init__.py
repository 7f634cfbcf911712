"""The diffusion host: modules act at block and sub-module calls across sampler steps, on diffusers' own hooks."""

from modules.diffusion_host.attach import ReuseHandle, attach_reuse, attached_reuse
from modules.diffusion_host.clock import StepClock
from modules.diffusion_host.counter import WorkCounter
from modules.diffusion_host.hooks import add_hook, remove_hook

__all__ = ["ReuseHandle", "StepClock", "WorkCounter", "add_hook", "attach_reuse", "attached_reuse", "remove_hook"]
