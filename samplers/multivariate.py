"""A diffusers scheduler whose noise level differs per pixel, and per sample where it depends on a latent."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .gamma import FunctionGamma, Gamma, check_monotone, from_description
from .levels import Level

TENSORS = "gamma.safetensors"
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SOLVERS = ("ancestral", "ode")
ENDS = ("zero", "sigma_min")


@dataclass
class MultivariateSchedulerOutput(BaseOutput):
    """The sample of the next level, and the clean sample predicted."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class MultivariateScheduler(SchedulerMixin, ConfigMixin):
    """Variance-preserving diffusion with a level `gamma(t)` of each pixel's own (Sahoo et al. 2024, MuLAN).

    `z_t = a_t x + s_t e`, `a_t^2 = sigmoid(-gamma)`, `s_t^2 = sigmoid(gamma)`, all in float32 from gamma. The network
    must be told the level of every pixel: `model(z_t, scheduler.gamma_at(t, len(z_t)))`, a map `(B, C, H, W)` in place
    of the timestep; told one time for all, its predictions are wrong by orders of magnitude.

    Times are numbers in [0, 1], 0 the picture; whole numbers k (of an integer dtype, or Python's) are the time
    `(k + 1) / num_train_timesteps`, so that `torch.randint(0, num_train_timesteps, ...)` draws times as elsewhere.

    Args:
        gamma: a schedule of `lossguide.samplers.gamma`, or a function `t -> map (C, H, W)`, differentiable and never
            falling.
        num_train_timesteps: how many whole numbers there are.
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction", `v = a e - s x`.
        clip_sample, clip_sample_range: clamp the clean sample predicted, as DDIM does.
        solver_type: "ancestral", the steps of DDIM (eta = 0) to DDPM (eta = 1); or "ode", second-order multistep steps
            of the probability flow (Lu et al. 2022, DPM-Solver++ 2M, with a step of each pixel's own), which draw no
            noise whatever eta is.
        final_sigmas_type: where sampling ends: "zero" at the clean sample predicted, "sigma_min" at gamma(0).

    Raises:
        ValueError: gamma falls somewhere, or a setting is not known.
    """

    config_name = "scheduler_config.json"
    order = 1
    init_noise_sigma = 1.0
    per_pixel = True  # what its model must be told

    def __init__(
        self,
        gamma: Gamma | Callable[[torch.Tensor], torch.Tensor] | dict[str, Any],
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        solver_type: str = "ancestral",
        final_sigmas_type: str = "zero",
    ) -> None:
        for name, value, known in (
            ("prediction_type", prediction_type, PREDICTIONS),
            ("solver_type", solver_type, SOLVERS),
            ("final_sigmas_type", final_sigmas_type, ENDS),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}")
        if isinstance(gamma, dict):
            gamma = from_description(gamma)
        elif not isinstance(gamma, Gamma):
            gamma = FunctionGamma(gamma)
        if type(gamma).__module__ != Gamma.__module__:  # a schedule of the user's own
            check_monotone(gamma, torch.zeros(1, gamma.latent) if gamma.latent else None)
        self.gamma = gamma
        self.register_to_config(
            gamma=gamma.describe(),
            num_train_timesteps=num_train_timesteps,
            prediction_type=prediction_type,
            clip_sample=clip_sample,
            clip_sample_range=clip_sample_range,
            solver_type=solver_type,
            final_sigmas_type=final_sigmas_type,
        )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps, 0, -1) / num_train_timesteps
        self.gammas: list[torch.Tensor] = []
        self.z: torch.Tensor | None = None
        self._previous: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ---- levels --------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        z: torch.Tensor | None = None,
    ) -> None:
        """Choose the times to visit, evenly from 1 down, and read their levels.

        Args:
            num_inference_steps: how many; or
            timesteps: the times themselves, falling, in [0, 1] or whole numbers.
            device: where `timesteps` and levels lie.
            z: the latents `(B, latent)` of the samples to draw, or `(1, latent)` for all, where gamma depends on one.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes either num_inference_steps or timesteps")
        if timesteps is not None:
            times = self._times(torch.as_tensor(timesteps))
            if times.dim() != 1 or not len(times) or bool((times[1:] >= times[:-1]).any()):
                raise ValueError("timesteps fall from noise to picture, each below the one before")
        elif num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is at least 1, got {num_inference_steps}")
        elif self.config.final_sigmas_type == "zero":
            times = torch.linspace(1, 0, num_inference_steps)
        else:
            times = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
        self.z = z
        with torch.no_grad():
            maps = [self._map(time) for time in times]
            end = self._map(torch.zeros(()))
        if self.config.final_sigmas_type == "zero":
            end = torch.full_like(end, -torch.inf)
        self.gammas = [one.to(device or one.device) for one in (*maps, end)]
        self.timesteps = times.to(device or times.device)
        self.num_inference_steps = len(times)
        self._previous = None

    def gamma_at(self, timesteps: float | torch.Tensor, batch: int = 1, z: torch.Tensor | None = None) -> torch.Tensor:
        """What the network is told: the map `(B, *shape)` at one time for all, or at times `(B,)`.

        Args:
            timesteps: in [0, 1], or whole numbers.
            batch: B, where there is one time for all.
            z: latents `(B, latent)` in place of those of `set_timesteps`.
        """
        maps = self._map(self._times(torch.as_tensor(timesteps)), z)
        return maps if len(maps) == batch else maps.expand(batch, *maps.shape[1:]) if len(maps) == 1 else maps

    def level_at(self, timesteps: float | torch.Tensor, z: torch.Tensor | None = None) -> Level:
        """The noise level at one time, or at times `(B,)`."""
        return Level.of_gamma(self._map(self._times(torch.as_tensor(timesteps)), z))

    def progress_levels(self) -> list[Level]:
        """The levels of the timesteps as far as they tell how far sampling has come: of a schedule that depends on a
        latent at latent 0, so that a sample's course does not depend on those beside it."""
        if not self.gamma.latent:
            return [Level.of_gamma(gamma) for gamma in self.gammas[:-1]]
        device = next(self.gamma.parameters()).device
        zero = torch.zeros(1, self.gamma.latent, device=device)
        with torch.no_grad():
            return [Level.of_gamma(self.gamma(time.to(device), zero)) for time in self.timesteps]

    def _map(self, times: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """Gamma with a batch dimension, float32."""
        z = (self.z if z is None else z) if self.gamma.latent else None
        if z is not None and z.dim() == 2 and times.dim() and len(z) != len(times) and len(z) != 1:
            raise ValueError(f"there are {len(times)} times and {len(z)} latents")
        found = self.gamma(times, z)
        return (found if found.dim() > len(self.gamma.shape) else found[None]).float()

    def _times(self, times: torch.Tensor) -> torch.Tensor:
        if not times.is_floating_point():
            times = (times + 1) / self.config.num_train_timesteps
        if bool((times < 0).any()) or bool((times > 1).any()):
            raise ValueError(
                f"times are in [0, 1], or whole numbers from 0 to {self.config.num_train_timesteps - 1}; "
                f"got {times.min():g} to {times.max():g}"
            )
        return times

    # ---- sampling ------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MultivariateSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """From a timestep's level to the next one's.

        `z_s = (a_s / a_t) (z_t - s_t c eh) + s_s sqrt(c) n` with `c = -expm1(gamma_s - gamma_t)` at eta = 1.

        Args:
            model_output: the network's prediction `(B, C, H, W)`.
            timestep: one of `timesteps`.
            sample: `z_t`, `(B, C, H, W)`.
            eta: share of the ancestral noise, 0 (DDIM) to 1 (DDPM).
            generator: for the noise; or one per sample.
            variance_noise: the noise itself, instead.
        """
        if not self.gammas:
            raise ValueError("call set_timesteps before step")
        index = self._index(timestep)
        level, after = (Level.of_gamma(self.gammas[i].to(sample.device)) for i in (index, index + 1))
        fine = torch.promote_types(sample.dtype, torch.float32)
        x, prediction = sample.to(fine), model_output.to(fine)
        x0 = level.x0(prediction, x, self.config.prediction_type)
        noise = level.noise(prediction, x, self.config.prediction_type)
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if self.config.solver_type == "ode":
            previous = self._flow_step(x, x0, index, level, after)
        else:
            kept, lost = level.shared(after)
            previous = after.alpha * x0 + after.sigma * ((1 - eta**2) * lost + kept).sqrt() * noise
            if eta > 0:
                if variance_noise is None:
                    variance_noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                previous = previous + eta * level.step_std(after) * variance_noise.to(previous)
        previous, x0 = previous.to(sample.dtype), x0.to(sample.dtype)
        if not return_dict:
            return previous, x0
        return MultivariateSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def _flow_step(self, x: torch.Tensor, x0: torch.Tensor, index: int, level: Level, after: Level) -> torch.Tensor:
        """The probability flow `dz/dt = gamma' s (eh - s z) / 2`, exact for the x0 that two visits extrapolate.

        In each pixel's own time lambda = -gamma / 2; the last step to a clean sample goes by x0 alone.
        """
        before, self._previous = self._previous, (index, x0)
        here, to = self.gammas[index], self.gammas[index + 1]
        to_clean = self.config.final_sigmas_type == "zero" and index == len(self.timesteps) - 1
        if before is not None and before[0] == index - 1 and not to_clean:
            came, goes = self.gammas[index - 1] - here, here - to
            share = (goes / (2 * came.clamp_min(1e-12))).clamp(0, 1).to(x0.device)  # 1/2 for even steps
            x0 = x0 + share * (x0 - before[1])
        fresh = -torch.expm1((after.gamma - level.gamma) / 2)
        return after.sigma / level.sigma * x + after.alpha * fresh * x0

    def _index(self, timestep: float | torch.Tensor) -> int:
        time = timestep.item() if isinstance(timestep, torch.Tensor) else timestep
        found = (self.timesteps - float(time)).abs()
        index = int(found.argmin())
        if found[index] > 1e-6:
            raise ValueError(f"step takes one of the scheduler's timesteps, got {time:g}")
        return index

    # ---- training ------------------------------------------------------------------------------------------------

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        z: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`a_t x + s_t e` at times `(B,)`; with latents, `z` `(B, latent)` or those of `set_timesteps`."""
        level = Level.of_gamma(self._map(self._times(timesteps), z).to(original_samples.device))
        return level.mix(original_samples, noise).to(original_samples.dtype)

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, z: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`v = a_t e - s_t x` at times `(B,)`."""
        level = Level.of_gamma(self._map(self._times(timesteps), z).to(sample.device))
        return (level.alpha * noise - level.sigma * sample).to(sample.dtype)

    # ---- to a folder and back ------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json`, and gamma's tensors to `gamma.safetensors`.

        Raises:
            ValueError: gamma is a function or a class of your own, which no file holds.
        """
        from safetensors.torch import save_file

        if type(self.gamma).__module__ != Gamma.__module__ or isinstance(self.gamma, FunctionGamma):
            raise ValueError(
                "a gamma of your own is code, which is not stored: use PolynomialGamma or ScalarGamma, or make it anew"
            )
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.gamma.state_dict().items()}
        os.makedirs(save_directory, exist_ok=True)
        if tensors:
            save_file(tensors, Path(save_directory) / TENSORS)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ):
        """What `save_pretrained` wrote, from a folder or a repository of the Hub; options as in diffusers."""
        config, rest = cls.load_config(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )
        if "gamma" not in rest:
            if "gamma" not in config:
                raise ValueError(f"this config of {config.get('_class_name')} holds no gamma: pass gamma=")
            hub = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only") if k in kwargs}
            rest["gamma"] = from_description(
                config["gamma"], _tensors(pretrained_model_name_or_path, subfolder, config["gamma"], hub)
            )
        return cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **rest)


def _tensors(name, subfolder: str | None, description: dict, hub: dict) -> dict[str, torch.Tensor] | None:
    """The coefficients beside a config, or None where there are none to be had."""
    from safetensors.torch import load_file

    if description.get("type") == "ScalarGamma":
        return None
    if os.path.isdir(name):
        path = Path(name, subfolder or "", TENSORS)
        if not path.is_file():
            raise ValueError(f"{path.parent} holds no {TENSORS}, with the coefficients of the schedule")
    else:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(str(name), TENSORS, subfolder=subfolder, **hub)
    return load_file(path)
