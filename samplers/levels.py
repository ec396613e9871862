"""Noise levels: the one place that does the algebra of `x_t = alpha * x_0 + sigma * noise`.

`alpha` and `sigma` broadcast against the sample: one number for all, one per sample `(B, 1, 1, 1)`, or one per pixel.
Variance-preserving models have `alpha**2 + sigma**2 = 1`, Karras and EDM samplers `alpha = 1`, flow matching
`alpha = 1 - sigma`; every formula here holds for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .gamma import alpha as alpha_of
from .gamma import sigma as sigma_of

_UNREADABLE = ("CMStochastic",)  # its sigmas are not the levels at which the model is asked
KINDS = ("epsilon", "sample", "v_prediction", "flow", "reverse-flow", "edm", "edm-v")


@dataclass(frozen=True, eq=False)
class Level:
    """A noise level; `sigma_data` matters only to models in EDM's parametrisation ("edm").

    `gamma = log(sigma^2 / alpha^2)` is known of variance-preserving levels that were made from it (`of_gamma`); what is
    lost from level to level is then computed from it, where differences of squares would be round-off.

    Scalars are kept as 0-dimensional float64 tensors on the CPU: they combine with a sample on any device, in the
    sample's own dtype, without a synchronisation.
    """

    alpha: torch.Tensor
    sigma: torch.Tensor
    sigma_data: float = 0.5
    gamma: torch.Tensor | None = None

    @classmethod
    def of_gamma(cls, gamma: torch.Tensor) -> Level:
        """The level `a^2 = sigmoid(-gamma)`, `s^2 = sigmoid(gamma)`, broadcastable to the sample (Kingma et al. 2021);
        minus infinity is no noise."""
        return cls(alpha_of(gamma), sigma_of(gamma), gamma=gamma)

    @property
    def per_pixel(self) -> bool:
        """Whether the pixels of a sample may differ."""
        return any(value.dim() > 1 and value[0].numel() > 1 for value in (self.alpha, self.sigma))

    @classmethod
    def of(cls, alpha: float | torch.Tensor, sigma: float | torch.Tensor, sigma_data: float = 0.5) -> Level:
        """A level from numbers or tensors."""
        alpha, sigma = (
            v if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=torch.float64) for v in (alpha, sigma)
        )
        return cls(alpha, sigma, sigma_data)

    def _edm(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.sigma**2 + self.sigma_data**2
        c_out = self.sigma * self.sigma_data / total.sqrt()
        return self.sigma_data**2 / total, -c_out if kind == "edm-v" else c_out

    def x0(self, prediction: torch.Tensor, x: torch.Tensor, kind: str) -> torch.Tensor:
        """The clean sample that a prediction of `kind` at sample `x` means, same shape as `x`.

        epsilon: `(x - s e) / a`; sample: the prediction; v_prediction, `v = (a e - s x_0) / c` with
        `c**2 = a**2 + s**2`: `(a x / c - s v) / c`; flow, `u = e - x_0`: `(x - s u) / (a + s)`; reverse-flow, the same
        with `-u` (models whose time runs from noise to data, such as Mochi); edm: `c_skip x + c_out F` (Karras et al.
        2022); edm-v: the same with `-c_out` (diffusers' EDM with v_prediction).
        """
        a, s = self.alpha, self.sigma
        if kind == "epsilon":
            return (x - s * prediction) / a
        if kind == "sample":
            return prediction
        if kind == "v_prediction":
            c = (a**2 + s**2).sqrt()
            return (a / c) * (x / c) - (s / c) * prediction
        if kind == "flow":
            return (x - s * prediction) / (a + s)
        if kind == "reverse-flow":
            return (x + s * prediction) / (a + s)
        if kind in ("edm", "edm-v"):
            c_skip, c_out = self._edm(kind)
            return c_skip * x + c_out * prediction
        raise _unknown(kind)

    def weights(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """How `x0`, which is linear, weighs the prediction and the sample."""
        one, zero = (torch.tensor(value, dtype=self.alpha.dtype, device=self.alpha.device) for value in (1.0, 0.0))
        return self.x0(one, zero, kind), self.x0(zero, one, kind)

    def noise(self, prediction: torch.Tensor, x: torch.Tensor, kind: str) -> torch.Tensor:
        """The noise that a prediction of `kind` at sample `x` means: `(x - a x_0) / s`, without that division where the
        kind allows; zero where there is none (`s = 0`)."""
        a, s = self.alpha, self.sigma
        if kind == "epsilon":
            return prediction
        if kind == "v_prediction":
            c = (a**2 + s**2).sqrt()
            return (s / c) * (x / c) + (a / c) * prediction
        if kind == "flow":
            return (x + a * prediction) / (a + s)
        if kind == "reverse-flow":
            return (x - a * prediction) / (a + s)
        noise = (x - a * self.x0(prediction, x, kind)) / s.clamp_min(torch.finfo(x.dtype).tiny)
        if not s.dim():  # known on the host
            return noise if s > 0 else torch.zeros_like(noise)
        return torch.where(s.to(x.device) > 0, noise, 0.0)

    def prediction(self, x0: torch.Tensor, noise: torch.Tensor, kind: str) -> torch.Tensor:
        """The prediction of `kind` that means this clean sample and noise: the inverse of `x0` and `noise`."""
        a, s = self.alpha, self.sigma
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x0
        if kind == "v_prediction":
            return (a * noise - s * x0) / (a**2 + s**2).sqrt()
        if kind == "flow":
            return noise - x0
        if kind == "reverse-flow":
            return x0 - noise
        if kind in ("edm", "edm-v"):
            c_skip, c_out = self._edm(kind)
            return (x0 - c_skip * self.mix(x0, noise)) / c_out
        raise _unknown(kind)

    def mix(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`alpha * x0 + sigma * noise`."""
        return self.alpha * x0 + self.sigma * noise

    def renoise(self, x: torch.Tensor, to: Level, noise: torch.Tensor) -> torch.Tensor:
        """Take a sample at this level to a noisier one: `r x + sqrt(s'^2 - r^2 s^2) n` with `r = a' / a`.

        The marginal law of the result is that of `to`.
        """
        return to.alpha / self.alpha * x + to.sigma * to.shared(self)[1].sqrt() * noise

    @property
    def signal_share(self) -> torch.Tensor:
        """`a^2 / (a^2 + s^2)`, the cumulative `abar` of the variance-preserving model at the same signal-to-noise."""
        return self.alpha**2 / (self.alpha**2 + self.sigma**2)

    @property
    def x0_variance(self) -> torch.Tensor:
        """`s^2 / (a^2 + s^2)`: how uncertain x0 is, of data of variance one."""
        return self.sigma**2 / (self.alpha**2 + self.sigma**2)

    @property
    def progress(self) -> float:
        """How far DDPM has come at the same ratio of noise to signal, from 0 (noise) to 1 (the picture); per-pixel
        levels by their mean.

        By the continuous limit of its linear schedule, `log abar = -(0.1 t + 9.95 t^2)` (Song et al. 2021), at `1 - t`.
        """
        log_share = -self.signal_share.double().clamp_min(1e-9).log()
        progress = (1 - ((0.01 + 39.8 * log_share).sqrt() - 0.1) / 19.9).clamp(0, 1).mean()
        return round(progress.item(), 2)  # no schedule is exactly the continuous one

    @property
    def stretch(self) -> torch.Tensor:
        """By how much sigma space (`alpha = 1`) is wider than variance-preserving coordinates; one for other levels."""
        if self.gamma is not None:
            return torch.ones((), dtype=torch.float64)
        return torch.where(self.alpha == 1, (1 + self.sigma**2).sqrt(), 1.0)

    def preserving(self) -> Level:
        """The same level in variance-preserving coordinates, `x / stretch`; other levels than sigma space's as they
        are."""
        if self.gamma is not None:
            return self
        return Level(self.alpha / self.stretch, self.sigma / self.stretch, self.sigma_data)

    def ancestral_mean(self, to: Level, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The mean of an ancestral step to the cleaner level `to`: `a' x0 + sqrt(s'^2 - s_step^2) noise`."""
        return to.alpha * x0 + to.sigma * self.shared(to)[0].sqrt() * noise

    def step_std(self, to: Level) -> torch.Tensor:
        """Standard deviation of the noise that an ancestral solver draws from this level to the cleaner `to`.

        `s' sqrt(1 - (a / a')^2 s'^2 / s^2)`, the spread of `q(x_to | x, x_0)`: DDIM's with eta = 1, DDPM's small
        variance, Euler-ancestral's `sigma_up`.
        """
        return to.sigma * self.shared(to)[1].sqrt()

    def shared(self, to: Level) -> tuple[torch.Tensor, torch.Tensor]:
        """`(a s' / (a' s))^2`, what an ancestral step to the cleaner level `to` keeps of the noise's variance, and
        `c`, one minus that, which it draws anew."""
        if self.gamma is not None and to.gamma is not None:
            apart = (to.gamma - self.gamma).clamp_max(0)
            return apart.exp(), -torch.expm1(apart)
        kept = (self.alpha / to.alpha * to.sigma / self.sigma.clamp_min(1e-20)) ** 2
        return kept.clamp_max(1), (1 - kept).clamp_min(0)

    def score_gain(self, to: Level) -> torch.Tensor:
        """`P = (a'/a) s^2 c`: a score that is larger by `g` moves the mean of an ancestral step to `to` by `P g`."""
        ratio = torch.where(self.alpha > 0, to.alpha / self.alpha.clamp_min(1e-20), 0)
        return ratio * self.sigma**2 * self.shared(to)[1]


def scheduler_levels(scheduler) -> list[Level]:
    """The levels that a diffusers scheduler visits, after `set_timesteps`: one per entry of `timesteps`, and the last.

    Reads variance-preserving schedulers (DDPM, DDIM, PNDM, LCM, DPM-Solver, UniPC ...), samplers in Karras' sigma
    space (Euler, Heun, LMS ...), EDM, flow matching and the per-pixel `MultivariateScheduler`, in the scale in which
    `scheduler.step` sees the sample.

    Raises:
        ValueError: the scheduler's noise level cannot be read.
    """
    if getattr(scheduler, "gammas", None):
        return [Level.of_gamma(gamma) for gamma in scheduler.gammas]
    name, config = type(scheduler).__name__, scheduler.config
    count = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) > count - 1 and not name.startswith(_UNREADABLE):
        sigmas = [float(s) for s in sigmas[: count + 1]]
        sigmas += [0.0] * (count + 1 - len(sigmas))
        sigmas = _between(scheduler, sigmas)
        kind = prediction_kind(scheduler)
        flow = name.startswith("FlowMatch") or getattr(config, "use_flow_sigmas", False)
        if kind == "flow" and not flow:
            raise ValueError(
                f"the noise level of {name} cannot be read: its prediction_type is that of a flow, and its sigmas are "
                "not; a scheduler that knows use_flow_sigmas=True needs it here"
            )
        if not all(map(math.isfinite, sigmas)):
            raise ValueError(
                f"the noise level of {name} cannot be read: with {count} timesteps its sigmas are not finite; take "
                "another number of steps"
            )
        if flow:
            if max(sigmas) > 1 + 1e-4:
                raise ValueError(
                    f"the noise level of {name} cannot be read: a flow's sigmas are at most 1, got {sigmas[0]:g}"
                )
            return [Level.of(s, 1 - s) if kind == "reverse-flow" else Level.of(1 - s, s) for s in sigmas]
        if hasattr(scheduler, "precondition_outputs"):  # EDM's, and that of Stable Audio
            return [Level.of(1.0, s, config.sigma_data) for s in sigmas]
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            return [Level.of(1 / (1 + s * s) ** 0.5, s / (1 + s * s) ** 0.5) for s in sigmas]
        return [Level.of(1.0, s) for s in sigmas]
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        if count and int(scheduler.timesteps.max()) >= len(scheduler.alphas_cumprod):
            raise ValueError(
                f"the noise level of {name} cannot be read: it visits timestep {int(scheduler.timesteps.max())}, and "
                f"has levels of {len(scheduler.alphas_cumprod)} only; take fewer steps, or steps_offset=0"
            )
        last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
        cumulative = torch.cat(
            [scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()].double().cpu(), last.double().cpu().view(1)]
        )
        return [Level.of(alpha, sigma) for alpha, sigma in zip(cumulative.sqrt(), (1 - cumulative).clamp_min(0).sqrt())]
    if hasattr(scheduler, "_alpha_cumprod"):  # Stable Cascade's, whose time is continuous
        times = scheduler.timesteps.double().cpu()
        cumulative = [*scheduler._alpha_cumprod(times, torch.device("cpu")).tolist(), 1.0]
        return [Level.of(share**0.5, (1 - share) ** 0.5) for share in cumulative]
    raise ValueError(
        f"the noise level of {name} cannot be read: it has neither `sigmas` nor `alphas_cumprod`; "
        "use a scheduler of the DDIM, DDPM, Euler, DPM-Solver, EDM or FlowMatch families"
    )


def _between(scheduler, sigmas: list[float]) -> list[float]:
    """The sigmas of solvers whose every second visit (the odd ones) is halfway to the next level."""
    name = type(scheduler).__name__
    if name.startswith("DPMSolverSDE"):
        return [(sigmas[i - 1] * sigmas[i]) ** 0.5 if i % 2 else sigma for i, sigma in enumerate(sigmas)]
    if name.startswith("KDPM2"):
        halfway = scheduler.sigmas_interpol.tolist()
        back = 1 if "Ancestral" in name else 0
        return [halfway[i - back] if i % 2 else sigma for i, sigma in enumerate(sigmas)]
    return sigmas


def prediction_kind(scheduler) -> str:
    """What a model under this diffusers scheduler predicts, one of `KINDS`."""
    name = type(scheduler).__name__
    if name.startswith("FlowMatch"):
        return "reverse-flow" if getattr(scheduler.config, "invert_sigmas", False) else "flow"
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if hasattr(scheduler, "precondition_outputs"):
        return "edm-v" if kind == "v_prediction" else "edm"
    kind = {"flow_prediction": "flow", "original_sample": "sample"}.get(kind, kind)
    return check_kind(kind)


def check_kind(kind: str) -> str:
    """The kind itself, where it is one of `KINDS`.

    Raises:
        ValueError: it is not.
    """
    if kind not in KINDS:
        raise _unknown(kind)
    return kind


def _unknown(kind: object) -> ValueError:
    return ValueError(f"unknown prediction kind {kind!r}; known are {', '.join(KINDS)}")
