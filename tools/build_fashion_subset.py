"""Build the bundled, class-balanced part of Fashion-MNIST from the full data set.

    python tools/build_fashion_subset.py

The first 450 training and 100 test images of each class, in their original order, in the original's idx format,
compressed with xz. Prints the checksums that ``diffbook.data`` holds.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from pathlib import Path

import torch
from torch import Tensor

from diffbook.data import fashion_mnist

ASSETS = Path(__file__).resolve().parents[1] / "src" / "diffbook" / "assets" / "data"
PER_CLASS = {"train": 450, "test": 100}


def idx_bytes(values: Tensor) -> bytes:
    """The idx format: magic (type 8 = bytes, number of dimensions), sizes, data."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def main() -> None:
    ASSETS.mkdir(parents=True, exist_ok=True)
    for split, count in PER_CLASS.items():
        full = fashion_mnist(split)
        keep = torch.cat([(full.labels == k).nonzero()[:count, 0] for k in range(len(full.classes))]).sort()[0]
        for kind, values in (("images-idx3", full.images[keep, 0]), ("labels-idx1", full.labels[keep])):
            raw = idx_bytes(values)
            path = ASSETS / f"fashion-subset-{split}-{kind}-ubyte.xz"
            path.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
            print(f"{path.name}: {path.stat().st_size} bytes, sha256 of the content {hashlib.sha256(raw).hexdigest()}")


if __name__ == "__main__":
    main()
