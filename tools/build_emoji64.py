"""Build emoji64, small captioned colour pictures in three styles, from three npm packages.

    python tools/build_emoji64.py

Fetches the packages with ``npm pack`` (kept in the cache; each is checked by its integrity), draws every picture on
white at 64×64, writes captions, holds combinations out for the test, and packs all of it into ``emoji64.zip``. Pictures
lie in sheets of 16×16, compressed as AVIF with full colour resolution: a block of the codec is then one picture, and
there is no cost of a file a picture. Beside the archive lies ``emoji64.json``: counts, sizes, and how close the
pictures still are to the originals. Repeated with the same Pillow it writes the same bytes. Prints the checksum that
``diffbook.data`` holds.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

from diffbook.data import EMOJI_SHEET, EMOJI_TONES, Emoji, cache_folder

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src" / "diffbook" / "assets" / "data"
SIZE = 64
QUALITY = 82  # of the AVIF encoder: the archive has 10 MiB of the repository's budget
NEAR = 8.0  # grey levels: pictures with a smaller RMS difference count as the same picture
SHARE = 0.07  # of the pictures are candidates for the test; where an object has several, one is taken

# style: package, version, integrity as npm states it, folder of the pictures
PACKAGES = {
    "noto": (
        "emoji-datasource-google",
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "package/img/google/64/",
    ),
    "twemoji": (
        "emoji-datasource-twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "package/img/twitter/64/",
    ),
    "fluent": (
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets/",
    ),
}
TONES = dict(zip(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"), EMOJI_TONES, strict=True))

# What the package of the Fluent style holds beyond what Microsoft released under the MIT licence: country flags (they
# are Noto's drawings), families and couples, and the pictures that show a trademark.
NOT_FLUENT = {"country-flag", "subdivision-flag", "family"}
NOT_FLUENT |= {"1F46A", "1F4CE", "1F3AE", "1F9D1-200D-1F4BB", "1F468-200D-1F4BB", "1F469-200D-1F4BB"}

# The package of the Fluent style names the pictures of medium-light and medium skin the wrong way round, and has all
# five mixed up in one object: for each tone, the last letter of the tone's code in the file's name.
FLUENT_TONES = dict(zip("bcdef", "bdcef", strict=True))
FLUENT_TONES_OF = {"1F6B5": dict(zip("bcdef", "fecdb", strict=True))}

# Names of Unicode that say less than the picture shows, or call a person a man; and two that cleaning would double.
NAMES = {
    "002A-FE0F-20E3": "keycap asterisk",
    "1F3C3": "person running",
    "1F3C4": "person surfing",
    "1F3CA": "person swimming",
    "1F46F": "people with bunny ears",
    "1F472": "person with gua pi mao",
    "1F473": "person wearing turban",
    "1F481": "person tipping hand",
    "1F482": "guard",
    "1F486": "person getting massage",
    "1F487": "person getting haircut",
    "1F645": "person gesturing no",
    "1F646": "person gesturing ok",
    "1F64B": "person raising hand",
    "1F64E": "person pouting",
    "1F6A3": "person rowing boat",
    "1F6B4": "person biking",
    "1F6B5": "person mountain biking",
    "1F6B6": "person walking",
    "1F935": "person in tuxedo",
}

ATTRIBUTION = """\
emoji64: pictures of emoji with captions, for teaching. Built by tools/build_emoji64.py of the diffbook repository.

Changes made to all pictures: drawn on white, Fluent scaled from 256 to 64 pixels, collected in sheets, compressed with
loss as AVIF. The captions are made from the names and categories of emoji.json.

noto     Noto Emoji, (c) Google LLC, Apache License 2.0 (Apache-2.0.txt);
         https://github.com/googlefonts/noto-emoji
twemoji  Twemoji, Copyright Twitter, Inc and other contributors, graphics licensed under CC BY 4.0:
         https://creativecommons.org/licenses/by/4.0/; https://github.com/jdecked/twemoji
fluent   Fluent Emoji, (c) Microsoft Corporation, MIT License (MIT-Fluent-Emoji.txt);
         https://github.com/microsoft/fluentui-emoji; files converted and named by LobeHub,
         https://github.com/lobehub/fluent-emoji. Left out: flags of countries, families and couples, and pictures with
         trademarks.
emoji.json, and the files of the styles noto and twemoji: emoji-data, (c) 2013 Cal Henderson, MIT License
         (MIT-emoji-data.txt); https://github.com/iamcal/emoji-data
"""
LICENCES = ("Apache-2.0.txt", "CC-BY-4.0-Twemoji.txt", "MIT-Fluent-Emoji.txt", "MIT-emoji-data.txt")


# packages


def fetch(name: str, version: str, integrity: str, folder: Path) -> dict[str, bytes]:
    """The files of one npm package, by their name in it; fetched unless it is there already.

    Raises:
        ValueError: the package is not the expected one.
        RuntimeError: npm is missing or fails.
    """
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(f"npm is needed to fetch {name}")
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([npm, "pack", f"{name}@{version}"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm pack {name}@{version} failed: {done.stderr.strip()}")
    raw = path.read_bytes()
    if "sha512-" + base64.b64encode(hashlib.sha512(raw).digest()).decode() != integrity:
        raise ValueError(f"{path} is not {name} {version} (wrong integrity): delete it")
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        files = ((member, archive.extractfile(member)) for member in archive)
        return {member.name: file.read() for member, file in files if file is not None}


# names and captions


def clean_name(name: str) -> str:
    """A name as plain lower-case words: no accents, no punctuation but hyphens and apostrophes within words."""
    plain = unicodedata.normalize("NFKD", name.replace("’", "'").replace("&", "and"))
    plain = "".join(c for c in plain if not unicodedata.combining(c)).lower().replace(".", "")
    return " ".join(re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", plain))


def tone_words(key: str) -> str:
    """The tone of a key of ``skin_variations``: one word, or two joined by "and", the first person's first.

    Where both persons have the same tone it is named once.
    """
    words = [TONES[code] for code in key.split("-")]
    return " and ".join(dict.fromkeys(words))


def read_rows(entries: Iterable[Mapping[str, Any]], style: str) -> list[tuple[Emoji, str]]:
    """The rows of one style in Unicode's order, each with the file name of its picture, without its ending.

    The five swatches of skin tone are left out: they show nothing.
    """
    rows = []
    for entry in sorted(entries, key=lambda entry: int(entry["sort_order"])):
        code, subcategory = entry["unified"], entry["subcategory"]
        if entry["category"] == "Component" or (style == "fluent" and NOT_FLUENT & {code, subcategory}):
            continue
        name = NAMES.get(code, clean_name(entry["name"]))
        for key, picture in {"": entry, **entry.get("skin_variations", {})}.items():
            row = Emoji(
                code=picture["unified"],
                style=style,
                object=code,
                name=name,
                tone=tone_words(key) if key else "",
                category=entry["category"],
                subcategory=subcategory,
            )
            stem = picture["image"].removesuffix(".png")
            if style == "fluent":
                stem = fluent_stem(code, stem)
            rows.append((row, stem))
    return rows


def fluent_stem(code: str, stem: str) -> str:
    """The name under which the Fluent package has the picture that should be called ``stem``."""
    letters = FLUENT_TONES_OF.get(code, FLUENT_TONES)
    return re.sub("(?<=1f3f)[b-f]", lambda match: letters[match[0]], stem)


def find_picture(files: Mapping[str, bytes], folder: str, name: str) -> bytes | None:
    """The picture of a code; the Fluent package leaves the code fe0f out of some names."""
    stems = (name, name.replace("-fe0f", ""))
    candidates = (folder + stem + end for stem in stems for end in (".png", ".webp"))
    return next((files[path] for path in candidates if path in files), None)


# pictures


def on_white(picture: Image.Image) -> NDArray[np.uint8]:
    """A picture on white, 64×64; uint8, shape ``(64, 64, 3)``.

    White is put behind it first: scaling the transparent picture would mix in the colour of what cannot be seen.
    """
    picture = picture.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def near_pairs(images: NDArray[np.uint8], limit: float) -> list[tuple[int, int]]:
    """Pairs of pictures whose RMS difference is below ``limit`` grey levels.

    Averaging 2×2 pixels never enlarges the RMS difference, so the small pictures find all pairs that can qualify.
    """
    n, height, width, channels = images.shape
    blocks = images.reshape(n, height // 2, 2, width // 2, 2, channels)
    small = blocks.mean((2, 4), dtype=np.float32).reshape(n, -1) - 128
    squares = (small**2).sum(1)
    pairs = []
    for start in range(0, n, 512):
        block = small[start : start + 512]
        distance = squares[start : start + 512, None] + squares - 2 * block @ small.T
        # the margin covers the rounding of float32
        for k, j in np.argwhere(distance < (limit + 0.5) ** 2 * small.shape[1]):
            i = start + k
            if i < j and np.sqrt(((images[i].astype(np.float64) - images[j]) ** 2).mean()) < limit:
                pairs.append((int(i), int(j)))
    return pairs


def groups(pairs: Iterable[tuple[int, int]]) -> list[set[int]]:
    """The connected sets of a graph, given by its edges."""
    found: list[set[int]] = []
    for pair in pairs:
        touched = [group for group in found if group & set(pair)]
        found = [group for group in found if not group & set(pair)] + [set(pair).union(*touched)]
    return found


def sheet(images: NDArray[np.uint8]) -> Image.Image:
    """At most 256 pictures as one, row by row; the rest is white."""
    full = np.full((EMOJI_SHEET**2, SIZE, SIZE, 3), 255, np.uint8)
    full[: len(images)] = images
    rows = -(-len(images) // EMOJI_SHEET)
    grid = full[: rows * EMOJI_SHEET].reshape(rows, EMOJI_SHEET, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(np.ascontiguousarray(grid).reshape(rows * SIZE, EMOJI_SHEET * SIZE, 3))


def compress(picture: Image.Image) -> bytes:
    """AVIF. Colour is kept at full resolution, and the tools for drawn content are on: emoji have flat colours and
    sharp coloured edges. One thread, so that the bytes do not depend on the machine."""
    out = io.BytesIO()
    advanced = {"tune": "psnr", "tune-content": "screen"}
    options: dict[str, Any] = {"subsampling": "4:4:4", "speed": 4, "max_threads": 1, "codec": "aom"}
    picture.save(out, "AVIF", quality=QUALITY, advanced=advanced, **options)
    return out.getvalue()


def psnr(images: NDArray[np.uint8], originals: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB, a picture; at most that of rounding, so that an exact copy counts too."""
    error = np.array([((a.astype(np.float64) - b) ** 2).mean() for a, b in zip(images, originals, strict=True)])
    return 10 * np.log10(255**2 / np.maximum(error, 1 / 12))


# split


def draw(row: Emoji) -> float:
    """A number in [0, 1) that belongs to a picture: the same in every build, whatever else is in the set."""
    return int.from_bytes(hashlib.sha256(f"{row.style} {row.code}".encode()).digest()[:8], "big") / 2**64


def hold_out(rows: Sequence[Emoji], twins: set[int], share: float = SHARE) -> list[str]:
    """For each row the factor under which it is held out, "style" or "tone", or "" where it is for training.

    An object without tones is held out in one style and stays in the others; an object with tones is held out, in a
    style, in one tone and stays in the others. A picture with a twin is never held out: the test would have been seen.
    """
    toned = {row.object for row in rows if row.tone}
    styles = {name: {row.style for row in rows if row.object == name} for name in {row.object for row in rows}}
    factors = [""] * len(rows)
    best: dict[tuple[str, ...], tuple[float, int]] = {}
    for i, row in enumerate(rows):
        factor = "tone" if row.object in toned else "style"
        if i in twins or (factor == "tone" and not row.tone) or (factor == "style" and len(styles[row.object]) == 1):
            continue
        unit = (row.object, *([row.style] if factor == "tone" else []))
        if draw(row) < share:
            best[unit] = min(best.get(unit, (1.0, -1)), (draw(row), i))
    for unit, (_, i) in best.items():
        factors[i] = "tone" if len(unit) == 2 else "style"
    return factors


# archive


def captions_csv(rows: Iterable[Emoji]) -> bytes:
    """The table of captions; its last column is a function of the others."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*Emoji._fields, "caption"])
    writer.writerows([*row, row.caption] for row in rows)
    return out.getvalue().encode()


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    """A zip whose bytes depend on the files alone. Pictures are stored, text is deflated."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix, on every system
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".avif") else zipfile.ZIP_DEFLATED
            archive.writestr(entry, content, compresslevel=9)


def collect(folder: Path) -> tuple[list[Emoji], NDArray[np.uint8]]:
    """All rows, style by style, and their pictures."""
    rows, images = [], []
    for style, (name, version, integrity, where) in PACKAGES.items():
        files = fetch(name, version, integrity, folder)
        if style == "noto":
            entries = json.loads(files["package/emoji.json"])
        for row, stem in read_rows(entries, style):
            picture = find_picture(files, where, stem)
            if picture is not None:
                rows.append(row)
                images.append(on_white(Image.open(io.BytesIO(picture))))
    return rows, np.stack(images)


def card(rows: Sequence[Emoji], quality: NDArray[np.float64], near: Sequence[set[int]]) -> dict[str, Any]:
    """What is to be said of the set in numbers."""
    train = [row for row in rows if row.split == "train"]
    by_style = {style: quality[[row.style == style for row in rows]] for style in PACKAGES}
    return {
        "packages": [f"{name}@{version}" for name, version, _, _ in PACKAGES.values()],
        "images": len(rows),
        "styles": dict(Counter(row.style for row in rows)),
        "categories": dict(Counter(row.category for row in rows)),
        "subcategories": len({row.subcategory for row in rows}),
        "objects": len({row.object for row in rows}),
        "objects_with_tones": len({row.object for row in rows if row.tone}),
        "words": len({word for row in rows for word in row.caption.split()}),
        "longest_caption": max(len(row.caption.split()) for row in rows),
        "train": len(train),
        "test": dict(Counter(row.factor for row in rows if row.split == "test")),
        "near_limit": NEAR,
        "near_groups": len(near),
        "near_images": sum(map(len, near)),
        "codec": f"AVIF 4:4:4, quality {QUALITY}, Pillow {PIL.__version__}, libavif {features.version('avif')}",
        "psnr_mean": round(float(quality.mean()), 2),
        "psnr_worst": round(float(quality.min()), 2),
        "psnr_by_style": {style: round(float(values.mean()), 2) for style, values in by_style.items()},
    }


def main() -> None:
    rows, images = collect(cache_folder() / "npm")
    near = groups(near_pairs(images, NEAR))
    factors = hold_out(rows, set().union(*near))
    rows = [row._replace(split="test" if f else "train", factor=f) for row, f in zip(rows, factors, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: rows[i].split == "test")  # stable: train first
    rows, images = [rows[i] for i in order], images[order]

    parts: dict[str, NDArray[np.uint8]] = {}
    for split in ("train", "test"):
        chosen = images[[row.split == split for row in rows]]
        for start in range(0, len(chosen), EMOJI_SHEET**2):
            parts[f"{split}-{start // EMOJI_SHEET**2:02}.avif"] = chosen[start : start + EMOJI_SHEET**2]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = dict(zip(parts, pool.map(lambda part: compress(sheet(part)), parts.values()), strict=True))
    texts = {"ATTRIBUTION.txt": ATTRIBUTION.encode(), "captions.csv": captions_csv(rows)}
    texts |= {name: (ROOT / "LICENSES" / name).read_bytes() for name in LICENCES}
    path = ASSETS / "emoji64.zip"
    write_archive(path, texts | files)

    read = np.concatenate([cut(files[name])[: len(part)] for name, part in parts.items()])
    about = card(rows, psnr(read, images), near)
    about |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=1))


def cut(content: bytes) -> NDArray[np.uint8]:
    """The pictures of a sheet, shape ``(N, 64, 64, 3)``: undoes :func:`sheet`."""
    grid = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    rows = grid.shape[0] // SIZE
    return grid.reshape(rows, SIZE, EMOJI_SHEET, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIZE, SIZE, 3)


if __name__ == "__main__":
    main()
