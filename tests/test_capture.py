"""Replayed functions: the same pictures as without, what a CUDA graph repeats and what it cannot, and no waiting.

There is no CUDA device here: a tape of the operations stands for the graph, and tensors that only say that they are
elsewhere for the device.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import diffusers
import pytest
import torch
from away import Away, Device, moved_away
from lossguide.guidance import Augment, Guidance, recipes
from lossguide.guidance.steps import Constant
from lossguide.losses import ClassLabel, Color, Measurement, operators
from lossguide.losses.network import constant, moved
from lossguide.samplers import Record, Solver, capture, denoiser, sample
from lossguide.samplers.capture import WARMUPS, Captured, Latest, Watch
from lossguide.samplers.random import generators
from models import tiny_unet, vp_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

SIDE = 8
LABEL = ClassLabel("sneaker")
HALVED = operators.SuperResolution(2)
SMALLER = Measurement(HALVED, HALVED(torch.linspace(0, 1, 3 * SIDE**2).view(1, 3, SIDE, SIDE)), sigma=0.01)


class Tape(TorchDispatchMode):
    """The operations of a body, done again on the same memory: like a CUDA graph, without its Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.done:
                again = function(*args, **kwargs)
                for old, new in zip(capture._tensors(result), capture._tensors(again)):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                        old.copy_(new)


def taped(bodies, inputs, shared):
    capture.warm_up(bodies)
    replays = []
    for body in bodies:
        with Tape() as tape:
            body()
        replays.append(tape.replay)
    return replays


@pytest.fixture(scope="module")
def tiny():
    return denoiser(tiny_unet(), vp_scheduler(prediction_type="v_prediction", clip_sample=True))


def late(image):
    return (image - 0.3).square().flatten(1).sum(1)


CASES = {
    "unguided": lambda: None,
    "auto": lambda: recipes.auto(LABEL, time_travel=None),
    "auto, measurement": lambda: recipes.auto(SMALLER),
    "both kinds of visits": lambda: recipes.auto(LABEL, through_share=0.4),
    "weights that change": lambda: recipes.dps(Color("red") + Color("blue").scheduled((0.0, 0.0), (1.0, 1.0))),
    "windows": lambda: recipes.dps(LABEL.during(0, 0.5) + Color("red")),
    "balanced, smoothed": lambda: recipes.lgd_mc(LABEL + Color("red"), copies=2, balance=True),
    "moments": lambda: recipes.adam_dps(LABEL),
    "inner steps": lambda: recipes.tfg(Color("red")),
    "anchor": lambda: recipes.red_diff(Color("red")),
    "sphere": lambda: recipes.dsg(LABEL),
    "particles": lambda: recipes.fk_steering(LABEL, count=2),
    "conjugate gradients": lambda: recipes.pigdm(SMALLER),
}


@pytest.mark.parametrize("replayed", ["as it is", "from a tape"])
@pytest.mark.parametrize("name", CASES)
def test_pictures_and_records_are_bitwise_the_same(tiny, name, replayed, monkeypatch):
    """Recordings of the first batch serve the second one, so that nothing of a visit may be baked in."""
    if replayed == "from a tape":
        monkeypatch.setattr(capture, "recorded", taped)
    eager = sample(tiny, CASES[name](), steps=4, seeds=range(2), batch_size=1)
    graphed = sample(tiny, CASES[name](), steps=4, seeds=range(2), batch_size=1, graphs=True)
    assert torch.equal(eager.samples, graphed.samples)
    assert torch.equal(eager.record.losses(), graphed.record.losses())
    assert eager.record.terms == graphed.record.terms
    assert not graphed.samples.requires_grad


@pytest.mark.parametrize("replayed", ["as it is", "from a tape"])
def test_a_decoder_is_replayed_too(replayed, monkeypatch):
    if replayed == "from a tape":
        monkeypatch.setattr(capture, "recorded", taped)
    calls = []
    layer = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)

    def decode(x):
        calls.append(torch.is_grad_enabled())
        return layer(x).sigmoid()

    model = denoiser(tiny_unet(), vp_scheduler(), decode=decode)
    guidance = recipes.dps(Color("red"), time_travel=None)
    eager = sample(model, guidance, steps=6)
    assert sum(calls) == 6
    calls.clear()
    graphed = sample(model, guidance, steps=6, graphs=True)
    assert torch.equal(eager.images, graphed.images)
    assert sum(calls) == (6 if replayed == "as it is" else WARMUPS + 1)


def test_the_model_is_replayed_not_called_on_buffers_that_stay(monkeypatch):
    """As it is, every visit of a kind finds its input at one address; from a tape, the model is not even called."""
    places: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    unet = tiny_unet()

    def model(x, t):
        places[x.requires_grad].append((x.data_ptr(), t.data_ptr()))
        return unet(x, t).sample

    wrapped = denoiser(model, vp_scheduler(), shape=(3, SIDE, SIDE))
    guidance = recipes.auto(LABEL, through_share=0.4, time_travel=None)
    sample(wrapped, guidance, steps=10, seeds=range(2), batch_size=1, graphs=True)
    assert all(len(found) >= 4 and len(set(found)) == 1 for found in places.values())
    assert sum(map(len, places.values())) == 20
    for found in places.values():
        found.clear()
    monkeypatch.setattr(capture, "recorded", taped)
    sample(wrapped, guidance, steps=10, seeds=range(2), batch_size=1, graphs=True)
    assert [len(found) for found in places.values()] == [WARMUPS + 1] * 2


@pytest.mark.parametrize("record", [capture.recorded, taped])
def test_what_was_returned_stays_and_gradients_pass(record, monkeypatch):
    monkeypatch.setattr(capture, "recorded", record)
    captured = Captured(lambda x, w: (x * w).sin())
    first = torch.linspace(0, 1, 4).requires_grad_()
    w = torch.tensor(2.0)
    y = captured(first, w)
    torch.testing.assert_close(y, (2 * first).sin())
    (g,) = torch.autograd.grad(y.sum(), first)
    torch.testing.assert_close(g, 2 * (2 * first).cos())
    kept, y = y.clone(), y.detach()
    second = torch.linspace(1, 3, 4).requires_grad_()
    again = captured(second, torch.tensor(3.0))
    assert torch.equal(y, kept)
    assert torch.equal(again, (3 * second).sin())
    (other,) = torch.autograd.grad(again.sum(), second)
    assert torch.equal(g, 2 * (2 * first).cos())
    torch.testing.assert_close(other, 3 * (3 * second).cos())
    with torch.no_grad():
        assert not captured(second, w).requires_grad
    assert captured(torch.ones(3, 2).requires_grad_(), w).shape == (3, 2)  # another kind of call


def test_a_gradient_belongs_to_the_latest_call():
    captured = Captured(torch.sin)
    x = torch.ones(2).requires_grad_()
    early, latest = captured(x), captured(x)
    with pytest.raises(RuntimeError, match="called again before its gradient"):
        torch.autograd.grad(early.sum(), x)
    torch.autograd.grad(latest.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="called again before its gradient"):
        torch.autograd.grad(latest.sum(), x)


def test_what_carries_no_gradient_is_told_as_without(tiny):
    model = denoiser(lambda x, t: tiny.model(x.detach(), t).sample, vp_scheduler(), shape=(3, SIDE, SIDE))
    for graphs in (False, True):
        with pytest.raises(ValueError, match="carries no gradient back"):
            sample(model, recipes.dps(late), steps=2, graphs=graphs)


def test_functions_of_several_tensors_return_several():
    captured = Captured(lambda x, y: (x + y, x - y))
    total, difference = captured(torch.ones(2), torch.ones(2))
    assert total.tolist() == [2, 2] and difference.tolist() == [0, 0]


# What a graph cannot hold


def _masked(x):
    return x[x > 0.5].sum()


def _looked_up(x):
    return torch.arange(3.0)[x.argmax()] * x


UNRECORDABLE = {
    "value": (lambda x: x * x.max().item(), "_local_scalar_dense"),
    "branch": (lambda x: x if x.max() > 0 else -x, "_local_scalar_dense"),
    "mask": (_masked, "index"),
    "place": (lambda x: x.nonzero(), "nonzero"),
    "read": (lambda x: x.cpu().to(x.device), "_to_copy"),
    "table": (lambda x: torch.arange(3.0).to(x.device) * x, "_to_copy"),
    "places of the host": (lambda x: x[torch.tensor([2, 0, 1])], "index"),
    "choice": (lambda x: torch.where(torch.tensor(True), x, 0), "where"),
    "inverse": (lambda x: torch.linalg.inv(torch.diag(x + 1)), "_linalg_check_errors"),
}
RECORDABLE = {
    "numbers": lambda x: torch.where(x > 0.5, x, 0).clamp(0, 1) * torch.tensor(2.0, dtype=torch.float64),
    "places": lambda x: x[x.argsort()] + x.index_select(0, x.topk(1).indices),
    "new": lambda x: (
        x
        + torch.full((3,), 0.5, device=x.device)
        + torch.arange(3, device=x.device)
        + x.new_zeros(3)
        + torch.ones_like(torch.zeros(3), device=x.device)
    ),
    "kept": lambda x: x * constant((1.0, 2.0, 3.0), x),
}


def _prepared(bodies, inputs, shared):
    capture.warm_up(bodies)
    return bodies


@pytest.mark.parametrize("name", UNRECORDABLE)
def test_a_function_that_waits_runs_as_it_is_and_says_so(name, monkeypatch):
    monkeypatch.setattr(capture, "recorded", _prepared)
    function, operation = UNRECORDABLE[name]
    x = torch.tensor([0.2, 0.9, 0.7])
    with Device():
        away = x.to("meta")
        captured = Captured(function, "the example")
        with pytest.warns(RuntimeWarning, match=f"the example runs as it is.*{operation}"):
            found = captured(away)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # told once
            captured(away)
    torch.testing.assert_close(found.inner, function(x))


@pytest.mark.parametrize("name", RECORDABLE)
def test_what_does_not_wait_is_recorded(name, monkeypatch):
    monkeypatch.setattr(capture, "recorded", _prepared)
    x = torch.tensor([0.2, 0.9, 0.7])
    with Device(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Captured(RECORDABLE[name])(x.to("meta"))
    torch.testing.assert_close(found.inner, RECORDABLE[name](x))


def test_numbers_of_python_on_the_device_are_noticed():
    with Watch() as watch:  # what torch makes of new_tensor([1.0, 2.0]); since 2.14 it makes nothing of it on "meta"
        torch.ops.aten.lift_fresh(torch.ones(2, device="meta"))
    assert watch.found == ["lift_fresh.default"]


# Steps that do not wait


def _waits_inside_steps(guidance, scheduler, monkeypatch, **options) -> list[str]:
    """What the host waits for from the first visit's end to the last one's, in a second run."""
    marks: list[int] = []
    add = Record.add
    with Device() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(Record, "add", lambda self, **row: (add(self, **row), marks.append(len(device.found))))
        model = denoiser(moved_away(tiny_unet()), scheduler)
        assert model.device.type == "meta"
        sample(model, guidance, steps=2, seeds=range(2))  # what is copied once is copied here
        marks.clear()
        result = sample(model, guidance, steps=4, seeds=range(2), **options)
    monkeypatch.undo()
    assert torch.isfinite(result.images).all() and not isinstance(result.images, Away)
    return device.found[marks[0] : marks[-1]]


QUICK = dict(time_travel=None)
STEPS = {
    "unguided": lambda: None,
    "through and at x0": lambda: recipes.auto(LABEL, through_share=0.5, **QUICK),
    "colour": lambda: recipes.auto(Color("red"), augment=Augment(2), **QUICK),
    "measurement": lambda: recipes.auto(SMALLER),
    "mean": lambda: recipes.mpgd(LABEL, **QUICK),
    "score": lambda: recipes.score(LABEL),
    "sphere": lambda: recipes.dsg(LABEL),
    "remixed": lambda: recipes.flowdps(SMALLER),
}


@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_the_device(name, monkeypatch):
    scheduler = vp_scheduler(prediction_type="v_prediction", clip_sample=True)
    assert _waits_inside_steps(STEPS[name](), scheduler, monkeypatch) == []


@pytest.mark.parametrize("solver", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_solvers_do_not_wait(solver, monkeypatch):
    guidance = Guidance(late, rule=Constant(0.1))
    assert _waits_inside_steps(guidance, getattr(diffusers, solver)(), monkeypatch, graphs=True) == []


def test_the_simulated_device_tells_what_waits(monkeypatch):
    """The check itself: a loss that reads a value is found at every visit."""
    guidance = recipes.dps(lambda image: late(image) * image.amax().item(), **QUICK)
    found = _waits_inside_steps(guidance, vp_scheduler(), monkeypatch)
    assert found == ["_local_scalar_dense.default"] * 3


def test_the_progress_is_read_when_it_is_there(monkeypatch):
    done = [False]
    event = SimpleNamespace(query=lambda: done[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))

    def number(value):
        return SimpleNamespace(is_cuda=True, device=None, to=lambda device, non_blocking: torch.tensor(value))

    latest = Latest()
    assert latest(number(3.0)) is None and latest(number(2.0)) is None
    done[0] = True
    assert latest(number(1.0)) == 3.0 and latest(number(0.5)) == 1.0
    assert Latest()(torch.tensor(4.0)) == 4.0


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        return self.last(torch.nn.functional.silu(self.first(x) + t / 1000))


def test_a_compiled_denoiser_works_with_and_without_graphs(monkeypatch):
    """Captured by dynamo, differentiated ahead of time; the machine code is the business of torch."""
    network = Convolutions()
    plain, compiled = (
        denoiser(one, vp_scheduler(), shape=(3, SIDE, SIDE))
        for one in (network, torch.compile(network, backend="aot_eager"))
    )
    guidance = recipes.dps(late)
    wanted = sample(plain, guidance, steps=4, seeds=range(2))
    found = sample(compiled, guidance, steps=4, seeds=range(2))
    monkeypatch.setattr(capture, "recorded", taped)
    graphed = sample(compiled, guidance, steps=4, seeds=range(2), graphs=True)
    torch.testing.assert_close(found.samples, wanted.samples, rtol=0, atol=1e-4)
    assert torch.equal(found.samples, graphed.samples)
    assert all(parameter.requires_grad for parameter in network.parameters())


# The CUDA path, with a tape for the graph


def test_graphs_are_recorded_as_torch_asks(monkeypatch):
    """Warmed up on the stream that records; forward before backward, in one pool."""
    log: list[object] = []
    freed: list[str] = []

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    class Graph:
        def replay(self):
            self.tape.replay()

        def __del__(self):
            freed.append("graph")

    @contextmanager
    def graph(made, pool, stream):
        log.append((pool, type(stream)))
        with Tape() as made.tape:
            yield

    for name, stub in {
        "device": lambda device: nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(
        capture, "recorded", lambda bodies, inputs, shared: capture.graphs(bodies, inputs[0].device, shared)
    )
    calls = []

    def function(x):
        calls.append(1)
        return x.square()

    captured = Captured(function)
    for value in (1.0, 2.0, 3.0):
        x = torch.full((2,), value).requires_grad_()
        (g,) = torch.autograd.grad(captured(x).sum(), x)
        assert g.tolist() == [2 * value] * 2
    assert log == ["wait", "wait", ("pool", Stream), ("pool", Stream)]
    assert len(calls) == WARMUPS + 1
    gc.collect()
    gc.disable()  # a graph must not be freed while another one is recorded: not by the collector, whose time is its own
    try:
        del captured
        assert freed == ["graph", "graph"]
    finally:
        gc.enable()


def recording_that_fails(monkeypatch, error: Exception) -> None:
    """Record a graph on a stand-in for CUDA, which raises the error."""

    @contextmanager
    def graph(made, pool, stream):
        raise error
        yield

    stub = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "device": lambda device: nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda: stub,
        "current_stream": lambda: stub,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": SimpleNamespace,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    capture.graphs([lambda: None], torch.device("cpu"), capture._Shared())


def test_a_failed_recording_says_what_to_do(monkeypatch):
    with pytest.raises(RuntimeError, match="not permitted.*use graphs=False"):
        recording_that_fails(monkeypatch, RuntimeError("operation not permitted when stream is capturing"))


def test_too_little_memory_is_told_as_torch_tells_it(monkeypatch):
    """Also where torch has no `OutOfMemoryError` but its CUDA part's (2.4)."""
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.delattr(torch, "OutOfMemoryError", raising=False)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="^CUDA out of memory$"):
        recording_that_fails(monkeypatch, error)


def test_the_profile_counts_what_overlaps_once():
    from benchmarks.gpu_profile import busy, summary

    assert busy([(0, 4), (1, 2), (3, 6), (16, 20), (7, 8)]) == (11, [8, 1])
    lines = summary([("conv", 0, 4), ("conv", 3, 6), ("add", 26, 30)], visits=2)
    assert "2 kernels" in lines[0] and "works 33% of the time" in lines[0] and "the longest 20 us" in lines[0]
    assert lines[4:] == ["| `conv` | 1.0 | 0.004 | 70% |", "| `add` | 0.5 | 0.002 | 40% |"]
    assert summary([], 1) == ["The profiler saw no kernel."]


# What was moved off the host for it


def test_warps_are_those_of_kornia():
    """Against kornia's own affine warp, up to round-off."""
    from kornia.geometry.transform import get_affine_matrix2d, warp_affine

    augment = Augment(1, 0.2, (0.7, 1.4), 30.0, 0.0, (1, 1), (1, 1), 0.0)
    generator = torch.Generator().manual_seed(0)
    image, u = torch.rand(5, 3, 9, 12, generator=generator), torch.rand(5, 9, generator=generator)
    size = torch.tensor([12.0, 9.0])
    shift, zoom = (2 * u[:, :2] - 1) * 0.2 * size, (0.7 + 0.7 * u[:, 2:3]).expand(-1, 2)
    matrix = get_affine_matrix2d(shift, ((size - 1) / 2).expand(5, 2), zoom, (2 * u[:, 3] - 1) * 30.0)[:, :2]
    wanted = warp_affine(image, matrix, (9, 12), padding_mode="border", align_corners=True)
    torch.testing.assert_close(augment.apply(image, u), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_noise_of_ddim_is_what_it_draws_itself(eta):
    solver = Solver.of(vp_scheduler(), 4)
    x, prediction = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = solver.step(prediction, 1, x, eta=eta, generator=generators([3, 4]))
    own = solver.scheduler.step(prediction, solver.timesteps[1], x, eta=eta, generator=generators([3, 4]))
    assert torch.equal(ours, own.prev_sample)


def test_a_fixed_tensor_is_copied_once_and_again_when_it_changes():
    with Device() as device:
        like, fixed = torch.zeros(2).to("meta"), torch.ones(2, dtype=torch.float64)
        before = len(device.found)
        one, two = moved(fixed, like), moved(fixed, like)
        assert one is two and one.dtype == torch.float32 and len(device.found) == before + 1
        fixed += 1
        assert moved(fixed, like).inner.tolist() == [2, 2]
    with torch.inference_mode():
        numbers = constant((0.25, 0.5), torch.zeros(1, dtype=torch.float64))
    assert not numbers.is_inference() and numbers.tolist() == [0.25, 0.5]


def test_copies_do_not_go_along_with_their_tensor():
    """Neither into a pickle, nor to a copy of the tensor, which may change to something else."""
    with Device():
        like, fixed = torch.zeros(2).to("meta"), torch.ones(2)
        fixed += 1
        fixed += 1
        size = len(pickle.dumps(fixed))
        moved(fixed, like)
        assert len(pickle.dumps(fixed)) == size
        other = copy.deepcopy(fixed)
        while other._version < fixed._version:
            other += 1
        assert moved(other, like).inner.tolist() == other.tolist() != fixed.tolist()
        kept = weakref.ref(moved(fixed, like))
        assert kept() is not None
        del fixed
        assert kept() is None


def test_constants_that_a_recording_reads_stay():
    with Device():
        like = torch.zeros(2).to("meta")
        read = weakref.ref(constant((0.125, 0.375), like))
        for i in range(200):
            constant((float(i),), like)
        assert read() is not None
