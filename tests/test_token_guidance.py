"""Loss guidance of masked-token generators: tiny random ones, analytic truths, and the one that is shipped."""

from __future__ import annotations

import json
import math
import shlex

import pytest
import torch
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from lossguide.guidance import Augment, Guidance, guide, recipes
from lossguide.guidance.guidance import Inner, Tokens
from lossguide.guidance.steps import Constant, Fisher, PolyakToFloor, UnsuitableSolver
from lossguide.guidance.tokens import TokenRun, for_tokens
from lossguide.losses import Loss, Term
from lossguide.losses.loss import as_losses
from lossguide.samplers import TimeTravel, denoiser, sample, token_generator
from lossguide.samplers.tokens import Unmasking, among_top

CODES, SIDE, MASK = 12, 4, 12
SEEDS = range(4)


def parts(seed: int = 0, channels: int = 3) -> tuple[UVit2DModel, VQModel, AmusedScheduler]:
    torch.manual_seed(seed)
    transformer = UVit2DModel(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        in_channels=16,
        block_out_channels=16,
        block_num_heads=2,
        num_res_blocks=1,
        cond_embed_dim=4,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=6,
        vocab_size=CODES + 1,
        codebook_size=CODES,
        sample_size=SIDE,
    )
    vqvae = VQModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=CODES,
        sample_size=2 * SIDE,
        lookup_from_codebook=True,
    )
    vqvae.quantize.embedding.weight.data.normal_()
    return transformer.eval(), vqvae.eval(), AmusedScheduler(MASK)


def generator(seed: int = 0, channels: int = 3, **settings):
    return token_generator(*parts(seed, channels), **settings)


class Red(Loss):
    """How far a picture is from red."""

    augment = False

    def __call__(self, image):
        return (1 - image[:, 0]).square().mean((1, 2)) + image[:, 1:].square().mean((1, 2, 3))


def by_diffusers(model, steps: int, seed: int, **settings) -> torch.Tensor:
    """One picture's tokens by AmusedScheduler itself, as AmusedPipeline calls it."""
    scheduler = AmusedScheduler(MASK)
    scheduler.set_timesteps(steps, settings.get("temperature", (2, 0)))
    tokens = torch.full((1, SIDE, SIDE), MASK)
    source = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        tokens = scheduler.step(model.logits(tokens), t, tokens, generator=source).prev_sample
    return tokens


# ---- the plain sampler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [(2, 0), 4])
def test_plain_sampler_is_amused_schedulers_own_bitwise(temperature):
    model = generator(temperature=temperature)
    ours = sample(model, steps=7, seeds=[5])
    assert torch.equal(ours.samples, by_diffusers(model, 7, 5, temperature=temperature))
    with torch.no_grad():
        shape = (1, SIDE, SIDE, 3)
        image = model.vqvae.decode(ours.samples, force_not_quantize=True, shape=shape).sample
    assert torch.equal(ours.images, image.clamp(0, 1))


def test_sample_depends_on_its_seed_alone():
    model = generator()
    for guidance in (None, recipes.tokens(Red(), time_travel=TimeTravel(2)), recipes.tokens(Red(), candidates=3)):
        together = sample(model, guidance, steps=5, seeds=SEEDS)
        apart = torch.cat([sample(model, guidance, steps=5, seeds=[seed]).samples for seed in SEEDS])
        in_pairs = sample(model, guidance, steps=5, seeds=SEEDS, batch_size=2)
        assert torch.equal(together.samples, apart)
        assert torch.equal(together.samples, in_pairs.samples)


def test_pipeline_with_classifier_free_guidance_bitwise():
    pytest.importorskip("transformers")
    from diffusers import AmusedPipeline

    transformer, vqvae, scheduler = parts()
    pipe = AmusedPipeline(vqvae=vqvae, tokenizer=None, text_encoder=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    pooled, hidden, no_pooled, no_hidden = (torch.randn(s) for s in ((1, 4), (1, 5, 6), (1, 4), (1, 5, 6)))
    theirs = pipe(
        prompt_embeds=pooled,
        encoder_hidden_states=hidden,
        negative_prompt_embeds=no_pooled,
        negative_encoder_hidden_states=no_hidden,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    side = float(2 * SIDE)
    conds = torch.tensor([[side, side, 0, 0, 6]])
    model = token_generator(
        transformer,
        vqvae,
        scheduler,
        condition=dict(encoder_hidden_states=hidden, pooled_text_emb=pooled, micro_conds=conds),
        negative=dict(encoder_hidden_states=no_hidden, pooled_text_emb=no_pooled, micro_conds=conds),
        guidance_scale=3.0,
    )
    ours = sample(model, steps=5, seeds=[7])
    assert torch.equal(ours.images, theirs.clamp(0, 1))
    with pytest.raises(TypeError, match="use sample"):
        guide(pipe, recipes.auto(Red()))
    assert scheduler.timesteps is not None  # the pipeline set its own; ours are set on a copy


def test_condition_reaches_the_transformer():
    transformer, vqvae, scheduler = parts()
    condition = dict(
        encoder_hidden_states=torch.randn(3, 5, 6), pooled_text_emb=torch.randn(3, 4), micro_conds=torch.ones(1, 5)
    )
    model = token_generator(transformer, vqvae, scheduler, condition=condition)
    tokens = torch.full((3, SIDE, SIDE), MASK)
    with torch.no_grad():
        own = transformer(tokens, condition["encoder_hidden_states"], condition["pooled_text_emb"], torch.ones(3, 5))
    assert torch.equal(model.logits(tokens), own)
    with pytest.raises(ValueError, match="3 pictures, one row each, and 2 are drawn"):
        sample(model, steps=2, seeds=[0, 1])


def conditions(rows: int, **more) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes = dict(encoder_hidden_states=(5, 6), pooled_text_emb=(4,), micro_conds=(5,))
    return {name: torch.randn(rows, *shape) * more.get("scale", 1.0) for name, shape in shapes.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_each_picture_has_its_own_condition_in_every_batch(batch_size):
    each, none = conditions(4), conditions(4, scale=0.1)
    row = lambda of, i: {name: value[i : i + 1] for name, value in of.items()}
    made = generator(condition=each, negative=none, guidance_scale=3.0)
    told, own = [], made.transformer.forward
    made.transformer.forward = lambda tokens, **more: told.append(more["pooled_text_emb"]) or own(tokens, **more)
    found = sample(made, recipes.tokens(Red(), inner=1), steps=4, seeds=SEEDS, batch_size=batch_size).samples
    size = batch_size or 4
    for first, start in zip(told[::4], range(0, 4, size)):  # four steps, each of which asks once
        both = [of["pooled_text_emb"][start : start + size] for of in (none, each)]
        assert torch.equal(first, torch.cat(both))
    for i in SEEDS:
        alone = generator(condition=row(each, i), negative=row(none, i), guidance_scale=3.0)
        assert torch.equal(sample(alone, recipes.tokens(Red(), inner=1), steps=4, seeds=[i]).samples[0], found[i])


@pytest.mark.parametrize("which", ["condition", "negative"])
def test_conditions_of_another_number_of_pictures_are_refused(which):
    given = dict(condition=conditions(1), negative=conditions(1)) | {which: conditions(2)}
    model = generator(**given, guidance_scale=2.0)
    with pytest.raises(ValueError, match="for 2 pictures, one row each, and 4 are drawn"):
        sample(model, steps=2, seeds=SEEDS, batch_size=2)


def test_top_k_and_temperature():
    logits = torch.randn(2, CODES, SIDE, SIDE)
    few = among_top(logits, 3)
    assert (torch.isfinite(few).sum(1) == 3).all()
    assert torch.equal(few.amax(1), logits.amax(1))
    assert among_top(logits, None) is logits and among_top(logits, CODES) is logits
    ties = among_top(torch.zeros(1, CODES, 1, 1), 2)
    assert torch.isfinite(ties).sum() == 2

    greedy = generator(top_k=1)
    schedule = Unmasking(greedy, 3)
    tokens = torch.full((2, SIDE, SIDE), MASK)
    sources = [torch.Generator().manual_seed(i) for i in range(2)]
    after, drawn = schedule.draw(logits, 0, tokens, sources)
    assert torch.equal(drawn, logits.argmax(1))


def test_cold_masking_takes_the_least_confident():
    model = generator(temperature=(0, 0))
    schedule, logits = Unmasking(model, 3), torch.randn(1, CODES, SIDE, SIDE)
    after, drawn = schedule.draw(logits, 0, torch.full((1, SIDE, SIDE), MASK), [torch.Generator().manual_seed(0)])
    assert (after != MASK).sum() == SIDE**2 - math.floor(SIDE**2 * math.cos(math.pi / 6))
    likely = logits.softmax(1).gather(1, drawn[:, None])[:, 0]
    assert likely[after == MASK].max() < likely[after != MASK].min()


def test_grey_pictures_are_seen_in_colour_and_returned_as_they_are():
    seen = []

    def look(image):
        seen.append(image.shape)
        return image.square().mean((1, 2, 3))

    result = sample(generator(channels=1), recipes.auto(look), steps=3, seeds=[0, 1])
    assert result.images.shape == (2, 1, 8, 8)
    assert {shape[1] for shape in seen} == {3}


# ---- the gradient ------------------------------------------------------------------------------------------------


def test_gradient_of_the_mixture_by_finite_differences():
    model = generator()
    for module in (model.transformer, model.vqvae):
        module.double()
    torch.manual_seed(3)
    tokens = torch.randint(0, CODES, (1, SIDE, SIDE))
    tokens[0, 0], tokens[0, 2, 1] = MASK, MASK
    logits = torch.randn(1, CODES, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    model.vqvae.decoder.conv_out.register_forward_hook(lambda m, i, o: setattr(model.vqvae, "last", o))

    def value(logits):
        model.decode_soft(logits, tokens)
        return Red()(model.vqvae.last).sum()  # in float64, before the picture is made float32

    (g,) = torch.autograd.grad(value(logits), logits)
    assert (g[:, :, tokens[0] != MASK] == 0).all()  # known tokens have no logits
    direction = torch.randn_like(logits)
    eps = 1e-5
    with torch.no_grad():
        slope = (value(logits + eps * direction) - value(logits - eps * direction)) / (2 * eps)
    assert slope.item() == pytest.approx((g * direction).sum().item(), rel=1e-6)
    # the softmax knows no constant, so that neither does its gradient
    assert g.sum(1).abs().max() < 1e-12


def test_sure_logits_decode_as_their_tokens():
    model = generator()
    tokens = torch.randint(0, CODES, (2, SIDE, SIDE))
    logits = torch.full((2, CODES, SIDE, SIDE), -50.0).scatter(1, tokens[:, None], 50.0)
    unknown = torch.full_like(tokens, MASK)
    assert torch.allclose(model.decode_soft(logits, unknown), model.decode(tokens), atol=1e-6)
    assert torch.equal(model.decode_soft(torch.zeros_like(logits), tokens), model.decode(tokens))


def steered(model, guidance, tokens, logits, step=1, steps=4):
    """The logits that guidance makes of these."""
    schedule = Unmasking(model, steps)
    run = TokenRun(for_tokens(guidance), schedule, model, list(range(len(tokens))))
    found = []
    run.step_tokens(tokens, logits, run.visits[step], lambda moved, t: found.append(moved) or (t, t))
    return found[0], run.record


@pytest.mark.parametrize("rule", [PolyakToFloor(), Fisher(), Fisher(damping=0.1)])
def test_one_step_is_polyaks(rule):
    model = generator()
    torch.manual_seed(0)
    tokens, logits = torch.full((3, SIDE, SIDE), MASK), torch.randn(3, CODES, SIDE, SIDE)
    moved, record = steered(model, recipes.tokens(Red(), inner=Inner(1, rule), strength=0.5), tokens, logits)
    leaf = logits.log_softmax(1).requires_grad_()
    loss = Red()(model.decode_soft(leaf, tokens))
    (g,) = torch.autograd.grad(loss.sum(), leaf)
    length = g.flatten(1).norm(dim=1)
    metric = 1 / (logits.softmax(1) + rule.damping) if isinstance(rule, Fisher) else 1.0
    squared = (g * metric * g).flatten(1).sum(1)
    step = 0.5 * (loss.detach() / squared).view(-1, 1, 1, 1) * metric * g
    assert torch.allclose(moved, (leaf.detach() - step).clamp(-30, 30), atol=1e-4)
    (row,) = record.rows
    assert torch.allclose(row["loss"], loss.detach(), atol=1e-6)
    assert torch.allclose(row["gradient_norm"], length, rtol=1e-4)
    assert torch.allclose(row["step_size"], step.flatten(1).norm(dim=1), rtol=1e-3)


def test_natural_steps_follow_what_tokens_are_worth():
    """Without damping, a natural step moves each logit by how its token would change the loss, to first order."""
    model = generator()
    torch.manual_seed(1)
    tokens, logits = torch.full((1, SIDE, SIDE), MASK), torch.randn(1, CODES, SIDE, SIDE)
    moved, _ = steered(
        model, recipes.tokens(Red(), inner=Inner(1, Fisher(damping=1e-9)), strength=1e-3), tokens, logits
    )
    step = moved - logits.log_softmax(1)
    mixed = (logits.softmax(1).movedim(1, -1) @ model.codes.detach()).requires_grad_()
    (pull,) = torch.autograd.grad(Red()(model._picture(mixed)).sum(), mixed)
    worth = ((pull @ model.codes.T) - (pull * mixed).sum(-1, keepdim=True)).detach().movedim(-1, 1)
    cosine = torch.cosine_similarity(step.flatten(), -worth.flatten(), dim=0)
    assert cosine > 0.999
    with pytest.raises(ValueError, match="knows no metric"):
        Fisher(Constant(1.0))


def test_floor_ends_the_steps():
    class Near(Red):
        floor = 10.0

    model = generator()
    tokens, logits = torch.full((2, SIDE, SIDE), MASK), torch.randn(2, CODES, SIDE, SIDE)
    moved, record = steered(model, recipes.tokens(Near()), tokens, logits)
    assert torch.equal(moved, logits)  # below the floor there is nothing to be gained
    assert (record.rows[0]["step_size"] == 0).all()


def test_samples_without_a_sound_gradient_are_left_alone():
    class Broken(Red):
        def __call__(self, image):
            factor = torch.tensor([float("nan"), 0.0, 1.0]).to(image)
            return factor * super().__call__(image)

    model = generator()
    torch.manual_seed(0)
    tokens, logits = torch.full((3, SIDE, SIDE), MASK), torch.randn(3, CODES, SIDE, SIDE)
    moved, record = steered(model, recipes.tokens(Broken()), tokens, logits)
    assert torch.equal(moved[:2], logits[:2])
    assert not torch.equal(moved[2], logits[2])
    assert record.nonfinite.tolist() == [1, 0, 0]
    plain = sample(model, steps=4, seeds=range(3))
    with pytest.warns(RuntimeWarning, match="1 of 3 pictures"):
        guided = sample(model, recipes.tokens(Broken()), steps=4, seeds=range(3))
    assert torch.equal(guided.samples[:2], plain.samples[:2])
    with pytest.raises(FloatingPointError, match=r"pictures \[0\]"):
        sample(model, recipes.tokens(Broken(), raise_on_nonfinite=True), steps=4, seeds=range(3))


def test_huge_steps_stay_within_the_limit():
    model = generator()
    tokens, logits = torch.full((2, SIDE, SIDE), MASK), torch.randn(2, CODES, SIDE, SIDE)
    moved, _ = steered(model, recipes.tokens(Red(), inner=Inner(2, Constant(1e9))), tokens, logits)
    assert moved.abs().max() == 30
    moved, _ = steered(
        model, recipes.tokens(Red(), inner=Inner(2, Constant(1e9)), tokens=Tokens(limit=5.0)), tokens, logits
    )
    assert moved.abs().max() == 5


# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [recipes.tokens(Red(), strength=0), recipes.auto(Red(), strength=0)])
def test_strength_zero_is_the_plain_sampler_bitwise(guidance):
    model = generator()
    plain, watched = sample(model, steps=6, seeds=SEEDS), sample(model, guidance, steps=6, seeds=SEEDS)
    assert torch.equal(plain.samples, watched.samples) and torch.equal(plain.images, watched.images)
    assert watched.record.losses().shape == (6, 4)


def test_loss_falls_with_inner_steps():
    model = generator()
    means = [Red()(sample(model, steps=8, seeds=range(16)).images).mean().item()]
    for inner in (1, 3):
        result = sample(model, recipes.tokens(Red(), inner=inner), steps=8, seeds=range(16))
        means.append(Red()(result.images).mean().item())
    assert means[0] > means[1] + 0.01
    assert means[0] > means[2] + 0.01


def watch(model):
    """The tokens at the beginning of each visit, as the transformer sees them."""
    seen, own = [], model.transformer.forward
    model.transformer.forward = lambda tokens, **more: seen.append(tokens.clone()) or own(tokens, **more)
    return seen


@pytest.mark.parametrize("guidance", [None, recipes.tokens(Red()), recipes.tokens(Red(), inner=0, candidates=4)])
def test_known_tokens_never_change(guidance):
    model = generator()
    seen = watch(model)
    result = sample(model, guidance, steps=8, seeds=SEEDS)
    for before, after in zip(seen, [*seen[1:], result.samples]):
        known = before != MASK
        assert torch.equal(before[known], after[known])
    assert (result.samples != MASK).all()
    counts = [(tokens == MASK).flatten(1).sum(1) for tokens in seen]
    assert all((a > b).all() for a, b in zip(counts, counts[1:]))


def test_time_travel_masks_the_least_confident_again():
    model = generator()
    seen = watch(model)
    guidance = recipes.tokens(Red(), time_travel=TimeTravel(3, 0.25, 0.75))
    result = sample(model, guidance, steps=8, seeds=SEEDS)
    visits = [(row["step"], row["visit"]) for row in result.record.rows]
    assert visits == [(i, j) for i in range(8) for j in range(3 if 2 <= i < 6 else 1)]
    counts = {}
    for (step, _), tokens in zip(visits, seen):  # a visit begins with as many masked as the first of its step
        counts.setdefault(step, []).append((tokens == MASK).flatten(1).sum(1).tolist())
    assert all(len({tuple(c) for c in found}) == 1 for found in counts.values())
    again = [(seen[i], seen[i + 1]) for i, (_, j) in enumerate(visits) if j < 2 and visits[i][0] in range(2, 6)]
    assert any(((a != MASK) & (b != a)).any() for a, b in again)  # tokens that were known are thought over


def test_masked_again_takes_the_least_confident():
    model = generator()
    guidance = recipes.tokens(Red(), time_travel=TimeTravel(2))
    run = TokenRun(guidance, Unmasking(model, 4), model, [0])
    tokens = torch.zeros(1, SIDE, SIDE, dtype=torch.long)
    tokens[0, 0, :3] = MASK  # three were unknown
    run._confidence = torch.rand(1, SIDE, SIDE)
    drawn = torch.randint(0, CODES, (1, SIDE, SIDE))
    after = run._masked_again(tokens, drawn)
    least = run._confidence.flatten().argsort()[:3]
    assert (after == MASK).flatten().nonzero().flatten().tolist() == sorted(least.tolist())
    assert torch.equal(after[after != MASK], drawn[after != MASK])


def test_candidates_find_the_planted_best():
    model = generator()
    logits, tokens = torch.zeros(2, CODES, SIDE, SIDE), torch.full((2, SIDE, SIDE), MASK)
    schedule = Unmasking(model, 4)
    run = TokenRun(recipes.tokens(Red(), inner=0, candidates=5, sharpness=1e6), schedule, model, [0, 1])
    with torch.no_grad():
        pool = torch.randint(0, CODES, (5, 2, SIDE, SIDE))
        losses = torch.stack([Red()(model.decode(one)) for one in pool])
    draws = iter(pool)
    kept = run.step_tokens(tokens, logits, run.visits[0], lambda *_: (one := next(draws), one))
    for i in range(2):
        assert torch.equal(kept[i], pool[losses[:, i].argmin(), i])
    assert torch.allclose(run.record.rows[0]["loss"], losses.amin(0), atol=1e-6)


def test_candidates_are_drawn_by_the_softmax_of_their_losses():
    values = torch.tensor([0.0, 0.1, 0.3])
    planted = Term(lambda image: values[image[:, 0, 0, 0].long()], name="planted", augment=False)
    model = generator()
    object.__setattr__(model, "decode_soft", lambda logits, drawn: drawn[:, None].expand(-1, 3, -1, -1).float())
    count = 3000
    run = TokenRun(
        recipes.tokens(planted, inner=0, candidates=3, sharpness=5.0), Unmasking(model, 2), model, list(range(count))
    )
    draws = iter([torch.full((count, SIDE, SIDE), k) for k in range(3)])
    tokens = torch.full((count, SIDE, SIDE), MASK)
    kept = run.step_tokens(tokens, torch.zeros(count, CODES, 1, 1), run.visits[0], lambda *_: (x := next(draws), x))
    shares = torch.bincount(kept[:, 0, 0], minlength=3) / count
    wanted = (-5.0 * values).softmax(0)
    assert (shares - wanted).abs().max() < 4 * (0.25 / count) ** 0.5


def test_candidates_without_a_finite_loss_are_told_of_and_not_chosen():
    def broken(image):
        return image.flatten(1).mean(1) * torch.tensor([float("nan"), 1.0, 1.0]).to(image)

    model, nan = generator(), Term(broken, name="broken", augment=False)
    plain = sample(model, steps=4, seeds=range(3))
    with pytest.warns(RuntimeWarning, match="1 of 3 pictures"):
        guided = sample(model, recipes.tokens(nan, inner=0, candidates=3), steps=4, seeds=range(3))
    assert guided.record.nonfinite.tolist() == [4, 0, 0]
    assert torch.equal(guided.samples[0], plain.samples[0]) and torch.equal(guided.images[0], plain.images[0])
    with pytest.raises(FloatingPointError, match=r"at step 0 for pictures \[0\]"):
        sample(model, recipes.tokens(nan, inner=0, candidates=2, raise_on_nonfinite=True), steps=4, seeds=range(3))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_the_best_of_the_candidates_that_are_finite(odd):
    values = torch.tensor([odd, 0.5, 0.1])
    model = generator()
    object.__setattr__(model, "decode_soft", lambda logits, drawn: drawn[:, None].expand(-1, 3, -1, -1).float())
    planted = Term(lambda image: values[image[:, 0, 0, 0].long()], name="planted", augment=False)
    run = TokenRun(recipes.tokens(planted, inner=0, candidates=3, sharpness=1e6), Unmasking(model, 2), model, [0, 1])
    tokens = torch.full((2, SIDE, SIDE), MASK)
    one = lambda logits, tokens, k: (torch.full_like(tokens, k),) * 2
    assert (run.step_tokens(tokens, torch.zeros(2, CODES, 1, 1), run.visits[0], one) == 2).all()
    assert run.record.nonfinite.tolist() == [1, 1]


def test_candidates_need_no_gradient():
    steps = lambda image: image[:, 0].detach().mean((1, 2)).round(decimals=2)
    model = generator()
    with pytest.raises(ValueError, match="not differentiable"):
        sample(model, recipes.tokens(steps), steps=3, seeds=SEEDS)
    plain = steps(sample(model, steps=6, seeds=range(12)).images).mean()
    guided = sample(model, recipes.tokens(steps, inner=0, candidates=8, sharpness=1e3), steps=6, seeds=range(12))
    assert steps(guided.images).mean() < plain - 0.01


def test_windows_augmentation_and_record():
    copies = []

    def judged(image):
        copies.append(len(image))
        return image[:, 0].mean((1, 2))

    loss = Term(judged, name="judged", window=(0.0, 0.5)) + 0.5 * Term(Red(), name="red", augment=False)
    model = generator()
    result = sample(model, recipes.tokens(loss, inner=2, augment=Augment(3, chunk=4), stop=0.75), steps=8, seeds=[0, 1])
    rows = result.record.rows
    assert [sorted(row.get("terms", {})) for row in rows] == [["judged", "red"]] * 4 + [["red"]] * 2 + [[]] * 2
    assert set(copies) == {4, 2} and sum(copies) == 2 * 3 * 2 * 4  # 2 pictures, 3 copies, 2 inner steps, 4 visits
    first = rows[0]
    assert {"step", "visit", "timestep", "progress", "alpha", "sigma", "seconds", "gradient_norm", "step_size"} <= set(
        first
    )
    assert first["timestep"] == 7 and first["alpha"] == 0 and first["sigma"] == 1
    assert torch.allclose(first["loss"], first["terms"]["judged"] + 0.5 * first["terms"]["red"])
    assert result.record.losses("red").shape == (6, 2)
    assert result.record.settings["name"] == "tokens"
    result.record.to_dict()


def test_windows_on_the_clock_of_the_noise():
    """Half the noise's way comes early: with the share of masked tokens for noise, most steps lie behind it."""
    model = generator()
    schedule = Unmasking(model, 8)
    assert len(schedule.progress) == 8 and schedule.progress == sorted(schedule.progress)
    result = sample(model, recipes.tokens(Red(), clock="noise", stop=0.5), steps=8, seeds=[0])
    progress = [row["progress"] for row in result.record.rows]
    assert progress[0] == 0 and progress == sorted(progress) and progress != [i / 8 for i in range(8)]
    assert ["loss" in row for row in result.record.rows] == [p < 0.5 for p in progress]


# ---- what is given ------------------------------------------------------------------------------------------------


def test_auto_is_the_recipe_for_tokens():
    loss = as_losses(Red())
    again = TimeTravel(2, 0.25, 0.75)
    assert for_tokens(recipes.auto(loss)) == recipes.tokens(loss, time_travel=again)
    assert for_tokens(recipes.auto(loss, time_travel=None)) == recipes.tokens(loss)
    asked = recipes.auto(loss, 0.7, augment=None, every=2, time_travel=TimeTravel(2), inner=Inner(1, PolyakToFloor()))
    found = for_tokens(asked)
    assert (found.strength, found.every, found.time_travel) == (0.7, 2, TimeTravel(2))
    assert found.inner == Inner(1, PolyakToFloor())
    for cost in (1.0, 1.3, 4.0):
        assert for_tokens(recipes.auto(loss, cost=cost)).time_travel is None


@pytest.mark.parametrize(
    "guidance, told",
    [
        (recipes.dps(Red()), "steps by the noise of a diffusion model"),
        (recipes.best_of_n(Red()), "recipes.auto or recipes.tokens"),
        (recipes.auto(Red(), rule=Constant(1.0)), "rule is for diffusion models"),
        (recipes.auto(Red(), remix=0.5), "remix is for diffusion models"),
        (recipes.auto(Red(), edit="score"), "does nothing to a token generator"),
    ],
)
def test_settings_that_make_no_sense_are_refused(guidance, told):
    with pytest.raises(UnsuitableSolver, match=told):
        sample(generator(), guidance, steps=3)


def test_recipe_for_tokens_is_refused_elsewhere():
    from diffusers import DDIMScheduler

    pixels = denoiser(lambda x, t: x, DDIMScheduler(), shape=(3, 8, 8))
    with pytest.raises(UnsuitableSolver, match="masked-token generator, and this is another model"):
        sample(pixels, recipes.tokens(Red()), steps=3)
    with pytest.raises(ValueError, match="inner steps on its logits, or by more than 1 candidate"):
        recipes.tokens(Red(), inner=0)
    with pytest.raises(ValueError, match="candidates are at least 1"):
        recipes.tokens(Red(), candidates=0)
    with pytest.raises(ValueError, match="graphs"):
        sample(generator(), steps=2, graphs=True)


def test_parts_that_do_not_go_together_are_refused():
    transformer, vqvae, scheduler = parts()
    with pytest.raises(TypeError, match="VQModel"):
        token_generator(transformer, transformer, scheduler)
    from diffusers import DDIMScheduler

    with pytest.raises(TypeError, match="AmusedScheduler, got DDIMScheduler"):
        token_generator(transformer, vqvae, DDIMScheduler())
    with pytest.raises(ValueError, match="the mask token, 3,"):
        token_generator(transformer, vqvae, AmusedScheduler(3))
    with pytest.raises(ValueError, match="negative"):
        token_generator(transformer, vqvae, scheduler, guidance_scale=3.0)
    with pytest.raises(ValueError, match="shape"):
        token_generator(lambda tokens: tokens, vqvae, scheduler)
    small = VQModel(num_vq_embeddings=5, block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ValueError, match="knows 12 codes, and the codebook has 5"):
        token_generator(transformer, small, scheduler)


def test_any_callable_is_a_transformer():
    _, vqvae, scheduler = parts()
    table = torch.randn(CODES, SIDE, SIDE)
    model = token_generator(lambda tokens: table.expand(len(tokens), -1, -1, -1), vqvae, scheduler, shape=(SIDE, SIDE))
    result = sample(model, recipes.auto(Red()), steps=3, seeds=[0, 1])
    assert result.samples.shape == (2, SIDE, SIDE)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def half(request):
    """A precision in half, where the CPU has what it takes."""
    try:
        torch.nn.functional.conv2d(
            torch.ones(1, 1, 3, 3, dtype=request.param), torch.ones(1, 1, 3, 3).to(request.param)
        )
    except RuntimeError as error:
        pytest.skip(f"no kernels of {request.param} here: {error}")
    return request.param


@pytest.mark.parametrize("codes", ["in half", "in float32, as diffusers loads them"])
def test_half_precision(half, codes):
    transformer, vqvae, scheduler = parts()
    vqvae.to(half)
    if codes != "in half":
        vqvae.quantize.embedding.float()
    model = token_generator(transformer.to(half), vqvae, scheduler)
    assert model.vqvae is vqvae
    plain = sample(model, steps=4, seeds=SEEDS)
    result = sample(model, recipes.auto(Red()), steps=4, seeds=SEEDS)
    for one in (plain, result):
        assert one.images.dtype == torch.float32 and torch.isfinite(one.images).all()
    losses = result.record.losses().mean(1)
    assert losses[-1] < losses[0]
    assert torch.isfinite(sample(model, recipes.tokens(Red(), inner=0, candidates=2), steps=3).images).all()


def test_an_autoencoder_too_large_for_half_decodes_in_float32():
    transformer, vqvae, scheduler = parts()
    vqvae.half().register_to_config(force_upcast=True)
    model = token_generator(transformer, vqvae, scheduler)
    assert vqvae.post_quant_conv.weight.dtype == torch.float16  # as it was
    tokens = torch.randint(0, CODES, (2, SIDE, SIDE))
    wanted = vqvae.float().decode(tokens, force_not_quantize=True, shape=(2, SIDE, SIDE, 3)).sample
    assert torch.equal(model.decode(tokens), wanted)


def test_shipped_weights_in_half(half):
    from lossguide.samplers.demo_tokens import FOLDER, load_demo_tokens

    if not (FOLDER / "transformer" / "diffusion_pytorch_model.safetensors").is_file():
        pytest.skip("the weights of demo-tokens are not here")
    model, full = load_demo_tokens("cpu", half), load_demo_tokens()
    tokens = torch.arange(128).view(2, 8, 8)
    assert (model.decode(tokens) - full.decode(tokens)).abs().mean() < 0.02
    for guidance in (None, recipes.auto(Red())):
        images = sample(model, guidance, steps=2, seeds=[0]).images
        assert images.dtype == torch.float32 and torch.isfinite(images).all() and images.std() > 0.05


def test_scheduler_and_weights_are_left_as_they_were():
    transformer, vqvae, scheduler = parts()
    model = token_generator(transformer, vqvae, scheduler)
    sample(model, recipes.auto(Red()), steps=3, seeds=[0])
    assert scheduler.timesteps is None
    assert all(p.requires_grad and p.grad is None for m in (transformer, vqvae) for p in m.parameters())


def test_saved_and_loaded(tmp_path):
    from lossguide.losses import ClassLabel

    guidance = recipes.tokens(ClassLabel(3), inner=2, candidates=2)
    guidance.save_pretrained(tmp_path)
    found = Guidance.from_pretrained(tmp_path)
    assert found.tokens == guidance.tokens and found.inner == guidance.inner


# ---- the command line, and what is shipped -------------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """The command line in an empty folder, with a tiny generator in place of the one that is shipped."""
    from click.testing import CliRunner
    from lossguide.guidance.cli import main
    from lossguide.samplers import demo_tokens

    transformer, vqvae, scheduler = parts(channels=1)
    transformer.save_pretrained(tmp_path / "tiny" / "transformer")
    vqvae.save_pretrained(tmp_path / "tiny" / "vqvae")
    scheduler.save_pretrained(tmp_path / "tiny" / "scheduler")
    monkeypatch.setattr(demo_tokens, "FOLDER", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def bright(image):\n    return (1 - image).square().flatten(1).mean(1)\n")
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


def test_generate_draws_with_tokens(cli, tmp_path):
    asked = "generate", "--model", "demo-tokens", "--loss", "own.py:bright", "--num-images", 3, "--steps", 4, "-q"
    result = cli(*asked, "--out", "made")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert {"00000.png", "00002.png", "sheet.png", "record.json", "record.png", "settings.json"} <= {
        file.name for file in (tmp_path / "made").iterdir()
    }
    settings = json.loads((tmp_path / "made" / "settings.json").read_text())
    assert settings["scheduler"]["class"] == "AmusedScheduler"
    again = cli(*shlex.split(settings["command"])[1:], "--out", "again")
    assert again.exit_code == 0
    assert all((tmp_path / "made" / f"{i:05d}.png").read_bytes() == (tmp_path / "again" / f"{i:05d}.png").read_bytes()
               for i in range(3))  # fmt: skip


def test_generate_in_half_precision(cli, tmp_path, half):
    asked = "generate", "--model", "demo-tokens", "--loss", "own.py:bright", "--num-images", 1, "--steps", 3, "-q"
    result = cli(*asked, "--dtype", str(half).removeprefix("torch."), "--out", "made")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert (tmp_path / "made" / "00000.png").is_file()


@pytest.mark.parametrize(
    "words, told",
    [
        (("generate", "--scheduler", "ddim"), "--scheduler is for diffusion models"),
        (("generate", "--recipe", "dps"), "choose --recipe auto or --recipe tokens"),
        (("tune",), "tune searches the settings of recipes for diffusion models"),
    ],
)
def test_options_that_make_no_sense_are_told_in_a_sentence(cli, words, told):
    more = ("--num-images", 1, "--steps", 3, "-q") if words[0] == "generate" else ()
    result = cli(*words, "--model", "demo-tokens", "--loss", "own.py:bright", *more)
    assert result.exit_code == 2, (result.output, result.exception)
    assert told in result.stderr and "Traceback" not in result.stderr


def test_recipe_for_tokens_is_told_of_other_models(cli):
    result = cli("generate", "--recipe", "tokens", "--loss", "own.py:bright", "--num-images", 1, "--steps", 3, "-q")
    assert result.exit_code == 2
    assert "masked-token generator, and this is another model; choose --recipe auto" in result.stderr


@pytest.fixture(scope="module")
def shipped():
    from lossguide.samplers.demo_tokens import FOLDER, load_demo_tokens

    if not (FOLDER / "transformer" / "diffusion_pytorch_model.safetensors").is_file():
        pytest.skip("the weights of demo-tokens are not here")
    return load_demo_tokens()


def test_demo_tokens_draw_what_a_text_asks(shipped):
    from lossguide.losses import ClipText
    from lossguide.losses.demo import classifier

    judge, label = classifier("judge"), 5
    plain = sample(shipped, steps=12, seeds=range(6))
    assert plain.images.shape == (6, 1, 32, 32) and plain.samples.shape == (6, 8, 8)
    guided = sample(shipped, recipes.auto(ClipText("a sandal", model="demo")), steps=12, seeds=range(6))
    with torch.no_grad():
        right = [(judge(one.images).argmax(1) == label).sum().item() for one in (plain, guided)]
    assert right[1] >= 4 and right[1] > right[0]
