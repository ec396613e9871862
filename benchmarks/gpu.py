"""The loop on a CUDA device: eager, compiled and graphed steps against the floor, memory, and where the time goes.

The floor of a step through the denoiser is one forward and one backward to the sample, timed bare by CUDA events. Where
there is no CUDA device, what can be checked on the CPU is: pictures with and without `graphs=True` are bitwise equal.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lossguide.guidance import Guidance, recipes
from lossguide.guidance.gradient import loss_gradient
from lossguide.losses import ClassLabel, Measurement, operators
from lossguide.samplers import Denoiser, denoiser, load_demo, sample
from lossguide.samplers.capture import Captured

from . import real
from .gpu_profile import profiled

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 64)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHORT, LONG = 8, 24  # steps of two runs, whose difference is free of what is done once
TOLERANCE = 1e-3  # mean absolute difference of pictures in [0, 1], beyond what two eager runs differ by
BUDGET = 420.0  # seconds after which nothing more is compiled
Row = dict[str, object]


def models(device: str, dtype: torch.dtype) -> dict[str, Denoiser]:
    """The demo model and, where it is at hand, the real 64x64 one; channels last."""
    found = {"demo 32x32": load_demo(device, dtype)}
    if real.available():
        own = real.model()
        found["real 64x64"] = denoiser(copy.deepcopy(own.model).to(device, dtype), own.scheduler)
    if device != "cpu":
        for model in found.values():
            model.model.to(memory_format=torch.channels_last)
    return found


def guidances(model: Denoiser) -> dict[str, Guidance]:
    """The default recipe, at every visit through the denoiser: a label for the demo, a measurement for all."""
    side = model.shape[1]
    if real.available() and side == 64:
        truth = real.pictures()[:1]
    else:
        truth = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    operator = operators.SuperResolution(2)
    found = {"measurement": recipes.auto(Measurement(operator, operator(truth), sigma=0.01), time_travel=None)}
    if side == 32:
        found = {"label": recipes.auto(ClassLabel("sneaker"), time_travel=None, stop=1.0)} | found
    return found


def compiled(model: Denoiser) -> Denoiser:
    """The same model, compiled for one batch size."""
    return denoiser(torch.compile(model.model, dynamic=False), model.scheduler, shape=model.shape)


def same_pictures(model: Denoiser, guidance: Guidance | None, seeds: Iterable[int], steps: int) -> dict[str, float]:
    """Mean absolute differences of pictures from those of an eager run: of another one, and of a graphed one; and the
    largest relative difference of the first visit's gradient norms."""
    seeds = list(seeds)
    eager, again = (sample(model, guidance, steps=steps, seeds=seeds) for _ in range(2))
    graphed = sample(model, guidance, steps=steps, seeds=seeds, graphs=True)
    found = {"eager": (eager.images - again.images).abs().mean().item()}
    found["graphed"] = (eager.images - graphed.images).abs().mean().item()
    if guidance is not None:
        one, other = (result.record.guided[0]["gradient_norm"].float().cpu() for result in (eager, graphed))
        found["gradient norm"] = ((one - other).abs() / one.clamp_min(1e-20)).max().item()
    return found


def equal(device: str, quick: bool) -> list[Row]:
    """The equality of graphed and eager pictures in float32, as rows.

    Raises:
        RuntimeError: pictures differ by more than `TOLERANCE`, or on the CPU at all.
    """
    rows = []
    deterministic, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        for name, model in models(device, torch.float32).items():
            if quick and name != "demo 32x32":
                continue
            for kind, guidance in {"unguided": None, **guidances(model)}.items():
                steps = 3 if device == "cpu" else 10
                found = same_pictures(model, guidance, range(2 if device == "cpu" else 4), steps)
                rows.append({"model": name, "guidance": kind, **{k: f"{value:.2g}" for k, value in found.items()}})
                print(rows[-1], flush=True)
                allowed = 0.0 if device == "cpu" else TOLERANCE + 2 * found["eager"]
                if not (found["graphed"] <= allowed and found.get("gradient norm", 0.0) <= allowed):
                    raise RuntimeError(f"{name}, {kind}: graphed pictures are not the eager ones: {found}")
    finally:
        torch.backends.cudnn.deterministic = deterministic
    return rows


def seconds_per_visit(model: Denoiser, guidance: Guidance | None, batch: int, repeats: int, **options) -> dict:
    """Milliseconds per visit, from the difference of a long and a short run; what a run costs once; peak memory."""

    def run(steps: int) -> tuple[float, int]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = sample(model, guidance, steps=steps, seeds=range(batch), **options)
        torch.cuda.synchronize()
        return time.perf_counter() - start, len(result.record.rows)

    run(2)  # compiles, chooses kernels, fills caches
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    each, once = [], []
    for _ in range(repeats):
        (short, few), (long, many) = run(SHORT), run(LONG)
        each.append((long - short) / (many - few))
        once.append(short - few * each[-1])
    memory = torch.cuda.max_memory_reserved() / 2**20
    return {"ms": 1e3 * statistics.median(each), "once": statistics.median(once), "MiB": memory}


def by_events(work: Callable[[], object], repeats: int = 7, times: int = 5) -> float:
    """Median milliseconds of a piece of work on the device, by CUDA events around several of it."""
    for _ in range(5):
        work()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / times)
    return statistics.median(found)


def floor(model: Denoiser, guidance: Guidance, batch: int) -> dict[str, float]:
    """Milliseconds of the necessary passes, as torch launches them and captured: a forward, a forward and an input-only
    backward, and one pass of the guide."""
    x = torch.randn(batch, *model.shape, device=model.device)
    t = torch.tensor(100, device=model.device)
    image = torch.rand(batch, 3, *model.shape[1:], device=model.device)
    terms, augment = list(guidance.loss.terms()), guidance.augment
    draws = None if augment is None else torch.rand(augment.copies, batch, 9, device=model.device)

    def guide(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        g, loss, _ = loss_gradient(image, terms, augment, draws)
        return g, loss

    found = {}
    for name, wrap in {"": lambda function: function, ", captured": Captured}.items():
        predict, judge = wrap(model.predict), wrap(guide)

        def both(predict=predict) -> None:
            leaf = x.detach().requires_grad_(True)
            output = predict(leaf, t)
            torch.autograd.grad(output, leaf, torch.ones_like(output))

        with model.frozen():
            with torch.no_grad():
                found[f"forward{name}"] = by_events(lambda predict=predict: predict(x, t))
            found[f"forward and backward{name}"] = by_events(both)
            found[f"guide{name}"] = by_events(lambda judge=judge: judge(image))
    return found


def steps_and_floors(quick: bool, began: float) -> tuple[list[Row], list[Row]]:
    """Rows of times per visit, and of floors."""
    times, floors = [], []
    batches, repeats = (BATCHES[:1], 1) if quick else (BATCHES, 3)
    for precision, dtype in DTYPES.items():
        for name, model in models("cuda", dtype).items():
            for batch in batches:
                kinds = guidances(model)
                base: Row = {"model": name, "dtype": precision, "batch": batch}
                for kind, guidance in ({"unguided": None} | kinds).items():
                    row = base | {"guidance": kind}
                    for way, options in {"eager": {}, "graphed": {"graphs": True}}.items():
                        found = seconds_per_visit(model, guidance, batch, repeats, **options)
                        row |= {way: f"{found['ms']:.2f}", f"{way} MiB": f"{found['MiB']:.0f}"}
                        row[f"once, {way} (s)"] = f"{found['once']:.2f}"
                    times.append(row)
                    print(row, flush=True)
                kind, guidance = next(iter(kinds.items()))
                found = floor(model, guidance, batch)
                floors.append(base | {"guide's loss": kind} | {key: f"{value:.2f}" for key, value in found.items()})
                print(floors[-1], flush=True)
    for row in times:  # at last, as it takes longest
        model = models("cuda", torch.bfloat16)[row["model"]]
        kind, guidance = next(iter(guidances(model).items()))
        if (row["dtype"], row["guidance"]) != ("bfloat16", kind) or time.perf_counter() - began > BUDGET:
            continue
        torch._dynamo.reset()
        faster = compiled(model)
        for way, options in {"compiled": {}, "compiled, graphed": {"graphs": True}}.items():
            row[way] = f"{seconds_per_visit(faster, guidance, row['batch'], 1, **options)['ms']:.2f}"
        print(row, flush=True)
    return times, floors


def table(rows: list[Row]) -> list[str]:
    """Rows as a Markdown table; what a row does not have is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(str(row.get(name, "-")) for name in names) + " |" for row in rows]


def machine() -> str:
    """The device, its driver and the versions, in one line."""
    import subprocess

    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{properties.name}, {memory}, driver {driver}; {versions}, Python {platform.python_version()}"


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Check equality, measure and write the report; without a CUDA device, check what the CPU can."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here: only the equality of the loop with and without graphs is checked.")
        torch.set_num_threads(1)
        equal("cpu", quick)
        print("bitwise equal")
        return
    began = time.perf_counter()
    lines = [
        "# The loop on a CUDA device",
        "",
        "`python -m benchmarks run gpu`",
        "",
        machine() + ".",
        "",
        "## Equality",
        "",
        "Mean absolute difference of pictures in [0, 1] after 10 steps in float32, from an eager run's: of another one "
        "(gradients of `grid_sample` are sums in no fixed order), and of a graphed one; and the largest relative "
        f"difference of gradient norms at the first visit. Allowed: {TOLERANCE:g} beyond twice the eager difference.",
        "",
        *table(equal("cuda", quick)),
    ]
    times, floors = steps_and_floors(quick, began)
    lines += [
        "",
        "## Time per visit",
        "",
        f"Milliseconds of the host's clock, from the difference of runs of {LONG} and {SHORT} steps, medians; `once`: "
        "what a run costs beyond its visits (recording the graphs, above all), in seconds; MiB is the peak memory that "
        "torch reserved, the graphs' own included. Levels are float32 or more, the denoiser has channels last and the "
        "dtype given. Every guided visit goes through the denoiser (`recipes.auto`, without time travel).",
        "",
        *table(times),
        "",
        "## Floor",
        "",
        "Milliseconds on the device, by CUDA events: the necessary passes alone. The label's guide sees eight "
        "augmented copies in one pass; a step toward the measurement asks its loss three times.",
        "",
        *table(floors),
    ]
    model = models("cuda", torch.bfloat16)["demo 32x32"]
    for batch in BATCHES[:1] if quick else (BATCHES[0], BATCHES[-1]):
        for way in (False, True):
            how = "graphed" if way else "eager"
            lines += ["", f"## Profile: demo 32x32, bfloat16, label, batch {batch}, {how}", ""]
            lines += profiled(model, guidances(model)["label"], batch, graphs=way)
    lines += ["", f"Measured in {time.perf_counter() - began:.0f} s."]
    path = RESULTS / ("gpu-quick.md" if quick else "gpu.md")
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(path)
