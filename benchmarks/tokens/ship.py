"""Put the demo's tokenizer where the library finds it: samplers/demo_tokens/vqvae, a diffusers VQModel.

    python -m benchmarks.tokens.ship

It is trained first if it is not there. Weights are stored as float16, the codes as float32, so that they keep their
unit norm.
"""

from __future__ import annotations

import json
from pathlib import Path

from . import data
from .train import Plan, name_of, train

DEMO = Plan("fashion", "kd", pixel_steps=3000, soften=0.5, sharp=0.1)
OUT = Path(__file__).parents[2] / "samplers" / "demo_tokens"


def rounded(vq):
    """A VQModel with all weights but the codes in float16; changes it."""
    codes = vq.quantize.embedding.weight.data.clone()
    vq.half().quantize.embedding.weight.data = codes
    return vq


def ship(folder: Path = data.FOLDER, out: Path = OUT) -> None:
    """Save the model, and how it was trained beside it."""
    vq, facts = train(DEMO, folder)
    rounded(vq).save_pretrained(out / "vqvae")
    for file in (out / "vqvae").glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes a file that only its owner can read
    config = json.loads((out / "vqvae" / "config.json").read_text())
    config.pop("_name_or_path", None)  # a path of the machine it was trained on
    (out / "vqvae" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    known = json.loads((folder / f"{DEMO.data}-teacher.json").read_text())
    training = dict(tokenizer=facts, teacher=known)
    (out / "vqvae_training.json").write_text(json.dumps(training, indent=1) + "\n")
    print(f"{name_of(DEMO)} is in {out / 'vqvae'}")


if __name__ == "__main__":
    ship()
