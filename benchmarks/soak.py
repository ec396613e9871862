"""A soak of large runs: processes killed at random, a full disk, and `accelerate launch`, against an undisturbed run.

Four processes share a run of `lossguide generate` in a small file system in memory. Whenever so many more pictures are
done, one of them, or all at once, is killed (SIGKILL) and started again by the same command; once the file system is
full, all end, it is made larger, and they go on. The pictures and the manifest must be those of a run that one process
draws undisturbed, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PROCESSES, STEPS, SHARED = 4, 5, 200
FULL = dict(pictures=2000, batch=20, kills=25)
QUICK = dict(pictures=200, batch=8, kills=8)
ALL = 5  # each so many-th kill is of all processes, while files of a batch are written
PATIENCE = 900  # seconds without a new picture or end, after which the soak gives up
PAGE = 4096

# where no file system can be mounted: a process that refuses to write where its folder holds too much already
SHIM = """
import errno, os, sys
from pathlib import Path
folder, room, real = sys.argv.pop(1), int(sys.argv.pop(1)), os.write
def size(path):
    return -(-os.stat(path).st_size // 4096) * 4096 if os.path.exists(path) else 0
def write(handle, data):
    if sum(size(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names) > room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(handle, data)
os.write = write
from lossguide.guidance.cli import main
main()
"""


def command(folder: Path, pictures: int, batch: int) -> list[str]:
    """What is run, after the Python interpreter and how it is started."""
    words = f"generate --loss class-label:bag --recipe mpgd --steps {STEPS} --resume -q --device cpu"
    return [*words.split(), "--num-images", str(pictures), "--batch-size", str(batch), "--out", str(folder)]


MODULE = ["-m", "lossguide.guidance.cli"]
PLAIN = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def done(folder: Path) -> int:
    """How many pictures the manifest lists, whole lines or not."""
    path = folder / "manifest.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def unlisted(folder: Path) -> int:
    """Files of pictures, whole or not, that are not listed yet."""
    return sum(len(files) for _, _, files in os.walk(folder / "pictures")) - done(folder)


def content(folder: Path) -> dict[str, bytes]:
    """The manifest and the pictures, and what else lies beside them in their folders."""
    files = [folder / "manifest.jsonl", *(path for path in (folder / "pictures").rglob("*") if path.is_file())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def pages(files: Iterable[bytes]) -> int:
    """How many bytes of a disk they take."""
    return sum(-(-len(data) // PAGE) * PAGE for data in files)


def undisturbed(folder: Path, size: dict) -> tuple[float, list[tuple[int, float]]]:
    """Draw in one process: the seconds it took, and its resident MiB by the number of pictures done."""
    start, memory = time.perf_counter(), []
    words = [sys.executable, *MODULE, *command(folder, size["pictures"], size["batch"])]
    process = subprocess.Popen(words, env=PLAIN, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        resident = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")]
        memory += [(done(folder), resident[0])] if resident else []
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit("the undisturbed run failed")
    return time.perf_counter() - start, [point for point in memory if 0 < point[0] < size["pictures"]]


@contextmanager
def small_disk(place: Path, room: int) -> Iterator[bool]:
    """A file system in memory of so many bytes at a folder; False where none can be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "soak", str(place)]
    real = sys.platform == "linux" and shutil.which("mount") is not None
    real = real and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield real
    finally:
        if real:
            subprocess.run(["umount", str(place)], check=True)


class Soak:
    """Processes at work on one run, and what befalls them."""

    def __init__(self, disk: Path, room: int | None, size: dict):
        self.folder, self.disk, self.room, self.size = disk / "run", disk, room, size
        self.random = random.Random(0)
        self.processes: dict[int, subprocess.Popen] = {}
        self.log = disk.parent / "log"
        self.log.mkdir()
        self.starts = self.killed = self.left = 0
        self.full: list[str] = []

    def start(self, rank: int) -> None:
        """Start a process, or start it again; what it says goes to a file."""
        how = MODULE if self.room is None else ["-c", SHIM, str(self.disk), str(self.room)]
        words = command(self.folder, self.size["pictures"], self.size["batch"])
        with (self.log / str(rank)).open("w") as told:
            self.processes[rank] = subprocess.Popen(
                [sys.executable, *how, *words],
                env=PLAIN | {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)},
                stderr=told,
                stdout=subprocess.DEVNULL,
            )
        self.starts += 1

    def at_work(self) -> list[int]:
        """Ranks of processes that have come into the folder."""
        found = []
        for rank, process in self.processes.items():
            files = Path(f"/proc/{process.pid}/fd")
            try:
                inside = any(os.readlink(file).endswith("/.claims") for file in files.iterdir())
            except OSError:
                inside = False
            found += [rank] if inside else []
        return found

    def kill(self, number: int) -> None:
        """Kill one process, or all, once there is work to disturb; and start them again."""
        begun = time.monotonic()
        everyone = number % ALL == ALL - 1
        if everyone:  # while the files of a batch are there, and their lines are not
            while unlisted(self.folder) < 1 and time.monotonic() - begun < 10:
                pass
        else:
            time.sleep(self.random.uniform(0, 0.5))
        ranks = list(self.processes) if everyone else self.random.sample(self.at_work() or list(self.processes), 1)
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGKILL)
        for rank in ranks:
            self.killed += self.processes[rank].wait() == -signal.SIGKILL
            if everyone:
                self.left += unlisted(self.folder) if rank == ranks[-1] else 0
            self.start(rank)

    def grow(self) -> None:
        """Make the disk larger once all processes have ended for want of room."""
        if self.room is None:
            subprocess.run(["mount", "-o", "remount,size=1g", str(self.disk)], check=True)
        self.room = None
        for rank in self.processes:
            self.start(rank)

    def run(self) -> None:
        """Until all is done."""
        for rank in range(PROCESSES):
            self.start(rank)
        kills, last, heard = 0, -1, time.monotonic()
        while any(process.poll() is None for process in self.processes.values()) or not self._over():
            here = done(self.folder)
            if here != last:
                last, heard = here, time.monotonic()
            if time.monotonic() - heard > PATIENCE:
                raise SystemExit(f"nothing has happened for {PATIENCE} s, at {here} pictures")
            ended = {rank: process.returncode for rank, process in self.processes.items() if process.poll() is not None}
            if any(ended.values()) and len(ended) == PROCESSES:
                told = [(self.log / str(rank)).read_text().strip() for rank, status in ended.items() if status]
                if self.full or not all(
                    one.startswith("Error: No space left on device") and "\n" not in one for one in told
                ):
                    raise SystemExit("\n".join(told))
                self.full = told
                print(f"full at {here} pictures: {told[0]}", flush=True)
                self.grow()
            due = here >= self.size["pictures"] * 0.95 * kills / self.size["kills"]
            if kills < self.size["kills"] and due and self.at_work():
                self.kill(kills)
                kills += 1
                print(f"kill {kills} at {here} pictures", flush=True)
            time.sleep(0.02)
        self.kills = kills

    def _over(self) -> bool:
        return not any(process.returncode for process in self.processes.values())


def launched(folder: Path, batch: int) -> None:
    """Draw in two processes of `accelerate launch`."""
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    words = [*launch.split(), "--dynamo_backend", "no", *MODULE, *command(folder, SHARED, batch)]
    subprocess.run([sys.executable, *words], env=PLAIN, check=True, stdout=subprocess.DEVNULL)


def run(quick: bool = False, fresh: bool = False, only: tuple[str, ...] = ()) -> None:
    """Draw undisturbed, disturbed and by accelerate, compare, and write what came out."""
    if os.name != "posix":
        raise SystemExit("the soak kills processes by signals, which this system does not have")
    size = QUICK if quick else FULL
    name = "soak-quick" if quick else "soak"
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        text, right = _measured(place, size, quick)
    finally:
        shutil.rmtree(place)
    (RESULTS / f"{name}.md").write_text(text)
    print(RESULTS / f"{name}.md")
    if not right:
        raise SystemExit("the disturbed run's files are not those of the undisturbed one")


def _measured(place: Path, size: dict, quick: bool) -> tuple[str, bool]:
    begun = time.perf_counter()
    seconds, memory = undisturbed(place / "one", size)
    expected = content(place / "one")
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    beside = [path.read_bytes() for path in (place / "one").iterdir() if path.name.startswith(("record", "settings"))]
    room = pages(beside) + pages(expected.values()) // 2
    with small_disk(place / "disk", room) as real:
        soak = Soak(place / "disk", None if real else room, size)
        start = time.perf_counter()
        try:
            soak.run()
        finally:
            for process in soak.processes.values():
                process.kill()
                process.wait()
        disturbed = time.perf_counter() - start
        found = content(soak.folder)
        hidden = [path.name for path in soak.folder.rglob(".*")]
    if shutil.which("accelerate"):
        launched(place / "two", size["batch"])
        two = content(place / "two")
        same = sum(expected.get(file) == data for file, data in two.items() if file.endswith(".png"))
        shared = f"{same} of {SHARED}"
    else:
        shared, same = "accelerate is not installed", SHARED
    equal = sum(expected.get(file) == data for file, data in found.items() if file.endswith(".png"))
    listed = [json.loads(line) for line in found["manifest.jsonl"].splitlines()[1:]]
    exact = found["manifest.jsonl"] == expected["manifest.jsonl"]
    tenth = next(one for one in memory if one[0] >= size["pictures"] / 10)
    right = found == expected and not hidden and same == SHARED and bool(soak.full) and soak.kills == size["kills"]
    disk = "a tmpfs with room for half of the pictures" if real else "simulated: writes refused by the process itself"
    rows = {
        "pictures, batch": f"{size['pictures']}, {size['batch']}",
        "kills: of one process or of all, processes killed": f"{soak.kills}, {soak.killed}",
        "starts of processes": soak.starts,
        "files of pictures written and not yet listed, at kills of all": soak.left,
        "full disk": f"{disk}; {len(soak.full)} processes ended by one sentence each",
        "pictures equal to the undisturbed run's, byte for byte": f"{equal} of {size['pictures']}",
        "pictures lost, doubled, torn": f"{len(expected.keys() - found.keys())}, "
        f"{len(listed) - len({row['index'] for row in listed})}, {len(found) - 1 - equal}",
        "manifest equal, byte for byte": "yes" if exact else "no",
        "temporary files and locks left": len(hidden),
        f"pictures of 2 `accelerate` processes equal to those of one ({SHARED})": shared,
        "resident MiB of the undisturbed process": f"{tenth[1]:.0f} at {tenth[0]} pictures, "
        f"{memory[-1][1]:.0f} at {memory[-1][0]}",
        "seconds: undisturbed, disturbed, in all": f"{seconds:.0f}, {disturbed:.0f}, {time.perf_counter() - begun:.0f}",
    }
    lines = [
        "# Soak of large runs",
        "",
        f"`python -m benchmarks run soak{' --quick' if quick else ''}`",
        "",
        f"`lossguide {' '.join(command(Path('DIR'), size['pictures'], size['batch']))}` in {PROCESSES} processes, one "
        f"thread each, on {os.cpu_count()} cores. Processes are killed by SIGKILL and started again by the same "
        f"command: one of those at work, at a random moment; at each {ALL}th kill all, while files are written. "
        'The last full disk message: "'
        + (soak.full[-1] if soak.full else "none").replace(str(soak.folder), "DIR")
        + '".',
        "",
        "| what | found |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows.items()),
    ]
    return "\n".join(lines) + "\n", right
