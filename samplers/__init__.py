"""How an image comes out of noise: noise levels, denoisers, solvers, the sampling loop, time travel, the record."""

from .demo import load_demo
from .denoiser import Denoiser, denoiser, frozen
from .levels import Level, prediction_kind, scheduler_levels
from .loop import Result, sample
from .record import Record
from .solver import Solver
from .time_travel import TimeTravel, Visit, visits

__all__ = [
    "Denoiser",
    "Level",
    "Record",
    "Result",
    "Solver",
    "TimeTravel",
    "Visit",
    "load_demo",
    "denoiser",
    "frozen",
    "prediction_kind",
    "sample",
    "scheduler_levels",
    "visits",
]
