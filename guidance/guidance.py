"""Guidance: what to do with a loss while sampling, as plain data."""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..losses.loss import Composable, as_losses
from ..samplers.levels import Level
from ..samplers.plain import plain
from ..samplers.solver import Solver
from ..samplers.time_travel import TimeTravel
from .augment import Augment
from .particles import Particles
from .proximal import Proximal
from .smoothing import Smoothing
from .steps import Constant, NoiseScaled, StepRule, UnsuitableSolver

THROUGH = ("denoiser", "x0")
EDITS = ("shift", "score", "mean", "anchor")
KEPT = ("noise", "sample")
REMIXES = ("signal", "ancestral")
CLOCKS = ("steps", "noise")


@dataclass(frozen=True)
class Inner:
    """Gradient steps on x0 within one visit of a step, not through the denoiser.

    Args:
        iterations: how many.
        rule: how far each goes, seeing the gradient at the x0 reached so far.
        keep: what stays where x0 moves: the "noise" predicted, so that the sample moves along (MPGD, TFG), or the
            "sample", so that the noise makes up for it (UGD's backward guidance).
        blend: the share of the way that counts is the noise's, `s / (a + s)` (FlowDPS); else all of it.
    """

    iterations: int = 4
    rule: StepRule = Constant(1.0)
    keep: str = "noise"
    blend: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"inner iterations are at least 1, got {self.iterations}")
        if self.keep not in KEPT:
            raise ValueError(f"keep is one of {', '.join(KEPT)}, got {self.keep!r}")

    def spread_at(self, level: Level) -> torch.Tensor | None:
        """What the displacement weighs each pixel by, where they differ in their level."""
        return level.x0_variance if self.rule.natural else None


_PARTS = {
    "rule": "a step rule such as steps.Constant(1.0)",
    "augment": "an Augment",
    "smoothing": "a Smoothing",
    "inner": "an Inner",
    "time_travel": "a TimeTravel such as TimeTravel(3, 0.25, 0.75)",
    "particles": "a Particles",
}


@dataclass(frozen=True)
class Tokens:
    """What is done at each step of a masked-token generator, besides `inner` steps on its logits.

    Args:
        candidates: of so many draws of a step one is kept; 1 takes the first. Needs no gradient.
        sharpness: it is drawn by weights `exp(-sharpness * L)`, `1 / T` of a softmax of `-L / T`.
        limit: logits that have moved stay within plus and minus this.
    """

    candidates: int = 1
    sharpness: float = 100.0
    limit: float = 30.0

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates are at least 1, got {self.candidates}")
        if not 0 < self.sharpness < float("inf") or not 0 < self.limit < float("inf"):
            raise ValueError(f"sharpness and limit are positive, got {self.sharpness} and {self.limit}")


@dataclass(frozen=True)
class Guidance:
    """A description of how a loss steers a sampler; recipes return it, `sample` and `guide` carry it out.

    Args:
        loss: any loss, sum of losses, or callable `(B, 3, H, W) -> (B,)`; None guides nothing.
        rule: how far to go along the gradient; None where only `inner` steps or `particles` are wanted.
        through: where the gradient is taken: at `x_t` through the "denoiser", or at "x0" only (no graph of the
            denoiser).
        through_share: go through the denoiser at this share of the solver's steps only, evenly spread over those where
            the loss acts; at the steps between, the gradient is taken at x0. A step through the denoiser costs two of
            the others.
        edit_between: where the step lands at those steps, "shift" or "mean".
        edit: where the step lands: "shift" moves `x_{t-1}` after the solver's step; "score" adds it to the noise
            prediction and moves x0 along, before the solver's step; "mean" moves x0 while the noise stays, which shifts
            `x_{t-1}` by `a_{t-1}` times the step. Solvers that do not keep a shift (SA-Solver) get the score that a
            first-order step would turn into it. "anchor" optimises a clean sample of its own, on which fresh noise is
            put at each level (RED-diff); the solver's steps are not taken.
        toward: go toward the x0 that this finds, instead of against the gradient: the proximal point of a linear
            measurement, or what inner steps reach. The rule then sees that displacement, reversed, as its gradient.
        inner: further steps on x0 within a visit.
        balance: scale each term's gradient, per sample, to the mean length of all terms', before their weights: terms
            of weight one pull alike.
        project: x0 -> x0, applied after x0 has moved (an autoencoder's round trip in MPGD).
        smoothing: of the loss by noise around x0.
        augment: random augmentation, for the terms that it suits.
        time_travel: repeated visits in a window.
        remix: makes a deterministic solver random, and leaves a random one alone: at each step fresh noise takes the
            place of a share in [0, 1] of the noise's variance; "signal" for the share `a' / (a' + s')` (FlowDPS),
            "ancestral" for as much as an ancestral solver draws.
        particles: several candidates per picture, of which one is kept.
        tokens: for a masked-token generator, whose logits `inner` steps move; None for diffusion and flow models.
        start, stop: window of sampling progress [start, stop) in which the loss acts; 0 is pure noise, 1 the picture.
        clock: what progress is measured by, here and in the windows of time travel and of the loss's terms: the share
            of the solver's "steps", or the "noise" left: the progress of DDPM with as much of it, from 0 at the first
            step's, so that a window means the same to Karras', flow-matching and other schedules.
        every: act at every n-th step only.
        strength: factor of every step; 1 is the recipe's own default, 0 samples plainly and only records the loss.
        raise_on_nonfinite: raise at the first prediction, loss, gradient or step that is not finite and say where it
            is, instead of moving nothing and reporting at the end. A first prediction that is not finite for any
            picture raises in any case.
        name, citation: of the published method.
    """

    loss: Composable | Callable[[torch.Tensor], torch.Tensor] | None
    rule: StepRule | None = NoiseScaled()
    through: str = "denoiser"
    through_share: float = 1.0
    edit: str = "shift"
    edit_between: str = "shift"
    toward: Proximal | Inner | None = None
    inner: Inner | None = None
    project: Callable[[torch.Tensor], torch.Tensor] | None = None
    smoothing: Smoothing | None = None
    augment: Augment | None = None
    remix: float | str = 0.0
    particles: Particles | None = None
    tokens: Tokens | None = None
    time_travel: TimeTravel | None = None
    start: float = 0.0
    stop: float = 1.0
    clock: str = "steps"
    every: int = 1
    strength: float = 1.0
    balance: bool = False
    raise_on_nonfinite: bool = False
    name: str = "guidance"
    citation: str = ""

    def __post_init__(self) -> None:
        if self.loss is not None:
            object.__setattr__(self, "loss", as_losses(self.loss))
        for name, wanted in _PARTS.items():
            if isinstance(getattr(self, name), (str, numbers.Number)):
                raise ValueError(f"{name} is {wanted} or None, got {getattr(self, name)!r}")
        if self.through not in THROUGH:
            raise ValueError(f"through is one of {', '.join(THROUGH)}, got {self.through!r}")
        if self.edit not in EDITS:
            raise ValueError(f"edit is one of {', '.join(EDITS)}, got {self.edit!r}")
        if self.edit_between not in ("shift", "mean"):
            raise ValueError(f"edit_between is one of shift, mean, got {self.edit_between!r}")
        if self.edit == "anchor" and (
            self.rule is None or self.through != "x0" or self.inner or self.project or self.toward
        ):
            raise ValueError(
                'edit="anchor" needs a rule and through="x0", and knows no inner steps, projection or goal (toward)'
            )
        if self.tokens is not None:
            self._check_tokens(self.tokens)
        elif self.rule is None and (self.toward is not None or (self.inner is None and self.particles is None)):
            raise ValueError("without a rule there must be inner steps or particles, and nothing to go toward")
        if self.project is not None and self.edit != "mean" and self.inner is None:
            raise ValueError('project acts where x0 is moved: with edit="mean" or inner steps')
        if self.through_share < 1 and self.edit == "score":
            raise ValueError('through_share below 1 needs edit="shift" or "mean"')
        plain_steps = self.rule and self.edit == "shift" and self.through_share == 1 and not (self.inner or self.remix)
        if self.particles is not None and self.particles.twisted and not plain_steps:
            raise ValueError(
                'twisted particles need a rule with edit="shift" at every step, without inner steps or remixed noise'
            )
        if isinstance(self.toward, Proximal):
            terms = () if self.loss is None else self.loss.terms()
            linear = all(
                hasattr(term.loss, "residual") and getattr(getattr(term.loss, "operator", None), "linear", True)
                for term in terms
            )
            if self.loss is not None and (len(terms) != 1 or not linear):
                names = ", ".join(term.name for term in terms)
                raise ValueError(f"{self.name} works with one Measurement of a linear operator, got {names}")
        if self.remix not in REMIXES if isinstance(self.remix, str) else not 0 <= self.remix <= 1:
            raise ValueError(f"remix is a share in [0, 1], or one of {', '.join(REMIXES)}, got {self.remix!r}")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"a window needs 0 <= start < stop <= 1, got {self.start}, {self.stop}")
        if self.balance and self.rule is None and self.inner is None:
            raise ValueError("balance scales gradients, and here none is taken")
        if self.clock not in CLOCKS:
            raise ValueError(f"clock is one of {', '.join(CLOCKS)}, got {self.clock!r}")
        if self.every < 1:
            raise ValueError(f"every is at least 1, got {self.every}")
        if not 0 < self.through_share <= 1:
            raise ValueError(f"through_share is more than 0 and at most 1, got {self.through_share}")
        if not isinstance(self.strength, numbers.Real) or not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength is a number from 0 up, got {self.strength!r}")

    def _check_tokens(self, tokens: Tokens) -> None:
        for name in ("rule", "toward", "project", "smoothing", "particles", "remix"):
            if getattr(self, name):
                raise ValueError(f"{name} is for diffusion models, and does nothing to the logits of a token generator")
        if self.edit != "shift":
            raise ValueError(f'edit="{self.edit}" is for diffusion models, and does nothing to a token generator')
        if self.inner is None and tokens.candidates == 1:
            raise ValueError("a token generator is steered by inner steps on its logits, or by more than 1 candidate")
        if self.inner is not None and (self.inner.blend or self.inner.keep != "noise"):
            raise ValueError("inner steps on logits know neither blend nor keep")

    @property
    def active(self) -> bool:
        """Whether it moves anything at all."""
        return self.loss is not None and self.strength > 0

    @property
    def needs_gradient(self) -> bool:
        """Whether the loss's gradient is taken; particles alone need none."""
        steps = self.rule is not None and not isinstance(self.toward, Proximal)
        return self.active and (steps or self.inner is not None)

    @property
    def goes_through(self) -> bool:
        """Whether steps, or a share of them, need the graph of the denoiser."""
        return self.active and self.rule is not None and self.through == "denoiser"

    @property
    def candidates(self) -> int:
        """How many samples are drawn per picture."""
        return self.particles.count if self.particles is not None and self.active else 1

    def progress(self, step: int, solver: Solver) -> float:
        """How far a solver step has come, from 0 (noise) to 1 (the picture), on the guidance's clock."""
        if self.clock == "steps":
            return step / len(solver)
        first, here = solver.progress[0], solver.progress[step]
        return min((here - first) / max(1 - first, 0.01), 0.99)  # 1 is after the last step

    def acts_at(self, step: int, progress: float) -> bool:
        """Whether the loss acts at this solver step, which has come so far."""
        return self.loss is not None and self.start <= progress < self.stop and step % self.every == 0

    def begin(self, solver, decode: Callable[[torch.Tensor], torch.Tensor], seeds):
        """Start a run over a solver whose timesteps are set; see `lossguide.guidance.step.Run`."""
        from .step import Run

        if self.tokens is not None:
            raise UnsuitableSolver(
                f"'{self.name}' steers the logits of a masked-token generator, and this is another model",
                "recipes.auto",
            )
        return Run(self, solver, decode, seeds)

    def begin_tokens(self, schedule, generator, seeds: list[int]):
        """Start a run of a masked-token generator; see `lossguide.guidance.tokens.TokenRun`.

        Raises:
            UnsuitableSolver: the guidance is for diffusion models, or asks for what there is none of here.
        """
        from .tokens import TokenRun, for_tokens

        return TokenRun(for_tokens(self), schedule, generator, seeds)

    def replace(self, **changes: Any) -> Guidance:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every setting, and the losses' own descriptions."""

        data = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "loss"}
        return {"loss": None if self.loss is None else [plain(term.describe()) for term in self.loss.terms()], **data}

    def to_json(self) -> str:
        """The description as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def save_pretrained(self, folder: str | os.PathLike[str], *, losses: bool = True) -> None:
        """Write all there is to know into a folder: `guidance.json`, and tensors to `guidance.safetensors`.

        Reference pictures are stored, and the paths that they were read from as their names. Networks are not, only
        where they come from: 'demo', a name of open_clip, or the path of a local file or folder as it was given.

        Args:
            losses: whether to store the losses; without them, `from_pretrained` is given some.

        Raises:
            ValueError: a loss, network, operator, rule or projection is not the library's own, but code of yours.
        """
        from .saved import save

        save(self, folder, losses)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        loss: Composable | Callable[[torch.Tensor], torch.Tensor] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Guidance:
        """What `save_pretrained` or `push_to_hub` stored; no code is taken from the files.

        Networks come from where their names say; those with open_clip's 'hf-hub:' are downloaded.

        Args:
            name: a folder here, or else a repository of the Hugging Face Hub.
            loss: takes the place of the stored loss.
            revision, token, cache_dir, local_files_only: of the Hub, as in diffusers.

        Raises:
            ValueError: a file is missing, newer or damaged, or holds what is not known; or a loss is needed.
            OSError: neither a folder nor a repository that can be had; or a network's weights cannot.
        """
        from .saved import load

        return load(name, loss, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        losses: bool = True,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload guidance",
    ) -> Any:
        """Save to a repository of the Hugging Face Hub, made where there is none; returns the Hub's commit.

        Args:
            losses: as in `save_pretrained`.
            private, token, commit_message: of the Hub, as in diffusers.

        Raises:
            ValueError: as in `save_pretrained`.
        """
        from .saved import push

        return push(self, repo_id, losses, private, token, commit_message)
