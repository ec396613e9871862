"""How an image comes out of noise: noise levels, denoisers, solvers, the sampling loop, time travel, the record."""

from .demo import load_demo
from .denoiser import Denoiser, denoiser, frozen
from .gamma import Gamma, PolynomialGamma, ScalarGamma
from .levels import Level, prediction_kind, scheduler_levels
from .likelihood import Likelihood, elbo_bpd, ode_bpd
from .loop import Result, sample
from .record import Record
from .solver import Solver
from .time_travel import TimeTravel, Visit, visits
from .tokens import TokenGenerator, token_generator

__all__ = [
    "Denoiser",
    "Gamma",
    "Level",
    "Likelihood",
    "MultivariateScheduler",
    "PolynomialGamma",
    "Record",
    "Result",
    "ScalarGamma",
    "Solver",
    "TimeTravel",
    "TokenGenerator",
    "Visit",
    "load_demo",
    "denoiser",
    "elbo_bpd",
    "frozen",
    "ode_bpd",
    "prediction_kind",
    "sample",
    "scheduler_levels",
    "token_generator",
    "visits",
]


def __getattr__(name: str):
    if name == "MultivariateScheduler":  # made of diffusers' own classes, which take seconds to import
        from .multivariate import MultivariateScheduler

        return MultivariateScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
