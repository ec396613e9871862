"""Pictures that are partly given: losses act on what is to be painted, and what is given gets no gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from lossguide.guidance import guide, recipes, step
from lossguide.guidance.panels import example_pairs
from lossguide.losses import PairTask
from lossguide.samplers import TimeTravel
from pipelines import PIPELINES
from test_pipelines import Near, generators, made, options, result, state
from torchvision.transforms.functional import to_pil_image, to_tensor

NAMES = ("visualcloze", "flux-fill")
INPAINTING = ("flux-fill", "sd-inpaint", "sd-inpaint-9", "sdxl-inpaint")


def squares(image: torch.Tensor) -> torch.Tensor:
    return (image - 0.8).square().flatten(1).mean(1)


def painted(name: str) -> torch.Tensor:
    """Which latents are to be painted, by the layout: the last of four panels, or the right half of a picture."""
    if name == "visualcloze":  # rows of 4 x 8 tokens
        mask = torch.zeros(2, 4, 8, dtype=torch.bool)
        mask[1, :, 4:] = True
        return mask.flatten()[:, None]
    side = 4 if name == "flux-fill" else 8
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[:, side // 2 :] = True
    return mask.flatten()[:, None] if name == "flux-fill" else mask


class Watch:
    """A callback that keeps the latents after each step."""

    def __init__(self):
        self.latents = []

    def __call__(self, pipe, step, timestep, tensors):
        self.latents.append(tensors["latents"].clone())
        return {}


def drawn(name: str, guidance, watch=None, steps: int = 10, **changes):
    """A guided call of two pictures: the pictures, and the call's record."""
    guided = guide(made(name), guidance, **changes)
    more = {"num_inference_steps": steps} | ({} if watch is None else {"callback_on_step_end": watch})
    output = guided(**options(name, 2) | more, generator=generators(1, 2))
    return result(name, output), guided.record


def plain(name: str, *seeds: int) -> torch.Tensor:
    seeds = seeds or (1, 2)
    return result(name, made(name)(**options(name, len(seeds)), generator=generators(*seeds)))


METHODS = {
    "auto": functools.partial(recipes.auto, time_travel=None),
    "x0": functools.partial(recipes.auto, time_travel=None, through="x0"),
    "remixed": functools.partial(recipes.auto, time_travel=None, remix="ancestral"),
    "dps": recipes.dps,
    "shen": recipes.shen,
    "freedom": functools.partial(recipes.freedom, time_travel=None),
    "universal": functools.partial(recipes.universal, time_travel=None, inner=2),
    "mpgd": recipes.mpgd,
    "tfg": functools.partial(recipes.tfg, time_travel=None),
    "adam_dps": recipes.adam_dps,
    "red_diff": recipes.red_diff,
    "flowdps": recipes.flowdps,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("panel", ["target", "picture", None])
def test_without_strength_or_loss_it_is_bitwise_the_plain_call(name, panel):
    for loss, strength in ((squares, 0.0), (None, 1.0)):
        guidance = recipes.auto(loss, strength=strength)
        assert torch.equal(drawn(name, guidance, panel=panel)[0], plain(name))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_no_step_reaches_what_is_given(name, method):
    """At the first step that moves anything, what is given is bitwise what it is under a loss without gradient."""
    moves, idle, guided = painted(name), Watch(), Watch()
    drawn(name, METHODS[method](lambda image: 0 * squares(image)), idle, steps=3)
    drawn(name, METHODS[method](squares), guided, steps=3)
    first = [i for i, (a, b) in enumerate(zip(idle.latents, guided.latents)) if not torch.equal(a, b)][0]
    differ = idle.latents[first] != guided.latents[first]
    assert not (differ & ~moves).any() and (differ & moves).flatten(1).any(1).all()


@pytest.mark.parametrize("name", INPAINTING)
def test_what_stays_of_a_gradient_is_the_painted_parts_own(name, monkeypatch):
    """The record's gradient is the whole gradient without what would move the context; the loss is the same."""
    gradients: list = []

    def pulled_back(*args):
        gradients.append(own(*args))
        return gradients[-1]

    own = step.pulled_back
    monkeypatch.setattr(step, "pulled_back", pulled_back)
    guidance, moves = recipes.dps(squares, through="x0"), painted(name)
    inside = drawn(name, guidance)[1].rows[0]
    monkeypatch.setattr("lossguide.guidance.panels.Hole.movable", lambda self, x, told: None)
    whole, g = drawn(name, guidance)[1].rows[0], gradients[0]
    assert torch.equal(inside["loss"], whole["loss"])
    assert (torch.where(moves, 0, g) != 0).any()  # the decoder's gradient does reach the context
    torch.testing.assert_close(inside["gradient_norm"], torch.where(moves, g, 0).flatten(1).norm(dim=1))
    torch.testing.assert_close(whole["gradient_norm"], g.flatten(1).norm(dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_of_the_target_falls(name):
    columns = {"visualcloze": 16, "flux-fill": 8}[name]
    other = plain(name, 3, 4)[..., -columns:]
    start = Near(other)(plain(name)[..., -columns:])
    image, record = drawn(name, recipes.auto(Near(other)), panel="target")
    assert (Near(other)(image[..., -columns:]) < 0.7 * start).all()
    assert (record.losses()[-1] < 0.7 * start).all()


@pytest.mark.parametrize("name", ["visualcloze", "visualcloze-upsampled", "flux-fill"])
def test_time_travel_and_checkpointing_and_what_is_left_behind(name):
    """Every sample sees its own panel, also where the decoder goes picture by picture."""
    pipe = made(name)
    pipe(**options(name, 1) | dict(num_inference_steps=4), generator=generators(0))  # its own trace in its scheduler
    before = state(pipe)
    guidance = recipes.auto(squares, time_travel=TimeTravel(2, 0.0, 1.0))
    image, record = drawn(name, guidance, panel="target", steps=4)
    again, _ = drawn(name, guidance, panel="target", steps=4, checkpointing=True)
    assert {row["visit"] for row in record.rows} == {0, 1}
    torch.testing.assert_close(again, image, rtol=0, atol=2e-3 if name != "visualcloze-upsampled" else 0.03)
    assert state(pipe) == before


# What the losses see


def looked_at(pipe, given: dict, **changes) -> torch.Tensor:
    """What a loss sees at the last step of an unguided call."""
    seen = []

    def loss(image):
        seen.append(image.detach())
        return image.flatten(1).sum(1) * 0

    guide(pipe, recipes.dps(loss, strength=0), **changes)(**given)
    return seen[-1]


def picture(seed: int, width: int = 32, height: int = 32):
    """Coarse noise as a Pillow image."""
    small = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return to_pil_image(torch.nn.functional.interpolate(small, (height, width), mode="bilinear")[0])


def call(grid, **changes) -> dict:
    common = dict(task_prompt="a", content_prompt="b", num_inference_steps=3, output_type="pt", max_sequence_length=128)
    return common | dict(image=grid, generator=torch.Generator().manual_seed(0)) | changes


def test_the_panels_of_a_row_by_name_and_index():
    """Three panels of which two are painted: what the losses see is what the pipeline returns."""
    pipe = made("visualcloze")
    grid = [[picture(i) for i in range(3)], [None, picture(9), None]]
    made_of = pipe(**call(grid)).images
    row = looked_at(pipe, call(grid), panel="picture")
    assert row.shape == (1, 3, 16, 48)
    both = looked_at(pipe, call(grid))
    assert torch.equal(both, torch.cat([row[..., :16], row[..., 32:]], -1))
    for index, place in ((0, 0), (2, 2), (-1, 2), (-3, 0)):
        one = looked_at(pipe, call(grid), panel=index)
        assert torch.equal(one, row[..., 16 * place : 16 * place + 16])
        torch.testing.assert_close(one.clamp(0, 1)[0], made_of[place // 2], rtol=0, atol=1e-4)


def test_only_the_panel_of_an_index_moves():
    grid, watches = [[picture(i) for i in range(3)], [None, picture(9), None]], [Watch(), Watch()]
    for strength, watch in enumerate(watches):
        guided = guide(made("visualcloze"), recipes.dps(squares, strength=float(strength)), panel=2)
        guided(**call(grid), callback_on_step_end=watch)
    latents = [watch.latents[0].view(2, 4, 3, 4, -1) for watch in watches]  # row, token row, panel, token column
    same = (latents[0] == latents[1]).all(-1)
    assert same[0].all() and same[1, :, :2].all() and not same[1, :, 2].any()


def test_each_grid_of_a_batch_has_its_own_target():
    pipe = made("visualcloze")
    grids = [[[picture(1), picture(2)], [None, picture(3)]], [[picture(4), picture(5)], [picture(6), None]]]
    texts = dict(task_prompt=["a", "b"], content_prompt=["a", "b"])
    given = call(grids, **texts, generator=generators(1, 2))
    row, target = (looked_at(pipe, given | dict(generator=generators(1, 2)), panel=p) for p in ("picture", "target"))
    assert torch.equal(target, torch.stack([row[0, ..., :16], row[1, ..., 16:]]))
    alone = looked_at(pipe, call(grids[1], task_prompt=["b"], content_prompt=["b"], image=grids[1:]) | dict(
        generator=generators(2)))  # fmt: skip
    torch.testing.assert_close(alone, target[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", INPAINTING)
def test_the_box_around_the_mask(name):
    given = options(name, 2) | dict(generator=generators(1, 2))
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 4:12, 6:10] = 1
    given["mask_image"] = mask
    whole = looked_at(made(name), given)
    box = looked_at(made(name), given | dict(generator=generators(1, 2)), panel="target")
    assert whole.shape == (2, 3, 16, 16) and torch.equal(box, whole[..., 4:12, 6:10])
    mask[1, :, :, 12:] = 1
    with pytest.raises(ValueError, match="differ in size between the pictures"):
        looked_at(made(name), given | dict(generator=generators(1, 2)), panel="target")
    mask.zero_()
    with pytest.raises(ValueError, match="the mask marks nothing to paint"):
        looked_at(made(name), given | dict(generator=generators(1, 2)), panel="target")


def test_a_whole_mask_is_no_mask():
    """Where all is painted the guidance is what it is without panels."""
    given = options("flux-fill", 1) | dict(mask_image=torch.ones(1, 1, 16, 16))
    image = guide(made("flux-fill"), recipes.auto(squares))(**given, generator=generators(1)).images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lossguide.guidance.panels.Hole.movable", lambda self, x, told: None)
        again = guide(made("flux-fill"), recipes.auto(squares))(**given, generator=generators(1)).images
    assert torch.equal(image, again)


# What is refused


def test_panels_that_are_not_there():
    def of(name, panel):
        return guide(PIPELINES[name].build() if name == "sd" else made(name), recipes.dps(squares), panel=panel)

    for name, panel, told in (
        ("sd", "target", "paints the whole picture"),
        ("flux-fill", 1, "no panels to count"),
        ("visualcloze", "query", "'target', 'picture' or an index"),
        ("visualcloze", True, "'target', 'picture' or an index"),
        ("visualcloze-upsampled", "query", "'target', 'picture' or an index"),
    ):
        with pytest.raises(ValueError, match=told):
            of(name, panel)
    grid = [[picture(1), picture(2)], [picture(3), None]]
    with pytest.raises(ValueError, match="panel 0 of the last row is given: to be painted is 1, counted from 0"):
        of("visualcloze", 0)(**call(grid))
    with pytest.raises(ValueError, match="panel 5 of the last row is not there"):
        of("visualcloze", 5)(**call(grid))


@pytest.mark.parametrize("name", ["visualcloze", "visualcloze-upsampled"])
@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(latents=torch.zeros(1, 32, 16)), "ignores latents"),
        (dict(prompt_embeds=torch.zeros(1, 8, 32), pooled_prompt_embeds=torch.zeros(1, 16)), "cannot use prompt_emb"),
        (dict(generator=None), "cannot draw without a generator"),
        (dict(image=[[picture(1, 32, 16)] * 3, [picture(2, 32, 16), None, None]]), "swaps width and height"),
        (dict(image=[[picture(1)] * 2, [picture(2)] * 2]), "only panels of the last row are None"),
        (dict(image=[[picture(1), None], [picture(2), None]]), "only panels of the last row are None"),
        (dict(image=[[picture(1)] * 3, [picture(2), None]]), "rows of as many panels"),
        (dict(image=picture(1)), "takes a grid of Pillow images"),
        (dict(image=[torch.zeros(3, 8, 8)]), "takes a grid of Pillow images"),
    ],
)  # fmt: skip
def test_what_visualcloze_gets_wrong_is_told_in_a_sentence(name, changes, told):
    pipe = made(name)
    more = {} if name == "visualcloze" else dict(upsampling_height=32, upsampling_width=32)
    with pytest.raises(ValueError, match=told) as error:
        guide(pipe, recipes.dps(squares))(**call([[picture(1)] * 2, [picture(2), None]]) | more | changes)
    assert "\n" not in str(error.value)


def test_several_prompts_of_several_pictures_are_refused():
    grid = [[picture(1)] * 2, [picture(2), None]]
    given = call([grid, grid], task_prompt=["a", "b"], content_prompt=["a", "b"], num_images_per_prompt=2)
    with pytest.raises(ValueError, match="mixes up grids and prompts"):
        guide(made("visualcloze"), recipes.dps(squares))(**given)
    sizes = [grid, [[picture(1, 64, 16)] * 2, [picture(2, 64, 16), None]]]
    with pytest.raises((ValueError, RuntimeError), match="same sizes|Sizes of tensors must match"):
        given = call(sizes, task_prompt=["a", "b"], content_prompt=["a", "b"], generator=generators(1, 2))
        guide(made("visualcloze"), recipes.dps(squares))(**given)


def test_one_prompt_of_several_pictures_repeats_its_grid():
    given = call([[picture(1)] * 2, [picture(2), None]], num_images_per_prompt=2, generator=generators(1, 2))
    guided = guide(made("visualcloze"), recipes.dps(squares))
    assert guided(**given).images.shape == (2, 3, 16, 16) and guided.record.losses().shape[1] == 2


def test_oblong_panels_with_one_target_are_fine():
    given = call([[picture(1, 32, 8)] * 2, [picture(2, 32, 8), None]])
    seen = looked_at(made("visualcloze"), given)
    assert seen.shape == made("visualcloze")(**given | dict(generator=generators(0)[0])).images.shape
    assert seen.shape[-1] > seen.shape[-2]


# In-context guidance and an in-context model together


def test_the_pairs_of_a_grid_are_what_the_network_sees():
    pipe = made("visualcloze")
    grid = [[picture(1, 16, 16), picture(2, 16, 16)], [picture(3, 16, 16), None]]
    pairs, query = example_pairs(made("visualcloze-upsampled"), grid)
    assert len(pairs) == 1 and all(one.shape == (3, 16, 16) for one in (*pairs[0], query))
    for mine, theirs in zip((*pairs[0], query), (*grid[0], grid[1][0])):
        exact = torch.tensor(list(theirs.tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-6)
    for wrong in ([grid[1]], [[picture(1)] * 3, [picture(2), None, picture(3)]], [grid[0], [None, picture(1)]]):
        with pytest.raises(ValueError, match="a grid of pairs has rows"):
            example_pairs(pipe, wrong)
    with pytest.raises(ValueError, match="takes no grid of examples"):
        example_pairs(made("flux-fill"), grid)


@pytest.mark.parametrize("through", ["denoiser", "x0"])
def test_the_pairs_that_fill_the_grid_give_the_loss(through):
    """A colour cast, shown to the network and asked of its answer by the same pictures."""
    pipe, matrix = made("visualcloze"), torch.tensor([[0.8, 0.1, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.6]])

    def cast(image):
        return torch.einsum("ij,jhw->ihw", matrix, image).clamp(0, 1)

    sharp = [to_tensor(picture(seed, 16, 16)) for seed in range(2)]
    wanted = plain("visualcloze", 3)[0]  # a picture that the decoder of random weights can make
    grid = [[to_pil_image(cast(one)), to_pil_image(one)] for one in sharp] + [[to_pil_image(cast(wanted)), None]]
    pairs, query = example_pairs(pipe, grid)
    task = PairTask.fit(pairs)
    assert task.mode == "operator" and task.family == "colour" and task.way == "restore"
    loss = task.loss(query)
    given = call(grid, num_inference_steps=10)
    before = pipe(**given | dict(generator=generators(0))).images
    after = guide(pipe, recipes.auto(loss, through=through))(**given | dict(generator=generators(0))).images
    assert (loss(after) < 0.7 * loss(before)).all()
    assert (after - wanted).square().mean() < 0.5 * (before - wanted).square().mean()
