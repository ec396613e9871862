"""Example pairs on a real model: what was done to one picture, found from a pair, and undone on others.

`auto` at its default guides the real 64x64 model in bfloat16, with the operator fitted from one pair, with the true
one, and with a wrong one. Then edits without an operator, by a network's features, judged by others. Pair pictures and
queries are disjoint. One row per run goes to `results/imitate.jsonl`; a run that is there is not repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from lossguide.guidance import recipes
from lossguide.losses import Measurement, PairTask, measure
from lossguide.losses.loss import Composable
from lossguide.losses.network import IMAGENET_MEAN, IMAGENET_STD
from lossguide.samplers import sample

from . import imitate_report, losses, real, runs
from .imitate_tasks import EDITS, degradations, family_of, random_task
from .rows import Rows
from .work_restore import filled, psnr

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parents[1] / ".train" / "imitate"  # not committed: pictures of the runs
PAIR = 40
EXAMPLES = (30, 31, 32, 33)
QUERIES = (5, 50, 100, 150)
UNRELATED = range(160, 220)
NOISE, STEPS, SEED = 0.02, 50, 20
DRAWS = 4  # whose mean is judged too


def draw(name: str, loss: Composable | None, count: int, steps: int, seed: int = SEED) -> torch.Tensor:
    """Pictures `(count, 3, 64, 64)` in [0, 1], kept beside for the page."""
    guidance = None if loss is None else recipes.auto(loss)
    images = sample(runs.model_in(real.model, torch.bfloat16), guidance, steps=steps, seeds=range(seed, seed + count))
    path = kept(name, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(images.images, path)
    return images.images


def kept(name: str, steps: int) -> Path:
    """Where a run's pictures are kept."""
    return KEPT / f"{name.replace(' ', '-').replace('%', 'percent')}-{steps}.pt"


# ---- operators -----------------------------------------------------------------------------------------------------


@functools.cache
def degraded(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair's picture and the queries, after a degradation with noise."""
    true = degradations()[task].true
    source = torch.Generator().manual_seed(9)
    pictures = real.pictures()[[PAIR, *QUERIES]]
    y = measure(true, pictures, NOISE, source)
    return y[:1], y[1:]


@functools.cache
def fitted(task: str) -> PairTask:
    """What the one pair tells."""
    return PairTask.fit([(degraded(task)[0][0], real.pictures()[PAIR])])


def trivial(task: str) -> torch.Tensor:
    """The queries as pictures of full size: bicubic, holes filled by their neighbours."""
    q = degraded(task)[1]
    if task == "30 % mask":
        q = filled(q, degradations()[task].true.mask[None, None])
    return F.interpolate(q, (64, 64), mode="bicubic").clamp(0, 1) if q.shape[-1] < 64 else q.clamp(0, 1)


def judge(images: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """PSNR and LPIPS (AlexNet), means over pictures."""
    images = images.clamp(0, 1)
    return dict(psnr=psnr(images, truth).mean().item(), lpips=real.lpips(images, truth).mean().item())


def restore(rows: Rows, task: str, operator: str, count: int, steps: int) -> None:
    """Measure a task with one of the operators, or their absence."""
    key = dict(kind="restore", task=task, operator=operator, queries=count, steps=steps)
    once(rows, key, lambda: _restored(task, operator, count, steps))


def _restored(task: str, operator: str, count: int, steps: int) -> dict:
    truth, q = real.pictures()[list(QUERIES[:count])], degraded(task)[1][:count]
    more = {}
    if operator == "none":
        images = trivial(task)[:count]
    else:
        if operator == "fitted":
            loss = fitted(task).loss(q)
            more = dict(found=fitted(task).family, sigma=loss.sigma)
        else:
            loss = Measurement(getattr(degradations()[task], operator), q, NOISE)
        name = f"{task} {operator}"
        images = draw(name, loss, count, steps)
        more["floors"] = (loss(images) / torch.as_tensor(loss.floor)).mean().item()
    return judge(images, truth) | more


def restore_mean(rows: Rows, task: str, count: int, steps: int) -> None:
    """Measure the mean of several answers by the fitted operator, the first of which is there already."""
    key = dict(kind="restore", task=task, operator="mean", queries=count, steps=steps)
    if not kept(f"{task} fitted", steps).exists():
        return
    loss, truth = fitted(task).loss(degraded(task)[1][:count]), real.pictures()[list(QUERIES[:count])]

    def measured() -> dict:
        answers = [torch.load(kept(f"{task} fitted", steps), weights_only=True)]
        for i in range(1, DRAWS):
            answers.append(draw(f"{task} fitted {i}", loss, count, steps, SEED + 1000 * i))
        return judge(torch.stack(answers).mean(0), truth)

    once(rows, key, measured)


def once(rows: Rows, key: dict, measured: Callable[[], dict]) -> None:
    """Measure what is not there yet and no other process is at."""
    if rows.get(**key) is None:
        with rows.claim(**key) as mine:
            if mine:
                row = rows.add(key | measured())
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


# ---- which family, and none ----------------------------------------------------------------------------------------


def choices(rows: Rows, count: int) -> None:
    """Which family is found for random tasks, of one pair each."""
    for seed in range(count):
        once(rows, dict(kind="choice", seed=seed), lambda: _chosen(seed))  # noqa: B023 called at once


def _chosen(seed: int) -> dict:
    family, operator, noise = random_task(seed)
    after = real.pictures()[[220 + seed]]
    before = measure(operator, after, noise, torch.Generator().manual_seed(seed))
    row = dict(family=family, noise=noise)
    try:
        task = PairTask.fit([(before[0], after[0])])
    except ValueError:
        return row | dict(found="refused", way="", sigma=None)
    return row | dict(found=family_of(task.family), way=task.way, sigma=task.sigma)


def refusals(rows: Rows, count: int) -> None:
    """Whether pairs of unrelated pictures are refused: one, and three of them, with and without a network."""
    for pairs in (1, 3):
        for network in (False, True):
            for seed in range(count):
                key = dict(kind="refusal", pairs=pairs, network=network, seed=seed)
                once(rows, key, lambda: _refused(pairs, network, seed))  # noqa: B023 called at once


def _refused(pairs: int, network: bool, seed: int) -> dict:
    order = torch.randperm(len(UNRELATED), generator=torch.Generator().manual_seed(0)).tolist()
    some = [UNRELATED[order[(seed * 2 * pairs + i) % len(order)]] for i in range(2 * pairs)]
    pictures = real.pictures()[some]
    try:
        return dict(found=PairTask.fit(list(zip(pictures[:pairs], pictures[pairs:])), eyes if network else None).mode)
    except ValueError:
        return dict(found="refused")


# ---- edits ---------------------------------------------------------------------------------------------------------


def eyes(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MobileNetV2's features, the guide: means of an early, a middle and the last map, and the middle map."""
    network, x, maps = losses.mobilenet().features, losses.normalised(image, 128), []
    for i, layer in enumerate(network):
        x = layer(x)
        if i in (3, 6, 18):
            maps.append(x)
    return torch.cat([F.normalize(one.mean((2, 3)), dim=1) for one in maps], 1), maps[1]


@functools.cache
def _vgg():
    from torchvision.models import vgg16

    network = vgg16(weights=None).features
    state = torch.load(real.FOLDER / "lpips" / "vgg16_features.pt", weights_only=True)
    network.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    return network.eval().requires_grad_(False)


@torch.no_grad()
def judged_features(image: torch.Tensor, net: str) -> torch.Tensor:
    """Another network's features `(B, d)`: AlexNet's or VGG-16's last map, its mean over places."""
    network = real.alexnet() if net == "alexnet" else _vgg()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = F.interpolate(image.clamp(0, 1), (128, 128), mode="bilinear", antialias=True)
    return network((image - mean) / std).mean((2, 3))


def similarity(images: torch.Tensor, queries: torch.Tensor, edit: Callable, net: str) -> float:
    """The cosine of the answers' change to the mean change of the examples, in a network that did not guide."""
    examples = real.pictures()[list(EXAMPLES)]
    changes = judged_features(edit(examples), net) - judged_features(examples, net)
    wanted = F.normalize(changes, dim=1).mean(0)
    change = judged_features(images, net) - judged_features(queries, net)
    return F.cosine_similarity(change, wanted[None]).mean().item()


def edited(rows: Rows, edit: str, kind: str, count: int, steps: int) -> None:
    """Measure an edit by direction or analogy, of the unguided model, or done by image processing."""
    key = dict(kind="edit", task=edit, by=kind, queries=count, steps=steps)
    once(rows, key, lambda: _edited(edit, kind, count, steps))


def _edited(edit: str, kind: str, count: int, steps: int) -> dict:
    queries, done = real.pictures()[list(QUERIES[:count])], EDITS[edit]
    if kind == "itself":
        images = done(queries)
    elif kind == "unguided":
        images = unguided(count, steps)
    else:
        task = PairTask.fit([(one, done(one)) for one in real.pictures()[list(EXAMPLES)]], eyes, mode=kind)
        images = draw(f"{edit} {kind}", task.loss(queries), count, steps)
    row = {net: similarity(images, queries, done, net) for net in ("alexnet", "vgg16")}
    row |= {
        f"{name} lpips": real.lpips(images, what).mean().item()
        for name, what in (("query", queries), ("edit", done(queries)))
    }
    return row


@functools.cache
def unguided(count: int, steps: int) -> torch.Tensor:
    """What the model draws of the same seeds without guidance."""
    return draw("unguided", None, count, steps)


# ---- all of it -----------------------------------------------------------------------------------------------------


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Measure, and write the report; `only` some of the degradations and edits, choice and refusal."""
    if not real.available():
        raise SystemExit("the real model is not on this machine")
    names = ("choice", "refusal", *degradations(), *EDITS)
    for name in only:
        if name not in names:
            raise SystemExit(f"there is no {name!r}; there are {', '.join(names)}")
    torch.set_num_threads(1)
    count, steps = (1, 5) if quick else (len(QUERIES), STEPS)
    file = "imitate-quick" if quick else "imitate"
    rows = Rows(RESULTS / f"{file}.jsonl", runs.weights_digest(real.model), fresh)
    if not only or "choice" in only:
        choices(rows, 5 if quick else 20)
    if not only or "refusal" in only:
        refusals(rows, 2 if quick else 10)
    wanted = [task for task in degradations() if not only or task in only]
    for operators in (("none", "fitted", "true"), ("wrong",)):  # the most telling first
        for task in wanted:
            for operator in operators:
                restore(rows, task, operator, count, steps)
    for kind in ("itself", "unguided", "direction"):
        for edit in EDITS:
            if not only or edit in only:
                edited(rows, edit, kind, count, steps)
    for task in () if quick else ("4x reduction",):
        if task in wanted:
            restore_mean(rows, task, count, steps)
    imitate_report.write(rows, file, count, steps)
