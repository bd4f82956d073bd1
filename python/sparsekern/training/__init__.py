"""Sparse training: methods that change masks while a model trains, and the pieces they are made of."""

from ..distributions import allocate
from . import schedules
from .dynamic import SET, RigL
from .method import Method, Static
from .schedules import Schedule
from .updater import drop_grow

__all__ = ["SET", "Method", "RigL", "Schedule", "Static", "allocate", "drop_grow", "schedules"]
