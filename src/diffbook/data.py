"""Data sets as tensors: Fashion-MNIST, emoji, CIFAR-10, digits, your own folder of images, and toy sets in the plane.

Images are kept as uint8 and scaled to [-1, 1] when they are used: a quarter of the memory of float32, on the CPU
as on a GPU.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import lzma
import math
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FASHION_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

# File name, sha256 of the *decompressed* content: the same whether the file is plain, .gz or .xz.
_FASHION = {
    "train": (
        ("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    ),
    "test": (
        ("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ),
}
_SUBSET = {
    "train": (
        (
            "fashion-subset-train-images-idx3-ubyte",
            "de11bac6b9a84b574ca3d60f5ed8d6c61abf67ddf8466fa747d14e0ff564a362",
        ),
        (
            "fashion-subset-train-labels-idx1-ubyte",
            "93e107f3213f7008167732d609971e1eb3c0ce5564e44ea5868fa4d27e09dc43",
        ),
    ),
    "test": (
        (
            "fashion-subset-test-images-idx3-ubyte",
            "7cee33c3c6414b1b86c25e665a6c4f41584269de3b7cc9768b1d351922845eef",
        ),
        (
            "fashion-subset-test-labels-idx1-ubyte",
            "3128d790775889812b73c4f13923559c8b9e281d112c6ea7862acf60a206a909",
        ),
    ),
}
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_ADDRESS = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
_FASHION_GZ = {  # sha256 of what is downloaded
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_IDX_BYTES = 2**26  # no file of Fashion-MNIST is larger; a compressed file may claim to be
CIFAR_ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_CIFAR_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
EMOJI_STYLES = ("noto", "twemoji", "fluent")
EMOJI_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
EMOJI_CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
EMOJI_SHEET = 16  # the archive keeps the pictures in sheets of so many rows and columns
_EMOJI_ARCHIVE = resources.files("diffbook") / "assets" / "data" / "emoji64.zip"
_EMOJI_SHA256 = "905b94ba6b36c107c0e1420b373fbbf08c782611c57bb39ab0bb2fb67783047c"
# Where Debian's package dataset-fashion-mnist puts the four files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class DataError(ValueError):
    """A data file is missing, damaged or not what it should be; the message says what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: uint8, shape ``(N, C, H, W)``.
        labels: int64, shape ``(N,)``, values 0 … K-1.
        classes: the K class names.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def x(self, index: Tensor | slice | list[int] | None = None) -> Tensor:
        """Images as float32 in [-1, 1], shape ``(B, C, H, W)``; all of them without an index."""
        return to_unit_range(self.images if index is None else self.images[index])

    def one_per_class(self) -> Self:
        """The first image of each class, in the order of the classes."""
        return self.part(torch.stack([(self.labels == k).nonzero()[0, 0] for k in range(len(self.classes))]))

    def part(self, index: Tensor) -> Self:
        """The images with these numbers, as a set."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def spread(self, number: int) -> Self:
        """At most so many of the images, at equal distances: many sets are sorted."""
        n = min(number, len(self))
        return self.part(torch.arange(n, device=self.labels.device) * len(self) // n)

    def to(self, device: torch.device | str) -> Self:
        """The same set with its tensors on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


class Emoji(NamedTuple):
    """What is known of one picture of :func:`emoji64`.

    Attributes:
        code: Unicode's code points, in hexadecimal; with ``style`` it names the picture.
        style: whose drawing, one of ``EMOJI_STYLES``.
        object: the code without skin tone, the same in all tones and styles.
        name: lower-case words, the same in all tones and styles.
        tone: "" where none is chosen; one of ``EMOJI_TONES``; or two of them, "light and dark", for two persons.
        category: one of ``EMOJI_CATEGORIES``.
        subcategory: a finer one, such as "animal-bird".
        split: "train" or "test".
        factor: of a picture of the test, what is new about it, "style" or "tone"; else "".
    """

    code: str
    style: str
    object: str
    name: str
    tone: str
    category: str
    subcategory: str
    split: str = "train"
    factor: str = ""

    @property
    def caption(self) -> str:
        """Words with spaces between them, such as "noto woman firefighter medium-dark skin" or "noto volcano"."""
        return f"{self.style} {self.name}" + (f" {self.tone} skin" if self.tone else "")


@dataclass(frozen=True)
class CaptionedImages(ImageSet):
    """Images with captions; a label is the picture's category.

    Attributes:
        rows: what is known of each image, N of them.
    """

    rows: tuple[Emoji, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """The N captions."""
        return tuple(row.caption for row in self.rows)

    def part(self, index: Tensor) -> Self:
        """The images with these numbers, as a set."""
        return replace(super().part(index), rows=tuple(self.rows[i] for i in index.tolist()))

    def where(self, **values: str) -> Tensor:
        """Numbers of the images whose rows have these values: ``where(style="noto", tone="dark")``; int64, ``(M,)``.

        Raises:
            ValueError: a row has no such attribute.
        """
        unknown = [name for name in values if name not in Emoji._fields]
        if unknown:
            raise ValueError(f"a row has {', '.join(Emoji._fields)}, not {unknown[0]!r}")
        fits = [all(getattr(row, name) == value for name, value in values.items()) for row in self.rows]
        return torch.tensor(fits, dtype=torch.bool).nonzero()[:, 0]


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 values 0 … 255 to float32 in [-1, 1]: x = 2 k / 255 - 1.

    Raises:
        ValueError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Values in [-1, 1] to the nearest of 0 … 255; values outside are clipped. Inverts :func:`to_unit_range`."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fashion_mnist(split: str = "train", root: str | Path | None = None, download: bool = True) -> ImageSet:
    """Fashion-MNIST, 60,000 training or 10,000 test images of 28×28 (Xiao et al. 2017).

    Looked for in ``root`` if it is given; else in the folder that the environment variable ``DIFFBOOK_DATA``
    names, in the folder of Debian's package ``dataset-fashion-mnist``, and in the cache. If it is in none of
    them, it is downloaded from its authors' repository into the cache. Files may be plain, ``.gz`` or ``.xz``; each is
    checked by the checksum of its content.

    Raises:
        ValueError: unknown split.
        DataError: a file is damaged; or the data is nowhere and cannot be downloaded.
    """
    files = _split(_FASHION, split)
    folders = [Path(root)] if root is not None else _fashion_folders()
    for folder in folders:
        if all(_find(folder, name) for name, _ in files):
            return _read_image_set(folder, files)
    if root is not None:
        raise DataError(f"no {files[0][0]}[.gz|.xz] and {files[1][0]}[.gz|.xz] in {root}: put both files there")
    if download:
        for name, _ in files:
            _download(f"{FASHION_ADDRESS}/{name}.gz", folders[-1], _FASHION_GZ[name], _HOW_TO_GET)
        return _read_image_set(folders[-1], files)
    raise DataError(f"Fashion-MNIST is in none of {', '.join(map(str, folders))}. {_HOW_TO_GET}")


def fashion_subset(split: str = "train") -> ImageSet:
    """The class-balanced part of Fashion-MNIST that comes with the package: 4,500 training, 1,000 test images.

    The first 450 (100) images of each class, in their original order; built by ``tools/build_fashion_subset.py``.

    Raises:
        ValueError: unknown split.
        DataError: a bundled file is damaged.
    """
    files = _split(_SUBSET, split)
    with resources.as_file(resources.files("diffbook") / "assets" / "data") as folder:
        return _read_image_set(folder, files)


def cifar10(split: str = "train", root: str | Path | None = None, download: bool = True) -> ImageSet:
    """CIFAR-10, 50,000 training or 10,000 test images of 32×32 in colour (Krizhevsky 2009).

    Read from its *binary* distribution, ``cifar-10-binary.tar.gz`` or what is in it: the other one for Python is a
    pickle, and to read a pickle is to run a program. Looked for in ``root`` if it is given; else in the folder that
    ``DIFFBOOK_DATA`` names and in the cache, into which it is downloaded (170 MB) if it is in neither.

    Raises:
        ValueError: unknown split.
        DataError: a file is damaged; or the data is nowhere and cannot be downloaded.
    """
    if split not in _CIFAR_FILES:
        raise ValueError(f"split must be one of train, test, got {split!r}")
    named, cache = os.environ.get("DIFFBOOK_DATA"), cache_folder() / "cifar-10"
    folders = [Path(root)] if root is not None else [*([Path(named)] if named else []), cache]
    for folder in folders:
        content = _cifar_content(folder, _CIFAR_FILES[split])
        if content is not None:
            return _read_cifar(content)
    if root is None and download:
        _download(CIFAR_ADDRESS, cache, _CIFAR_SHA256)
        content = _cifar_content(cache, _CIFAR_FILES[split])
        assert content is not None
        return _read_cifar(content)
    name = CIFAR_ADDRESS.rpartition("/")[2]
    raise DataError(f"CIFAR-10 is not in {', '.join(map(str, folders))}: put {name} there, from {CIFAR_ADDRESS}")


def image_folder(root: str | Path, size: int, split: str = "train") -> ImageSet:
    """Your own images: a folder of PNG, JPEG, WebP, …, with a subfolder for each class, or all in one class.

    Each image is turned as its camera says, laid on white where it is transparent, cut to the largest square in its
    middle and scaled to ``size``. A folder that has subfolders ``train`` and ``test`` (or ``val``) is split by them;
    else about one image in twenty is held out for the test, by a hash of its name, so that new files move none. Hidden
    files are left out. What was read is kept in the cache until a file changes. All images are in memory, 3 · size²
    bytes each.

    Args:
        size: height and width, a multiple of 8.

    Raises:
        ValueError: unknown split, or another size.
        DataError: there is no such folder; no images are in it; the test has a class that training has not; or some
            images cannot be read, which are named.
    """
    root = Path(root)
    if split not in ("train", "test"):
        raise ValueError(f"split must be one of train, test, got {split!r}")
    if size < 8 or size % 8:
        raise ValueError(f"size must be a positive multiple of 8, got {size}")
    if not root.is_dir():
        raise DataError(f"{root} is no folder: name a folder of images")
    folders = {"train": root / "train", "test": root / "test" if (root / "test").is_dir() else root / "val"}
    if folders["train"].is_dir():  # somebody has split them
        base, known = folders[split], _class_names(_image_names(folders["train"]))
        if not base.is_dir():
            raise DataError(f"{root} has a folder train, but neither test nor val: make one, or move all out of train")
        names = _image_names(base)
    else:
        base, everything = root, _image_names(root)
        known = _class_names(everything)
        names = [name for name in everything if _held_out(name) == (split == "test")]
    if not names:
        raise DataError(f"there are no images for {split} in {base}; looked for {', '.join(IMAGE_SUFFIXES)}")
    foreign = [name for name in _class_names(names) if name not in known]
    if foreign:
        raise DataError(f"{base} has classes that {folders['train']} has not: {', '.join(foreign[:10])}")
    labels = torch.tensor([known.index(_class_name(name)) for name in names])
    return ImageSet(_read_images(base, [base / name for name in names], size), labels, known)


def image_set(name: str, split: str = "train") -> ImageSet:
    """The images that a recipe or a command names: a name in ``IMAGE_SETS``, or ``folder:SIZE:PATH``.

    Raises:
        ValueError: there is nothing of that name.
        DataError: see the function of the data set.
    """
    size = folder_size(name)
    if size:
        return image_folder(name.split(":", 2)[2], size, split)
    if name not in IMAGE_SETS:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(IMAGE_SETS)} and folder:SIZE:PATH")
    return IMAGE_SETS[name]() if name == "digits" else IMAGE_SETS[name](split)


def folder_size(name: str) -> int:
    """SIZE of ``folder:SIZE:PATH``; 0 for another name.

    Raises:
        ValueError: it begins so and does not go on so.
    """
    kind, _, rest = name.partition(":")
    size, _, path = rest.partition(":")
    if kind == "folder" and not (size.isdigit() and path):
        raise ValueError(f"a folder is named as folder:SIZE:PATH, got {name!r}")
    return int(size) if kind == "folder" else 0


def emoji_rows(split: str = "train") -> tuple[Emoji, ...]:
    """What is known of the pictures of :func:`emoji64`, without the pictures, which take longer to read.

    Raises:
        ValueError: unknown split.
        DataError: the bundled file is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be one of train, test, got {split!r}")
    with _emoji_archive() as archive:
        table = list(csv.DictReader(io.TextIOWrapper(archive.open("captions.csv"), "utf-8")))
    return tuple(Emoji(*(line[name] for name in Emoji._fields)) for line in table if line["split"] == split)


def emoji64(split: str = "train") -> CaptionedImages:
    """Emoji in three artists' styles, 64×64 in colour on white, with captions; they come with the package.

    Noto by Google, Twemoji by Twitter, and Fluent by Microsoft. The test holds combinations of object, tone and style
    that the training images lack, though each of the three occurs in them: an object without skin tones in one of its
    styles (factor "style"), and an object with skin tones, in a style, in one of its tones (factor "tone"). No image of
    the test looks like one for training. Built by ``tools/build_emoji64.py``; ``emoji64.json`` has counts and quality.

    Raises:
        ValueError: unknown split.
        DataError: the bundled file is damaged, or Pillow was built without AVIF.
    """
    from PIL import Image, features

    rows = emoji_rows(split)
    if not features.check("avif"):
        raise DataError("emoji64 needs a Pillow that reads AVIF: install pillow from pip")
    with _emoji_archive() as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(split))
        sheets = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    images = torch.cat([_cut(sheet) for sheet in sheets])[: len(rows)]
    labels = torch.tensor([EMOJI_CATEGORIES.index(row.category) for row in rows])
    return CaptionedImages(images, labels, EMOJI_CATEGORIES, rows)


def digits() -> ImageSet:
    """scikit-learn's handwritten digits: 1,797 images of 8×8 (17 grey levels, stretched to 0 … 255)."""
    from sklearn.datasets import load_digits  # slow to import, and not needed for training on a GPU

    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(np.round(images * 255 / 16).astype(np.uint8)).reshape(-1, 1, 8, 8)
    return ImageSet(grey, torch.from_numpy(labels.astype(np.int64)), tuple(str(k) for k in range(10)))


def two_moons(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Two interleaved half circles with a little noise, shape ``(n, 2)``, mean 0 and variance 1 a dimension."""
    angle = math.pi * torch.rand(n, generator=generator)
    lower = torch.rand(n, generator=generator) < 0.5
    x = torch.where(lower, 1 - angle.cos(), angle.cos())
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin())
    return _standardise(torch.stack([x, y], 1) + 0.05 * torch.randn(n, 2, generator=generator))


def swiss_roll(n: int, generator: torch.Generator | None = None) -> Tensor:
    """A spiral with a little noise, shape ``(n, 2)``, mean 0 and variance 1 a dimension."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    roll = torch.stack([angle * angle.cos(), angle * angle.sin()], 1)
    return _standardise(roll + 0.3 * torch.randn(n, 2, generator=generator))


def checkerboard(n: int, generator: torch.Generator | None = None) -> Tensor:
    """The dark squares of a 4×4 board, shape ``(n, 2)``, mean 0 and variance 1 a dimension."""
    x = 4 * torch.rand(n, generator=generator) - 2
    row = 2 * torch.randint(0, 2, (n,), generator=generator) + torch.rand(n, generator=generator) - 2
    return _standardise(torch.stack([x, row + x.floor() % 2], 1))


IMAGE_SETS: dict[str, Callable[..., ImageSet]] = {
    "fashion-mnist": fashion_mnist,
    "fashion-subset": fashion_subset,
    "digits": digits,
    "emoji64": emoji64,
    "cifar10": cifar10,
}
TOY_SETS: dict[str, Callable[..., Tensor]] = {
    "two-moons": two_moons,
    "swiss-roll": swiss_roll,
    "checkerboard": checkerboard,
}

_HOW_TO_GET = (
    "Install Debian's package dataset-fashion-mnist, or put the four files of "
    "github.com/zalandoresearch/fashion-mnist into a folder and name it in DIFFBOOK_DATA, "
    "or use the bundled part: fashion_subset()."
)


def cache_folder() -> Path:
    """Where downloads are kept: ``$XDG_CACHE_HOME/diffbook``, by default ``~/.cache/diffbook``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffbook"


def _fashion_folders() -> list[Path]:
    named = os.environ.get("DIFFBOOK_DATA")
    return [*([Path(named)] if named else []), DEBIAN_FOLDER, cache_folder() / "FashionMNIST" / "raw"]


def _download(address: str, folder: Path, sha256: str, otherwise: str = "") -> None:
    """Put a file into a folder: in full and with this checksum, or not at all."""
    if not address.startswith("https://"):
        raise ValueError(f"a download needs https, got {address}")
    name = address.rpartition("/")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(folder / name), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        otherwise = otherwise or f"Get it by hand, and put it into {folder}"
        raise DataError(f"{address} could not be downloaded ({reason}). {otherwise}") from error


def _cifar_content(folder: Path, names: list[str]) -> list[tuple[Path, bytes]] | None:
    """The files of a split, from the archive or from a folder; None if there is neither."""
    archive = folder / CIFAR_ADDRESS.rpartition("/")[2]
    if archive.is_file():
        content = archive.read_bytes()
        if hashlib.sha256(content).hexdigest() != _CIFAR_SHA256:
            raise DataError(f"{archive} is not the expected file (wrong checksum): delete it and get {CIFAR_ADDRESS}")
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = [tar.extractfile(f"cifar-10-batches-bin/{name}") for name in names]
            return [(archive / name, file.read()) for name, file in zip(names, members, strict=True) if file]
    for place in (folder / "cifar-10-batches-bin", folder):
        if (place / names[0]).is_file():
            missing = [name for name in names if not (place / name).is_file()]
            if missing:
                raise DataError(f"{', '.join(missing)} missing in {place}: unpack {CIFAR_ADDRESS} again")
            return [(place / name, (place / name).read_bytes()) for name in names]
    return None


def _read_cifar(files: list[tuple[Path, bytes]]) -> ImageSet:
    """Records of a label and 3·32·32 bytes, red first, row by row; ten thousand a file."""
    batches = []
    for path, content in files:
        if len(content) != 10_000 * 3073:
            raise DataError(f"{path} has {len(content)} bytes and not {10_000 * 3073}: get {CIFAR_ADDRESS} again")
        batches.append(torch.from_numpy(np.frombuffer(content, np.uint8).copy()).reshape(-1, 3073))
        if batches[-1][:, 0].max() > 9:
            raise DataError(f"{path} is damaged, it has labels above 9: get {CIFAR_ADDRESS} again")
    records = torch.cat(batches)
    return ImageSet(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].to(torch.int64), CIFAR_CLASSES)


def _image_names(folder: Path) -> list[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 13  # of 256


def _class_name(name: str) -> str:
    """The first folder; "" where there is none."""
    return name.partition("/")[0] if "/" in name else ""


def _class_names(names: list[str]) -> tuple[str, ...]:
    return tuple(sorted({_class_name(name) for name in names}))


def _read_images(root: Path, paths: list[Path], size: int) -> Tensor:
    """The images as they are used, uint8, ``(N, 3, size, size)``, from the cache if no file has changed."""
    from PIL import Image
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    about = [(path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(repr((str(root.resolve()), size, about)).encode()).hexdigest()
    kept = cache_folder() / "folders" / f"{key[:16]}.safetensors"
    if kept.is_file():
        try:
            return load_file(kept)["images"]
        except (SafetensorError, KeyError):  # cut off by a full disk: read them again
            kept.unlink()
    images, damaged = [], []
    for path in paths:
        try:
            images.append(_square(path, size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            damaged.append(f"{path} ({(str(error).splitlines() or [type(error).__name__])[0]})")
    if damaged:
        shown = "; ".join(damaged[:10]) + ("; …" if len(damaged) > 10 else "")
        raise DataError(f"{len(damaged)} of {len(paths)} images cannot be read, move them away: {shown}")
    whole = torch.stack(images)
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    save_file({"images": whole}, temporary)
    os.replace(temporary, kept)
    return whole


def _square(path: Path, size: int) -> Tensor:
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255 and not scale
            picture = Image.fromarray((np.asarray(picture, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    whole = Image.alpha_composite(white, picture).convert("RGB")
    (width, height), side = whole.size, min(whole.size)
    left, top = (width - side) // 2, (height - side) // 2
    square = whole.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _split(
    table: dict[str, tuple[tuple[str, str], tuple[str, str]]], split: str
) -> tuple[tuple[str, str], tuple[str, str]]:
    if split not in table:
        raise ValueError(f"split must be one of {', '.join(table)}, got {split!r}")
    return table[split]


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / (name + end) for end in ("", ".gz", ".xz")) if p.is_file()), None)


def _read_image_set(folder: Path, files: tuple[tuple[str, str], tuple[str, str]]) -> ImageSet:
    images, labels = (_read_idx(folder, name, sha256) for name, sha256 in files)
    return ImageSet(images[:, None], labels.to(torch.int64), FASHION_CLASSES)


def _read_idx(folder: Path, name: str, sha256: str) -> Tensor:
    """Read an idx file of bytes: a header of big-endian numbers (magic, then one size a dimension), then data."""
    path = _find(folder, name)
    if path is None:
        raise DataError(f"no file {name}[.gz|.xz] in {folder}. {_HOW_TO_GET}")
    try:
        opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opened(path, "rb") as file:
            raw = file.read(_IDX_BYTES)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it and get it again. {_HOW_TO_GET}") from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(f"{path} is not the expected file (wrong checksum): delete it and get it again. {_HOW_TO_GET}")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int).tolist()
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    return torch.from_numpy(values.copy()).reshape(shape)


def _emoji_archive() -> zipfile.ZipFile:
    content = _EMOJI_ARCHIVE.read_bytes()
    if hashlib.sha256(content).hexdigest() != _EMOJI_SHA256:
        raise DataError(f"{_EMOJI_ARCHIVE} is not the expected file (wrong checksum): install the package again")
    return zipfile.ZipFile(io.BytesIO(content))


def _cut(sheet: NDArray[np.uint8]) -> Tensor:
    """The pictures of a sheet, row by row; uint8, shape ``(N, 3, S, S)``."""
    size = sheet.shape[1] // EMOJI_SHEET
    grid = torch.from_numpy(sheet.copy()).unflatten(0, (-1, size)).unflatten(2, (EMOJI_SHEET, size))
    return grid.permute(0, 2, 4, 1, 3).flatten(0, 1)


def _standardise(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)
