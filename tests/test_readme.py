"""The README's Python snippets, run as they stand; the package's own promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import PIPELINES

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def offline(monkeypatch):
    """Tiny pipelines in place of the Hub's, and the demo's CLIP in place of ViT-B/32."""
    from diffusers import FluxPipeline, StableDiffusionXLPipeline
    from lossguide.losses import clip

    def tiny(name):
        pipe = PIPELINES[name].build()
        pipe.default_sample_size = 8
        return pipe

    for kind, name in ((StableDiffusionXLPipeline, "sdxl"), (FluxPipeline, "flux")):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, name=name, **kwargs: tiny(name))
    own = clip.load_clip
    monkeypatch.setattr(clip, "load_clip", lambda *args, **kwargs: own("demo", None))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.split("\n")[-2][:40])
def test_snippets_of_the_readme_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in snippet.split("\n") if line.strip() and not line.startswith(("from", "import"))]
    assert len(lines) < 10
    scope: dict = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    images = scope.get("images", scope["result"].images if "result" in scope else None)
    assert (tmp_path / "sandal.png").exists() if images is None else (images.min() >= 0 and images.max() <= 1)


def test_importing_guidance_brings_no_heavy_package():
    code = (
        "import sys, lossguide.guidance; heavy = ('open_clip', 'lpips', 'transformers', 'matplotlib', 'kornia');"
        "print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_imports_point_one_way():
    for folder in ("losses", "samplers"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) .*guidance", file.read_text(), re.MULTILINE), file


def test_the_wheel_is_small_and_holds_the_demo():
    sizes = [f.stat().st_size for folder in ("samplers", "losses") for f in (ROOT / folder).rglob("*.safetensors")]
    assert len(sizes) == 6 and sum(sizes) < 20e6
