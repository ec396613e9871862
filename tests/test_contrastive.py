"""Language relations: hard negatives of phrases, the contrast of a text with them, words and the patches they match."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lossguide.guidance import Guidance, recipes
from lossguide.losses import ClipText, ContrastiveText, WordRelation, check, registry
from lossguide.losses.clip import load_clip
from lossguide.losses.contrastive import in_text_space
from lossguide.losses.phrases import content_words, hard_negatives
from lossguide.losses.words import calibrate, overlap, relation_distance, soft_matches

PROMPT = "a boot left of a bag"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def picture(count, seed=0, dtype=torch.float32, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- phrases -------------------------------------------------------------------------------------------------------

NEGATIVES = {
    "a boot left of a bag": [
        "a boot right of a bag",
        "a boot above a bag",
        "a boot below a bag",
        "a bag left of a boot",
        "a boot",
        "a bag",
    ],
    "a photo of an orange bag to the right of a boot.": [
        "a photo of an orange bag to the left of a boot",
        "a photo of an orange bag above a boot",
        "a photo of an orange bag below a boot",
        "a photo of a boot to the right of an orange bag",
        "a photo of a bag to the right of an orange boot",
        "a photo of a bag to the right of a boot",
        "a photo of an orange bag",
        "a photo of a boot",
    ],
    "A dress above a bag": [
        "a dress below a bag",
        "a dress left of a bag",
        "a dress right of a bag",
        "a bag above a dress",
        "a dress",
        "a bag",
    ],
    "cat on mat": ["cat under mat", "mat on cat", "cat", "mat"],
    "a cat sitting on a mat": ["a cat sitting under a mat", "a mat sitting on a cat", "a cat", "a mat"],
    "a dog chasing a cat": ["a cat chasing a dog", "a dog", "a cat"],
    "a cat and a dog": ["a cat", "a dog"],
    "a red cube and a blue ball": [
        "a blue cube and a red ball",
        "a cube and a blue ball",
        "a red cube and a ball",
        "a red cube",
        "a blue ball",
    ],
    "a small red boot": ["a red boot", "a small boot"],
    "an ankle boot": ["a boot"],
    "a man with a hat": ["a man without a hat", "a man", "a hat"],
    "the old house is behind the tree": [
        "the old house is in front of the tree",
        "the tree is behind the old house",
        "the house is behind the old tree",
        "the house is behind the tree",
        "the old house",
        "the tree",
    ],
    "a boot on the left and a bag on the right": [
        "a boot on the right and a bag on the right",
        "a boot on the left and a bag on the left",
        "a bag on the left and a boot on the right",
        "a boot",
        "a bag",
    ],
    "a hot bowl of soup, next to a spoon": [
        "a bowl of soup, next to a hot spoon",
        "a bowl of soup, next to a spoon",
        "a hot bowl of soup",
        "a spoon",
    ],
    "a unicorn over an hour glass": [
        "a unicorn under an hour glass",
        "an hour glass over a unicorn",
        "an hour unicorn over a glass",
        "a unicorn over a glass",
        "a unicorn",
        "an hour glass",
    ],
    "an old unicorn": ["a unicorn"],
    "the Left Of a bag": ["a bag"],
    "the above a bag": ["a bag"],
    "not a cat": [],
    "a boot, not a bag": [],
    "a boot not left of a bag": [],
    "a boot left of a bag with no handle": [
        "a boot right of a bag with no handle",
        "a boot above a bag with no handle",
        "a boot below a bag with no handle",
        "a bag left of a boot with no handle",
        "a boot",
        "a bag",
    ],
    "a bag": [],
    "two boots": [],
}


@pytest.mark.parametrize("prompt", NEGATIVES)
def test_hard_negatives(prompt):
    found = hard_negatives(prompt)
    assert found == NEGATIVES[prompt]
    assert len(set(found)) == len(found) and prompt not in found


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a photo of a boot to the left of a bag", ["boot", "bag"]),
        ("An old red house, behind the tree!", ["old", "red", "house", "tree"]),
        ("a bag on a bag", ["bag"]),
        ("there is a cat sitting on the mat", ["cat", "mat"]),
        ("a picture of it", []),
    ],
)
def test_content_words(prompt, words):
    assert content_words(prompt) == words


# ---- words and patches ---------------------------------------------------------------------------------------------


def test_soft_matches_are_the_formula():
    words, patches = draw(2, 3, 5), draw(2, 7, 5, seed=1)
    matches, attention = soft_matches(words, patches, 0.3)
    for b in range(2):
        for i in range(3):
            scores = torch.stack([F.cosine_similarity(words[b, i], patch, dim=0) for patch in patches[b]])
            weights = (scores / 0.3).exp() / (scores / 0.3).exp().sum()
            mixed = sum(weight * patch / patch.norm() for weight, patch in zip(weights, patches[b]))
            assert torch.allclose(attention[b, i], weights, atol=1e-12)
            assert torch.allclose(matches[b, i], mixed / mixed.norm(), atol=1e-12)
    shared = soft_matches(words[:1], patches, 0.3)
    assert torch.allclose(shared[0][0], matches[0]) and shared[1].shape == (2, 3, 7)
    nearest = soft_matches(words, patches, 1e-4)[1].argmax(-1)
    assert torch.equal(nearest, (F.normalize(words, dim=-1) @ F.normalize(patches, dim=-1).mT).argmax(-1))
    for wrong in ((words, patches[..., :4]), (words[:, 0], patches), (draw(3, 3, 5), patches)):
        with pytest.raises(ValueError, match=r"words are \(B or 1, N, d\)"):
            soft_matches(*wrong)
    with pytest.raises(ValueError, match="tau is above 0"):
        soft_matches(words, patches, 0.0)


def test_relation_distance_is_the_mean_over_pairs_of_words():
    words, matches = draw(2, 3, 5), F.normalize(draw(2, 3, 6, seed=1), dim=-1)
    found = relation_distance(matches, words, scale=0.7, offset=0.2)
    for b in range(2):
        terms = []
        for i in range(3):
            for j in range(3):
                if i != j:
                    wanted = 0.7 * F.cosine_similarity(words[b, i], words[b, j], dim=0) + 0.2
                    terms.append((matches[b, i] @ matches[b, j] - wanted) ** 2)
        assert math.isclose(found[b], sum(terms) / 6, rel_tol=1e-12)
    unit = F.normalize(words, dim=-1)
    assert relation_distance(unit, words).abs().max() < 1e-24
    with pytest.raises(ValueError, match="of the matches"):
        relation_distance(matches, words[:, :2])
    with pytest.raises(ValueError, match="a mask of words"):
        relation_distance(matches, words, torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filling", [0.0, 3.0, float("nan")])
def test_padding_changes_nothing(filling, dtype):
    words, patches = draw(2, 3, 5, dtype=dtype), draw(2, 7, 5, seed=1, dtype=dtype)
    padded = torch.cat([words, torch.full((2, 4, 5), filling, dtype=dtype)], 1)
    mask = torch.arange(7)[None] < 3

    def values(words, mask):
        matches, attention = soft_matches(words, patches)
        assert matches.dtype == torch.float32
        return relation_distance(matches, words, mask, 0.5, 0.1), overlap(attention, mask)

    for plain, more in zip(values(words, None), values(padded, mask)):
        assert (plain - more).abs().max() <= 1e-6
    first, several = torch.tensor([[True, False, False], [True, True, False]]), values(words, None)[0]
    of_first = values(words, first)
    assert of_first[0][0] == 0 and of_first[1][0] == 0, "one word has no relation"
    pair = values(words[1:, :2].expand(2, -1, -1), None)[0][1]
    assert abs(of_first[0][1] - pair) < 1e-6 and abs(of_first[0][1] - several[1]) > 1e-4
    assert (torch.stack(values(words, torch.zeros(1, 3))) == 0).all()


def test_overlap_from_none_to_whole():
    apart = torch.eye(4)[None, :3]
    same = torch.tensor([0.1, 0.6, 0.3]).expand(1, 4, 3)
    assert overlap(apart).item() == 0 and math.isclose(overlap(same).item(), 1, rel_tol=1e-6)
    half = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]], requires_grad=True)
    assert math.isclose(overlap(half).item(), 0.5, rel_tol=1e-6)
    overlap(half).sum().backward()
    assert half.grad[0, 0, 1] > 0 > half.grad[0, 0, 0], "less of what is shared, more of what is not"
    between = overlap(draw(20, 3, 6).softmax(-1))
    assert (between > 0).all() and (between < 1).all()


def test_both_losses_have_their_gradient():
    words, patches = draw(2, 3, 4).requires_grad_(), draw(2, 6, 4, seed=1).requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def loss(words, patches):
        matches, attention = soft_matches(words, patches, 0.2)
        return relation_distance(matches, words, mask, 0.5, 0.1) + overlap(attention, mask)

    assert torch.autograd.gradcheck(loss, (words, patches))


def test_calibration_finds_what_was_planted():
    words = draw(6, 4, 3)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[0, 2:] = False
    unit = F.normalize(words, dim=-1)
    similar = 0.4 * unit @ unit.mT + 0.3
    similar.diagonal(dim1=1, dim2=2).fill_(1)
    values, vectors = torch.linalg.eigh(similar)
    assert (values > 0).all(), "unit vectors of just these similarities exist"
    matches = vectors * values.sqrt()[:, None]
    matches[0, 2:] = draw(2, 4, seed=3)  # do not count
    k, b = calibrate(matches, words, mask)
    assert abs(k - 0.4) < 1e-9 and abs(b - 0.3) < 1e-9
    assert relation_distance(matches, words, mask, k, b).max() < 1e-18
    noisy = calibrate(F.normalize(matches + 0.05 * draw(6, 4, 4, seed=4), dim=-1), words, mask)
    assert abs(noisy[0] - 0.4) < 0.1 and abs(noisy[1] - 0.3) < 0.1
    k, b = calibrate(matches[:, :2], words[:1, :2])
    pairs = (matches[:, 0] * matches[:, 1]).sum(-1)
    assert k == 0 and math.isclose(b, pairs.mean(), rel_tol=1e-12), "one pair of words has no slope"
    with pytest.raises(ValueError, match="no picture has two words"):
        calibrate(matches, words, torch.arange(4)[None] < 1)


# ---- the contrast --------------------------------------------------------------------------------------------------


def test_contrast_is_the_cross_entropy_of_the_prompt_among_the_texts():
    clip = load_clip("demo")
    image = picture(3, size=64)
    texts = F.normalize(clip.embed_text([PROMPT, *NEGATIVES[PROMPT]]), dim=-1)
    scores = F.normalize(clip.embed(image), dim=-1) @ texts.T * clip.text.logit_scale.exp()
    loss = ContrastiveText(PROMPT, model="demo")
    assert torch.allclose(loss(image), F.cross_entropy(scores, torch.zeros(3, dtype=torch.long), reduction="none"))
    assert loss.settings["negatives"] == NEGATIVES[PROMPT] and loss.arguments["negatives"] is None
    given = ContrastiveText(PROMPT, ["a dress"], model="demo", temperature=0.1)
    between = (
        F.normalize(clip.embed_text([PROMPT, "a dress"]), dim=-1) @ F.normalize(clip.embed(image), dim=-1).T
    ) / 0.1
    assert torch.allclose(given(image), -between.log_softmax(0)[0], atol=1e-6)
    one = ContrastiveText("a bag", ["a boot"], model="demo")
    assert torch.equal(one(image), ContrastiveText("a bag", "a boot", model="demo")(image))


def test_contrast_has_the_gradient_of_finite_differences(tiny_clip):
    loss = ContrastiveText(PROMPT, model=tiny_clip)
    image = picture(2, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(image).sum(), image)
    direction = draw(*image.shape)
    with torch.no_grad():
        step = 1e-5
        slope = (loss(image + step * direction) - loss(image - step * direction)) / (2 * step)
    assert torch.allclose((gradient * direction).flatten(1).sum(1), slope, rtol=1e-5)


def test_the_gradient_fades_once_the_prompt_has_won(tiny_clip):
    clip = load_clip(tiny_clip)
    image = picture(1, seed=2).requires_grad_()
    texts = F.normalize(clip.embed_text(["a bag", "a boot"]), dim=-1)
    score = (F.normalize(clip.embed(image), dim=-1) @ texts.T)[0]
    likes, other = ("a bag", "a boot") if score[0] > score[1] else ("a boot", "a bag")
    gap = (score[0] - score[1]).abs().item()

    def slope(prompt, negative, temperature):
        value = ContrastiveText(prompt, [negative], model=tiny_clip, temperature=temperature)(image)
        return torch.autograd.grad(value.sum(), image)[0].norm() * temperature, value.item()

    sharp = gap / 8  # the prompt is ahead by 8 nats
    (won, value), (lost, high) = slope(likes, other, sharp), slope(other, likes, sharp)
    assert abs(value - math.log1p(math.exp(-8))) < 1e-5 and abs(high - 8 - value) < 1e-3
    assert math.isclose(won / lost, math.exp(-8), rel_tol=1e-2), "as much as the negatives still get"
    (far, tiny) = slope(likes, other, gap / 30)
    assert 0 < tiny < 1e-12 and far < 1e-10 * lost, "small, not rounded to zero"
    cosine = torch.autograd.grad(ClipText(likes, model=tiny_clip)(image).sum(), image)[0].norm()
    assert far < 1e-6 * cosine, "where the cosine still pulls as it did"


def test_contrast_of_several_prompts_at_once(tiny_clip):
    prompts = [PROMPT, "a red bag"]
    together = ContrastiveText(prompts, model=tiny_clip)
    image = picture(4)
    apart = [ContrastiveText(prompts[i % 2], model=tiny_clip)(image[i : i + 1]) for i in range(4)]
    assert together.batch == 2 and torch.allclose(together(image), torch.cat(apart), atol=1e-5)
    others = ContrastiveText(prompts, prompts, model=tiny_clip)
    assert others.settings["negatives"] == [["a red bag"], [PROMPT]], "each other's"
    mixed = ContrastiveText(PROMPT, model=[tiny_clip, "demo"])
    single = [ContrastiveText(PROMPT, model=model)(image) for model in (tiny_clip, "demo")]
    assert torch.allclose(mixed(image), sum(single) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ContrastiveText("a bag", model="demo"), "nothing in 'a bag' can be swapped"),
        (lambda: ContrastiveText([], model="demo"), "must not be empty"),
        (lambda: ContrastiveText("a bag", [], model="demo"), "at least one"),
        (lambda: ContrastiveText("a bag", ["a bag"], model="demo"), "other than the prompt"),
        (lambda: ContrastiveText("a bag", [""], model="demo"), "not empty"),
        (lambda: ContrastiveText(PROMPT, model="demo", temperature=0), "temperature is above 0"),
        (lambda: WordRelation(PROMPT, model="demo", tau=0), "tau is above 0"),
        (lambda: WordRelation(PROMPT, model="demo", overlap=-1), "overlap not negative"),
        (lambda: WordRelation(PROMPT, model="demo", template="a photo"), "has {}"),
        (lambda: WordRelation("a bag", model="demo").calibrated(picture(1)), "no picture has two words"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# ---- word relations ------------------------------------------------------------------------------------------------


def test_word_relation_is_its_maths(tiny_clip):
    clip, image = load_clip(tiny_clip), picture(2)
    visual = clip.image.network
    tokens = visual._pool(visual.transformer(visual._embeds(clip.image.prepare(image))))[1] @ visual.proj
    words = clip.embed_text(["a photo of a boot", "a photo of a bag"])[None]
    matches, attention = soft_matches(words, tokens, 0.05)
    wanted = relation_distance(matches, words, None, 0.5, 0.1) + 2 * overlap(attention)
    loss = WordRelation(PROMPT, model=str(tiny_clip), scale=0.5, offset=0.1, tau=0.05, overlap=2.0)
    assert torch.allclose(loss(image), wanted, atol=1e-5) and loss.settings["words"] == ["boot", "bag"]


@pytest.mark.parametrize("model", ["demo", "tiny"])
def test_patches_in_the_space_of_texts(model, tiny_clip):
    """What they are to add up to: the embedding, where a model pools them by their mean or looks at one place."""
    clip, image = load_clip("demo" if model == "demo" else tiny_clip), picture(2, size=64)
    loss = WordRelation(PROMPT, model="demo" if model == "demo" else str(tiny_clip))
    features = loss.patches(image)
    visual = clip.image.network
    if model == "demo":
        pool = visual.attnpool
        values = F.linear(features, pool.v_proj.weight, pool.v_proj.bias)
        wanted = F.linear(values.mean(1), pool.c_proj.weight, pool.c_proj.bias)
    else:
        wanted = features.mean(1) @ visual.proj
    found = in_text_space(clip, features)
    assert found.shape[-1] == clip.embed(image).shape[-1]
    assert torch.allclose(found.mean(1), wanted, atol=1e-5)


def test_word_relation_of_fewer_than_two_words_is_zero(tiny_clip):
    image = picture(2).requires_grad_()
    alone = WordRelation("a photo of a bag", model=str(tiny_clip), tau=0.1)(image)
    assert torch.equal(alone, torch.zeros(2)) and alone.requires_grad
    several = WordRelation(["a bag", PROMPT, "a picture of it"], model=str(tiny_clip), tau=0.1)
    image = picture(3)
    value = several(image)
    single = WordRelation(PROMPT, model=str(tiny_clip), tau=0.1)
    whole = single(image[1:2])
    assert value[0] == value[2] == 0 < value[1] and torch.allclose(value[1:2], whole, atol=1e-6)
    longer = WordRelation([PROMPT, "a small old red dress, a hat and a coat"], model=str(tiny_clip), tau=0.1)
    count = single.targets.shape[1]  # the same words and batch for both, as features round otherwise in another batch
    torch.testing.assert_close(longer.targets[:1, :count], single.targets)
    longer.targets[:1, :count] = single.targets
    twice = image[1:2].expand(2, -1, -1, -1)
    assert abs(longer(twice)[0] - single(twice)[0]) < 1e-6, "padding"


def test_word_relation_takes_k_and_b_from_pictures(tiny_clip):
    prompts = [PROMPT, "a red dress above a sandal"]
    loss = WordRelation(prompts, model=str(tiny_clip), overlap=0.0)
    pictures = picture(6, seed=3)
    found = loss.calibrated(pictures)
    assert found(pictures).mean() < loss(pictures).mean()
    pairs = torch.tensor([1.0, 3.0]).repeat(3)  # of words, over which k and b are the best

    def cost(scale, offset):
        own = WordRelation(prompts, model=str(tiny_clip), overlap=0.0, scale=scale, offset=offset)
        return (own(pictures) * pairs).sum().item()

    k, b = found.arguments["scale"], found.arguments["offset"]
    least = cost(k, b)
    assert all(cost(k + x, b + y) > least for x, y in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)))


# ---- both, as losses -----------------------------------------------------------------------------------------------

LOSSES = {
    "contrast": lambda model: ContrastiveText(PROMPT, model=model),
    "contrast-given": lambda model: ContrastiveText("a bag", ["a boot", "a dress"], model=model, temperature=0.05),
    "contrasts": lambda model: ContrastiveText([PROMPT, "a red bag"], model=model),
    "relation": lambda model: WordRelation(PROMPT, model=model, scale=0.3, offset=0.2),
    "relations": lambda model: WordRelation([PROMPT, "a bag"], model=model, tau=0.05, overlap=0.5),
}


@pytest.mark.parametrize("model", ["demo", "tiny"])
@pytest.mark.parametrize("name", LOSSES)
def test_contract_batches_and_precision(name, model, tiny_clip):
    loss = LOSSES[name]("demo" if model == "demo" else str(tiny_clip))
    image = picture(4)
    value = loss(image)
    assert value.shape == (4,) and value.isfinite().all() and (value >= 0).all()
    with torch.no_grad():
        other = torch.cat([image[:2], 1 - image[2:]])
        assert torch.allclose(loss(other)[:2], value[:2], atol=1e-5), "a picture's value is its own"
    for dtype in (torch.bfloat16, torch.float16):
        low = image.to(dtype).requires_grad_()
        rounded = loss(low)
        (gradient,) = torch.autograd.grad(rounded.sum(), low)
        assert rounded.shape == (4,) and gradient.dtype == dtype and gradient.isfinite().all()
        assert torch.allclose(rounded.float(), value, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", LOSSES)
def test_saved_and_loaded(name, tmp_path):
    guidance = recipes.auto(LOSSES[name]("demo"))
    guidance.save_pretrained(tmp_path)
    loaded = Guidance.from_pretrained(tmp_path)
    assert loaded.to_dict() == guidance.to_dict()
    image = picture(2)
    assert torch.equal(loaded.loss(image), guidance.loss(image))


def test_they_keep_to_what_is_asked_of_a_loss():
    for name in ("contrast", "relation"):
        report = check(LOSSES[name]("demo"), (3, 32, 32))
        assert report.ok and not report.warnings, report


def test_by_name():
    image = picture(2)
    assert torch.equal(registry.parse(f"contrast:{PROMPT}")(image), ContrastiveText(PROMPT, model="demo")(image))
    assert torch.equal(registry.parse(f"2*contrast:{PROMPT}")(image), 2 * ContrastiveText(PROMPT, model="demo")(image))
    with pytest.raises(ValueError, match=r"in Python: WordRelation"):
        registry.parse(f"word-relation:{PROMPT}")
    assert {"contrast", "word-relation"} <= {entry.name for entry in registry.available()}
