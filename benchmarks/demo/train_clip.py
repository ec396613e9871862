"""Train the demo's CLIP: a small open_clip model, contrastively, on captions of Fashion-MNIST's guide half.

    python -m benchmarks.demo.train_clip

Writes `open_clip_config.json` and `open_clip_model.safetensors` (fp16) into `losses/demo/clip`, which
`open_clip.create_model_and_transforms("local-dir:...")` loads, and figures into `losses/demo/clip_training.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from lossguide.losses import demo

from .data import fashion_mnist
from .train_classifiers import NOISE, OUT, batches, learning_rate, save, update_average

CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": [2, 2, 2, 1], "width": 16, "head_width": 64},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.22] * 3, "std": [0.33] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}
FILLER = "zebra"  # stands for a word that no caption uses: the embeddings of all of those are zero


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """Grey pictures (B, 1, 32, 32) in [0, 1] as CLIP's own transform would give them: (B, 3, 64, 64), normalised."""
    config = CONFIG["preprocess_cfg"]
    size = CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    large = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return ((large - config["mean"][0]) / config["std"][0]).expand(-1, 3, -1, -1)


def caption_tokens(tokenizer) -> list[torch.Tensor]:
    """Tokens (N, context) of the captions of each class, the same captions with unknown words among them included.

    "a photo of a red ankle boot on grass" should mean about what "a photo of an ankle boot" does.
    """
    tables = []
    for name in demo.CLASSES:
        plain = demo.captions(name)
        words = sorted({w for word in (name, *demo.SYNONYMS[name]) for w in (word, demo.plural(word))}, key=len)
        filled = []
        for text in plain:
            word = next(word for word in reversed(words) if text.endswith(word))
            for before, after in ((1, 0), (2, 0), (0, 2), (1, 4)):
                filled.append(f"{text.removesuffix(word)}{f'{FILLER} ' * before}{word}{f' {FILLER}' * after}")
        tables.append(tokenizer([*plain * 4, *filled]))
    return tables


def forget_unknown_words(model: open_clip.CLIP, tables: list[torch.Tensor], filler: int) -> None:
    """Zero, and keep at zero, the embedding of every token that no caption uses: the file compresses by that much."""
    known = torch.zeros(model.vocab_size, 1)
    known[torch.cat(tables).unique()] = 1
    known[[0, filler]] = 0  # 0 pads, after the end, where nothing looks
    model.token_embedding.weight.data.mul_(known)
    model.token_embedding.weight.register_hook(lambda gradient: gradient * known)


def contrast(logits: torch.Tensor, same: torch.Tensor, smoothing: float = 0.05) -> torch.Tensor:
    """Cross-entropy of rows against targets that share the mass among all columns of the same class.

    With ten classes every batch holds many captions that fit a picture: plain InfoNCE would push them away.
    """
    target = same / same.sum(1, keepdim=True).clamp_min(1)
    return F.cross_entropy(logits, (1 - smoothing) * target + smoothing / same.shape[1])


@torch.no_grad()
def zero_shot(folder: Path) -> dict:
    """Figures of the model in a folder: zero-shot test accuracy with official names, in all and per class, and more.

    `synonyms` is the mean, `worst_synonym` the lowest accuracy when one class's official name is replaced by one
    synonym; `boots_first` the share of ankle boots among the 1000 test pictures nearest to 'an ankle boot'.
    """
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images, labels = fashion_mnist("test")
    image = torch.cat([model.encode_image(preprocess(part), normalize=True) for part in images.split(500)])

    def text(names: list[str]) -> torch.Tensor:
        return model.encode_text(tokenizer([demo.caption(name) for name in names]), normalize=True)

    def hits(names: list[str]) -> torch.Tensor:
        return (image @ text(names).T).argmax(1) == labels

    official = hits(list(demo.CLASSES))
    replaced = {}
    for i, name in enumerate(demo.CLASSES):
        for synonym in demo.SYNONYMS[name]:
            names = [synonym if j == i else other for j, other in enumerate(demo.CLASSES)]
            replaced[synonym] = hits(names).float().mean().item()
    worst = min(replaced, key=replaced.get)
    nearest = (image @ text(["ankle boot"]).T)[:, 0].topk(1000).indices
    figures = {"all": official.float().mean().item()}
    figures |= {name: official[labels == i].float().mean().item() for i, name in enumerate(demo.CLASSES)}
    return {
        "test_accuracy": {k: round(v, 4) for k, v in figures.items()},
        "synonyms": round(sum(replaced.values()) / len(replaced), 4),
        "worst_synonym": {worst: round(replaced[worst], 4)},
        "boots_first": round((labels[nearest] == 9).float().mean().item(), 4),
    }


def train(epochs: int, batch: int, texts: int, peak: float, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    tables = caption_tokens(tokenizer)
    model = open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"]))
    forget_unknown_words(model, tables, tokenizer.encode(FILLER)[0])
    model.visual.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval()
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embedding" in n]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    start, mean_loss = time.time(), None
    caption_class = torch.arange(texts) % len(tables)
    for step, (progress, images, labels) in enumerate(batches("guide", epochs, batch, NOISE["guide"])):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        tokens = torch.stack([tables[c][torch.randint(len(tables[c]), ())] for c in caption_class.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(preprocess(images).contiguous(memory_format=torch.channels_last))
            text = model.encode_text(tokens)
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        logits = model.logit_scale.exp() * image @ text.T
        same = (labels[:, None] == caption_class).float()
        loss = (contrast(logits, same) + contrast(logits.T, same.T)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)  # open_clip's own bound, a factor of 100
        update_average(average, model, step)
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 100 == 0:
            scale, seconds = model.logit_scale.exp().item(), time.time() - start
            print(f"{progress:.0%} loss {mean_loss:.4f} scale {scale:.1f} {seconds:.0f} s", flush=True)
    minutes = (time.time() - start) / 60

    folder = out / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    save(average, folder / "open_clip_model.safetensors")
    figures = zero_shot(folder)
    facts = {
        "split": "guide",
        "epochs": epochs,
        "batch": batch,
        "texts": texts,
        "learning_rate": peak,
        "seed": seed,
        "minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "logit_scale": round(average.logit_scale.exp().item(), 2),
        **figures,
    }
    (out / "clip_training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch", type=int, default=128, help="pictures per step")
    parser.add_argument("--texts", type=int, default=60, help="captions per step, spread evenly over the classes")
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", action="store_true", help="measure the model that is there; do not train")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(arguments.pop("threads"))
    if arguments.pop("measure"):
        print(json.dumps(zero_shot(arguments["out"] / "clip"), indent=1))
    else:
        train(**arguments)
