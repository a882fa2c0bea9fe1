"""emoji64: what is in it, what its split promises, and the parts of the tool that builds it."""

import hashlib
import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import build_emoji64 as build
import numpy as np
import pytest
import torch
from PIL import Image

import diffbook.data as data
from diffbook.data import EMOJI_CATEGORIES, EMOJI_STYLES, EMOJI_TONES, DataError, Emoji, emoji64

ARCHIVE = Path(data.__file__).parent / "assets" / "data" / "emoji64.zip"
CARD = json.loads(ARCHIVE.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sets():
    return {split: emoji64(split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def rows(sets):
    return [*sets["train"].rows, *sets["test"].rows]


# ---- what is in it


def test_shapes_and_counts(sets, rows):
    for split, images in sets.items():
        assert images.images.shape == (len(images), 3, 64, 64) and images.images.dtype == torch.uint8
        assert images.labels.shape == (len(images),) and images.labels.dtype == torch.int64
        assert len(images.rows) == len(images.captions) == len(images)
        assert {row.split for row in images.rows} == {split}
        assert images.classes == EMOJI_CATEGORIES and images.labels.bincount(minlength=9).min() > 0
        assert [images.classes[k] for k in images.labels.tolist()] == [row.category for row in images.rows]
    assert len(rows) == CARD["images"] and len(sets["train"]) == CARD["train"]
    assert Counter(row.style for row in rows) == CARD["styles"] and tuple(CARD["styles"]) == EMOJI_STYLES
    assert Counter(row.factor for row in sets["test"].rows) == CARD["test"]
    assert len({row.object for row in rows}) == CARD["objects"]


def test_pictures_stand_on_white(sets):
    """Most corners are white up to the loss of compression, and no picture is empty."""
    x = sets["train"].images
    corners = torch.stack([x[:, :, i, j] for i in (0, 63) for j in (0, 63)])
    assert (corners.amin(2) > 245).float().mean() > 0.85
    assert x.flatten(1).amin(1).max() < 250


def test_pictures_lie_where_their_captions_say(sets):
    """Red things are red in every style. A shift by one row would break it."""
    images = sets["train"]
    for i in images.where(name="large red square").tolist():
        red, green, blue = images.images[i, :, 32, 32].tolist()
        assert red > 180 and green < 110 and blue < 110, images.captions[i]


@pytest.mark.parametrize("style", EMOJI_STYLES)
def test_a_darker_tone_is_darker(sets, style):
    """Of every hand: there is no hair, which in places is lighter in a darker tone."""
    images = sets["train"]
    light: dict[str, list[float]] = {}
    for tone in EMOJI_TONES:
        for i in images.where(style=style, tone=tone).tolist():
            if images.rows[i].subcategory.startswith("hand"):
                light.setdefault(images.rows[i].name, []).append(images.images[i].float().mean().item())
    assert len(light) > 30
    assert all(levels == sorted(levels, reverse=True) for levels in light.values())


def test_captions(sets, rows):
    captions = [row.caption for row in rows]
    assert len(set(captions)) == len(captions), "a caption names one picture"
    words = {word for caption in captions for word in caption.split()}
    assert len(words) == CARD["words"] and max(len(c.split()) for c in captions) == CARD["longest_caption"]
    assert all(caption == " ".join(caption.split()) == caption.lower() and caption.isascii() for caption in captions)
    for caption in (
        "noto grinning face",
        "fluent woman firefighter medium-dark skin",
        "twemoji germany flag",
        "noto cote d'ivoire flag",
        "twemoji handshake light and dark skin",
        "noto people holding hands medium skin",
        "noto family man woman girl boy",
        "fluent keycap asterisk",
    ):
        assert caption in captions, caption
    assert len({(row.style, row.code) for row in rows}) == len(rows)


def test_tones(rows):
    named = {row.tone for row in rows if " and " not in row.tone}
    assert named == {"", *EMOJI_TONES}
    pairs = {row.tone for row in rows if " and " in row.tone}
    assert pairs == {f"{a} and {b}" for a in EMOJI_TONES for b in EMOJI_TONES if a != b}


def test_object_has_one_name_and_one_place(rows):
    about = {}
    for row in rows:
        assert about.setdefault(row.object, row[3:4] + row[5:7]) == (row.name, row.category, row.subcategory)
        assert row.tone or row.code == row.object
    assert len({row.subcategory for row in rows}) == CARD["subcategories"]


def test_fluent_holds_only_what_was_released(rows):
    fluent = [row for row in rows if row.style == "fluent"]
    assert not {row.subcategory for row in fluent} & {"country-flag", "subdivision-flag", "family"}
    assert not {row.name for row in fluent} & {"paperclip", "video game", "technologist", "man technologist"}


def test_parts_keep_rows_with_images(sets):
    images = sets["test"]
    chosen = images.where(style="twemoji", factor="tone")
    part = images.part(chosen)
    assert len(part) == len(chosen) > 0 and {row.style for row in part.rows} == {"twemoji"}
    assert torch.equal(part.images, images.images[chosen]) and part.captions[0] == images.captions[chosen[0]]
    first = images.one_per_class()
    assert [row.category for row in first.rows] == list(EMOJI_CATEGORIES)
    assert images.to("cpu").captions == images.captions
    assert images.x(chosen).shape == (len(chosen), 3, 64, 64) and images.x(chosen).min() >= -1
    with pytest.raises(ValueError, match="not 'colour'"):
        images.where(colour="red")


def test_image_set_by_name():
    assert data.IMAGE_SETS["emoji64"] is emoji64


# ---- split


def test_test_holds_new_combinations_of_known_factors(sets):
    train, test = sets["train"].rows, sets["test"].rows
    combinations = {(row.object, row.tone, row.style) for row in train}
    objects = {(row.object, row.style) for row in train}
    tones = {(row.tone, row.style) for row in train}
    words = {word for row in train for word in row.caption.split()}
    toned = {row.object for row in train if row.tone}
    for row in test:
        assert (row.object, row.tone, row.style) not in combinations
        assert (row.tone, row.style) in tones and set(row.caption.split()) <= words
        if row.factor == "style":
            assert row.object not in toned and (row.object, row.style) not in objects
            assert any((row.object, style) in objects for style in EMOJI_STYLES)
        else:
            assert row.factor == "tone" and row.tone
            assert any(r.object == row.object and r.style == row.style and r.tone != row.tone for r in train)
    assert 0.04 < len(test) / (len(test) + len(train)) < 0.06
    for factor in ("style", "tone"):
        assert all(count > 50 for count in Counter(r.style for r in test if r.factor == factor).values())


def test_no_picture_of_the_test_looks_like_one_for_training(sets):
    """Averaging pixels never enlarges an RMS difference, so what is far apart after it is far apart before it."""
    small = [torch.nn.functional.avg_pool2d(sets[split].images.float() - 128, 4).flatten(1) for split in sets]
    near = (torch.cdist(small[1], small[0]) / small[0].shape[1] ** 0.5 < build.NEAR).nonzero()
    margin = 1.0  # the limit was applied to the pictures before compression
    for i, j in near.tolist():
        difference = sets["test"].images[i].float() - sets["train"].images[j].float()
        assert difference.square().mean().sqrt() > build.NEAR - margin


def row(code, style="noto", tone="", thing=None):
    return Emoji(code, style, thing or code, "a thing", tone, "Objects", "tool")


def test_split_is_a_function_of_each_picture():
    rows = [row(str(k), style) for k in range(300) for style in EMOJI_STYLES]
    rows += [
        row(f"{k}-{tone}", style, tone, str(k))
        for k in range(300, 400)
        for style in EMOJI_STYLES
        for tone in EMOJI_TONES
    ]
    factors = build.hold_out(rows, set(), share=0.2)
    assert factors == build.hold_out(rows, set(), share=0.2)
    known = dict(zip(rows, factors, strict=True))
    assert dict(zip(rows[::-1], build.hold_out(rows[::-1], set(), share=0.2), strict=True)) == known
    held = [row for row, factor in known.items() if factor]
    assert 0.05 < len(held) / len(rows) < 0.2 and all(build.draw(row) < 0.2 for row in held)
    assert max(Counter(row.object for row in held if not row.tone).values()) == 1
    assert max(Counter((row.object, row.style) for row in held if row.tone).values()) == 1
    assert all(known[row] == ("tone" if row.tone else "style") for row in held)


def test_twins_and_lonely_objects_are_never_held_out():
    rows = [row("1", style) for style in EMOJI_STYLES] + [row("2")]
    assert build.hold_out(rows, set(), share=1.0).count("style") == 1
    assert build.hold_out(rows, {0, 1, 2}, share=1.0) == [""] * 4
    assert build.draw(row("1")) == pytest.approx(DRAWN, abs=1e-12), "the split would change"


DRAWN = int(hashlib.sha256(b"noto 1").hexdigest()[:16], 16) / 2**64


# ---- the archive


def test_archive_is_plain_and_small():
    assert ARCHIVE.stat().st_size == CARD["bytes"] <= 9.9 * 2**20
    assert hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == CARD["sha256"] == data._EMOJI_SHA256
    with zipfile.ZipFile(ARCHIVE) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
        assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
        names = {entry.filename for entry in entries}
        assert {"captions.csv", "ATTRIBUTION.txt", *build.LICENCES} < names
        for name in build.LICENCES:
            assert archive.read(name) == (build.ROOT / "LICENSES" / name).read_bytes()
        assert archive.read("ATTRIBUTION.txt").decode() == build.ATTRIBUTION
        table = archive.read("captions.csv").decode().splitlines()
    assert table[0] == "code,style,object,name,tone,category,subcategory,split,factor,caption"
    assert len(table) == CARD["images"] + 1
    assert CARD["psnr_mean"] > 40 and CARD["psnr_worst"] > 35


def test_damaged_archive(monkeypatch, tmp_path):
    content = bytearray(ARCHIVE.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "emoji64.zip").write_bytes(content)
    monkeypatch.setattr(data, "_EMOJI_ARCHIVE", tmp_path / "emoji64.zip")
    with pytest.raises(DataError, match="wrong checksum"):
        emoji64()


def test_pillow_without_avif(monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(DataError, match="AVIF"):
        emoji64()


# ---- the tool


@pytest.mark.parametrize(
    "name, clean",
    [
        ("GRINNING FACE", "grinning face"),
        ("FAMILY: MAN, WOMAN, BOY", "family man woman boy"),
        ("Côte d’Ivoire Flag", "cote d'ivoire flag"),
        ("U.S. Virgin Islands Flag", "us virgin islands flag"),
        ("Congo - Kinshasa Flag", "congo kinshasa flag"),
        ("Trinidad & Tobago Flag", "trinidad and tobago flag"),
        ("T-SHIRT", "t-shirt"),
    ],
)
def test_clean_name(name, clean):
    assert build.clean_name(name) == clean


def test_tone_words():
    assert build.tone_words("1F3FB") == build.tone_words("1F3FB-1F3FB") == "light"
    assert build.tone_words("1F3FF-1F3FC") == "dark and medium-light"


def entry(code, name="A THING", subcategory="tool", category="Objects", **more):
    about = {"unified": code, "image": f"{code.lower()}.png", "sort_order": 1}
    return about | {"name": name, "category": category, "subcategory": subcategory} | more


def test_read_rows():
    waving = {"1F3FD": {"unified": "1F44B-1F3FD", "image": "1f44b-1f3fd.png"}}
    entries = [
        entry("1F1E9-1F1EA", "Germany Flag", "country-flag", "Flags", sort_order=9),
        entry("1F44B", "WAVING HAND SIGN", skin_variations=waving),
        entry("1F3FB", category="Component"),
        entry("1F935", "MAN IN TUXEDO", sort_order=3),
    ]
    rows = build.read_rows(entries, "noto")
    assert [stem for _, stem in rows] == ["1f44b", "1f44b-1f3fd", "1f935", "1f1e9-1f1ea"]
    captions = ["waving hand sign", "waving hand sign medium skin", "person in tuxedo", "germany flag"]
    assert [row.caption for row, _ in rows] == [f"noto {caption}" for caption in captions]
    assert {row.object for row, _ in rows} == {"1F44B", "1F935", "1F1E9-1F1EA"}
    assert len(build.read_rows(entries, "fluent")) == 3, "flags of countries are not Microsoft's"


def test_find_picture():
    files = {"a/1f44b.webp": b"hand", "a/2764-fe0f.png": b"heart", "b/1f44b.png": b"other"}
    assert build.find_picture(files, "a/", "1f44b-fe0f") == b"hand"
    assert build.find_picture(files, "a/", "2764-fe0f") == b"heart"
    assert build.find_picture(files, "a/", "1f600") is None


def test_fluent_names_its_tones_differently():
    """Two of them are exchanged, in one object all five are."""
    assert build.fluent_stem("1F44B", "1f44b-1f3fc") == "1f44b-1f3fd"
    assert build.fluent_stem("1F44B", "1f44b-1f3fd") == "1f44b-1f3fc"
    assert build.fluent_stem("1F44B", "1f44b-1f3ff") == "1f44b-1f3ff"
    assert build.fluent_stem("1F6B5", "1f6b5-1f3fb") == "1f6b5-1f3ff"
    assert build.fluent_stem("1F3F4", "1f3f4-200d-2620") == "1f3f4-200d-2620"
    waving = {"1F3FD": {"unified": "1F44B-1F3FD", "image": "1f44b-1f3fd.png"}}
    rows = build.read_rows([entry("1F44B", skin_variations=waving)], "fluent")
    assert [(row.tone, stem) for row, stem in rows] == [("", "1f44b"), ("medium", "1f44b-1f3fc")]


def test_on_white_does_not_mix_in_hidden_colours():
    """A red disc whose transparent surroundings are black inside: the edge must go from red to white, not to black."""
    pixels = np.zeros((256, 256, 4), np.uint8)
    y, x = np.mgrid[:256, :256]
    pixels[np.hypot(x - 127.5, y - 127.5) < 80] = (255, 0, 0, 255)
    picture = build.on_white(Image.fromarray(pixels))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (
        picture[..., 0].min() == 255 and picture[0, 0].tolist() == [255] * 3 and picture[32, 32].tolist() == [255, 0, 0]
    )
    tall = build.on_white(Image.new("RGBA", (256, 264), "black"))
    assert tall.shape == (64, 64, 3) and tall[:, 32].max() == 0 and tall[32, 0].min() > 100


def test_near_pairs_and_groups():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    images[3] = images[1]
    images[3, :32, :32] ^= 8
    images[5] = images[3]
    assert build.near_pairs(images, 8.0) == [(1, 3), (1, 5), (3, 5)]
    checks = np.indices((64, 64)).sum(0)[..., None] % 2 * np.uint8(20) + np.zeros(3, np.uint8)
    flipped = np.stack([checks, 20 - checks]).astype(np.uint8)  # alike when averaged, and only then
    assert build.near_pairs(flipped, 8.0) == []
    assert build.groups([(1, 3), (4, 2), (3, 5)]) == [{2, 4}, {1, 3, 5}]


@pytest.mark.parametrize("n", [1, 16, 40])
def test_sheets_and_back(n):
    images = np.random.default_rng(n).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
    picture = build.sheet(images)
    out = io.BytesIO()
    picture.save(out, "PNG")
    read = build.cut(out.getvalue()).copy()
    assert (read[:n] == images).all() and (read[n:] == 255).all()
    assert torch.equal(data._cut(np.asarray(picture)), torch.from_numpy(read).permute(0, 3, 1, 2))


def test_psnr():
    black = np.zeros((2, 64, 64, 3), np.uint8)
    other = black.copy()
    other[0] = 10
    exact = 10 * np.log10(255**2 * 12)
    np.testing.assert_allclose(build.psnr(other, black), [10 * np.log10(255**2 / 100), exact])


def test_archive_has_the_same_bytes_again(tmp_path):
    files = {"captions.csv": build.captions_csv([row("1"), row("2", tone="dark")]), "train-00.avif": b"\x00\x01"}
    for name in ("a.zip", "b.zip"):
        build.write_archive(tmp_path / name, files)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("captions.csv").decode().splitlines()[2].endswith(",noto a thing dark skin")


def test_a_changed_package_is_refused(tmp_path):
    (tmp_path / "thing-1.0.0.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="wrong integrity"):
        build.fetch("thing", "1.0.0", "sha512-abc", tmp_path)


def test_fetching_needs_npm(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm is needed"):
        build.fetch("thing", "1.0.0", "sha512-abc", tmp_path)
