"""Losses in understanding space: encoders against their libraries' own forward, k-means and losses against truths."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from lossguide.guidance import Guidance, recipes
from lossguide.losses import Codebook, FeatureLoss, PatchFeatures, TokenHistogramLoss, TokenLoss, check, registry
from lossguide.losses.tokens import codebook as codebooks
from lossguide.losses.tokens import entropy_of, spherical_kmeans
from torch import nn
from torchvision.utils import save_image


def picture(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def colours(image):
    """The mean colours of squares of 4 pixels, `(B, 3, h, w)`: an encoder whose every number is known."""
    return F.avg_pool2d(image, 4)


def smooth(seed=0, width=6):
    """Two smooth layers whose patches are 4 pixels wide and see no other's pixels."""
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), nn.Conv2d(8, width, 1)), seed)


def squares(*names):
    """A picture `(1, 3, 4, 4 * n)` of n squares of one colour each."""
    known = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "black": (0, 0, 0)}
    return torch.cat([torch.tensor(known[name]).float().view(1, 3, 1, 1).expand(1, 3, 4, 4) for name in names], 3)


RGB = torch.eye(3)
X = picture(2, 3, 32, 32)


# ---- encoders: what each library's own forward gives --------------------------------------------------------------


def test_open_clip_transformer(tiny_clip):
    from lossguide.losses.clip import load_clip

    clip = load_clip(tiny_clip)
    visual, ready = copy.deepcopy(clip.image.network), clip.image.prepare(X)
    visual.output_tokens = True
    encoder = PatchFeatures(tiny_clip)
    torch.testing.assert_close(encoder(X), visual(ready)[1])
    assert encoder.grid == (4, 4) and encoder.maps(X).shape == (2, 32, 4, 4)
    torch.testing.assert_close(encoder.maps(X).flatten(2).transpose(1, 2), encoder(X))
    _, blocks = visual.transformer.forward_intermediates(visual._embeds(ready))
    for index, name in ((1, "transformer.resblocks.1"), (-3, "transformer.resblocks.1")):
        torch.testing.assert_close(PatchFeatures(tiny_clip, index)(X), blocks[1][:, 1:])
        torch.testing.assert_close(PatchFeatures(tiny_clip, name)(X), blocks[1][:, 1:])
    for same in (clip, clip.text, clip.image.network):
        torch.testing.assert_close(PatchFeatures(same, mean=clip.image.mean, std=clip.image.std)(X), encoder(X))
    assert PatchFeatures(clip.text).network.mean == (0.5, 0.4, 0.3) and PatchFeatures(clip.text).network.size == (
        32,
        32,
    )


def test_open_clip_resnet():
    open_clip = pytest.importorskip("open_clip")
    image = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
    visual = seeded(lambda: open_clip.CLIP(embed_dim=8, vision_cfg=image, text_cfg=text)).visual
    x = picture(2, 3, 64, 64)
    third = visual.layer2(visual.layer1(visual.stem(x)))
    last = visual.layer4(visual.layer3(third))
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "size": 64}
    torch.testing.assert_close(PatchFeatures(visual, **plain).maps(x), last)
    for layer in (2, -3, "layer2"):
        torch.testing.assert_close(PatchFeatures(visual, layer, **plain).maps(x), third)


def test_timm():
    timm = pytest.importorskip("timm")
    own = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "reg_tokens": 4}
    vit = seeded(lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False, **own))
    encoder, ready = PatchFeatures(vit), (X - 0.5) / 0.5  # that model's own mean and deviation
    assert encoder.network.size == (32, 32) and encoder.grid == (4, 4)
    torch.testing.assert_close(encoder(X), vit.forward_features(ready)[:, 5:])
    torch.testing.assert_close(PatchFeatures(vit, 1)(X), PatchFeatures(vit, "blocks.1")(X))
    resnet = seeded(lambda: timm.create_model("resnet10t", pretrained=False))
    encoder = PatchFeatures(resnet, size=32)
    torch.testing.assert_close(encoder.maps(X), resnet.forward_features(encoder.network.prepare(X)))
    assert PatchFeatures(resnet, -2, size=32).maps(X).shape == (2, 256, 2, 2)
    with pytest.raises(LookupError, match="timm has no model"):
        PatchFeatures("timm:no_such_model")


def test_torchvision():
    from torchvision import models
    from torchvision.models.swin_transformer import SwinTransformer

    resnet = seeded(models.resnet18)
    ready = (X - torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        -1, 1, 1
    )
    stem = resnet.maxpool(F.relu(resnet.bn1(resnet.conv1(ready))))
    torch.testing.assert_close(
        PatchFeatures(resnet).maps(X), resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(stem))))
    )
    first = resnet.layer1[0]
    before = first.bn1(first.conv1(stem))
    torch.testing.assert_close(PatchFeatures(resnet, "layer1.0.bn1").maps(X), before)  # what overwrites it is not run
    torch.testing.assert_close(PatchFeatures(resnet, "layer1.0.relu").maps(X), before.relu())
    vit = seeded(lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32))
    vit.image_size = 32
    tokens = torch.cat([vit.class_token.expand(2, -1, -1), vit._process_input(ready)], 1)
    torch.testing.assert_close(PatchFeatures(vit)(X), vit.encoder(tokens)[:, 1:])
    torch.testing.assert_close(
        PatchFeatures(vit, -2)(X), vit.encoder.layers[0](tokens + vit.encoder.pos_embedding)[:, 1:]
    )
    swin = seeded(lambda: SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4]))
    torch.testing.assert_close(PatchFeatures(swin, 1).maps(X), swin.features[:2](ready).permute(0, 3, 1, 2))
    with pytest.raises(LookupError, match="torchvision has no model"):
        PatchFeatures("torchvision:no_such_model")


def test_torchvision_by_name_and_a_file(tmp_path):
    from torchvision import models

    network = seeded(models.squeezenet1_1, 3)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = PatchFeatures("torchvision:squeezenet1_1", "features.3", weights=tmp_path / "weights.pth")
    assert encoder.network.size == 224 and encoder.network.mean == (0.485, 0.456, 0.406)
    direct = PatchFeatures(network, "features.3", size=224)
    torch.testing.assert_close(encoder(X), direct(X))
    assert encoder.digest == direct.digest
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of torchvision's squeezenet1_1"):
        PatchFeatures("torchvision:squeezenet1_1", weights=tmp_path / "other.pth")


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    square = {"image_size": 32, "patch_size": 8}
    vit = seeded(lambda: transformers.ViTModel(transformers.ViTConfig(**small, **square)))
    output = vit(X, output_hidden_states=True)
    encoder = PatchFeatures(vit)
    torch.testing.assert_close(encoder(X), output.last_hidden_state[:, 1:])
    assert encoder.grid_at(32, 32) == (4, 4)
    for layer in (0, -2):
        torch.testing.assert_close(PatchFeatures(vit, layer)(X), output.hidden_states[1][:, 1:])
    vit.save_pretrained(tmp_path)
    own = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    torch.testing.assert_close(PatchFeatures(tmp_path)(X), vit((X - 0.5) / 0.25).last_hidden_state[:, 1:])
    clip = seeded(lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**small, **square)))
    torch.testing.assert_close(PatchFeatures(clip)(X), clip(X).last_hidden_state[:, 1:])
    config = transformers.Dinov2WithRegistersConfig(**{k: v for k, v in small.items() if k[0] != "i"}, **square)
    dino = seeded(lambda: transformers.Dinov2WithRegistersModel(config))
    torch.testing.assert_close(PatchFeatures(dino)(X), dino(X).last_hidden_state[:, 1 + config.num_register_tokens :])
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    )
    swin = seeded(lambda: transformers.SwinModel(config))
    wanted = swin(X, output_hidden_states=True)
    torch.testing.assert_close(PatchFeatures(swin)(X), wanted.last_hidden_state)
    torch.testing.assert_close(PatchFeatures(swin, 0).maps(X), wanted.reshaped_hidden_states[1])
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    resnet = seeded(lambda: transformers.ResNetModel(config))
    torch.testing.assert_close(PatchFeatures(resnet).maps(X), resnet(X).last_hidden_state)
    backbone = seeded(lambda: transformers.ResNetBackbone(config))
    torch.testing.assert_close(PatchFeatures(backbone).maps(X), backbone(X).feature_maps[-1])
    with pytest.raises(ValueError, match="2 layers, got 2"):
        PatchFeatures(vit, 2)(X)


def test_patches_come_row_by_row():
    encoder = PatchFeatures(smooth())
    x = picture(1, 3, 12, 20).requires_grad_()
    assert encoder(x).shape == (1, 15, 6) and encoder.grid_at(12, 20) == (3, 5)
    (slope,) = torch.autograd.grad(encoder(x)[0, 7].sum(), x)  # the second row's third
    seen = slope.abs().sum((0, 1)) > 0
    assert seen[4:8, 8:12].all() and seen.sum() == 16
    tokens = PatchFeatures(lambda image: colours(image).flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens.maps(X), colours(X))
    with pytest.raises(ValueError, match="no square"):
        tokens.maps(picture(1, 3, 12, 20))


def test_own_preprocessing_precision_and_overshoot():
    network = smooth()
    encoder = PatchFeatures(network, size=(16, 24), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert encoder.grid == (4, 6) and encoder(X).shape == (2, 24, 6)
    assert encoder(X.bfloat16()).dtype == torch.float32 and encoder(X.double()).dtype == torch.float64
    assert next(network.parameters()).dtype == torch.float32
    x = (2 * X - 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(encoder(x).square().sum(), x)
    assert (slope.abs().amax(1) > 0).all()
    assert not any(p.requires_grad for p in network.parameters())


def test_the_digest_is_of_the_weights():
    network = smooth()
    first = PatchFeatures(network).digest
    assert first == PatchFeatures(copy.deepcopy(network), size=16).digest == PatchFeatures(smooth()).digest
    assert first != PatchFeatures(smooth(1)).digest
    assert PatchFeatures(colours).digest is None
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1e-3
    assert PatchFeatures(network).digest != first


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: PatchFeatures(smooth(), "3"), ValueError, "no layer '3'"),
        (lambda: PatchFeatures(smooth(), 1), ValueError, "is named"),
        (lambda: PatchFeatures(colours, "layer"), ValueError, "no layers to choose"),
        (lambda: PatchFeatures(lambda image: image.mean((2, 3)))(X), ValueError, r"got \(2, 3\)"),
        (lambda: PatchFeatures(lambda image: image[:1])(X), ValueError, r"got \(1, 3, 32, 32\)"),
        (lambda: PatchFeatures(lambda image: "map")(X), ValueError, "got str"),
        (lambda: PatchFeatures(3), TypeError, "a name, a folder, a module or a callable"),
        (lambda: PatchFeatures("no/such/folder"), FileNotFoundError, "neither 'demo'"),
        (lambda: PatchFeatures("open_clip:ViT-B-33/openai"), LookupError, "no model 'ViT-B-33'"),
        (lambda: PatchFeatures(smooth(), weights="file.pth"), ValueError, "by name"),
        (lambda: PatchFeatures("demo", weights="file.pth"), ValueError, "timm or torchvision"),
        (lambda: PatchFeatures(smooth()).grid, ValueError, "grid_at"),
    ],
)
def test_what_is_no_encoder_is_said(make, error, says):
    with pytest.raises(error, match=says):
        make()


# ---- k-means and codebooks ----------------------------------------------------------------------------------------


def planted(clusters=12, points=40, dimension=16, seed=0):
    """Directions far from each other, points of any length around them, and whose each is."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator))[0][:clusters]
    whose = torch.arange(clusters).repeat(points)
    spread = 0.08 * torch.randn(len(whose), dimension, generator=generator)
    lengths = torch.rand(len(whose), 1, generator=generator) * 9 + 0.1
    return centres, (centres[whose] + spread) * lengths, whose


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_come_back(seed):
    centres, points, whose = planted()
    codes, ids = spherical_kmeans(points, 12, seed=seed)
    cosines = centres @ codes.T
    assert (cosines.amax(1) > 0.99).all() and cosines.argmax(1).unique().numel() == 12
    assert torch.equal(cosines.argmax(1)[whose], ids)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(12))
    unit = F.normalize(points, dim=1)
    means = F.normalize(torch.stack([unit[ids == k].mean(0) for k in range(12)]), dim=1)
    torch.testing.assert_close(codes, means)  # each is the mean direction of its own
    again = spherical_kmeans(points, 12, seed=seed)
    assert torch.equal(again[0], codes) and torch.equal(again[1], ids)
    torch.testing.assert_close(spherical_kmeans(points * 3, 12, seed=seed)[0], codes)


def test_dead_codes_find_a_new_place(monkeypatch):
    centres, points, _ = planted()
    grown, starts = codebooks._grown, []

    def all_the_same(points, codes, K, generator):
        starts.append(len(codes))
        return grown(points, codes, K, generator) if len(codes) else points[:1].repeat(K, 1)

    monkeypatch.setattr(codebooks, "_grown", all_the_same)
    codes, ids = spherical_kmeans(points, 12)
    assert starts[:2] == [0, 1] and starts[-1] == 12
    assert torch.bincount(ids, minlength=12).min() > 0
    assert ((centres @ codes.T).amax(1) > 0.99).all()


def test_as_many_codes_as_points_and_too_many():
    points = picture(5, 4)
    codes, ids = spherical_kmeans(points, 5)
    assert sorted(ids.tolist()) == list(range(5))
    torch.testing.assert_close(codes[ids], F.normalize(points, dim=1))
    with_zeros = torch.cat([points, torch.zeros(3, 4)])
    assert spherical_kmeans(with_zeros, 5)[1].shape == (8,)
    for K in (1, 6):
        with pytest.raises(ValueError, match=f"{K} codes of 5 patches"):
            spherical_kmeans(with_zeros, K)


def test_as_many_codes_as_directions_and_no_more():
    points = picture(4, 8)
    often = torch.cat([points * length for length in (1.0, 0.3, 7.0)])  # rounding makes them differ in their last bits
    codes, ids = spherical_kmeans(often, 4)
    assert sorted(ids[:4].tolist()) == list(range(4)) and torch.equal(ids, ids[:4].repeat(3))
    with pytest.raises(ValueError, match="5 codes of 12 patches, which have no more than 4 directions"):
        spherical_kmeans(often, 5)
    with pytest.raises(ValueError, match="no more than 1 directions"):
        Codebook.fit(torch.full((3, 3, 8, 8), 0.5), PatchFeatures(colours), 2)


@pytest.mark.parametrize(
    "row, told", [((0, 0, 0), "not all zero"), ((math.nan, 0, 1), "finite"), ((math.inf, 0, 1), "finite"),
                  ((0, 0, 3), "there twice")],
)  # fmt: skip
def test_a_code_is_a_direction_of_its_own(row, told):
    with pytest.raises(ValueError, match=told):
        Codebook(torch.cat([RGB, torch.tensor([row])]), PatchFeatures(colours))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_codes_on_a_device():
    book = Codebook(RGB.cuda(), PatchFeatures(colours), torch.tensor([1, 2, 3]).cuda())
    assert book.digest == Codebook(RGB, PatchFeatures(colours)).digest
    assert book.ids(squares("blue", "red").cuda()).tolist() == [[2, 0]]


def test_tokens_usage_and_entropy_of_known_colours():
    encoder = PatchFeatures(colours)
    book = Codebook(torch.cat([5 * RGB, torch.ones(1, 3)]), encoder)
    x = torch.cat([squares("red", "white", "red", "black"), squares("green", "red", "white", "red") * 0.3])
    assert book.ids(x)[:, :3].tolist() == [[0, 3, 0], [1, 0, 3]]
    assert torch.equal(book.ids([x[:1], x[1:]]), book.ids(x)) and torch.equal(book.ids(x, batch=1), book.ids(x))
    assert book.count(x[1:]).tolist() == [2, 1, 0, 1] and book.usage(x[1:]) == 0.75
    torch.testing.assert_close(book.tokens(book.ids(x[1:]))[0, 1], torch.tensor([1.0, 0, 0]))
    assert entropy_of(torch.tensor([2, 1, 0, 1])) == pytest.approx(1.5)
    assert Codebook(RGB, encoder, torch.tensor([7, 7, 7])).entropy == pytest.approx(math.log2(3))
    assert Codebook(RGB, encoder, torch.tensor([7, 0, 0])).entropy == pytest.approx(0)
    with pytest.raises(ValueError, match="does not know"):
        book.entropy  # noqa: B018
    for wrong in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="from 0 to 3"):
            book.tokens(wrong)
    for codes, counts in ((torch.ones(3), None), (torch.ones(1, 3), None), (RGB, torch.ones(2))):
        with pytest.raises(ValueError, match="codes|counts"):
            Codebook(codes, encoder, counts)


def test_a_fitted_codebook():
    encoder = PatchFeatures(smooth())
    x = picture(12, 3, 16, 16)
    book = Codebook.fit(x, encoder, 10, seed=3, batch=5)
    assert torch.equal(Codebook.fit(x.split(4), encoder, 10, seed=3).codes, book.codes)
    assert torch.equal(book.counts, book.count(x)) and book.usage(x) == 1.0 and 0 < book.entropy <= math.log2(10)
    nearest = F.cosine_similarity(encoder(x)[:, :, None], book.codes, dim=3).argmax(2)
    assert torch.equal(book.ids(x), nearest)
    assert not book.codes.requires_grad


def test_a_codebook_to_a_folder_and_back(tmp_path, tiny_clip):
    encoder, x = PatchFeatures(smooth(), size=16), picture(4, 3, 16, 16)
    book = Codebook.fit(x, encoder, 5)
    book.save(tmp_path / "own")
    loaded = Codebook.load(tmp_path / "own", PatchFeatures(smooth(), size=16))
    assert torch.equal(loaded.codes, book.codes) and torch.equal(loaded.counts, book.counts)
    assert loaded.digest == book.digest and torch.equal(loaded.ids(x), book.ids(x))
    told = json.loads((tmp_path / "own" / "codebook.json").read_text())
    assert (told["K"], told["d"], told["encoder"]["digest"]) == (5, 6, encoder.digest)
    named = Codebook.fit(x, PatchFeatures(tiny_clip, 1), 5)
    named.save(tmp_path / "named")
    assert torch.equal(Codebook.load(tmp_path / "named").ids(x), named.ids(x))


def test_another_encoder_is_refused(tmp_path):
    book = Codebook.fit(picture(4, 3, 16, 16), PatchFeatures(smooth(), size=16), 5)
    book.save(tmp_path / "own")
    others = {
        "weights": PatchFeatures(smooth(1), size=16),
        "layer": PatchFeatures(smooth(), "1", size=16),
        "size": PatchFeatures(smooth(), size=20),
        "mean": PatchFeatures(smooth(), size=16, mean=(0.5, 0.5, 0.5)),
    }
    for what, other in others.items():
        with pytest.raises(ValueError, match=f"was fitted in Sequential with {what} .*, not in Sequential with"):
            Codebook.load(tmp_path / "own", other)
    with pytest.raises(ValueError, match="other weights"):
        Codebook(book.codes, others["weights"], digest=book.encoder.digest)
    with pytest.raises(ValueError, match="pass encoder="):
        Codebook.load(tmp_path / "own")
    Codebook(RGB, PatchFeatures(colours)).save(tmp_path / "callable")
    Codebook.load(tmp_path / "callable", PatchFeatures(colours))
    with pytest.raises(ValueError, match="fitted in colours with encoder colours"):
        Codebook.load(tmp_path / "callable", PatchFeatures(squares))


def test_a_folder_that_holds_no_codebook_is_refused(tmp_path):
    from safetensors.torch import save_file

    encoder = PatchFeatures(colours)
    with pytest.raises(FileNotFoundError, match="there is no codebook"):
        Codebook.load(tmp_path, encoder)
    Codebook(RGB, encoder).save(tmp_path)
    save_file({"codes": RGB.flip(0).contiguous()}, tmp_path / "codebook.safetensors")
    with pytest.raises(ValueError, match="has changed"):
        Codebook.load(tmp_path, encoder)
    for text in ("{", "[]", '{"format": 9, "encoder": {}, "by_name": null}'):
        (tmp_path / "codebook.json").write_text(text)
        with pytest.raises(ValueError, match="no codebook that can be read"):
            Codebook.load(tmp_path, encoder)


# ---- losses -------------------------------------------------------------------------------------------------------


def test_feature_loss_of_known_colours():
    encoder, reference = PatchFeatures(colours), squares("red", "green", "white")
    loss = FeatureLoss(encoder, reference)
    torch.testing.assert_close(loss(reference), torch.zeros(1))
    torch.testing.assert_close(loss(0.3 * reference), torch.zeros(1))  # as bright as it likes
    torch.testing.assert_close(loss(-reference), torch.full((1,), 2.0))
    torch.testing.assert_close(loss(squares("green", "blue", "white")), torch.full((1,), 2 / 3))
    torch.testing.assert_close(loss(squares("red", "green", "red")), torch.tensor([(1 - 3**-0.5) / 3]))
    torch.testing.assert_close(loss(squares("red", "green", "black")), torch.full((1,), 1 / 3))
    masked = FeatureLoss(encoder, reference, mask=(1 / 3, 0, 1, 1))
    torch.testing.assert_close(masked(squares("blue", "green", "red")), torch.tensor([(1 - 3**-0.5) / 2]))
    each = FeatureLoss(encoder, reference, mask=torch.eye(3)[:2, None])
    assert each.batch == 2
    torch.testing.assert_close(each(squares("blue", "green", "red").repeat(2, 1, 1, 1)), torch.tensor([1.0, 0.0]))


def test_token_loss_of_known_colours():
    book, t = Codebook(RGB, PatchFeatures(colours)), 0.2
    sure = -math.log(math.exp(1 / t) / (math.exp(1 / t) + 2))
    far = -math.log(1 / (math.exp(1 / t) + 2))
    loss = TokenLoss(book, squares("red", "green", "blue", "red"), temperature=t)
    torch.testing.assert_close(loss(squares("red", "green", "blue", "red")), torch.tensor([sure]))
    torch.testing.assert_close(loss(squares("red", "green", "blue", "green")), torch.tensor([(3 * sure + far) / 4]))
    torch.testing.assert_close(loss(squares("white", "white", "white", "white")), torch.tensor([math.log(3)]))
    by_ids = TokenLoss(book, torch.tensor([0, 1, 2, 0]), temperature=t)
    torch.testing.assert_close(by_ids(X[:1, :, :4, :16]), loss(X[:1, :, :4, :16]))
    # a reference in other shades of the same words is the same reference: what, but not how
    shades = squares("red", "green", "blue", "red") * 0.4 + 0.2 * squares("white", "blue", "red", "green")
    torch.testing.assert_close(TokenLoss(book, shades, temperature=t)(X[:1, :, :4, :16]), loss(X[:1, :, :4, :16]))
    assert FeatureLoss(book.encoder, shades)(squares("red", "green", "blue", "red")).item() > 0.05


def test_histogram_of_known_colours():
    book, t = Codebook(RGB, PatchFeatures(colours)), 0.2
    loss = TokenHistogramLoss(book, squares("red", "red", "red", "green"), temperature=t)
    torch.testing.assert_close(loss(squares("red", "green", "red", "red")), torch.zeros(1), atol=1e-6, rtol=0)
    soft = torch.softmax(RGB / t, 1)
    wanted, got = (3 * soft[0] + soft[1]) / 4, (soft[0] + 3 * soft[2]) / 4
    kl = (wanted * (wanted / got).log()).sum()[None]
    torch.testing.assert_close(loss(squares("blue", "red", "blue", "blue")), kl)
    wanted = torch.tensor([0.75, 0.25, 0])
    kl = (wanted[:2] * (wanted[:2] / got[:2]).log()).sum()[None]
    by_ids = TokenHistogramLoss(book, torch.tensor([0, 0, 1, 0, 0, 0, 1, 0]), temperature=t)
    torch.testing.assert_close(by_ids(squares("blue", "red", "blue", "blue")), kl)
    masked = TokenHistogramLoss(book, squares("red", "green"), temperature=t, mask="left")
    torch.testing.assert_close(masked(squares("green", "red", "blue", "blue")), torch.zeros(1), atol=1e-6, rtol=0)


def test_the_histogram_is_free_of_place():
    book = Codebook.fit(picture(6, 3, 16, 16), PatchFeatures(smooth()), 8)
    x = picture(3, 3, 16, 24, seed=1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
    shuffled = patches.unflatten(2, (4, 6)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    histogram, tokens = (kind(book, picture(3, 16, 24, seed=2)) for kind in (TokenHistogramLoss, TokenLoss))
    torch.testing.assert_close(histogram(shuffled), histogram(x))
    assert (tokens(shuffled) - tokens(x)).abs().min() > 1e-3
    assert (histogram(x) > 0).all()
    torch.testing.assert_close(TokenHistogramLoss(book, x)(shuffled), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_gradient_of_tokens_is_bounded(temperature):
    book = Codebook.fit(picture(6, 3, 16, 16), PatchFeatures(smooth()), 8)
    loss = TokenLoss(book, torch.arange(16) % 8, temperature=temperature)
    features = (10 ** (4 * picture(400, 16, 1, seed=5) - 2) * torch.randn(400, 16, 6)).requires_grad_()
    loss.encoder = lambda image: features
    (slope,) = torch.autograd.grad(loss(picture(400, 3, 16, 16)).sum(), features)
    times_length = (slope.norm(dim=2) * features.norm(dim=2)).detach()
    assert times_length.max() <= 2 / temperature / 16
    assert times_length.max() > 0.2 / temperature / 16  # the bound is not an idle one
    assert (slope * features).sum(2).abs().max() < 1e-5 * times_length.max()  # no length is asked for


def test_the_gradient_fades_once_the_word_has_won():
    book = Codebook(RGB, PatchFeatures(colours))
    loss = TokenLoss(book, torch.tensor([0]), temperature=0.07)
    slopes = []
    for shade in (0.0, 0.5, 0.9, 1.1):
        x = (torch.tensor([1.0, 1 - shade, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)).clone().requires_grad_()
        slopes.append(torch.autograd.grad(loss(x).sum(), x)[0].norm().item())
    assert slopes[0] > slopes[1] > slopes[2] > slopes[3]
    assert slopes[3] < 1e-4 * slopes[0]


KINDS = {
    "features": lambda book, wanted, **more: FeatureLoss(book.encoder, wanted, **more),
    "token": TokenLoss,
    "token-histogram": TokenHistogramLoss,
}


@pytest.fixture(scope="module")
def book():
    return Codebook.fit(picture(6, 3, 16, 16), PatchFeatures(smooth(), mean=(0.4, 0.5, 0.6), std=(0.3, 0.3, 0.3)), 8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_finite_differences(kind, book):
    loss = KINDS[kind](book, picture(2, 3, 8, 8, seed=2), mask="left")
    x = (1.6 * picture(2, 3, 8, 8, seed=3, dtype=torch.float64) - 0.3).requires_grad_()  # beyond [0, 1], too
    assert torch.autograd.gradcheck(loss, x, atol=1e-4, rtol=1e-4)
    (slope,) = torch.autograd.grad(loss(x).sum(), x)
    assert (slope[..., :4].abs().amax(1) > 0).all() and (slope[..., 4:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_has_its_own_reference(kind, book):
    wanted, x = picture(2, 3, 16, 16, seed=2), picture(4, 3, 16, 16, seed=4)
    loss = KINDS[kind](book, wanted)
    assert loss.batch == 2 and loss.name == kind
    ones = [KINDS[kind](book, one) for one in wanted]
    torch.testing.assert_close(loss(x), torch.stack([ones[i % 2](x[[i]])[0] for i in range(4)]))
    torch.testing.assert_close(KINDS[kind](book, list(wanted))(x), loss(x))
    assert ones[0].batch == 1
    with pytest.raises(ValueError, match="2 references for 3 images"):
        loss(x[:3])
    with pytest.raises(ValueError, match="3 references and 2 masks"):
        KINDS[kind](book, picture(3, 3, 16, 16), mask=torch.ones(2, 4, 4))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(loss(x)[1], x)
    assert (slope[[0, 2, 3]] == 0).all() and slope[1].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype, book):
    loss, x = KINDS[kind](book, picture(3, 16, 16, seed=2)), picture(3, 3, 16, 16, seed=4)
    half = x.to(dtype).requires_grad_()
    values = loss(half)
    torch.testing.assert_close(values.float(), loss(x), rtol=0.05, atol=0.05)
    (slope,) = torch.autograd.grad(values.sum(), half)
    assert slope.dtype == dtype and slope.isfinite().all() and slope.abs().amax() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_they_keep_to_the_contract(kind, book):
    report = check(KINDS[kind](book, picture(3, 16, 16, seed=2)), (3, 16, 16), device="cpu")
    assert report.ok, report
    values = KINDS[kind](book, picture(3, 8, 8, seed=2), mask="disc")(picture(2, 3, 16, 24, seed=3))
    assert values.shape == (2,) and values.isfinite().all()  # the reference comes to the image's size


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_without_features_pulls_nowhere(kind):
    book = Codebook(RGB, PatchFeatures(colours))
    x = squares("black", "red").requires_grad_()
    (slope,) = torch.autograd.grad(KINDS[kind](book, squares("green", "blue")[0])(x).sum(), x)
    assert slope.isfinite().all() and (slope[..., :4] == 0).all() and slope[..., 4:].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_saved_and_come_back(kind, tiny_clip, tmp_path):
    x = picture(2, 3, 32, 32, seed=3)
    encoder = PatchFeatures(str(tiny_clip), 2)
    book = Codebook.fit(picture(6, 3, 32, 32), encoder, 8)
    loss = KINDS[kind](book, picture(3, 32, 32, seed=2), mask=(0, 0, 0.5, 1))
    recipes.auto(loss).save_pretrained(tmp_path)
    loaded = Guidance.from_pretrained(tmp_path)
    assert torch.equal(loaded.loss(x), loss(x))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "guidance.json").read_text() == (tmp_path / "guidance.json").read_text()
    own = Codebook.fit(picture(6, 3, 16, 16), PatchFeatures(smooth()), 8)
    with pytest.raises(ValueError, match="code is not saved"):
        recipes.auto(KINDS[kind](own, picture(3, 16, 16))).save_pretrained(tmp_path)


def test_tokens_of_another_encoder_are_not_loaded(tiny_clip, tmp_path):
    book = Codebook.fit(picture(6, 3, 32, 32), PatchFeatures(str(tiny_clip)), 8)
    recipes.auto(TokenLoss(book, picture(3, 32, 32))).save_pretrained(tmp_path)
    told = (tmp_path / "guidance.json").read_text()
    assert book.encoder.digest in told
    (tmp_path / "guidance.json").write_text(told.replace(book.encoder.digest, "0" * 16))
    with pytest.raises(ValueError, match="other weights"):
        Guidance.from_pretrained(tmp_path)


def test_by_name(tiny_clip, tmp_path):
    x, clip = picture(2, 3, 32, 32, seed=3), {"clip_model": str(tiny_clip)}
    save_image(picture(3, 32, 32, seed=2), tmp_path / "wanted@2x.png")
    book = Codebook.fit(picture(6, 3, 32, 32), PatchFeatures(str(tiny_clip)), 8)
    book.save(tmp_path / "words")
    wanted = tmp_path / "wanted@2x.png"
    both = f"{tmp_path / 'words'}@{wanted}"
    for text, loss in (
        (f"features:{wanted}", FeatureLoss(book.encoder, wanted)),
        (f"token:{both}", TokenLoss(book, wanted)),
        (f"token-histogram:{both}", TokenHistogramLoss(book, wanted)),
    ):
        torch.testing.assert_close(registry.parse(f"2*{text}", **clip)(x), 2 * loss(x))
    with pytest.raises(ValueError, match="a codebook's folder and a picture"):
        registry.parse(f"token:{tmp_path / 'words'}")
    with pytest.raises(FileNotFoundError, match="no codebook"):
        registry.parse(f"token:{tmp_path}@{wanted}")


def test_what_is_no_wish_is_said(book):
    for ids in (torch.tensor([8]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match="from 0 to 7"):
            TokenLoss(book, ids)
    with pytest.raises(ValueError, match=r"\(P,\) or \(B, P\)"):
        TokenLoss(book, torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="5 tokens for 16 patches"):
        TokenLoss(book, torch.zeros(5, dtype=torch.long))(picture(1, 3, 16, 16))
    for temperature in (0, -1, math.inf):
        with pytest.raises(ValueError, match="above 0"):
            TokenLoss(book, picture(3, 16, 16), temperature=temperature)
    with pytest.raises(FileNotFoundError, match="no picture"):
        FeatureLoss(book.encoder, "no-such-picture.png")


def test_pairs_are_seen_through_the_same_features():
    from lossguide.losses.pairs.features import Encoder

    network = smooth()
    features, patches = Encoder(PatchFeatures(network))(X)
    wanted = Encoder(network)(X)
    torch.testing.assert_close(features, wanted[0])
    torch.testing.assert_close(patches, wanted[1])


def test_words_of_real_pictures_tell_them_apart(shared):
    """In a network trained on real pictures each picture is the nearest to itself, also darker and in other colours."""
    import numpy as np
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2()
    network.load_state_dict(torch.load(shared / "real/imagenet/mobilenet_v2-b0353104.pth", weights_only=True))
    images = np.load(shared / "real/anime64/images.npz")["images"]
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    encoder = PatchFeatures(network, "features.13", size=128)
    book = Codebook.fit(images[100:160], encoder, 64)
    assert book.usage(images[:60]) > 0.95 and book.entropy > 5.5
    tokens, changed = book.ids(images[:8]), images[:8].flip(1) * 0.7
    with torch.no_grad():
        losses = torch.stack([TokenLoss(book, ids)(changed) for ids in tokens])
    assert (losses.argmin(0) == torch.arange(8)).all()
