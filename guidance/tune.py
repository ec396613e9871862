"""Tuning: a search over strength, time travel and the rest, for one's own loss and model, scored by a judge."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..losses.loss import Composable, Loss, Losses, as_losses
from ..samplers import Denoiser, TimeTravel, sample
from ..samplers.plain import plain
from . import recipes
from .augment import Augment
from .files import write_whole
from .guidance import Guidance
from .saved import check_types
from .tune_plot import plot_history

SEEDS = range(50_000, 50_008)
_JOURNAL, _TRIALS, _BEST, _HISTORY = "journal.log", "trials.json", "best.json", "history.png"
_AT_ONCE = 64  # pictures drawn or judged at once
# what a setting within a part changes where the recipe has no such part; either does nothing as it stands
_ABSENT = {"time_travel": TimeTravel(1, 0.25, 0.75), "augment": Augment.geometric(1)}

_SETTINGS = [name for name in Guidance.__dataclass_fields__ if name != "loss"]

Draw = Callable[[Guidance, list[int], int], torch.Tensor]


@dataclass(frozen=True)
class Trial:
    """One try.

    Attributes:
        number: from 0; trial 0 is the recipe as it is.
        settings: what was tried, see `with_settings`.
        score: the judge's mean over the pictures, lower is better; None where it failed.
        seconds: how long it took.
        failure: why it failed, else None.
    """

    number: int
    settings: dict[str, Any]
    score: float | None
    seconds: float
    failure: str | None = None


@dataclass(frozen=True)
class Fresh:
    """The recipe as it is and the best settings on seeds that the search never saw.

    The best of many scores is the best partly by chance, so `score` of `Tuned` flatters; this does not.

    Attributes:
        seeds: one per picture.
        own, best: the judge's mean; None where it is not finite.
        error: standard error of `own - best`, from their differences seed by seed; None below two pictures.
    """

    seeds: list[int]
    own: float | None
    best: float | None
    error: float | None


@dataclass(frozen=True)
class Tuned:
    """What tuning gives.

    Attributes:
        guidance: the recipe with the best settings.
        settings: the best settings, see `with_settings`.
        score: their score in the search, lower is better.
        fresh: their score on fresh seeds, beside that of the recipe as it is.
        trials: all that was tried, in order.
    """

    guidance: Guidance
    settings: dict[str, Any]
    score: float
    fresh: Fresh
    trials: tuple[Trial, ...]


def default_space() -> dict[str, Any]:
    """What is searched by default: the name of a setting -> an Optuna distribution.

    A name is a field of `Guidance`, or one within its `time_travel`, `augment` or `rule` after a dot ("rule.k").
    `augment.copies` 0 is no augmentation, `time_travel.repeats` 1 or an empty window no time travel.

    Raises:
        ImportError: Optuna is not installed.
    """
    distributions = _optuna().distributions
    return {
        "strength": distributions.FloatDistribution(0.1, 10.0, log=True),
        "stop": distributions.FloatDistribution(0.5, 1.0),
        "through": distributions.CategoricalDistribution(("denoiser", "x0")),
        "augment.copies": distributions.CategoricalDistribution((0, 4, 8)),
        "time_travel.repeats": distributions.IntDistribution(1, 4),
        "time_travel.start": distributions.FloatDistribution(0.0, 0.45),
        "time_travel.stop": distributions.FloatDistribution(0.5, 1.0),
    }


def with_settings(guidance: Guidance, settings: Mapping[str, Any]) -> Guidance:
    """The guidance with some settings changed, as `tune` names them; `best.json` holds such settings.

    Args:
        guidance: what a recipe returned.
        settings: name -> value, such as `{"strength": 2.0, "time_travel.repeats": 3}`; see `default_space`.

    Raises:
        ValueError: there is no such setting, or the values do not go together.
    """
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        _own_value(guidance, name)  # says what is wrong with the name
        part, _, field = name.partition(".")
        if field and part in settings:
            raise ValueError(f"the settings name '{part}' and '{name}', which is a part of it: leave out either")
        if field:
            changes.setdefault(part, {})[field] = value
        else:
            changes[part] = value
            check_types(Guidance, {name: value})
    for part in {name.partition(".")[0] for name in settings if "." in name}:
        fields = changes[part]
        held = getattr(guidance, part) or _ABSENT[part]
        check_types(type(held), fields, (part,))
        window = [fields.get(end, getattr(held, end, None)) for end in ("start", "stop")]
        empty = part == "time_travel" and window[0] >= window[1]
        absent = empty or (part == "augment" and fields.get("copies") == 0)
        changes[part] = None if absent else dataclasses.replace(held, **fields)
    return guidance.replace(**changes)


def tune(
    model: Denoiser | Draw,
    loss: Composable | Callable[[torch.Tensor], torch.Tensor],
    judge: Composable | Callable[[torch.Tensor], torch.Tensor],
    *,
    recipe: str | Callable[..., Guidance] = "auto",
    trials: int = 30,
    seeds: Iterable[int] = SEEDS,
    steps: int = 50,
    space: Mapping[str, Any] | None = None,
    folder: str | os.PathLike | None = None,
    setup: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Tuned:
    """Search the settings of a recipe that a judge likes best, for one loss and one model.

    Trial 0 is the recipe as it is; nine random ones follow, and then Optuna's TPE sampler (Bergstra et al. 2011)
    proposes what to try, from what was good so far. Every trial draws the same seeds, so that scores differ by the
    settings only. In the end the best settings and the recipe as it is are drawn once more on as many fresh seeds.

    What it costs: a trial draws all the pictures with all the steps, and up to four times that under time travel; the
    whole is `trials + 2` such runs. Settings depend on the number of steps: tune with the one that is used later.

    With a folder, each trial is kept as soon as it ends: `journal.log` (Optuna's), `trials.json`, `history.png`, and
    `best.json` in the end. The same call on the same folder goes on where the last one stopped or was killed, up to
    `trials` in all. One search at a time per folder.

    Args:
        model: from `lossguide.samplers.denoiser`; or, for a pipeline, any callable `(guidance, seeds, steps)` -> images
            `(B, 1 or 3, H, W)` in [0, 1], one per seed.
        loss: what guides.
        judge: what scores: a loss or callable, images `(B, 3, H, W)` -> `(B,)`, lower is better. Not the guide, which
            the search would only learn to fool.
        recipe: a name, or a callable `loss -> Guidance`.
        trials: how many in all, those of earlier calls on the folder included.
        seeds: one per picture.
        steps: solver steps.
        space: name -> Optuna distribution in place of `default_space()`; what the recipe itself has is added to it,
            choices that the recipe refuses are left out.
        folder: where the history lies; None keeps it in memory.
        setup: plain data that tell apart what the arguments do not (the file of a model's weights).
        progress: show a progress bar, with the best score on it.

    A trial fails where its score or a picture is not finite, it raises FloatingPointError, the memory does not hold it,
    its settings do not go together, or, but for the recipe as it is, it raises ValueError, as where its window holds no
    step. It counts, and the search goes on.

    Raises:
        ValueError: the judge is the guide; the folder holds the search of another setup; there is no such setting; or
            no trial gave a finite score.
        LookupError: there is no such recipe.
        ImportError: Optuna is not installed.
    """
    optuna = _optuna()
    loss, judge, seeds = as_losses(loss), as_losses(judge), [int(seed) for seed in seeds]
    if trials < 1 or not seeds:
        raise ValueError(f"tuning needs at least one trial and one seed, got {trials} and {len(seeds)}")
    _refuse_guide(loss, judge)
    own = (recipes.get(recipe) if isinstance(recipe, str) else recipe)(loss)
    space = default_space() if space is None else space
    start = {name: _own_value(own, name) for name in space}
    space = {name: _suited(distribution, own, name) for name, distribution in space.items()}
    draw = _drawn_by(model) if isinstance(model, Denoiser) else model

    def attempt(settings: Mapping[str, Any], seeds: list[int]) -> tuple[torch.Tensor | None, str | None]:
        try:
            guidance = with_settings(own, settings)
        except ValueError as error:
            return None, str(error)
        try:
            return _scores(draw(guidance, seeds, steps), judge), None
        except ValueError as error:  # as of a window that holds no step
            if settings == start:
                raise
            return None, str(error).split("\n")[0]
        except (FloatingPointError, MemoryError, torch.cuda.OutOfMemoryError) as error:
            return None, str(error).split("\n")[0] or type(error).__name__

    setup = {
        "model": _model(model),
        "loss": [described(term) for term in loss.terms()],
        "judge": [described(term) for term in judge.terms()],
        "recipe": {key: value for key, value in own.to_dict().items() if key != "loss"},
        "seeds": seeds,
        "steps": steps,
        "space": {name: optuna.distributions.distribution_to_json(one) for name, one in space.items()},
        **(setup or {}),
    }
    setup = json.loads(re.sub(r" at 0x[0-9a-fA-F]+", "", json.dumps(plain(setup))))
    place = None if folder is None else Path(folder)
    with _quiet(optuna):
        study = _study(optuna, place, setup, start)
        search = _Search(optuna, study, space, start, attempt, seeds, place)
        try:
            search.run(trials, progress)
        finally:
            search.write()
    done = search.trials()
    best = best_trial(done)
    if best is None:
        raise ValueError(f"none of the {len(done)} trials gave a finite score; the first failed: {done[0].failure}")
    fresh = _fresh(attempt, done[0].settings, best.settings, range(max(seeds) + 1, max(seeds) + 1 + len(seeds)))
    tuned = Tuned(with_settings(own, best.settings), best.settings, best.score, fresh, done)
    if place is not None:
        about = {"settings": best.settings, "trial": best.number, "score": best.score, "own_score": done[0].score}
        _write_json(place / _BEST, {**about, "fresh": dataclasses.asdict(fresh), "guidance": tuned.guidance.to_dict()})
    return tuned


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The trial of the lowest score, the earliest of equals; None where all failed."""
    return min((trial for trial in trials if trial.score is not None), key=lambda trial: trial.score, default=None)


class _Search:
    """A study with what its trials need."""

    def __init__(self, optuna, study, space, start, attempt, seeds: list[int], folder: Path | None):
        self.optuna, self.study, self.space, self.start = optuna, study, space, start
        self.attempt, self.seeds, self.folder = attempt, seeds, folder

    def run(self, trials: int, progress: bool) -> None:
        """Finish what was interrupted, with the settings that it had, and then try new ones up to `trials` in all."""
        unfinished = [trial for trial in self._begun() if not trial.state.is_finished()]
        done = len(self._begun()) - len(unfinished)
        with tqdm(total=max(trials, done + len(unfinished)), initial=done, disable=not progress, unit="trial") as bar:
            while unfinished or len(self._begun()) < trials:
                best = best_trial(self.trials())
                if best is not None:
                    bar.set_postfix(best=f"{best.score:.4g}")
                trial = unfinished.pop(0) if unfinished else self._ask()
                self._try(trial.number, trial.params)
                bar.update()

    def _ask(self):
        # a sampler of its own for every trial, so that a search that was resumed goes the way of one that was not
        number = len(self._begun())
        self.study.sampler = self.optuna.samplers.TPESampler(seed=(self.seeds[0] + 1_000_003 * number) % 2**32)
        return self.study.ask(self.space)

    def _try(self, number: int, params: dict[str, Any]) -> None:
        begun = time.perf_counter()
        scores, failure = self.attempt(self._settings(params), self.seeds)
        about = {"seconds": round(time.perf_counter() - begun, 2), "failure": failure}
        self.study.set_user_attr(f"trial {number}", about)
        if scores is None:
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(number, scores.mean().item())
        if self.folder is not None:
            self._write_trials()

    def _begun(self) -> list:
        waiting = self.optuna.trial.TrialState.WAITING
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != waiting]

    def _settings(self, params: dict[str, Any]) -> dict[str, Any]:
        """What is tried for what Optuna proposes: numbers of three digits; the recipe's own are left as they are."""
        settings = {}
        for name, own in self.start.items():
            value = params.get(name, own)
            settings[name] = float(f"{value:.3g}") if isinstance(value, float) and value != own else value
        return settings

    def trials(self) -> tuple[Trial, ...]:
        """What is finished, in order."""
        about = self.study.user_attrs
        return tuple(
            Trial(one.number, self._settings(one.params), one.value, **about[f"trial {one.number}"])
            for one in self._begun()
            if one.state.is_finished()
        )

    def write(self) -> None:
        """Write the history into the folder, where there is one."""
        if self.folder is None:
            return
        self._write_trials()
        logarithmic = [name for name, distribution in self.space.items() if getattr(distribution, "log", False)]
        plot = io.BytesIO()
        plot_history(self.trials(), plot, logarithmic)
        write_whole(self.folder / _HISTORY, plot.getvalue())

    def _write_trials(self) -> None:
        trials = [dataclasses.asdict(trial) for trial in self.trials()]
        _write_json(self.folder / _TRIALS, {"setup": self.study.user_attrs["setup"], "trials": trials})


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise ImportError('tuning needs Optuna, which is not installed: pip install "lossguide[tune]"') from error
    return optuna


@contextmanager
def _quiet(optuna) -> Iterator[None]:
    """Optuna without its lines about each study."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _study(optuna, folder: Path | None, setup: dict[str, Any], start: dict[str, Any]):
    """The study of a folder, begun where there is none.

    Raises:
        ValueError: it is that of another setup.
    """
    storage, journal, resumed = None, None, False
    if folder is not None:
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        folder.mkdir(parents=True, exist_ok=True)
        journal = folder / _JOURNAL
        _refuse_others(folder)
        _mend(journal)
        resumed = journal.is_file() and journal.stat().st_size > 0
    try:
        if journal is not None:
            backend = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
            storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
        for one in study.get_trials(deepcopy=False):
            if one.state.is_finished():
                Trial(one.number, {}, one.value, **study.user_attrs[f"trial {one.number}"])
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged journal raises is not limited to a few kinds
        if not resumed:
            raise
        raise ValueError(f"the journal '{journal}' is damaged ({error!r}); choose another folder") from error
    before = study.user_attrs.get("setup", setup)
    if not isinstance(before, dict):
        raise ValueError(f"the journal '{journal}' is damaged: it does not tell of a setup; choose another folder")
    changed = sorted(key for key in {*before, *setup} if before.get(key) != setup.get(key))
    if changed:
        raise ValueError(
            f"the folder '{folder}' holds a search that differs in {', '.join(changed)}; choose another folder, or "
            "go on with what it was begun with"
        )
    study.set_user_attr("setup", setup)
    if not study.trials:
        study.enqueue_trial(start)
    return study


def _refuse_others(folder: Path) -> None:
    """Raises ValueError where a file that a search writes is not one of a search, or is a link that leads elsewhere."""
    searched = (folder / _JOURNAL).exists()
    for path in (folder / name for name in (_JOURNAL, _TRIALS, _BEST, _HISTORY)):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"'{path}' is a link or no file, and a search writes its own there; choose another folder")
        if path.exists() and not searched:
            raise ValueError(f"'{path}' is not of a search, as there is no {_JOURNAL} beside; choose another folder")


def _mend(journal: Path) -> None:
    """Cut off a line that a killed run left half-written, past which Optuna could not read its journal."""
    content = journal.read_bytes() if journal.is_file() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)


def _own_value(guidance: Guidance, name: str) -> Any:
    """What the guidance itself has for a setting.

    Raises:
        ValueError: there is no such setting.
    """
    part, dot, field = name.partition(".")
    known = part in Guidance.__dataclass_fields__
    held = getattr(guidance, part) if known else None
    if name == "augment.copies" and held is None:
        return 0
    within = _ABSENT.get(part) if held is None else held
    if not known or part == "loss" or (dot and field not in getattr(within, "__dataclass_fields__", ())):
        raise ValueError(
            f"there is no setting '{name}' of '{guidance.name}'; there are {', '.join(_SETTINGS)}, "
            "and after a dot the fields of its parts, such as time_travel.repeats"
        )
    return getattr(within, field) if field else held


def _suited(distribution: Any, guidance: Guidance, name: str) -> Any:
    """The distribution with the recipe's own value in it, and without choices that the recipe refuses."""
    own = _own_value(guidance, name)
    if not hasattr(distribution, "choices"):
        if isinstance(own, bool) or not isinstance(own, int | float):
            raise ValueError(f"'{name}' is {own!r} in '{guidance.name}', no number: give choices to search among")
        options = {"log": distribution.log, "step": distribution.step}
        return type(distribution)(min(distribution.low, own), max(distribution.high, own), **options)
    choices = [own] if own not in distribution.choices else []
    for choice in distribution.choices:
        try:
            with_settings(guidance, {name: choice})
        except ValueError:
            continue
        choices.append(choice)
    return type(distribution)(choices)


def _drawn_by(denoiser: Denoiser) -> Draw:
    def draw(guidance: Guidance, seeds: list[int], steps: int) -> torch.Tensor:
        images = sample(denoiser, guidance, steps=steps, seeds=seeds, batch_size=_AT_ONCE).images
        return images.to(denoiser.device)

    return draw


@torch.no_grad()
def _scores(images: torch.Tensor, judge: Losses) -> torch.Tensor:
    """The judge's loss of each picture, `(B,)`, float64 on the CPU.

    Raises:
        FloatingPointError: a picture or its score is not finite.
    """
    if not images.isfinite().all():
        raise FloatingPointError("a picture is not finite")
    images = images.float().expand(-1, 3, -1, -1)
    scores = torch.cat([judge(part) for part in images.split(_AT_ONCE)]).double().cpu()
    if not scores.isfinite().all():
        raise FloatingPointError("the judge's score is not finite")
    return scores


def _fresh(attempt, own: dict[str, Any], best: dict[str, Any], seeds: range) -> Fresh:
    first, _ = attempt(own, list(seeds))
    second, _ = (first, None) if best == own else attempt(best, list(seeds))
    error = None
    if first is not None and second is not None and len(seeds) > 1:
        error = ((first - second).std() / len(seeds) ** 0.5).item()
    means = [None if scores is None else scores.mean().item() for scores in (first, second)]
    return Fresh(list(seeds), *means, error)


def _refuse_guide(loss: Losses, judge: Losses) -> None:
    for guide in loss.terms():
        for term in judge.terms():
            if _same(guide.loss, term.loss):
                raise ValueError(
                    f"the judge is the guide, '{term.name}': the search would learn to fool it; judge by another loss, "
                    "best by a network that saw other pictures"
                )


def _same(first: Any, second: Any) -> bool:
    """Whether two losses are one, or were made alike."""
    if first is second:
        return True
    if isinstance(first, Loss) and isinstance(second, Loss):
        if type(first) is not type(second) or not first.settings or plain(first.settings) != plain(second.settings):
            return False
        # settings name a network that the user gave by its class only
        networks = [getattr(getattr(loss, "network", None), "network", None) for loss in (first, second)]
        if not all(isinstance(network, torch.nn.Module) for network in networks):
            return True
        pairs = zip(*(network.state_dict().values() for network in networks))
        return all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
    if not (inspect.isfunction(first) and inspect.isfunction(second)):
        return False
    # the same function of the same file, read twice
    return first.__code__ == second.__code__ and first.__closure__ is None and second.__closure__ is None


def described(term) -> dict[str, Any]:
    """A term as plain data that is the same in every process; the user's own code as a digest of its source."""
    data = term.describe()
    data["loss"] = re.sub(r"(_lossguide_\w+?)_\d+\b", r"\1", data["loss"])  # the registry's name of a user's file
    if not isinstance(term.loss, Loss):
        own = term.loss if inspect.isroutine(term.loss) else type(term.loss)
        try:
            data["source"] = hashlib.sha256(inspect.getsource(own).encode()).hexdigest()[:12]
        except (OSError, TypeError):  # typed in, or not Python
            pass
    return plain(data)


def _model(model: Any) -> dict[str, Any]:
    if not isinstance(model, Denoiser):
        return {"class": getattr(model, "__qualname__", type(model).__qualname__)}
    network, scheduler = model.model, model.scheduler
    return {
        "class": getattr(network, "__qualname__", type(network).__qualname__),
        "config": dict(getattr(network, "config", {})),
        "scheduler": {"class": type(scheduler).__qualname__, **dict(scheduler.config)},
        "shape": model.shape,
        "kind": model.kind,
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(plain(data), indent=1) + "\n").encode())
