"""Masked-token generators (MaskGIT, Chang et al. 2022; aMUSEd, Patil et al. 2024): diffusers' parts, adapted once.

A picture is a grid of tokens, each the number of a vector in a codebook. All are masked at first; at each step the
transformer tells logits for every place, tokens are drawn where there are none, and the least confident are masked
again, fewer from step to step.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .denoiser import frozen
from .faults import TRANSFORMER, Faults
from .levels import Level
from .random import generators, particle_seeds
from .record import Record
from .time_travel import visits


@dataclass(frozen=True)
class TokenGenerator:
    """A transformer that fills in masked tokens, with what the sampling loop needs to know; made by `token_generator`.

    Attributes:
        transformer: callable `(tokens, **condition) -> logits (B, K, h, w)`.
        vqvae: the `VQModel` whose tokens they are; a copy in float32 of one that is too large for float16.
        scheduler: an `AmusedScheduler`; never mutated.
        shape: `(h, w)`, tokens of a picture.
        condition, negative: what the transformer is told besides the tokens, and what classifier-free guidance leads
            away from; tensors of one row for all pictures, or one row each.
        guidance_scale: of classifier-free guidance; 1 for none.
        temperature, top_k: of the draws, see `token_generator`.
        device: where the models run.
    """

    transformer: Callable
    vqvae: torch.nn.Module
    scheduler: object
    shape: tuple[int, int]
    condition: dict[str, torch.Tensor] = field(default_factory=dict)
    negative: dict[str, torch.Tensor] = field(default_factory=dict)
    guidance_scale: float = 1.0
    temperature: float | tuple[float, float] = (2, 0)
    top_k: int | None = None
    device: torch.device = torch.device("cpu")

    @property
    def mask_token(self) -> int:
        """The token that stands for none."""
        return self.scheduler.config.mask_token_id

    @property
    def codes(self) -> torch.Tensor:
        """The code vectors `(K, d)`."""
        return self.vqvae.quantize.embedding.weight

    def check(self, pictures: int) -> None:
        """Make sure that the conditions are for so many pictures.

        Raises:
            ValueError: one is for another number.
        """
        for value in (*self.condition.values(), *self.negative.values()):
            if len(value) not in (1, pictures):
                raise ValueError(f"the condition is for {len(value)} pictures, one row each, and {pictures} are drawn")

    def part(self, start: int, count: int) -> TokenGenerator:
        """That of `count` pictures of a run, or of those that are left, from `start` on."""
        condition, negative = (
            {name: value if len(value) == 1 else value[start : start + count] for name, value in one.items()}
            for one in (self.condition, self.negative)
        )
        return dataclasses.replace(self, condition=condition, negative=negative)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the transformer thinks of each place: `(B, K, h, w)` of tokens `(B, h, w)`, in its own precision."""
        if self.guidance_scale == 1:
            return self._ask(tokens, self.condition)
        both = {name: torch.cat([self._rows(self.negative[name], len(tokens)), self._rows(value, len(tokens))])
                for name, value in self.condition.items()}  # fmt: skip
        without, told = self._ask(torch.cat([tokens, tokens]), both).chunk(2)
        return without + self.guidance_scale * (told - without)

    def _ask(self, tokens: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        output = self.transformer(tokens, **{k: self._rows(v, len(tokens)) for k, v in condition.items()})
        output = output if isinstance(output, torch.Tensor) else output[0]
        wanted = (len(tokens), len(self.codes), *tokens.shape[1:])
        if output.shape != wanted:
            raise ValueError(f"the transformer must return logits {wanted}, but returned {tuple(output.shape)}")
        return output

    def _rows(self, value: torch.Tensor, batch: int) -> torch.Tensor:
        if len(value) not in (1, batch):
            raise ValueError(f"the condition is for {len(value)} pictures, one row each, and {batch} are drawn at once")
        return value.to(self.device).expand(batch, *value.shape[1:])

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pictures `(B, C, H, W)`, nominally in [0, 1], of tokens `(B, h, w)` of which none is masked."""
        return self._picture(self.codes[tokens])

    def decode_soft(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Pictures `(B, 3, H, W)` that losses see, differentiable in the logits `(B, K, h, w)`.

        Where a token is masked, the mean of the code vectors under the logits' softmax takes its place.
        """
        unknown = tokens == self.mask_token
        codes = self.codes.to(logits.dtype)
        mixed = logits.movedim(1, -1).softmax(-1) @ codes
        known = codes[torch.where(unknown, 0, tokens)]
        return as_colour(self._picture(torch.where(unknown[..., None], mixed, known)))

    def _picture(self, vectors: torch.Tensor) -> torch.Tensor:
        """The decoder without the search for the nearest codes, which `VQModel.decode` would begin with."""
        vqvae = self.vqvae
        dtype = vqvae.post_quant_conv.weight.dtype  # diffusers keeps codes in float32 where the rest is in half
        vectors = vectors.movedim(-1, 1).to(dtype).contiguous()
        spatial = vectors if vqvae.config.norm_type == "spatial" else None
        return vqvae.decoder(vqvae.post_quant_conv(vectors), spatial).float()

    def frozen(self):
        """Context in which the models' weights require no gradient; what was there is restored."""
        return frozen(self.transformer, self.vqvae)


def token_generator(
    transformer: Callable,
    vqvae: torch.nn.Module,
    scheduler,
    *,
    condition: dict[str, torch.Tensor] | None = None,
    negative: dict[str, torch.Tensor] | None = None,
    guidance_scale: float = 1.0,
    temperature: float | tuple[float, float] = (2, 0),
    top_k: int | None = None,
    shape: tuple[int, int] | None = None,
) -> TokenGenerator:
    """Adapt a masked-token generator to `sample`; the parts of an `AmusedPipeline` are such.

    Args:
        transformer: a `UVit2DModel`, or any callable `(tokens, **condition) -> logits (B, K, h, w)`.
        vqvae: the `VQModel` whose tokens they are, decoding to [0, 1] as aMUSEd's. Where it is in float16 and its
            config says `force_upcast`, as aMUSEd's, a copy in float32 decodes.
        scheduler: an `AmusedScheduler`; never mutated.
        condition: what the transformer is told besides: for a UVit2DModel `encoder_hidden_states (1 or B, n, d)`,
            `pooled_text_emb (1 or B, p)`, `micro_conds (1 or B, m)`; by default zeros, for a model that was trained so.
        negative: the same for classifier-free guidance to lead away from.
        guidance_scale: its scale, as in `AmusedPipeline`; 1 for none.
        temperature: randomness of which tokens are kept, from the first step to the last, as in `AmusedPipeline`; a
            number goes down to 0.01.
        top_k: draw only among so many most likely tokens; None for all.
        shape: tokens of a picture, `(h, w)`; by default the transformer's `sample_size`.

    Raises:
        TypeError: a part is of another kind.
        ValueError: the parts do not go together, or a number makes no sense.
    """
    if not hasattr(vqvae, "quantize") or not hasattr(vqvae, "post_quant_conv"):
        raise TypeError(f"tokens are decoded by a VQModel, got {type(vqvae).__name__}")
    mask_token = getattr(getattr(scheduler, "config", None), "mask_token_id", None)
    if mask_token is None:
        raise TypeError(f"a masked-token generator is drawn by an AmusedScheduler, got {type(scheduler).__name__}")
    if not callable(transformer):
        raise TypeError(
            f"a transformer is a callable (tokens, **condition) -> logits, got {type(transformer).__name__}"
        )
    config, codes = getattr(transformer, "config", None), len(vqvae.quantize.embedding.weight)
    if getattr(config, "codebook_size", codes) != codes:
        raise ValueError(f"the transformer knows {config.codebook_size} codes, and the codebook has {codes}")
    if not codes <= mask_token < getattr(config, "vocab_size", mask_token + 1):
        raise ValueError(
            f"the mask token, {mask_token}, must be a word of the transformer and none of the {codes} codes"
        )
    if shape is None:
        side = getattr(config, "sample_size", None)
        if side is None:
            raise ValueError(f"{type(transformer).__name__} does not tell how many tokens it draws: pass shape=(h, w)")
        shape = (side, side)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is at least 1, got {top_k}")
    if guidance_scale != 1 and negative is None:
        raise ValueError("classifier-free guidance needs what to lead away from: pass negative=, or guidance_scale=1")
    if condition is None:
        condition = unconditional(config) if hasattr(config, "micro_cond_embed_dim") else {}
    if negative is not None and set(negative) != set(condition):
        raise ValueError(
            f"negative holds {', '.join(negative)}, and condition {', '.join(condition)}: the same is needed"
        )
    parameter = next(iter(transformer.parameters()), None) if isinstance(transformer, torch.nn.Module) else None
    if parameter is not None:  # as AmusedPipeline tells them, in the transformer's own precision
        condition, negative = (
            {name: value.to(parameter.dtype) if value.is_floating_point() else value for name, value in one.items()}
            for one in (condition, negative or {})
        )
    if vqvae.post_quant_conv.weight.dtype == torch.float16 and getattr(vqvae.config, "force_upcast", False):
        vqvae = copy.deepcopy(vqvae).float()
    return TokenGenerator(
        transformer,
        vqvae,
        scheduler,
        tuple(shape),
        condition,
        negative or {},
        float(guidance_scale),
        temperature,
        top_k,
        vqvae.quantize.embedding.weight.device,
    )


def unconditional(config) -> dict[str, torch.Tensor]:
    """What an unconditional UVit2DModel of this config is told: zeros, one row."""
    return dict(
        encoder_hidden_states=torch.zeros(1, 1, config.encoder_hidden_size),
        pooled_text_emb=torch.zeros(1, config.cond_embed_dim),
        micro_conds=torch.zeros(1, config.micro_cond_embed_dim // config.micro_cond_encode_dim),
    )


def as_colour(image: torch.Tensor) -> torch.Tensor:
    """A grey picture `(B, 1, H, W)` with its channel three times; one in colour as it is."""
    return image.expand(-1, 3, *image.shape[2:]) if image.shape[1] == 1 else image


class Unmasking:
    """An AmusedScheduler whose timesteps are set: what a `Solver` is to diffusion.

    Attributes:
        times: the scheduler's timesteps.
        levels: `N + 1` levels, the share of tokens that are known as `alpha^2` and of the masked as `sigma^2`, from
            which progress on the noise's clock is told; step `i` leads from `levels[i]` to `levels[i + 1]`.
        progress: the progress of DDPM at each step's level, as a `Solver`'s.
    """

    goes_on = keeps_shifts = True

    def __init__(self, generator: TokenGenerator, steps: int) -> None:
        self.generator = generator
        self.scheduler = copy.deepcopy(generator.scheduler)
        temperature = generator.temperature
        temperature = tuple(temperature) if isinstance(temperature, (tuple, list)) else temperature
        self.scheduler.set_timesteps(steps, temperature=temperature, device=generator.device)
        self.times: list[int] = self.scheduler.timesteps.tolist()
        shares = [i / steps for i in range(steps + 1)]
        if self.scheduler.config.masking_schedule == "cosine":
            shares = [1 - math.cos(share * math.pi / 2) for share in shares]
        self.levels = [Level.of(share**0.5, (1 - share) ** 0.5) for share in shares]
        self.progress = [level.progress for level in self.levels[:-1]]

    def __len__(self) -> int:
        return len(self.times)

    def begins(self, index: int) -> bool:
        """Every step starts from the tokens it is given."""
        return True

    def draw(
        self, logits: torch.Tensor, step: int, tokens: torch.Tensor, sources: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scheduler's own step, a picture at a time, each with the generator of its own.

        Args:
            logits: `(B, K, h, w)`.
            tokens: `(B, h, w)`.

        Returns:
            the tokens of the next step, the least confident masked again; and all of them, as drawn.
        """
        logits = among_top(logits, self.generator.top_k)
        one = [
            self.scheduler.step(logits[i : i + 1], self.times[step], tokens[i : i + 1], generator=source)
            for i, source in enumerate(sources)
        ]
        return torch.cat([o.prev_sample for o in one]), torch.cat([o.pred_original_sample for o in one])


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The largest logit of each place, `(B, h, w)` of `(B, K, h, w)`: finite where a token can be drawn."""
    return logits.amax(1)


def among_top(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Logits `(B, K, h, w)` of which all but the `top_k` largest of each place are minus infinity."""
    if top_k is None or top_k >= logits.shape[1]:
        return logits
    best = logits.topk(top_k, dim=1).indices
    return torch.full_like(logits, -math.inf).scatter(1, best, logits.gather(1, best))


def draw_batch(
    generator: TokenGenerator, guidance, steps: int, seeds: list[int], batches: int, bar
) -> tuple[torch.Tensor, Record]:
    """Tokens `(B, h, w)` on the CPU, one grid per seed, and the record of the run."""
    schedule = Unmasking(generator, steps)
    run = None if guidance is None else guidance.begin_tokens(schedule, generator, seeds)
    plan = visits(range(steps)) if run is None else run.visits
    record = Record() if run is None else run.record
    record.model = TRANSFORMER
    if run is not None:
        run.watch.checks = True
    bar.total = len(plan) * batches
    candidates = 1 if run is None else run.guidance.tokens.candidates
    sources = generators(particle_seeds(seeds, candidates))  # the first candidate's are the picture's own
    tokens = torch.full((len(seeds), *generator.shape), generator.mask_token, device=generator.device)
    for visit in plan:
        start, i = time.perf_counter(), visit.step
        logits = generator.logits(tokens)

        def draw(logits, tokens, candidate=0, i=i):
            own = sources[candidate * len(seeds) : (candidate + 1) * len(seeds)]
            return schedule.draw(logits, i, tokens, own)

        if run is None:
            faults, row = Faults.of_prediction(likeliest(logits)), dict(step=i, visit=0, timestep=schedule.times[i])
            if i == 0:
                faults.check_prediction(row, TRANSFORMER)
            # no token can be drawn by logits that are not finite, of no picture
            tokens, _ = draw(torch.where(faults.sound.view(-1, 1, 1, 1), logits, 0), tokens)
            record.add(**row, fault=faults.codes, seconds=time.perf_counter() - start)
        else:
            tokens = run.step_tokens(tokens, logits, visit, draw, start)
        if not bar.disable:
            if "loss" in record.rows[-1]:
                bar.set_postfix(loss=f"{record.rows[-1]['loss'].mean().item():.4g}", refresh=False)
            bar.update()
    return tokens.cpu(), record
