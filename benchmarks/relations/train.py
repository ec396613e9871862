"""Train the networks of the scenes: a diffusion model and two CLIPs on the guide's half, a judge on the judge's half.

    python -m benchmarks.relations.train                 # all four, half an hour of one core
    python -m benchmarks.relations.train judge --minutes 0.1 --out SCRATCH          # to see that it runs

They go to a folder outside of the repository, each with `NAME_training.json`. Minutes are of processor time, so that
other work on the machine does not shorten a run. A run that was stopped, or ended by `--chunk`, goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ..demo.train_classifiers import roughen, save, update_average
from . import networks, scenes

MINUTES = {"unet": 16.0, "clip": 9.0, "clip-plain": 4.5, "judge": 0.6}
BATCH = {"unet": 32, "clip": 128, "clip-plain": 128, "judge": 128}
PEAK = {"unet": 1e-3, "clip": 1e-3, "clip-plain": 1e-3, "judge": 2e-3}
AVERAGE = {"unet": 0.999, "clip": 0.995, "clip-plain": 0.99, "judge": 0.99}
NOISE = {"clip": 0.1, "judge": 0.05}
CHECKPOINT_SECONDS = 60
CHECKED = 4800  # held-out scenes


def learning_rate(progress: float, peak: float) -> float:
    """Short warm-up, constant to the middle, then a cosine to zero."""
    if progress < 0.03:
        return peak * (progress + 1e-4) / 0.03
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (progress - 0.5) / 0.5))))


def fit(name: str, model: torch.nn.Module, loss: Callable[[], torch.Tensor], minutes: float, chunk: float, out: Path):
    """Minimise `loss` of the model for so many minutes, of which at most `chunk` now.

    Returns the averaged model and how it was trained; None where there is more to do.
    """
    average = copy.deepcopy(model).eval().requires_grad_(False)
    plain = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=plain, weight_decay=0.02), dict(params=others, weight_decay=0.0)])
    state, step, spent = out / f"{name}.state.pt", 0, 0.0
    if state.exists():
        held = torch.load(state, weights_only=True)
        for part, values in zip((model, average, optimizer), held["parts"]):
            part.load_state_dict(values)
        step, spent = held["step"], held["spent"]
    torch.manual_seed(step)  # other draws than before the stop

    def checkpoint() -> None:
        parts = [part.state_dict() for part in (model, average, optimizer)]
        torch.save(dict(parts=parts, step=step, spent=time.process_time() - start), state.with_suffix(".tmp"))
        state.with_suffix(".tmp").replace(state)

    begun = time.process_time()
    start, saved, mean = begun - spent, begun, None
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        if time.process_time() - begun > 60 * chunk:
            checkpoint()
            return None
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, PEAK[name])
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, step, AVERAGE[name])
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        step += 1
        if step % 100 == 0:
            print(f"{name} {progress:.0%} step {step} loss {mean:.4f}", flush=True)
        if time.process_time() - saved > CHECKPOINT_SECONDS:
            checkpoint()
            saved = time.process_time()
    checkpoint()
    facts = dict(minutes=minutes, steps=step, batch=BATCH[name], learning_rate=PEAK[name], loss=mean)
    return average, facts | dict(parameters=sum(p.numel() for p in model.parameters()))


# ---- the diffusion model -------------------------------------------------------------------------------------------


def train_unet(minutes: float, chunk: float, out: Path) -> dict | None:
    from ..cifar10.model import build_scheduler
    from ..cifar10.train import loss_of

    pool, model = scenes.garments("guide"), networks.build_unet()
    alphas = build_scheduler().alphas_cumprod

    def loss() -> torch.Tensor:
        pictures = scenes.compose(pool, scenes.random_layouts(BATCH["unet"]))
        return loss_of(model, F.pixel_unshuffle(pictures * 2 - 1, networks.PATCH), alphas)

    done = fit("unet", model, loss, minutes, chunk, out)
    if done is None:
        return None
    done[0].half().save_pretrained(out / "unet", safe_serialization=True)
    build_scheduler().save_pretrained(out / "scheduler")
    return done[1]


# ---- CLIP ----------------------------------------------------------------------------------------------------------


def captions() -> tuple[list[list[str]], torch.Tensor, list[slice]]:
    """Captions in all their forms, whether each is true of each layout `(texts, layouts)`, and the kinds among them.

    The kinds are what is where ("a boot left of a bag"), what is there ("a boot and a bag"), and one thing ("a boot").
    """
    forms, true = [], []

    def names(i: int) -> list[str]:
        own = scenes.CLASSES[i]
        return [own, own, scenes.OTHER_NAMES.get(own, own)]

    def filled(texts: list[str]) -> list[str]:
        return [template.format(text) for text in texts for template in scenes.TEMPLATES]

    for layout in scenes.LAYOUTS:
        texts = []
        for a, relation, b in layout.phrases():
            words = (relation, scenes.OTHER_RELATIONS[relation])
            texts += [scenes.caption(x, word, y) for x in names(a) for y in names(b) for word in words]
        forms.append(filled(texts))
        true.append([layout == other for other in scenes.LAYOUTS])
    kinds = len(scenes.CLASSES)
    for a in range(kinds):
        for b in range(a):
            pairs = [(x, y) for x in names(a) for y in names(b)]
            both = [f"{scenes.article(x)} and {scenes.article(y)}" for pair in pairs for x, y in (pair, pair[::-1])]
            forms.append(filled(both))
            true.append([{a, b} == {other.first, other.second} for other in scenes.LAYOUTS])
    for a in range(kinds):
        forms.append(filled([scenes.article(x) for x in names(a)] + names(a)))
        true.append([a in (other.first, other.second) for other in scenes.LAYOUTS])
    ends = (0, len(scenes.LAYOUTS), len(forms) - kinds, len(forms))
    return forms, torch.tensor(true).float(), [slice(*pair) for pair in zip(ends, ends[1:])]


def train_clip(minutes: float, chunk: float, out: Path, hard: bool = True) -> dict | None:
    """Each scene is to find its captions, and each caption its scenes.

    With `hard` captions among all of each kind: the same things in other places are negatives of every scene. Else as
    a CLIP is trained, among one caption of each scene of the batch, of which a third says where things are: negatives
    of the same things are rare, and relations are learnt last.
    """
    import open_clip

    from ..demo.train_clip import contrast

    pool = scenes.garments("guide")
    forms, true, kinds = captions()
    config = copy.deepcopy(networks.CLIP_CONFIG["model_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    tables = [tokenizer(texts) for texts in forms]
    # the token table holds used tokens alone while training; in order, so that the last is still the end of text
    known = torch.cat(tables).unique()
    config["text_cfg"]["vocab_size"] = len(known)
    tables = [torch.searchsorted(known, table) for table in tables]
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    index = {layout: i for i, layout in enumerate(scenes.LAYOUTS)}

    def _said(layout: scenes.Layout) -> int:
        """One caption of a layout: of any kind, each with the same chance."""
        kind = kinds[torch.randint(len(kinds), ())]
        fitting = true[kind, index[layout]].nonzero()[:, 0]
        return kind.start + fitting[torch.randint(len(fitting), ())].item()

    def loss() -> torch.Tensor:
        layouts = scenes.random_layouts(BATCH["clip"])
        pictures = roughen(scenes.compose(pool, layouts), NOISE["clip"])
        said = range(len(tables)) if hard else [_said(layout) for layout in layouts]
        tokens = torch.stack([tables[i][torch.randint(len(tables[i]), ())] for i in said])
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(((pictures - networks.MEAN) / networks.STD).expand(-1, 3, -1, -1))
            text = model.encode_text(tokens)
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        same = true[list(said)][:, [index[layout] for layout in layouts]].T
        found = [contrast(logits[:, kind], same[:, kind]) for kind in (kinds if hard else [slice(None)])]
        return sum(found) / len(found) + contrast(logits.T, same.T)

    name = "clip" if hard else "clip-plain"
    done = fit(name, model, loss, minutes, chunk, out)
    if done is None:
        return None
    average, facts = done
    whole = open_clip.CLIP(**copy.deepcopy(networks.CLIP_CONFIG["model_cfg"]))
    state = average.state_dict()
    table = torch.zeros_like(whole.token_embedding.weight)
    table[known] = state["token_embedding.weight"]
    whole.load_state_dict(state | {"token_embedding.weight": table})
    folder = out / name
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(networks.CLIP_CONFIG, indent=1) + "\n")
    save(whole, folder / "open_clip_model.safetensors")
    return facts | dict(logit_scale=average.logit_scale.exp().item()) | clip_figures(folder)


@torch.no_grad()
def clip_figures(folder: Path) -> dict:
    """Accuracy on held-out scenes: of the sixty layouts by plain captions; of a layout against the same two things in
    the other three places."""
    from lossguide.losses.clip import load_clip

    clip = load_clip(folder)
    texts = F.normalize(clip.embed_text([scenes.prompt(layout) for layout in scenes.LAYOUTS]), dim=1)
    layouts = list(scenes.LAYOUTS) * (CHECKED // len(scenes.LAYOUTS))
    pictures = scenes.compose(scenes.garments("test"), layouts, torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    scores = torch.cat([F.normalize(clip.embed(part), dim=1) @ texts.T for part in pictures.split(500)])
    wanted = torch.arange(len(scenes.LAYOUTS)).repeat(CHECKED // len(scenes.LAYOUTS))
    alike = torch.tensor([[{a.first, a.second} == {b.first, b.second} for b in scenes.LAYOUTS] for a in scenes.LAYOUTS])
    placed = scores.masked_fill(~alike[wanted], -2).argmax(1) == wanted
    return dict(accuracy=_mean(scores.argmax(1) == wanted), accuracy_of_places=_mean(placed))


# ---- the judge -----------------------------------------------------------------------------------------------------


def train_judge(minutes: float, chunk: float, out: Path) -> dict | None:
    pool = scenes.garments("judge")
    torch.manual_seed(1)
    model = networks.Judge().to(memory_format=torch.channels_last)

    def loss() -> torch.Tensor:
        layouts = scenes.random_layouts(BATCH["judge"])
        pictures = roughen(scenes.compose(pool, layouts), NOISE["judge"])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pictures.contiguous(memory_format=torch.channels_last))
        return sum(F.cross_entropy(one.float(), target, label_smoothing=0.05)
                   for one, target in zip(logits, networks.targets(layouts)))  # fmt: skip

    done = fit("judge", model, loss, minutes, chunk, out)
    if done is None:
        return None
    save(done[0], out / "judge.safetensors")
    layouts = list(scenes.LAYOUTS) * (CHECKED // len(scenes.LAYOUTS))
    pictures = scenes.compose(scenes.garments("test"), layouts, torch.Generator().manual_seed(0))
    right = networks.judged(networks.load_judge(out), pictures, layouts)
    return done[1] | {name: _mean(values) for name, values in right.items()}


def _mean(values: torch.Tensor) -> float:
    return round(values.float().mean().item(), 4)


TRAIN = {
    "unet": train_unet,
    "clip": train_clip,
    "clip-plain": functools.partial(train_clip, hard=False),
    "judge": train_judge,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(TRAIN)}; all unless given")
    parser.add_argument("--minutes", type=float, help="of processor time in all")
    parser.add_argument("--chunk", type=float, default=math.inf, help="minutes of processor time now")
    parser.add_argument("--out", type=Path, default=scenes.FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or TRAIN:
        facts = TRAIN[name](arguments.minutes or MINUTES[name], arguments.chunk, arguments.out)
        if facts is None:
            print(f"{name} is not done yet: run the command again")
            continue
        (arguments.out / f"{name}_training.json").write_text(json.dumps(facts, indent=1) + "\n")
        (arguments.out / f"{name}.state.pt").unlink()
        print(name, json.dumps(facts))


if __name__ == "__main__":
    main()
