"""Data sets: what is in them, where they are looked for, and what damaged or missing files lead to."""

import email.message
import gzip
import hashlib
import io
import lzma
import math
import re
import shutil
import urllib.error
from pathlib import Path

import pytest
import torch

import diffbook.data as data
from diffbook.data import DataError, digits, emoji64, fashion_mnist, fashion_subset, to_uint8, to_unit_range

ASSETS = Path(data.__file__).parent / "assets" / "data"


@pytest.mark.parametrize("split, count", [("train", 4500), ("test", 1000)])
def test_subset_is_balanced_and_scaled(split, count):
    images = fashion_subset(split)
    assert images.images.shape == (count, 1, 28, 28) and images.images.dtype == torch.uint8
    assert images.labels.dtype == torch.int64 and len(images) == count
    assert images.labels.bincount().tolist() == [count // 10] * 10 and len(images.classes) == 10
    x = images.x()
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1


def test_spread_takes_from_the_whole_set():
    images = fashion_subset("train")
    some = images.spread(45)
    assert torch.equal(some.images, images.images[::100]) and torch.equal(some.labels, images.labels[::100])
    assert len(images.spread(7)) == 7 and len(images.spread(10**6)) == len(images)


def test_subset_is_part_of_the_whole_in_its_order():
    """Where the full data set is on this machine, the subset equals its first images of each class."""
    try:
        full = fashion_mnist("test", download=False)
    except DataError as error:
        pytest.skip(f"the full Fashion-MNIST is not on this machine: {error}")
    keep = torch.cat([(full.labels == k).nonzero()[:100, 0] for k in range(10)]).sort()[0]
    subset = fashion_subset("test")
    assert torch.equal(subset.images, full.images[keep]) and torch.equal(subset.labels, full.labels[keep])
    assert len(full) == 10_000 and len(fashion_mnist("train", download=False)) == 60_000


def test_assets_stay_within_their_budget():
    assert sum(f.stat().st_size for f in ASSETS.glob("fashion-subset-*")) <= 2 * 2**20
    assert sum(f.stat().st_size for f in ASSETS.glob("emoji64.*")) <= 10 * 2**20


def test_pixel_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(values)), values)
    assert to_unit_range(values)[0] == -1 and to_unit_range(values)[255] == 1
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="float32"):
        to_unit_range(torch.zeros(3))


def test_one_per_class_and_index():
    images = fashion_subset("test")
    first = images.one_per_class()
    assert first.labels.tolist() == list(range(10))
    k = (images.labels == 3).nonzero()[0, 0]
    assert torch.equal(first.images[3], images.images[k])
    assert torch.equal(images.x([5, 2]), images.x()[[5, 2]])
    assert images.to("cpu").images.device.type == "cpu"


def test_digits():
    images = digits()
    assert images.images.shape == (1797, 1, 8, 8) and images.labels.bincount().min() > 170
    assert images.images.max() == 255 and images.images.min() == 0


@pytest.mark.parametrize("make", data.TOY_SETS.values(), ids=data.TOY_SETS)
def test_toy_sets_are_standardised_and_repeatable(make):
    x = make(5000, generator=torch.Generator().manual_seed(0))
    assert x.shape == (5000, 2) and x.dtype == torch.float32
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert torch.equal(x, make(5000, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(x, make(5000, generator=torch.Generator().manual_seed(1)))


def test_checkerboard_fills_every_second_square():
    x = data.checkerboard(20_000, generator=torch.Generator().manual_seed(0))
    squares = ((x * math.sqrt(4 / 3)) + 2).clamp(0, 3.999).floor().int()
    counts = torch.zeros(4, 4)
    counts.index_put_((squares[:, 0], squares[:, 1]), torch.ones(len(x)), accumulate=True)
    parity = torch.tensor([[(i + j) % 2 for j in range(4)] for i in range(4)])
    dark = counts[parity == 0] if counts[0, 0] > counts[0, 1] else counts[parity == 1]
    assert dark.sum() > 0.97 * len(x) and dark.min() > 0.9 * len(x) / 8


# ---- files: places, forms, damage -----------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The bundled test split in the place of the full data set, and no other place to look in."""
    monkeypatch.setattr(data, "_FASHION", {"test": data._SUBSET["test"]})
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.delenv("DIFFBOOK_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return [name for name, _ in data._SUBSET["test"]]


def put(names, folder, form="xz"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        raw = lzma.decompress((ASSETS / f"{name}.xz").read_bytes())
        if form == "xz":
            shutil.copy(ASSETS / f"{name}.xz", folder)
        else:
            (folder / (name + form)).write_bytes(gzip.compress(raw, 1) if form == ".gz" else raw)


@pytest.mark.parametrize("form", ["", ".gz", "xz"])
def test_reads_plain_gz_and_xz(small, tmp_path, form):
    put(small, tmp_path / "here", form)
    assert torch.equal(fashion_mnist("test", root=tmp_path / "here").images, fashion_subset("test").images)


def test_looks_in_each_place(small, tmp_path, monkeypatch):
    for folder in (tmp_path / "debian", tmp_path / "cache" / "diffbook" / "FashionMNIST" / "raw"):
        put(small, folder)
        assert len(fashion_mnist("test", download=False)) == 1000
        shutil.rmtree(folder)
    put(small, tmp_path / "named")
    monkeypatch.setenv("DIFFBOOK_DATA", str(tmp_path / "named"))
    assert len(fashion_mnist("test", download=False)) == 1000


def test_downloads_from_the_authors_into_the_cache(small, tmp_path, monkeypatch):
    asked = []

    def download(address, path, hash_prefix):
        asked.append((address, hash_prefix))
        put([Path(path).name.removesuffix(".gz")], Path(path).parent, ".gz")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(data, "_FASHION_GZ", dict.fromkeys(small, "the checksum"))
    assert len(fashion_mnist("test")) == len(fashion_mnist("test")) == 1000
    assert asked == [(f"{data.FASHION_ADDRESS}/{name}.gz", "the checksum") for name in small]
    assert (tmp_path / "cache" / "diffbook" / "FashionMNIST" / "raw").is_dir()


def test_every_file_has_its_address_and_checksum():
    assert set(data._FASHION_GZ) == {name for files in data._FASHION.values() for name, _ in files}
    for sha256 in [*data._FASHION_GZ.values(), data._CIFAR_SHA256]:
        assert re.fullmatch("[0-9a-f]{64}", sha256)


@pytest.fixture
def served(monkeypatch):
    """What the network answers, whatever is asked."""
    answers = {}

    class Answer(io.BytesIO):
        headers = email.message.Message()

        def info(self):
            return self.headers

    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Answer(answers["content"]))
    return answers


def test_a_download_is_there_in_full_or_not_at_all(served, tmp_path, capsys):
    served["content"] = b"some content"
    folder, address = tmp_path / "a" / "b", "https://example.org/file.gz"
    with pytest.raises(DataError, match="invalid hash value") as caught:
        data._download(address, folder, "0" * 64)
    assert f"put it into {folder}" in str(caught.value) and "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    data._download(address, folder, hashlib.sha256(b"some content").hexdigest())
    assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [("file.gz", b"some content")]


def test_a_download_needs_https(served, tmp_path):
    with pytest.raises(ValueError, match="needs https, got http://"):
        data._download("http://example.org/file.gz", tmp_path, "0" * 64)


def test_no_network_and_no_data_says_what_to_do(small, monkeypatch):
    def offline(*arguments, **keywords):
        raise urllib.error.URLError("no route to host\nmore lines")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(data, "_FASHION_GZ", dict.fromkeys(small, ""))
    for arguments in ({}, {"download": False}):
        with pytest.raises(DataError, match="dataset-fashion-mnist") as caught:
            fashion_mnist("test", **arguments)
        assert "\n" not in str(caught.value) and "fashion_subset()" in str(caught.value)


@pytest.mark.parametrize("form, opened", [(".gz", gzip.open), (".xz", lzma.open)])
def test_a_file_that_unpacks_to_far_too_much(small, tmp_path, monkeypatch, form, opened):
    """It is read no further than the largest file of the data set."""
    put(small, tmp_path)
    image_file = next(tmp_path.glob("*images*"))
    image_file.unlink()
    with opened(image_file.with_suffix(form), "wb") as file:
        for _ in range(20):
            file.write(bytes(2**20))
    monkeypatch.setattr(data, "_IDX_BYTES", 2**20)
    hashed = []
    real = hashlib.sha256
    monkeypatch.setattr(data.hashlib, "sha256", lambda raw: hashed.append(len(raw)) or real(raw))
    with pytest.raises(DataError, match="wrong checksum"):
        fashion_mnist("test", root=tmp_path)
    assert max(hashed) == 2**20


def test_a_missing_file_in_a_named_folder(small, tmp_path):
    with pytest.raises(DataError, match="put both files there"):
        fashion_mnist("test", root=tmp_path)


@pytest.mark.parametrize("form", [".gz", "xz"])
def test_truncated_file(small, tmp_path, form):
    put(small, tmp_path, form)
    path = next(tmp_path.glob("*images*"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="cannot be read") as caught:
        fashion_mnist("test", root=tmp_path)
    assert path.name in str(caught.value) and "delete it" in str(caught.value)


@pytest.mark.parametrize("form", ["", ".gz", "xz"])
def test_one_changed_byte(small, tmp_path, form):
    put(small, tmp_path, form)
    path = next(tmp_path.glob("*images*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"checksum|cannot be read"):
        fashion_mnist("test", root=tmp_path)


def test_another_file_under_the_right_name(small, tmp_path):
    put(small, tmp_path, ".gz")
    next(tmp_path.glob("*images*")).write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match="wrong checksum"):
        fashion_mnist("test", root=tmp_path)


@pytest.mark.parametrize("load", [fashion_mnist, fashion_subset, emoji64])
def test_unknown_split(load):
    with pytest.raises(ValueError, match="train, test, got 'validation'"):
        load("validation")
