"""The demo's own CLIP, guide and judge: they load, they differentiate, they know their classes."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lossguide.losses import demo

data = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "demo" / "data.py"))
needs_data = pytest.mark.skipif(not data["available"](), reason="needs the Debian package dataset-fashion-mnist")


@pytest.fixture(scope="module")
def clip():
    open_clip = pytest.importorskip("open_clip")
    name = f"local-dir:{demo.clip_folder()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def clip_input(model, images):
    """Pictures (B, 1, 32, 32) in [0, 1] as the network's own preprocessing configuration asks for them."""
    config = model.visual.preprocess_cfg
    size, interpolation = config["size"], config["interpolation"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    images = F.interpolate(images.expand(-1, 3, -1, -1), size, mode=interpolation, antialias=True)
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (images - mean) / std


def test_importing_the_demo_does_not_import_open_clip():
    code = "import sys, lossguide.losses.demo; sys.exit('open_clip.model' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("which, width", [("guide", 192), ("judge", 64)])
def test_classifier_shapes_and_gradients(which, width):
    network = demo.classifier(which)
    assert not network.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    for shape in [(2, 3, 32, 32), (2, 1, 32, 32), (2, 3, 64, 48), (2, 1, 28, 28)]:
        image = torch.rand(shape, requires_grad=True)
        assert network.features(image).shape == (2, width)
        logits = network(image)
        assert logits.shape == (2, 10)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([3, 9])), image)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    grey = torch.rand(2, 1, 32, 32)
    assert torch.allclose(network(grey), network(grey.expand(-1, 3, -1, -1)), atol=1e-5)


def test_classifier_errors():
    with pytest.raises(ValueError, match="guide, judge"):
        demo.classifier("teacher")
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        demo.classifier("guide")(torch.rand(3, 32, 32))


def test_clip_gradients_reach_the_picture(clip):
    model, _, tokenizer = clip
    assert tokenizer(["a photo of an ankle boot"]).shape == (1, model.context_length)
    image = torch.rand(2, 1, 32, 32, requires_grad=True)
    text = model.encode_text(tokenizer(["a photo of an ankle boot"]), normalize=True)
    features = model.encode_image(clip_input(model, image), normalize=True)
    assert features.shape == (2, text.shape[1])
    (gradient,) = torch.autograd.grad((features @ text.T).sum(), image)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_clip_ignores_words_it_never_read(clip):
    model, _, tokenizer = clip
    with torch.no_grad():
        texts = model.encode_text(tokenizer([demo.caption(name) for name in demo.CLASSES]), normalize=True)
        odd = model.encode_text(tokenizer(["a picture of a crimson ankle boot on wet grass"]), normalize=True)
    assert (odd @ texts.T).argmax() == demo.CLASSES.index("ankle boot")


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("an ankle boot", "ankle boot"),
        ("a Boot!", "ankle boot"),
        ("ANKLE BOOTS", "ankle boot"),
        ("T-shirt/top", "t-shirt"),
        ("two t-shirts", "t-shirt"),
        ("a t shirt", "t-shirt"),
        ("a shirt", "shirt"),
        ("a dress shirt", "shirt"),
        ("dresses", "dress"),
        ("a pair of jeans", "trouser"),
        ("sneakers in the snow", "sneaker"),
        ("a hand-knitted sweater", "pullover"),
        ("a handbag", "bag"),
        ("flip flops", "sandal"),
        ("a dog", None),
        ("", None),
        ("a desktop", None),
        ("a coat and a bag", None),
        ("a shirt or a t-shirt", None),
    ],
)
def test_class_of(prompt, name):
    assert demo.class_of(prompt) == (None if name is None else demo.CLASSES.index(name))


def test_every_caption_names_its_class():
    for i, name in enumerate(demo.CLASSES):
        assert {demo.class_of(text) for text in demo.captions(name)} == {i}
    with pytest.raises(ValueError, match="no class 'hat'"):
        demo.captions("hat")


def test_captions_mind_the_article():
    assert demo.caption("ankle boot") == "a photo of an ankle boot"
    assert demo.caption("dress", "this is a {}") == "this is a dress"
    assert demo.caption("pants", "this is a {}") == "these are pants"
    assert demo.plural("dress") == "dresses" and demo.plural("pair of jeans") == "pair of jeans"


def test_size_budget():
    files = [path for path in demo.FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 9e6


@needs_data
def test_accuracy_on_test_pictures(clip):
    images, labels = (part[:1000] for part in data["fashion_mnist"]("test"))
    model, preprocess, tokenizer = clip
    with torch.no_grad():
        for which in ("guide", "judge"):
            assert (demo.classifier(which)(images).argmax(1) == labels).float().mean() > 0.90
        texts = model.encode_text(tokenizer([demo.caption(name) for name in demo.CLASSES]), normalize=True)
        seen = model.encode_image(clip_input(model, images), normalize=True)
        assert ((seen @ texts.T).argmax(1) == labels).float().mean() > 0.87
        nearest = (seen @ texts[demo.CLASSES.index("ankle boot")]).topk(50).indices
        assert (labels[nearest] == 9).float().mean() > 0.95

        # the stock transform of open_clip, from a PIL picture, sees the same
        from torchvision.transforms.functional import to_pil_image

        stock = torch.stack([preprocess(to_pil_image(image)) for image in images[:8]])
        cosine = F.cosine_similarity(model.encode_image(stock), seen[:8])
        assert cosine.min() > 0.99
