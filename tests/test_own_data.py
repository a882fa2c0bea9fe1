"""CIFAR-10 from its binary distribution, folders of images, and the recipes that learn from them on a GPU."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffbook.data as data
from diffbook.cli import main
from diffbook.data import CIFAR_CLASSES, DataError, cifar10, folder_size, image_folder, image_set
from diffbook.evaluation import draw_images
from diffbook.recipes import RECIPES, Compression, Diffusion, Unconditional, find_recipe, stream, with_data
from diffbook.training import train, training_set
from diffbook.weights import load_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFBOOK_DATA", raising=False)
    monkeypatch.setattr(data, "_download", lambda *arguments: pytest.fail("no download wanted"))


def record(label: int, number: int) -> bytes:
    """A record in the format of the authors: all red pixels, then all green ones, then all blue ones."""
    red, green, blue = (np.full((32, 32), value, np.uint8) for value in (number % 256, 100, 200))
    red[0, 1] = 255  # row 0, column 1
    return bytes([label]) + red.tobytes() + green.tobytes() + blue.tobytes()


def batch(first: int) -> bytes:
    return b"".join(record((first + i) % 10, first + i) for i in range(10_000))


@pytest.fixture(scope="module")
def batches() -> dict[str, bytes]:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    return {name: batch(i) for i, name in enumerate(names)}


def unpacked(folder: Path, batches: dict[str, bytes]) -> Path:
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    for name, content in batches.items():
        (folder / "cifar-10-batches-bin" / name).write_bytes(content)
    return folder


class TestCifar:
    def test_pixels_labels_and_order(self, batches, tmp_path) -> None:
        images = cifar10("train", unpacked(tmp_path, batches))
        assert images.images.shape == (50_000, 3, 32, 32) and images.images.dtype == torch.uint8
        assert images.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1] and images.classes == CIFAR_CLASSES
        seventh = images.images[10_006]  # of the second file, which starts at 1
        assert seventh[:, 5, 5].tolist() == [7, 100, 200]
        assert seventh[0, 0, 1] == 255 and seventh[0, 1, 0] == 7
        assert len(cifar10("test", tmp_path)) == 10_000
        assert torch.equal(cifar10("test", tmp_path / "cifar-10-batches-bin").images, cifar10("test", tmp_path).images)

    def test_the_archive_is_read_in_place(self, batches, tmp_path, monkeypatch) -> None:
        path = tmp_path / "cifar-10-binary.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as tar:
            for name, content in batches.items():
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        with pytest.raises(DataError, match="wrong checksum"):
            cifar10("test", tmp_path)
        monkeypatch.setattr(data, "_CIFAR_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setenv("DIFFBOOK_DATA", str(tmp_path))
        assert torch.equal(cifar10("test").images, cifar10("test", unpacked(tmp_path / "other", batches)).images)
        assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["other"]

    def test_damaged_and_missing(self, batches, tmp_path, monkeypatch) -> None:
        with pytest.raises(ValueError, match="one of train, test, got 'val'"):
            cifar10("val")
        with pytest.raises(DataError, match=r"is not in .*put cifar-10-binary.tar.gz there, from https"):
            cifar10("train", tmp_path)
        with pytest.raises(DataError, match="is not in"):
            cifar10("train", download=False)
        folder = unpacked(tmp_path, batches) / "cifar-10-batches-bin"
        (folder / "test_batch.bin").write_bytes(batches["test_batch.bin"][:-1])
        with pytest.raises(DataError, match="30729999 bytes and not 30730000"):
            cifar10("test", tmp_path)
        (folder / "test_batch.bin").write_bytes(b"\x0a" + batches["test_batch.bin"][1:])
        with pytest.raises(DataError, match="labels above 9"):
            cifar10("test", tmp_path)
        (folder / "data_batch_3.bin").unlink()
        with pytest.raises(DataError, match=r"data_batch_3\.bin missing in"):
            cifar10("train", tmp_path)

    def test_it_is_downloaded_into_the_cache(self, batches, tmp_path, monkeypatch) -> None:
        asked = []

        def download(address: str, folder: Path, sha256: str) -> None:
            asked.append((address, sha256))
            unpacked(folder, batches)

        monkeypatch.setattr(data, "_download", download)
        assert len(image_set("cifar10", "test")) == len(image_set("cifar10", "test")) == 10_000
        assert asked == [(data.CIFAR_ADDRESS, data._CIFAR_SHA256)]


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.undo()

    def fail(*arguments, **keywords) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(DataError, match=r"could not be downloaded \(no route to host\)\. Get it by hand"):
        data._download("https://somewhere", tmp_path, "0")


def paint(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (30, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def pictures(tmp_path) -> Path:
    root = tmp_path / "pictures"
    for i in range(40):
        paint(root / "blue" / f"{i}.png", (0, 0, 5 * i))
        paint(root / "red" / f"{i}.PNG", (5 * i, 0, 0))
    (root / "notes.txt").write_text("no image")
    return root


class TestImageFolder:
    def test_classes_order_and_split(self, pictures) -> None:
        train_set, test_set = image_folder(pictures, 16), image_folder(pictures, 16, "test")
        assert train_set.classes == ("blue", "red") == test_set.classes
        assert len(train_set) + len(test_set) == 80 and 0 < len(test_set) < 15
        for images in (train_set, test_set):
            assert images.images.shape[1:] == (3, 16, 16) and images.images.dtype == torch.uint8
            blue = images.images[:, 2].flatten(1).max(1).values > images.images[:, 0].flatten(1).max(1).values
            black = images.images.flatten(1).max(1).values == 0
            assert torch.equal(images.labels[~black] == 0, blue[~black])
        before = {tuple(image[:, 0, 0].tolist()) for image in test_set.images}
        for i in range(40, 80):
            paint(pictures / "red" / f"{i}.png", (255, i, i))
        after = {tuple(image[:, 0, 0].tolist()) for image in image_folder(pictures, 16, "test").images}
        assert before < after  # new files move none

    def test_cut_scaled_turned_and_on_white(self, tmp_path) -> None:
        wide = Image.new("RGB", (300, 100), (255, 0, 0))
        wide.paste((0, 255, 0), (100, 0, 200, 100))
        wide.save(tmp_path / "a.png")
        paint(tmp_path / "b.png", (0, 0, 0, 0), mode="RGBA")
        turned = Image.new("RGB", (64, 64), (0, 0, 255))
        turned.paste((255, 255, 0), (0, 0, 64, 32))  # yellow above
        exif = Image.Exif()
        exif[0x0112] = 3  # the camera was upside down
        turned.save(tmp_path / "c.jpg", exif=exif, quality=95)
        splits = [split for split in ("train", "test") if self.some(tmp_path, split)]
        images = torch.cat([image_folder(tmp_path, 32, split).images for split in splits])
        green, white, blue = self.by_colour(images)
        assert (green[1] > 240).all() and (green[0] < 15).all()  # the middle third, and nothing of the red beside it
        assert (white == 255).all()
        assert blue[2, 4, 16] > 200 > 60 > blue[0, 4, 16] and blue[0, 28, 16] > 200  # blue is above now

    @staticmethod
    def some(folder: Path, split: str) -> bool:
        try:
            return len(image_folder(folder, 32, split)) > 0
        except DataError:
            return False

    @staticmethod
    def by_colour(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        means = images.float().mean((2, 3))
        green = images[(means[:, 1] - means[:, 2]).argmax()]
        white = images[means.sum(1).argmax()]
        (other,) = [i for i in images if not torch.equal(i, green) and not torch.equal(i, white)]
        return green, white, other

    @pytest.mark.parametrize("other", ["test", "val"])
    def test_a_folder_that_is_split_already(self, tmp_path, other) -> None:
        for i in range(30):  # some of these names would be held out by their hash
            paint(tmp_path / "train" / "a" / f"{i}.png", (i, 0, 0))
            paint(tmp_path / "train" / "b" / f"{i}.png", (i, 0, 0))
        for i in range(4):
            paint(tmp_path / other / "b" / f"{i}.png", (0, 0, 200 + i))
        train_set, test_set = image_folder(tmp_path, 16), image_folder(tmp_path, 16, "test")
        assert train_set.classes == test_set.classes == ("a", "b")
        assert train_set.labels.bincount().tolist() == [30, 30] and (train_set.images[:, 2] == 0).all()
        assert test_set.labels.tolist() == [1] * 4 and (test_set.images[:, 2] >= 200).all()
        paint(tmp_path / other / "c" / "0.png", (0, 0, 0))
        with pytest.raises(DataError, match=r"has classes that .*train has not: c"):
            image_folder(tmp_path, 16, "test")

    def test_only_a_train_folder(self, tmp_path) -> None:
        paint(tmp_path / "train" / "0.png", (0, 0, 0))
        assert len(image_folder(tmp_path, 16)) == 1
        with pytest.raises(DataError, match="a folder train, but neither test nor val"):
            image_folder(tmp_path, 16, "test")

    def test_hidden_files_and_sixteen_bits_and_huge_ones(self, tmp_path, monkeypatch) -> None:
        (tmp_path / "train" / ".trash").mkdir(parents=True)
        (tmp_path / "train" / "._a.png").write_bytes(b"what macOS leaves behind")
        paint(tmp_path / "train" / ".trash" / "b.png", (1, 2, 3))
        Image.fromarray(np.full((20, 20), 20_000, np.uint16)).save(tmp_path / "train" / "a.png")
        images = image_folder(tmp_path, 16)
        assert len(images) == 1 and (images.images == round(20_000 / 257)).all()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        paint(tmp_path / "train" / "huge.png", (0, 0, 0))
        with pytest.raises(DataError, match=r"cannot be read, move them away: .*huge\.png"):
            image_folder(tmp_path, 16)

    def test_read_once(self, pictures, tmp_path, monkeypatch) -> None:
        first, read = image_folder(pictures, 16), data._square
        monkeypatch.setattr(data, "_square", lambda *arguments: pytest.fail("read again"))
        assert torch.equal(image_folder(pictures, 16).images, first.images)
        monkeypatch.setattr(data, "_square", read)
        for i in range(40):
            paint(pictures / "blue" / f"{i}.png", (9, 9, 9), size=(40, 40))
        assert not torch.equal(image_folder(pictures, 16).images, first.images)
        for kept in (tmp_path / "cache" / "diffbook" / "folders").iterdir():
            kept.write_bytes(b"cut off")
        assert len(image_folder(pictures, 16)) == len(first)

    def test_bad_input(self, pictures, tmp_path) -> None:
        for size in (0, 12, -8):
            with pytest.raises(ValueError, match=f"multiple of 8, got {size}"):
                image_folder(pictures, size)
        with pytest.raises(ValueError, match="got 'val'"):
            image_folder(pictures, 16, "val")
        with pytest.raises(DataError, match="is no folder"):
            image_folder(pictures / "notes.txt", 16)
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="there are no images for train in"):
            image_folder(tmp_path / "empty", 16)
        for i in range(12):
            (pictures / "red" / f"{i}.PNG").write_bytes(b"\x89PNG nothing")
        with pytest.raises(DataError, match=r"\d+ of \d+ images cannot be read, move them away: .*1.PNG.*; …$"):
            image_folder(pictures, 16)

    def test_names(self, pictures, capsys) -> None:
        assert folder_size("folder:64:/a:b/c") == 64 and folder_size("emoji64") == 0
        for name in ("folder:x:/a", "folder:64", "folder::/a"):
            with pytest.raises(ValueError, match="named as folder:SIZE:PATH"):
                folder_size(name)
        with pytest.raises(ValueError, match=r"unknown data set 'mnist'; there are .*cifar10 and folder:SIZE:PATH"):
            image_set("mnist")
        assert main(["data", f"folder:16:{pictures}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["shape"][1:] == [3, 16, 16] and set(found["classes"]) == {"blue", "red"}


class TestRecipes:
    def test_the_network_of_the_paper(self) -> None:
        recipe = find_recipe("cifar10-gpu")
        assert sum(p.numel() for p in recipe.build().parameters()) == 35_746_307
        assert isinstance(recipe, Unconditional)
        assert recipe.images == 800_000 * recipe.batch and recipe.warmup == 5000 * recipe.batch
        assert (recipe.predicts, recipe.schedule, recipe.T, recipe.flip) == ("eps", "linear", 1000, True)

    def test_parts_fit(self) -> None:
        for vae, ldm, latent in (("emoji-vae-gpu", "emoji-ldm-gpu", "latent"), ("folder-vae", "folder-ldm", None)):
            shape = find_recipe(vae).build().latent_shape
            recipe = find_recipe(ldm)
            assert isinstance(recipe, Diffusion) and recipe.autoencoder == vae
            assert list(shape) == (
                recipe.options[latent] if latent else [recipe.options["channels"], recipe.size, recipe.size]
            )

    def test_half_of_the_images_are_mirrored(self) -> None:
        recipe, x = find_recipe("cifar10-gpu"), torch.rand(4000, 1, 2, 2)
        seen = recipe.augment(x, stream(0, "augment", 0))
        mirrored = (seen == x.flip(3)).flatten(1).all(1)
        assert ((seen == x).flatten(1).all(1) ^ mirrored).all()
        assert abs(mirrored.double().mean() - 0.5) < 0.03
        assert replace(recipe, flip=False).augment(x, stream(0, "augment", 0)) is x

    def test_without_labels(self) -> None:
        options = {"channels": 1, "widths": [8], "blocks": 1}
        recipe = replace(find_recipe("cifar10-gpu"), options=options, size=8, predicts="v")
        network, x = recipe.build(), torch.rand(3, 1, 8, 8)
        losses = [recipe.loss(network, x, torch.tensor(y), stream(0, "a", 0)) for y in ([0, 1, 2], [7, 7, 7])]
        assert torch.equal(*losses)
        (drawn,) = draw_images(network.requires_grad_(False), recipe, torch.zeros(3, dtype=torch.int64), steps=2)
        assert drawn.shape == x.shape
        with pytest.raises(ValueError, match="cifar10-gpu knows no classes: the weight of guidance must be 1, got 2"):
            list(draw_images(network, recipe, torch.zeros(1, dtype=torch.int64), steps=2, w=2.0))

    @pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-gpu")])
    def test_gpu_recipes_take_a_step_on_the_cpu(self, name, tmp_path, monkeypatch) -> None:
        """The recipe's own code path, at a size that fits: narrower, two steps of two images."""
        recipe = find_recipe(name)
        widths = [32, *[64] * (len(recipe.options["widths"]) - 1)]
        recipe = replace(recipe, options=recipe.options | {"widths": widths}, batch=2, images=4)
        if recipe.data == "fashion-mnist":
            recipe = replace(recipe, data="fashion-subset")
        monkeypatch.setitem(data.IMAGE_SETS, "cifar10", lambda split="train": noise(32))
        monkeypatch.setitem(data.IMAGE_SETS, "emoji64", lambda split="train": noise(64))
        if name == "emoji-ldm-gpu":
            recipe = replace(recipe, autoencoder="emoji-vae")
        steps = list(train(recipe, tmp_path / "run"))
        assert [step.images for step in steps] == [2, 4]
        assert all(step.loss == step.loss and step.gradient_norm > 0 for step in steps)

    def test_sampled_and_measured_without_classes(self, tmp_path, capsys, monkeypatch) -> None:
        monkeypatch.setitem(data.IMAGE_SETS, "cifar10", lambda split="train": noise(32))
        recipe = find_recipe("cifar10-gpu")
        small = replace(recipe, options={"channels": 3, "widths": [8], "blocks": 1}, batch=2, images=4)
        monkeypatch.setitem(RECIPES, "cifar10-gpu", small)
        assert main(["train", "cifar10-gpu", "--folder", str(tmp_path / "run")]) == 0
        command = ["evaluate", str(tmp_path / "run"), "--metric", "bits", "--number", "20", "--times", "3", "--json"]
        capsys.readouterr()
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["bits_per_dim"] > 1
        assert main(["sample", str(tmp_path / "run"), "--label", "3"]) == 1
        assert "--label must lie in 0…0" in capsys.readouterr().err

    def test_your_own_images_from_pixels_to_samples(self, pictures, tmp_path, capsys, monkeypatch) -> None:
        small = {
            "folder-vae": {"widths": [8, 8, 8], "blocks": 1},
            "folder-ldm": {"widths": [24], "blocks": 1, "attention": [0], "heads": 1},
        }
        for name, options in small.items():
            recipe = RECIPES[name]
            monkeypatch.setitem(RECIPES, name, replace(recipe, options=recipe.options | options, batch=8))
        command = ["train", "--images", "16", "--data", f"folder:64:{pictures}", "--json"]
        vae, ldm = str(tmp_path / "vae"), str(tmp_path / "ldm")
        assert main([*command, "folder-vae", "--folder", vae]) == 0
        assert main([*command, "folder-ldm", "--folder", ldm]) == 1
        assert "train folder-vae first, and name its run with --autoencoder" in capsys.readouterr().err
        assert main([*command, "folder-ldm", "--folder", ldm, "--autoencoder", vae]) == 0
        _, recipe = load_model(ldm)
        assert isinstance(recipe, Unconditional) and recipe.size == 8
        assert training_set(recipe).x(slice(1)).shape == (1, 4, 8, 8)
        assert main(["sample", ldm, "--number", "3", "--steps", "2", "--to", str(tmp_path / "s.png")]) == 0
        with Image.open(tmp_path / "s.png") as drawn:
            assert drawn.size == (3 * 65 + 1, 66)
        capsys.readouterr()
        assert main(["export", vae, "--to", str(tmp_path / "out")]) == 0
        for path in (tmp_path / "out").iterdir():
            assert str(pictures).encode() not in path.read_bytes() and b"folder:64:pictures" in path.read_bytes()
        assert main([*command, "folder-vae", "--autoencoder", vae]) == 1
        assert "works on pixels" in capsys.readouterr().err

    def test_sizes_follow_the_folder(self) -> None:
        vae, ldm = (with_data(find_recipe(name), "folder:256:/x") for name in ("folder-vae", "folder-ldm"))
        assert isinstance(vae, Compression) and vae.options["size"] == 256
        assert isinstance(ldm, Diffusion) and ldm.size == 32
        assert with_data(find_recipe("fashion-cpu"), "fashion-subset").data == "fashion-subset"


def noise(size: int) -> data.CaptionedImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, size, size), generator=generator, dtype=torch.uint8)
    return data.CaptionedImages(images, torch.arange(20) % 9, data.EMOJI_CATEGORIES, data.emoji_rows("train")[:20])
