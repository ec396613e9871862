"""What the fuzzer gives: command lines, losses and files that are nearly right, each from the seed and a number."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import click
from lossguide.guidance import recipes
from lossguide.guidance.cli import main
from lossguide.losses import registry

NUMBERS = (
    *("nan", "inf", "-inf", "1e400", "-1e400", "-0", "0x10", "1_000", "٣", "1e-320", "-1", "0", "1", "0.5", "1e9"),
    *("99999999999999999999999", "4294967295", "4294967296", "2147483648", "9" * 5000, "1,5", "1.", "+2", " 3 ", "½"),
)
ODD = (
    *("", " ", "\0", "a\0b", "\udcff", "\ud800", "\u202e", "é", "日本", "🥾", "\n", "\r\n", "\t", "a" * 20000),
    *("x" * 300, "b" * 5000),
    *("..", ".", "../..", "../../..", "/dev/zero", "/dev/null", "/dev/full", "/dev/fd/0", "/proc/self/mem"),
    *("~", "~root"),
    *("$HOME", "%s%n", "{}", "{0.__class__}", "'", '"', ";", "|", "*", "?", "[", "[red]", "--", "-", "-q", "\\", ":"),
    *("None", "True", "http://127.0.0.1:9/x", "file:///etc/hostname", "hf-hub:a/b", "local-dir:model", "a/b", "()"),
)
PICTURES = ("boot.png", "coat.png", "big.png", "small.png", "mask.png", "alpha.png", "grey16.png", "photo.jpg")
BAD_PICTURES = (
    *("empty.png", "broken.png", "truncated.png", "bomb.png", "folder.png", "loop.png", "dangling.png", "pipe.png"),
    *("text.txt", "my_losses.py", "no-such.png", "linked.png", "earlier/manifest.jsonl", "."),
)
FILES = (
    *("earlier/settings.json", "earlier/manifest.jsonl", "earlier/pictures/0000/00001.png", "plain/settings.json"),
    *("tuned/best.json", "tuned/journal.log", "tuned/trials.json", "guidance/guidance.json", "codebook/codebook.json"),
    *("codebook/codebook.safetensors", "boot.png", "mask.png", "photo.jpg", "my_losses.py", "model/unet/config.json"),
    "model/scheduler/scheduler_config.json",
)
"""What the sandbox holds that a case may damage before its command runs."""
ARGUMENTS = {
    "clip-text": ("an ankle boot", "a bag", "coat", "two shirts and a dress", "a red fox"),
    "contrast": ("a boot left of a bag", "a red boot above a bag", "a boot", "a dress with no bag", "left of"),
    "clip-image": PICTURES,
    "class-label": ("9", "bag", "ankle boot", "0", "-1", "10", "+3", "boots", "a bag and a boot"),
    "style": PICTURES,
    "color": ("red", "#ff0000", "#f00,#00ff00", "rgb(255, 0, 0)", "hsl(0,100%,50%)", "red,blue,rgb(1,2,3)", *PICTURES),
    "perceptual": PICTURES,
    "features": PICTURES,
    "token": ("codebook@boot.png", "codebook@coat.png"),
    "token-histogram": ("codebook@boot.png", "codebook@coat.png"),
    "aesthetic": ("head.pth", *PICTURES),
    "sketch": PICTURES,
    "symmetry": ("", "vertical", "horizontal"),
    "total-variation": ("", "isotropic", "anisotropic"),
    "my_losses.py": ("darkness", "Dark", "flat", "wrong_shape", "raises", "not_finite", "nothing", "number", "missing"),
    "broken.py": ("darkness",),
    "measurement": ("x",),
    "depth": (),
}
PROMPTS = ("ankle boot", "a bag", "sandals", "dress shirt", "a red fox", "boot and bag", "COAT")


def rng_of(seed: int, kind: str, number: int) -> random.Random:
    """The random numbers of one case."""
    return random.Random(f"{seed} {kind} {number}")


def mutated(text: str, rng: random.Random) -> str:
    """A text with a few characters or bytes changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, to = sorted(rng.choices(range(len(text) + 1), k=2))
        to = min(to, at + rng.choice((1, 1, 2, 8, 64)))
        how = rng.randrange(7)
        if how == 0:
            text = text[:at] + text[to:]
        elif how == 1:
            text = text[:to] + text[at:to] * rng.choice((1, 2, 50)) + text[to:]
        elif how == 2:
            text = text[:at] + rng.choice(ODD + NUMBERS) + text[at:]
        elif how == 3:
            text = text[:at] + rng.choice(ODD + NUMBERS) + text[to:]
        elif how == 4:
            text = text[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0x10000)))) + text[to:]
        elif how == 5:
            text = text[:at] + text[at:to].swapcase() + text[to:]
        else:
            text = damaged(text.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "surrogateescape")
    return text


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes, of which some are flipped, cut off, doubled or put elsewhere."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, to = sorted(rng.choices(range(len(data) + 1), k=2))
        how = rng.randrange(6)
        if how == 0 and data:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif how == 1:
            data = data[:at]
        elif how == 2:
            data = data[:to] + data[at:to] + data[to:]
        elif how == 3:
            data = data[:at] + rng.randbytes(rng.choice((1, 2, 16))) + data[at:]
        elif how == 4:
            data = data[:at] + data[to:]
        else:
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = b"\n".join(lines)
    return data


def loss_text(rng: random.Random) -> str:
    """A loss as the command line takes it, right or not."""
    weight = rng.choice(("", "", "", "2*", "0.5 * ", "0*", rng.choice(ODD + NUMBERS) + "*"))
    name = rng.choice([*ARGUMENTS, *(entry.name for entry in registry.available())])
    odd = rng.random() < 0.2
    argument = rng.choice(ODD + NUMBERS + BAD_PICTURES if odd else (ARGUMENTS.get(name) or PICTURES))
    text = f"{weight}{name}{':' if argument or rng.random() < 0.3 else ''}{argument}"
    return mutated(text, rng) if rng.random() < 0.35 else text


def changed_json(data: Any, rng: random.Random) -> Any:
    """JSON data, of which one or a few parts are another."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        _places(data, places)
        if not places:
            return data
        holder, key = rng.choice(places)
        other, other_key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1:
            holder[key] = copy.deepcopy(other[other_key]) if _has(other, other_key) else None
        elif how == 2 and isinstance(holder, dict):
            holder[mutated(key, rng)] = holder.pop(key)
        elif how == 3 and isinstance(holder[key], str):
            holder[key] = mutated(holder[key], rng)
        elif how == 4 and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice((-1, 0, 1e308, -1e308, 10**30, 0.5, 2, 1 << 31, math.nan, math.inf, 1e-320))
        else:
            other = (None, True, "", "x", 0, -1, 1.5, [], {}, [[]], [1], {"type": "Guidance"}, {"a": 1})
            holder[key] = copy.deepcopy(rng.choice(other))
    return data


def _places(data: Any, found: list[tuple[Any, Any]]) -> None:
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        found.append((data, key))
        _places(data[key], found)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(holder, list) and key < len(holder)


def json_bytes(data: Any, rng: random.Random) -> bytes:
    """JSON data changed in its parts, in its text, or in both."""
    how = rng.random()
    text = json.dumps(changed_json(data, rng) if how < 0.8 else data, indent=rng.choice((None, 1)))
    if how > 0.7:
        text = mutated(text, rng)
    if rng.random() < 0.01:
        text = "[" * 100_000 + text
    return text.encode("utf-8", "surrogatepass")


# ---- command lines -----------------------------------------------------------------------------------------------

_DRAW = ("generate", "restore", "imitate", "tune")
_BY_NAME = {
    "losses": loss_text,
    "judge": loss_text,
    "prompt": lambda rng: rng.choice(PROMPTS),
    "model": lambda rng: rng.choice(("demo", "demo", "demo-tokens", "model", "no-model", "a/b", "broken-model")),
    "recipe": lambda rng: rng.choice([*recipes.available(), "tokens"]),
    "changes": lambda rng: (
        rng.choice(("rule=", "rho=", "stop=", "count=", "inner=", "through=", "time_travel=", "", "="))
        + rng.choice(
            ("rms", "x0", "0.5", "2", "1e999", "-1", "NaN", "[[1]]", "{}", "null", "true", "[" * 5000, *NUMBERS)
        )
    ),
    "scheduler": lambda rng: rng.choice(("ddim", "ddpm", "euler", "euler-ancestral", "dpm++", "dpm++-sde", "unipc")),
    "device": lambda rng: rng.choice(("cpu", "auto", "cuda", "cuda:7", "meta", "mps", "cpu:3")),
    "out": lambda rng: rng.choice(
        ("out", "new/deep/out", "earlier", "plain", "tuned", ".", "..", "linked-out", "boot.png", "out/", "guidance")
    ),
    "tuned": lambda rng: rng.choice(("tuned/best.json", "tuned/best.json", "plain/settings.json", *BAD_PICTURES)),
    "clip_model": lambda rng: rng.choice(("demo", "demo", "ViT-B-32", "RN50", "model", "clip", "ViT-B-3")),
    "clip_pretrained": lambda rng: rng.choice(("openai", "laion2b_s34b_b79k", "text.txt", "empty.png")),
    "change_map": lambda rng: rng.choice((*PICTURES, "0.5", "0", "1", "2", "-1", "nan")),
    "shape": lambda rng: rng.choice(("3x16x16", "3x8x8", "1x16x16", "3x1x1", "3", "2x3x8x8", "3x99999x99999", "0x1")),
}


def command(rng: random.Random) -> list[str]:
    """A command line, right or not."""
    shares = {"generate": 8, "restore": 4, "imitate": 3, "tune": 1.5, "check": 0.8, "recipes": 0.2, "losses": 0.2}
    name = rng.choices(list(shares), shares.values())
    words: list[str] = name[:]
    params = main.commands[name[0]].params
    if name[0] in _DRAW:
        words += ["--device", "cpu", "--steps", rng.choice("12"), "--num-images", rng.choice("112")]
        words += ["--trials", rng.choice("123")] if name[0] == "tune" else []
    if name[0] == "restore" and rng.random() < 0.8:
        words += ["--degrade"] * (rng.random() < 0.8) + ["--resize"] * (rng.random() < 0.8)
    if name[0] == "imitate" and rng.random() < 0.6:
        words += ["--resize"]
    for param in params:
        cheap = param.name in ("steps", "num_images", "trials", "device")
        wanted = param.required or param.name in ("pairs", "prompt")
        if rng.random() < (0.9 if wanted else 0.03 if cheap else 0.11):
            words += _given(param, rng)
    if rng.random() < 0.3:
        words = _disturbed(words, rng)
    return words


def _given(param: click.Parameter, rng: random.Random) -> list[str]:
    """A parameter as it is written, with a value that suits it or does not."""
    if isinstance(param, click.Option) and param.is_flag:
        return [rng.choice(param.opts)]
    times = rng.choice((1, 1, 2)) if param.multiple or param.nargs == -1 else 1
    words = []
    for _ in range(times):
        values = [_value(param, rng) for _ in range(max(param.nargs, 1))]
        if isinstance(param, click.Argument):
            words += values
        elif len(values) == 1 and rng.random() < 0.1:
            words.append(f"{rng.choice(param.opts)}={values[0]}")
        else:
            words += [rng.choice(param.opts), *values]
    return words


def _value(param: click.Parameter, rng: random.Random) -> str:
    if rng.random() < 0.05:
        return rng.choice(ODD + NUMBERS)
    if param.name in _BY_NAME:
        return _BY_NAME[param.name](rng)
    if isinstance(param.type, click.Choice):
        return rng.choice(list(param.type.choices))
    if isinstance(param.type, (click.IntRange, click.types.IntParamType)):
        return rng.choice(("1", "1", "2", "3", "0", "65", "1000", rng.choice(NUMBERS)))
    if isinstance(param.type, (click.FloatRange, click.types.FloatParamType)):
        return rng.choice(("0", "0.5", "1", "1e-9", "1e9", "1e38", "1e300", rng.choice(NUMBERS)))
    return rng.choice(PICTURES if rng.random() < 0.8 else BAD_PICTURES)


def _disturbed(words: list[str], rng: random.Random) -> list[str]:
    """The words with one left out, doubled, put elsewhere, put in, or changed."""
    words = words[:]
    for _ in range(rng.choice((1, 1, 2))):
        at, how = rng.randrange(len(words)), rng.randrange(6)
        if how == 0 and len(words) > 1:
            del words[at]
        elif how == 1:
            words.insert(rng.randrange(len(words)), words[at])
        elif how == 2:
            words.insert(at, rng.choice(ODD + NUMBERS + ("--help", "--version", "--loss", "--pair", "-x", "--num")))
        else:
            words[at] = mutated(words[at], rng)
    return words
