"""The trainer of tokenizers: codes, ids, both stages, resuming, language losses, and the figures on planted data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vector_quantize_pytorch")

from benchmarks import tokenizers  # noqa: E402
from benchmarks.tokens import evaluate, fit, language, model, teacher, train  # noqa: E402
from benchmarks.tokens.train import Plan  # noqa: E402

TINY = dict(codes=16, steps=4, batch=4, pixel_steps=3)


@pytest.fixture(scope="module")
def images():
    """Smooth grey pictures, uint8."""
    torch.manual_seed(0)
    small = torch.rand(24, 1, 6, 6)
    return (F.interpolate(small, (32, 32), mode="bicubic").clamp(0, 1) * 255).byte()


@pytest.fixture(scope="module")
def frozen():
    """An untrained teacher."""
    torch.manual_seed(1)
    return teacher.Teacher(1, 4).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(images, frozen, tmp_path_factory):
    """A tokenizer after its first stage, and its plan."""
    plan = Plan("fashion", "kd", **TINY)
    tokenizer = train.build(plan, frozen.dimension)
    train.first_stage(plan, tokenizer, images, frozen, None, tmp_path_factory.mktemp("tokens") / "tokens.state")
    return tokenizer, plan


def test_ids_by_largest_cosine_are_those_of_the_exported_model(trained, images, tmp_path):
    from diffusers import VQModel

    tokenizer = train.build(Plan("fashion", "plain", **TINY), 0).eval()
    assert torch.allclose(trained[0].codes.norm(dim=1), torch.ones(16), atol=1e-6)
    x = images.float() / 255
    with torch.no_grad():
        z = tokenizer.encode(x)
        planted = F.normalize(z[torch.randint(len(z), (16,)), torch.randint(64, (16,))], dim=1)
        tokenizer.quantiser._codebook.embed.copy_(planted)
        tokenizer.quantiser._codebook.initted.fill_(True)
        _, ids, _ = tokenizer.quantiser(tokenizer.encode(x))
    tokenizer.export().save_pretrained(tmp_path)
    again = VQModel.from_pretrained(tmp_path)
    assert len(ids.unique()) > 8  # or they would agree whatever the rule
    assert torch.equal(ids, tokenizer.ids(x))
    assert torch.equal(ids, model.ids_of(again, images))


def test_pictures_of_ids_are_the_decoders_of_their_vectors(trained):
    tokenizer = trained[0].eval()
    torch.manual_seed(0)
    ids = torch.randint(16, (3, 64))
    with torch.no_grad():
        made = tokenizer.decode(tokenizer.codes[ids]).clamp(0, 1)
    assert torch.allclose(model.pictures_of(tokenizer.export(), ids), made, atol=1e-4)


def test_the_feature_loss_is_0_for_the_teachers_features_at_any_length_and_2_for_their_opposite():
    wanted = torch.randn(2, 5, 7)
    assert train.feature_loss(3 * wanted, wanted).abs() < 1e-6
    assert train.feature_loss(-wanted, wanted) == pytest.approx(2, abs=1e-6)
    half = torch.cat([wanted[:, :, :3], torch.zeros(2, 5, 4)], 2)
    cosines = half.norm(dim=2) / wanted.norm(dim=2)
    assert train.feature_loss(half, wanted) == pytest.approx((1 - cosines).mean().item(), abs=1e-6)


def test_the_pixel_loss_is_0_for_the_picture_and_1_for_its_mean():
    x = torch.rand(200, 1, 8, 8)
    assert train.pixel_loss(x, x, 1.0, sharp=1.0) == 0
    variance = x.var(correction=0).item()
    assert train.pixel_loss(torch.full_like(x, x.mean().item()), x, variance) == pytest.approx(1, abs=1e-5)


def test_commitment_is_the_squared_distance_of_unit_vectors_to_their_codes(trained, images):
    tokenizer = trained[0]
    tokenizer.train()
    z = tokenizer.encode(images[:4].float() / 255)
    before = {k: v.clone() for k, v in tokenizer.quantiser.state_dict().items()}
    codes = tokenizer.codes.clone()
    _, ids, loss = tokenizer.quantiser(z)
    tokenizer.quantiser.load_state_dict(before)
    assert loss.item() == pytest.approx(F.mse_loss(F.normalize(z, dim=-1), codes[ids]).item(), rel=1e-4)


def test_the_second_stage_trains_the_pixel_decoder_and_nothing_else(trained, images, tmp_path):
    tokenizer, plan = trained
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    ids = tokenizer.eval().ids(images.float() / 255)
    train.second_stage(plan, tokenizer, images, tmp_path / "pixels.state")
    changed = {key for key, value in tokenizer.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith(("vq.decoder", "vq.post_quant_conv")) for key in changed)
    assert torch.equal(tokenizer.ids(images.float() / 255), ids)


@pytest.mark.parametrize("kind", ["kd", "plain"])
def test_a_run_that_was_stopped_gives_what_one_that_was_not_does(images, frozen, tmp_path, kind):
    plan, ends = Plan("fashion", kind, **TINY), []
    for stops in ((None,), (2, None)):
        state = tmp_path / f"{len(stops)}.state"
        for until in stops:
            tokenizer = train.build(plan, frozen.dimension)  # anew, as another process would
            run = train.first_stage(plan, tokenizer, images, frozen, None, state, until)
        assert run["step"] == plan.steps
        ends.append(tokenizer.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_what_is_trained_is_kept_and_not_trained_again(images, frozen, tmp_path):
    plan, labels = Plan("fashion", "kd", **TINY), torch.arange(24) % 10
    vq, facts = train.train(plan, tmp_path, (images, labels), frozen)
    again, known = train.train(plan, tmp_path, None, None)  # without pictures: it could not train
    assert known == facts and facts["pixels"]["step"] == 3
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in vq.state_dict().items())


def test_softened_tokens_are_mixtures_of_codes_near_to_them():
    torch.manual_seed(0)
    codes = F.normalize(torch.randn(8, 32), dim=1)
    tokens = codes[torch.randint(8, (64, 10))]
    mixed = train.softened(codes, tokens, 0.5)
    same = (mixed == tokens).all((1, 2))
    assert 15 < same.sum() < 49  # about half, picture by picture
    assert (F.cosine_similarity(mixed, tokens, dim=-1)[~same] > 0.5).float().mean() > 0.9
    assert torch.equal(train.softened(codes, tokens, 0.0), tokens)


def test_contrast_is_least_where_each_view_is_its_partner_alone():
    x = torch.eye(4)
    right = teacher.contrast(x, x)
    assert right < 0.05 < teacher.contrast(x, x.roll(1, 0))
    # all alike: any of the 7 others is as good
    assert teacher.contrast(torch.ones(4, 3), torch.ones(4, 3)) == pytest.approx(math.log(7), abs=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_pictures_and_differ(channels):
    torch.manual_seed(0)
    x = torch.rand(6, channels, 32, 32)
    first, second = teacher.views(x, 0.3), teacher.views(x, 0.3)
    assert first.shape == x.shape and first.isfinite().all() and not torch.equal(first, second)


def test_usage_of_known_ids():
    assert evaluate.usage(torch.arange(8).repeat(5), 8) == pytest.approx({"usage": 1.0, "perplexity": 8.0})
    assert evaluate.usage(torch.zeros(10, dtype=torch.long), 8) == pytest.approx({"usage": 0.125, "perplexity": 1.0})
    ids = torch.tensor([0, 0, 1, 2])
    wanted = math.exp(-(0.5 * math.log(0.5) + 0.5 * math.log(0.25)))
    assert evaluate.usage(ids, 4) == pytest.approx({"usage": 0.75, "perplexity": wanted})


def test_a_probe_finds_what_is_linear_and_guesses_what_is_not():
    torch.manual_seed(0)
    x, labels = torch.randn(800, 6), torch.randint(4, (800,))
    assert evaluate.probe(x[:400], labels[:400], x[400:], labels[400:]) < 0.4
    x[:, 2:] += 8 * F.one_hot(labels, 4)
    assert evaluate.probe(x[:400], labels[:400], x[400:], labels[400:]) > 0.99


def test_recall_is_1_for_pictures_that_are_their_captions_and_chance_for_noise():
    torch.manual_seed(0)
    captions = torch.stack([torch.randint(5, (600,)), 5 + torch.randint(4, (600,))], 1)
    indicator = F.one_hot(captions, 9).sum(1).float()
    x = indicator @ torch.randn(9, 12)
    assert evaluate.recall(x[:300], captions[:300], x[300:], captions[300:], 9, 1) == (1.0, 20)
    noise = torch.randn(600, 12)
    assert evaluate.recall(noise[:300], captions[:300], noise[300:], captions[300:], 9, 1)[0] < 0.4


def test_psnr_of_a_known_error():
    assert torch.allclose(
        evaluate.psnr(torch.full((2, 1, 4, 4), 0.6), torch.full((2, 1, 4, 4), 0.5)), torch.tensor(20.0)
    )


def test_attributes_of_drawn_garments():
    x = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    x[0, 0, 2:30, 12:18] = 100  # dark, narrow, plain
    x[1, 0, 8:24, 8:24] = 160  # grey, square, plain
    x[2, 0, 12:20, 2:30] = 255  # bright, wide ...
    x[2, 0, 12:20, 2:30:2] = 150  # ... and patterned
    words = [[pair[i] for pair, i in zip(language.ATTRIBUTES, row)] for row in language.attributes(x).tolist()]
    assert words == [["dark", "narrow", "plain"], ["grey", "square", "plain"], ["bright", "wide", "patterned"]]
    captions = language.captions(x, torch.tensor([1, 8, 7]))
    assert [language.VOCABULARY[i] for i in captions[2]] == ["sneaker", "bright", "wide", "patterned"]


def test_the_semantic_loss_knows_a_picture_from_the_captions_of_others_but_not_from_its_own_again():
    x, own = torch.eye(4), torch.eye(4, dtype=torch.bool)
    assert language.semantic_loss(x, x, own) < 1e-3 < 1 < language.semantic_loss(x, x.roll(1, 0), own)
    pair = torch.zeros(2, 3)
    pair[:, 0] = 1
    assert language.semantic_loss(pair, pair, torch.ones(2, 2, dtype=torch.bool)) == 0
    assert language.semantic_loss(pair, pair, torch.eye(2, dtype=torch.bool)) == pytest.approx(math.log(2))


def test_language_trains_tokens_by_its_weights():
    torch.manual_seed(0)
    words = torch.tensor([[0, 10, 13, 16], [1, 11, 14, 17], [2, 12, 15, 16]])
    vectors = F.normalize(torch.randn(10, 8), dim=1)
    tokens = torch.randn(3, 64, 32, requires_grad=True)
    both = language.Language(words, 0.5, 2.0, vectors)
    loss, figures = both(tokens, torch.arange(3))
    assert loss.item() == pytest.approx(0.5 * figures["semantic"] + 2 * figures["relation"], rel=1e-5)
    loss.backward()
    assert (tokens.grad.flatten(1).norm(dim=1) > 0).all() and both.patch.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="captions of fashion"):
        train.language_of(Plan("cifar10", semantic=1.0), torch.zeros(0), torch.zeros(0))


def test_the_learning_rate_rises_and_ends_at_0():
    assert fit.learning_rate(0.05, 1.0) == pytest.approx(1.0, abs=1e-6)
    assert fit.learning_rate(0.0, 1.0) < 0.05 and fit.learning_rate(1.0, 1.0) < 1e-9


def test_the_report_says_what_was_measured_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "RESULTS", tmp_path)
    plain, _, kd, _ = tokenizers.GROUPS["fashion"]
    assert (plain.kind, kd.kind) == ("plain", "kd")
    row = dict(pictures=10_000, usage=1.0, perplexity=200.0, probe_flat=0.8)
    rows = {
        train.name_of(plain): row | dict(probe_pooled=0.4, psnr=25.0, frechet=0.1),
        train.name_of(kd): row | dict(probe_pooled=0.7),
    }
    tokenizers._write(rows, {"fashion": [plain, kd]}, {"fashion": dict(pixels=0.84, teacher=0.83)}, quick=False)
    text = (tmp_path / "tokenizers.md").read_text()
    assert "| plain VQ | 1.000 | 200.0 | 40.0 | 80.0 | 25.0 | 0.100 |" in text
    assert "| VQ-KD | 1.000 | 200.0 | 70.0 | 80.0 |  |  |" in text
    assert (
        "pooled: VQ-KD above plain by +30.0 points (standard error of one accuracy from 10000 test pictures: at" in text
    )
    assert "## CIFAR-10" not in text and "LG-VQ's losses, on" not in text
    with pytest.raises(SystemExit, match="--only takes fashion, cifar10, language, demo"):
        tokenizers.run(quick=True, fresh=False, only=("clothes",))


def test_the_shipped_tokenizer_has_unit_codes_and_uses_them_on_real_pictures():
    from diffusers import VQModel

    from benchmarks.tokens import data, ship

    if not (data.available("fashion") and (ship.OUT / "vqvae").is_dir()):
        pytest.skip("no Fashion-MNIST or no tokenizer here")
    vq = VQModel.from_pretrained(ship.OUT / "vqvae").eval()
    codes = vq.quantize.embedding.weight.detach()
    assert codes.shape == (256, 32) and torch.allclose(codes.norm(dim=1), torch.ones(256), atol=1e-6)
    pictures = data.pictures("fashion", "test")[0][:200]
    ids = model.ids_of(vq, pictures)
    with torch.no_grad():
        z = vq.encode(pictures.float() / 255).latents.flatten(2).transpose(1, 2)
    assert torch.equal((F.normalize(z, dim=-1) @ codes.T).argmax(-1), ids)
    assert evaluate.usage(ids, 256)["usage"] > 0.9
    assert evaluate.psnr(model.pictures_of(vq, ids), pictures.float() / 255).mean() > 20
