"""Where fuzzed commands run: a folder that is made anew, watched, and outside of which nothing can be written."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

LOSSES = """
import torch
class Dark:
    def __call__(self, image):
        return -image.mean((1, 2, 3))
def darkness(image): return -image.mean((1, 2, 3))
def flat(image): return image.detach().mean((1, 2, 3))
def wrong_shape(image): return image.mean()
def raises(image): raise KeyError("no such thing")
def not_finite(image): return image.mean((1, 2, 3)) / 0
def nothing(image): return None
number = 3
"""
RESULTS = re.compile(
    r"\.?(\d{5,}\.png|(sheet|record|degraded|original|mask|history)\.png|(record|settings|trials|best)\.json"
    r"|manifest\.jsonl|pictures|\d{4,}|report\.txt|journal\.log(\.lock)?|claims)(\.partial)?"
)
"""Names that a command may write over in its own folder, where it goes on with a run or takes one away."""

WEIGHTS = ("download.pytorch.org",)
"""Hosts that are asked for by design, where weights are not here yet; they are not reached either."""


def prepare(root: Path) -> None:
    """Make the folder that every case begins with, by the library's own commands."""
    import torch
    from lossguide.guidance import recipes
    from lossguide.guidance.cli import main
    from lossguide.guidance.cli_output import to_pil
    from lossguide.losses import ClipText, Codebook, Color, PatchFeatures
    from lossguide.samplers.demo import FOLDER

    work = root / "a" / "b" / "work"
    for folder in (work, root / "home", root / "tmp", root / "beside", root / "elsewhere", work / "folder.png"):
        folder.mkdir(parents=True)
    for folder in (root / "beside", root / "a", root / "a" / "b", root / "elsewhere"):
        (folder / "00000.png").write_text("somebody's")
        (folder / "notes.txt").write_text("somebody's")
    os.chdir(work)
    generator = torch.Generator().manual_seed(0)
    for name, size in {"boot.png": 32, "coat.png": 32, "big.png": 70, "small.png": 8, "photo.jpg": 48}.items():
        to_pil(torch.rand(3, size, size, generator=generator)).save(name)
    mask = to_pil((torch.rand(1, 32, 32, generator=generator) > 0.5).float().expand(3, -1, -1))
    mask.save("mask.png")
    alpha = to_pil(torch.rand(3, 32, 32, generator=generator))
    alpha.putalpha(mask.convert("L"))
    alpha.save("alpha.png")
    mask.convert("L").convert("I;16").save("grey16.png")
    whole = Path("big.png").read_bytes()
    Path("truncated.png").write_bytes(whole[: len(whole) // 2])
    Path("broken.png").write_bytes(whole[:40] + b"\xff" * 40 + whole[80:])
    Path("bomb.png").write_bytes(whole[:16] + (100_000).to_bytes(4, "big") * 2 + whole[24:])
    for name in ("empty.png", "head.pth"):
        Path(name).touch()
    Path("text.txt").write_text("not a picture\n")
    Path("my_losses.py").write_text(LOSSES)
    Path("broken.py").write_text("def darkness(image:\n")
    Path("loop.png").symlink_to("loop.png")
    Path("dangling.png").symlink_to("no-such")
    Path("linked.png").symlink_to("boot.png")
    Path("linked-out").symlink_to("../../elsewhere")
    for part in ("unet", "scheduler"):
        Path("model", part).mkdir(parents=True)
        for file in (FOLDER / part).iterdir():
            target = Path("model", part, file.name)
            target.symlink_to(file) if file.suffix == ".safetensors" else shutil.copy(file, target)
    Path("broken-model").mkdir()
    Path("broken-model/model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    words = "--steps 1 --num-images 2 --device cpu"
    for command in (
        f"generate bag --recipe mpgd {words} --out plain -q",
        f"generate bag --recipe mpgd {words} --out earlier --resume -q",
        f"tune bag {words} --trials 1 --out tuned",
    ):
        try:
            main(command.split(), prog_name="lossguide")
        except SystemExit as end:
            if end.code:
                raise SystemExit(f"the fuzzer's own 'lossguide {command}' failed") from None
    pictures = torch.rand(4, 3, 32, 32, generator=generator)
    Codebook.fit(pictures, PatchFeatures("demo"), 4).save("codebook")
    recipes.auto(ClipText("a bag", model="demo") + 2 * Color("red")).save_pretrained("guidance")


class Sandbox:
    """A copy of a prepared folder, at work in which nothing outside of it can be written.

    Attributes:
        root: the copy.
        work: the folder in it where commands run.
        told: what was tried and refused: writes outside, processes, the network.
    """

    def __init__(self, pristine: Path, root: Path):
        self.pristine, self.root, self.work = pristine, root, root / "a" / "b" / "work"
        self.told: list[str] = []
        self.armed = False
        os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        sys.addaudithook(self._audit)
        self.renew()

    def renew(self) -> None:
        """Make the copy anew."""
        os.chdir(self.pristine)
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.pristine, self.root, symlinks=True)
        os.chdir(self.work)
        os.mkfifo("pipe.png")
        self.before = self._content()

    def changes(self) -> dict[str, str]:
        """Paths below the root -> "made", "changed" or "gone", since `renew` or the last `accept`."""
        now = self._content()
        other = [path for path in now if now[path] != self.before.get(path)]
        found = {path: "changed" if path in self.before else "made" for path in other}
        return found | dict.fromkeys(self.before.keys() - now.keys(), "gone")

    def accept(self) -> None:
        """Take what lies there now as what was there before."""
        self.before = self._content()

    def wrong(self, changes: dict[str, str], out: Path | None, goes_on: bool) -> list[str]:
        """Those changes that a command may not make.

        Args:
            changes: from `changes`.
            out: the folder that the command was told to write to; None where it may write nothing.
            goes_on: whether it may change what results lie there.
        """
        found = []
        for path, how in changes.items():
            place = self.root / path
            if place.is_relative_to(self.root / "home" / ".cache" / "torch"):
                continue  # torch makes the folder of its weights before it asks for them
            inside = out is not None and (_within(place, out) or how == "made" and _within(out, place))
            inside = inside or path == "home/.cache" and how == "made"
            fine = how == "made" or goes_on and RESULTS.fullmatch(place.name)
            if not (inside and fine):
                found.append(f"{how} outside of the output folder: {path}" if not inside else f"{how}: {path}")
        return found

    def _content(self) -> dict[str, tuple]:
        found: dict[str, tuple] = {}
        for at, folders, files in os.walk(self.root):
            for name in folders + files:
                path = os.path.join(at, name)
                status = os.lstat(path)
                folder = stat.S_ISDIR(status.st_mode)
                seen = () if folder else (status.st_size, status.st_mtime_ns, status.st_ino)
                found[os.path.relpath(path, self.root)] = (stat.S_IFMT(status.st_mode), *seen)
        return found

    def _audit(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto")):
            if event == "socket.getaddrinfo" and args[0] in WEIGHTS:
                raise OSError("the fuzzer has no network")
            self._refuse(f"{event} {args[1:] if event == 'socket.connect' else args}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self._refuse(f"{event} {args[:2]}")
        elif event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if isinstance(path, (str, bytes)) and writes:
                self._inside(event, path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime", "shutil.rmtree"):
            self._inside(event, args[0])
        elif event in ("os.rename", "os.link", "os.symlink", "shutil.move"):
            self._inside(event, args[1])

    def _inside(self, event: str, path: object) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)) or path in ("/dev/null", os.devnull):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not _within(Path(real), self.root):
            if event == "os.mkdir" and os.path.isdir(real):
                return  # there already: mkdir(exist_ok=True)
            self._refuse(f"{event} {os.fsdecode(path)}")

    def _refuse(self, what: str) -> None:
        self.told.append(what)
        raise PermissionError(13, "the fuzzer's sandbox", what)


def _within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, below it, or below one of its free names `folder-2`, `folder-3` ..."""
    parts, wanted = path.parts, folder.parts
    same = parts[: len(wanted) - 1] == wanted[:-1] and len(parts) >= len(wanted)
    return same and re.fullmatch(re.escape(wanted[-1]) + r"(-\d+)?", parts[len(wanted) - 1]) is not None


def seeds(folder: Path) -> None:
    """Valid files to begin with: a saved guidance per recipe with losses of all kinds, `<name>/guidance.json`."""
    import lossguide.losses as lo
    import torch
    from lossguide.guidance import recipes
    from lossguide.losses import operators as op

    measured = lo.Measurement(op.SuperResolution(2), torch.rand(1, 3, 4, 4), sigma=0.1)
    chain = op.Chain(op.GaussianBlur(3, 1.0), op.SuperResolution(2))
    losses = [
        lo.ClipText("a bag", model="demo"),
        2 * lo.ClassLabel(9) + lo.Color(["red", "#00f"], shares=[1, 2]),
        measured,
        lo.Measurement(op.Inpaint(torch.ones(4, 4)), torch.rand(1, 3, 4, 4)),
        lo.Symmetry().during(0.2, 0.7),
        lo.TotalVariation().scheduled((0.0, 1.0), (0.5, 0.2)),
        lo.Sketch(torch.rand(3, 8, 8)),
        lo.Frames(lo.Color("red")),
        lo.Diversity() + lo.ContrastiveText("a boot left of a bag", model="demo"),
        lo.Measurement(chain, torch.rand(1, 3, 4, 4)),
        lo.Measurement(op.PhaseRetrieval(), op.PhaseRetrieval()(torch.rand(1, 3, 8, 8))),
    ]
    for number, (name, recipe) in enumerate([*recipes.available().items(), ("tokens", recipes.tokens)] * 2):
        loss = measured if name in ("pigdm", "diffpir", "ddnm") else losses[number % len(losses)]
        recipe(loss).save_pretrained(folder / f"{name}-{number}")
    travel = {"time_travel.repeats": 2, "time_travel.start": 0.1, "time_travel.stop": 0.6}
    settings = {"strength": 1.5, "stop": 0.9, "through": "x0", "augment.copies": 4, "rule.k": 0.2, **travel}
    (folder / "best.json").write_text(json.dumps({"settings": settings, "trial": 3, "score": 0.5}))
