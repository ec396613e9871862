"""The published comparisons, as data. Figures are those that their papers print."""

from __future__ import annotations

from .task import Part, Published, Row

TORCHSCRIPT = "saved by `torch.jit.trace(network, example).save(path)`"


def _hub(name: str, folder: str) -> str:
    return f"https://huggingface.co/{name}: `hf download {name} --local-dir FOLDER/{folder}`"


FACES = Part(
    ("denoiser",),
    "a diffusers model of CelebA-HQ at 256",
    _hub("google/ddpm-ema-celebahq-256", "denoiser"),
)
FACE_PICTURES = Part(
    ("pictures",),
    "a folder of CelebA-HQ pictures, to take layouts from and to measure FID to",
    "https://github.com/tkarras/progressive_growing_of_gans",
)
CLIP_B = Part(
    ("clip-b16",),
    "CLIP ViT-B/16 as an open_clip folder",
    _hub("timm/vit_base_patch16_clip_224.openai", "clip-b16"),
)
CLIP_L = Part(
    ("clip-l14",),
    "CLIP ViT-L/14 as an open_clip folder, which judges",
    _hub("timm/vit_large_patch14_clip_224.openai", "clip-l14"),
)
PROMPTS = Part(("prompts.txt",), "the texts, one per line", "the paper's appendix", optional=True)
PARSER = Part(
    ("parser.pt", "parser"),
    "the face parser, BiSeNet as TorchScript or a transformers model for segmentation",
    f"79999_iter.pth of https://github.com/zllrunning/face-parsing.PyTorch, {TORCHSCRIPT}",
)
LINES = Part(
    ("lines.pt",),
    "the line extractor Anime2Sketch as TorchScript, pictures in [-1, 1] -> lines",
    f"netG.pth of https://github.com/Mukosame/Anime2Sketch, {TORCHSCRIPT}",
)
ADM = Part(
    ("denoiser", "denoiser.pt"),
    "the unconditional ImageNet model at 256, as a diffusers model or as TorchScript (x, t) -> noise",
    f"256x256_diffusion_uncond.pt of https://github.com/openai/guided-diffusion, {TORCHSCRIPT}",
)
CATS = Part(
    ("denoiser",),
    "a diffusers model of cats at 256",
    _hub("google/ddpm-ema-cat-256", "denoiser"),
)
CAT_PICTURES = Part(
    ("pictures",),
    "a folder of cats, which are degraded",
    "the cats of https://huggingface.co/datasets/microsoft/cats_vs_dogs",
)
SQUEEZE = Part(
    ("squeezenet1_1.pth",),
    "torchvision's SqueezeNet 1.1, for LPIPS",
    "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
)

BASE = "Shen et al. 2024 (arXiv 2403.12404)"
UNTOLD = (
    "The paper's guidance strengths are not in it; where its code or that of the method has one it is used, else this "
    "toolkit's default. The model is Google's, not SDEdit's checkpoint that the papers used."
)


def _table1(column: str, at: int, freedom: dict) -> tuple[Row, ...]:
    """The rows of Table 1 for the figures of one of its tasks: the distance, and FID."""
    told = {
        "universal": {"segmentation": (2247, 39.9), "sketch": (52.2, 47.2), "text": (12.08, 44.3)},
        "lgd_mc": {"segmentation": (2089, 39.0), "sketch": (49.5, 54.5), "text": (11.84, 41.7)},
        "freedom": {"segmentation": (1657, 38.7), "sketch": (34.2, 52.2), "text": (11.17, 46.1)},
        "mpgd": {"segmentation": (1976, 39.8), "sketch": (37.2, 54.2), "text": (10.78, 42.5)},
        "shen": {"segmentation": (1576, 33.3), "sketch": (30.4, 41.3), "text": (10.72, 41.3)},
    }
    names = {"universal": "UGD", "lgd_mc": "LGD-MC", "freedom": "FreeDoM", "mpgd": "MPGD-Z", "shen": "Shen et al."}
    rows = [Row("unguided", "unguided"), Row("auto", "auto")]
    for recipe, name in names.items():
        distance, fid = told[recipe][column]
        settings = freedom if recipe == "freedom" else {}
        copies = 20 if recipe == "shen" and column == "text" else None  # in the released code
        rows.append(Row(name, recipe, settings, copies, {at: {"distance": distance, "fid": fid}}))
    return tuple(rows)


DISTANCE = {"distance": ("distance", 2), "fid": ("FID", 1), "seconds_per_step": ("s per step", 3)}
LPIPS = {"lpips": ("LPIPS", 3), "psnr": ("PSNR", 2), "seconds_per_step": ("s per step", 3)}
SIXTEENTH = {  # LPIPS at SR x16 by steps, arXiv 2603.16797
    "adam_dps": {12: 0.369, 25: 0.290, 50: 0.252, 100: 0.228},
    "dps": {12: 0.499, 25: 0.324, 50: 0.271, 100: 0.243},
    "mpgd": {100: 0.272},
    "tfg": {100: 0.256},
}


def _cats(told: dict[str, dict[int, float]], tfg: dict) -> tuple[Row, ...]:
    """The rows of the restorations of cats; `tfg` are the published settings of TFG."""
    names = {"dps": "DPS", "mpgd": "MPGD", "tfg": "TFG-4", "adam_dps": "AdamDPS"}
    rows = [Row("unguided", "unguided"), Row("auto", "auto")]
    for recipe, name in names.items():
        published = {steps: {"lpips": value} for steps, value in told[recipe].items()}
        rows.append(Row(name, recipe, tfg if recipe == "tfg" else {}, published=published))
    return tuple(rows)


def _restoration(about: str, wanted: dict, rows: tuple[Row, ...], steps: tuple[int, ...] = (100,)) -> Published:
    return Published(
        about,
        "Belardi et al. 2026 (arXiv 2603.16797)",
        {"denoiser": CATS, "pictures": CAT_PICTURES, "squeezenet": SQUEEZE},
        "restoration",
        rows,
        LPIPS,
        settings=wanted,
        steps=steps,
        pictures=32,
        batch=4,
        note="Published figures are each method's best of 150 settings; here every method has one: TFG what its paper "
        "tells for the task, the others this toolkit's default. No noise. LPIPS with SqueezeNet, as published.",
    )


TASKS = {
    "published-segmentation": Published(
        "CelebA-HQ 256, the layout of a face by BiSeNet: distance of class maps, FID",
        f"{BASE}, Table 1",
        {"denoiser": FACES, "network": PARSER, "pictures": FACE_PICTURES},
        "maps",
        _table1("segmentation", 100, dict(rule="sqrt-alpha", time_travel=None, stop=0.9)),
        DISTANCE,
        settings=dict(size=512, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        eta=0.5,
        note=UNTOLD,
    ),
    "published-sketch": Published(
        "CelebA-HQ 256, the lines of a face by Anime2Sketch: distance of line maps, FID",
        f"{BASE}, Table 1",
        {"denoiser": FACES, "network": LINES, "pictures": FACE_PICTURES},
        "maps",
        _table1("sketch", 100, dict(rule="sqrt-alpha", strength=100.0, time_travel=None, stop=0.9)),
        DISTANCE,
        settings=dict(size=256, mean=(0.5,) * 3, std=(0.5,) * 3),
        eta=0.5,
        note=UNTOLD,
    ),
    "published-text": Published(
        "CelebA-HQ 256, a text by CLIP ViT-B/16: distance of embeddings, FID",
        f"{BASE}, Table 1",
        {"denoiser": FACES, "clip": CLIP_B, "pictures": FACE_PICTURES, "prompts": PROMPTS},
        "text",
        _table1("text", 100, dict(time_travel=None)),
        DISTANCE,
        settings=dict(prompts=("a photo of a young woman", "a photo of an old man", "a painting of a smiling girl")),
        note=f"{UNTOLD} The texts are this task's own unless prompts.txt holds others.",
    ),
    "published-imagenet-text": Published(
        "ImageNet 256, a text by CLIP ViT-B/16, judged by ViT-L/14",
        f"{BASE}, Table 2",
        {"denoiser": ADM, "clip": CLIP_B, "judge": CLIP_L, "prompts": PROMPTS},
        "text",
        (
            Row("unguided", "unguided"),
            Row("auto", "auto"),
            Row("UGD", "universal", published={100: {"clip_score": 25.7}}),
            Row("LGD-MC", "lgd_mc", published={100: {"clip_score": 24.3}}),
            Row("FreeDoM", "freedom", published={100: {"clip_score": 25.9}}),
            Row("MPGD-Z", "mpgd", published={100: {"clip_score": 25.1}}),
            Row("Shen et al.", "shen", copies=20, published={100: {"clip_score": 27.7}}),
        ),
        {"clip_score": ("CLIP-L score", 2), "distance": ("distance", 2), "seconds_per_step": ("s per step", 3)},
        settings=dict(prompts=("a photo of a fox", "a photo of a lighthouse", "a bowl of fruit", "a red sports car")),
        pictures=100,
        batch=4,
        note="The texts are this task's own unless prompts.txt holds others. FreeDoM and Shen et al. travel in time as "
        "their recipes do.",
    ),
    "published-steps": Published(
        "CelebA-HQ 256, the layout of a face at few steps, with FreeDoM's step and Polyak's",
        f"{BASE}, Table 5",
        {"denoiser": FACES, "network": PARSER, "pictures": FACE_PICTURES},
        "maps",
        (
            Row("auto", "auto"),
            Row(
                "FreeDoM",
                "freedom",
                dict(rule="sqrt-alpha", time_travel=None, stop=0.9),
                published={20: {"distance": 2439}, 50: {"distance": 1821}, 100: {"distance": 1657}},
            ),
            Row(
                "FreeDoM with Polyak's step",
                "shen",
                dict(time_travel=None, stop=0.9),
                copies=0,
                published={20: {"distance": 2190}, 50: {"distance": 1635}, 100: {"distance": 1504}},
            ),
        ),
        DISTANCE,
        settings=dict(size=512, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        steps=(20, 50, 100),
        eta=0.5,
        note=UNTOLD,
    ),
    "published-cost": Published(
        "ImageNet 256, what augmented copies cost: seconds of a step guided by a text",
        f"{BASE}, Table 6",
        {"denoiser": ADM, "clip": CLIP_B, "prompts": PROMPTS},
        "text",
        (
            Row("unguided", "unguided"),
            Row("no copies", "shen", dict(time_travel=None), 0, {100: {"seconds_per_step": 0.541}}),
            Row("10 copies", "shen", dict(time_travel=None), 10, {100: {"seconds_per_step": 0.571}}),
            Row("30 copies", "shen", dict(time_travel=None), 30, {100: {"seconds_per_step": 0.625}}),
        ),
        {"seconds_per_step": ("s per step", 3), "peak_memory": ("peak memory, bytes", 0)},
        settings=dict(prompts=("a photo of a fox",)),
        pictures=4,
        batch=1,
        note="Published seconds are of the authors' GPU: compare the ratios.",
    ),
    "published-cats-sr4": _restoration(
        "Cats 256, super-resolution x4",
        dict(operator="super-resolution", factor=4),
        _cats(
            {"dps": {100: 0.129}, "mpgd": {100: 0.089}, "tfg": {100: 0.081}, "adam_dps": {100: 0.088}},
            dict(rho=4.0, mu=2.0, sigma=0.01),
        ),
    ),
    "published-cats-sr16": _restoration(
        "Cats 256, super-resolution x16, also at few steps",
        dict(operator="super-resolution", factor=16),
        _cats(SIXTEENTH, {}),
        steps=(100, 50, 25, 12),
    ),
    "published-cats-deblur": _restoration(
        "Cats 256, Gaussian deblurring, 61x61 pixels of deviation 3",
        dict(operator="deblur"),
        _cats(
            {"dps": {100: 0.174}, "mpgd": {100: 0.143}, "tfg": {100: 0.106}, "adam_dps": {100: 0.141}},
            dict(rho=1.0, mu=8.0, sigma=0.01),
        ),
    ),
}
