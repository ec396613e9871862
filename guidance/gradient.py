"""The gradient of a loss at a picture, with the value of each term, averaged over augmented copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..losses.loss import Term, advice_on, said
from ..losses.network import moved
from .augment import Augment


def loss_gradient(
    image: torch.Tensor,
    terms: list[Term],
    augment: Augment | None,
    draws: torch.Tensor | None,
    *,
    gradient: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, torch.Tensor]]:
    """Gradient of the weighted sum of terms at `image`, in one pass per chunk of copies.

    Terms that augmentation suits are averaged over the copies that `draws` describe, the others see the picture itself.

    Args:
        image: `(B, 3, H, W)`, or what else the losses see.
        terms: what to sum; see `lossguide.losses.Term`.
        augment: the augmentation, or None.
        draws: `(K, B, n)` from `augment.draw`.
        gradient: False to get the values only.

    Returns:
        the gradient, same shape as `image` (None without `gradient`); the weighted sum `(B,)`; each term `(B,)`.

    Raises:
        ValueError: a loss is not differentiable, or does not return one number per sample.
    """
    batch, plain = len(image), [t for t in terms if augment is None or not t.augment]
    varied = [t for t in terms if augment is not None and t.augment]
    values = {term.name: torch.zeros(batch, device=image.device, dtype=image.dtype) for term in terms}
    total = torch.zeros_like(image) if gradient else None
    passes: list[tuple[list[Term], torch.Tensor | None]] = [(plain, None)] if plain else []
    if varied:
        passes += [(varied, part) for part in draws.split(max(1, augment.chunk // batch))]
    for group, part in passes:
        copies = 1 if part is None else len(part)
        share = 1.0 if part is None else copies / len(draws)
        with torch.set_grad_enabled(gradient):
            leaf = image.detach().requires_grad_(gradient)
            seen = (
                leaf
                if part is None
                else augment.apply(leaf.repeat(copies, *[1] * (leaf.dim() - 1)), part.flatten(0, 1))
            )
            weighted = 0.0
            for term in group:
                value = term(seen).view(copies, batch).mean(0)
                if gradient and not value.requires_grad:
                    raise _not_differentiable([term.name])
                values[term.name] += share * value.detach().to(image.dtype)
                weighted = weighted + term.weight * value.sum()
            if gradient:
                names = [term.name for term in group]
                try:
                    gradient_here = torch.autograd.grad(weighted, leaf, allow_unused=True)[0]
                except Exception as error:
                    advice = advice_on(error)
                    if advice is None:
                        raise
                    raise ValueError(f"{_named(names)} has no gradient ({said(error)}); {advice}") from error
                if gradient_here is None:  # what requires a gradient is something else, such as a network's weights
                    raise _not_differentiable(names)
                total += share * gradient_here
    loss = torch.zeros(batch, device=image.device, dtype=image.dtype)
    for term in terms:
        loss = loss + term.weight * values[term.name]
    return total, loss, values


def balanced_gradient(
    image: torch.Tensor,
    terms: list[Term],
    augment: Augment | None,
    draws: torch.Tensor | None,
    factors: list[torch.Tensor] | None = None,
    evaluate: Callable = loss_gradient,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """As `loss_gradient`, each term times a factor per sample: their unweighted gradients get the mean length of all.

    Returns also the factors `(B,)` of each term; where some are given, these are used. A term whose gradient is zero or
    not finite is left as it is and does not count for the mean. `evaluate` is `loss_gradient`, or what does the same.
    """
    parts = [evaluate(image, [term], augment, draws) for term in terms]
    if factors is None:
        lengths = torch.stack([g.flatten(1).norm(dim=1) / term.weight for (g, _, _), term in zip(parts, terms)])
        sound = torch.isfinite(lengths) & (lengths > 0)
        mean = torch.where(sound, lengths, 0).sum(0) / sound.sum(0).clamp_min(1)
        factors = list(torch.where(sound, mean / torch.where(sound, lengths, 1), 1))
    g = sum(factor.view(-1, *[1] * (g.dim() - 1)) * g for factor, (g, _, _) in zip(factors, parts))
    loss = sum(factor * one for factor, (_, one, _) in zip(factors, parts))
    return g, loss, {name: value for _, _, values in parts for name, value in values.items()}, factors


def pulled_back(
    output: torch.Tensor, sources: torch.Tensor | Sequence[torch.Tensor], g: torch.Tensor
) -> torch.Tensor | None:
    """The product of `g` `(B, ...)` with the Jacobian of `output` in a source, per sample.

    `g` is brought to a largest entry of 1 on the way, so that it survives networks in half precision. Of several
    sources the first counts that `output` depends on; None where it depends on none.
    """
    largest = g.flatten(1).abs().amax(1).view(-1, *[1] * (g.dim() - 1))
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    sources = [sources] if isinstance(sources, torch.Tensor) else list(sources)
    found = torch.autograd.grad(output, sources, (g / scale).to(output.dtype), allow_unused=True) if sources else ()
    pulled = next((one for one in found if one is not None), None)
    return None if pulled is None else pulled.to(g.dtype) * scale.view(-1, *[1] * (pulled.dim() - 1))


def _named(names: list[str]) -> str:
    return f"loss {' and '.join(repr(name) for name in names)}"


def _not_differentiable(names: list[str]) -> ValueError:
    return ValueError(
        f"{_named(names)} is not differentiable: its value does not depend on the picture through torch operations (a "
        "detach, a numpy call, a comparison or argmax, or torch.no_grad inside it?)"
    )


def floor_of(terms: list, loss: torch.Tensor, factors: list[torch.Tensor] | None) -> torch.Tensor | None:
    """The weighted sum's known floor `(B,)`, or None when some term has none; particles repeat their pictures'."""
    floors = [getattr(term.loss, "floor", None) for term in terms]
    if any(floor is None for floor in floors):
        return None
    floors = [
        moved(floor, loss).reshape(-1) if isinstance(floor, torch.Tensor) else loss.new_full((1,), floor)
        for floor in floors
    ]
    floors = [term.weight * floor.repeat(len(loss) // len(floor)) for term, floor in zip(terms, floors)]
    return sum(floors if factors is None else (factor * floor for factor, floor in zip(factors, floors)))
