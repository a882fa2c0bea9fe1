"""Files of weights from strangers: refused with one clear line, before they cost memory, and without a side effect."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from diffbook import data, weights
from diffbook.cli import main
from diffbook.recipes import RECIPES, recipe_from_json
from diffbook.weights import WeightsError, load_model, read_header, read_tensors, write_tensors

SMOKE = RECIPES["fashion-smoke"]
SMALL = SMOKE.build().state_dict()


def file_of(path, recipe, tensors=SMALL):
    """A file as diffbook writes it, with a recipe of somebody's choice."""
    write_tensors(path, tensors, {"recipe": recipe})
    return path


def changed(**fields):
    return SMOKE.to_json() | fields


def options(**values):
    return changed(options=SMOKE.options | values)


def refused(path, words):
    with pytest.raises(WeightsError, match=words) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert path.name in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_the_check_knows_the_shapes_of_every_recipe(name, tmp_path):
    """Against PyTorch's own idea of them: nothing that the check leaves out changes a shape."""
    recipe = RECIPES[name]
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in recipe.build().state_dict().items()}
    weights._check_fit(recipe, shapes, tmp_path)
    first = next(iter(shapes))
    with pytest.raises(WeightsError, match="does not fit the network"):
        weights._check_fit(recipe, shapes | {first: (1, *shapes[first])}, tmp_path)
    with pytest.raises(WeightsError, match="does not fit the network"):
        weights._check_fit(recipe, {k: v for k, v in shapes.items() if k != first}, tmp_path)


def test_the_check_is_quick():
    """It would load PyTorch's compiler, seconds each time a model is used, if it computed with these tensors."""
    code = "import sys; from diffbook.weights import load_model\n"
    code += "for name in ('fashion-cpu', 'emoji-vae', 'emoji-ldm', 'emoji-matcher'): load_model(name)\n"
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


MATCHER = RECIPES["emoji-matcher"].to_json()
GIGANTIC = {
    "width": options(widths=[2**20, 2**20]),
    "classes": options(classes=10**12),
    "layers": options(blocks=10**9),
    "overflow": options(classes=10**30),
    "beside": MATCHER | {"options": MATCHER["options"] | {"words": 10**10}},
}
WITH_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
from diffbook.weights import WeightsError, load_model
load_model("fashion-classifier")
here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + 2**28, resource.getrlimit(resource.RLIMIT_AS)[1]))
for path in sys.argv[1:]:
    try:
        load_model(path)
    except WeightsError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory the process has")
def test_a_gigantic_network_is_refused_before_it_is_built(tmp_path):
    """In a process that may have 256 MiB more than it has, within a minute."""
    matcher, _ = read_tensors(weights.source_of("emoji-matcher"))
    paths = [
        file_of(tmp_path / f"{name}.safetensors", recipe, matcher if name == "beside" else SMALL)
        for name, recipe in GIGANTIC.items()
    ]
    command = [sys.executable, "-c", WITH_LITTLE_MEMORY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        words = "its recipe makes no network" if path.stem == "overflow" else "does not fit the network"
        assert path.name in line and words in line


def by_hand(path, header, size):
    """A safetensors file whose numbers are a hole in the file: gigantic, and takes no place."""
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    with open(path, "r+b") as file:
        file.truncate(8 + len(head) + size)
    return path


@pytest.mark.parametrize(
    "size, words", [(2**31, "does not fit the network"), (2**40, "this machine's memory|does not fit")]
)
def test_gigantic_tensors_are_refused_before_they_are_read(tmp_path, monkeypatch, size, words):
    monkeypatch.setattr(weights, "read_tensors", lambda path: pytest.fail("the tensors were read"))
    header = {
        "__metadata__": {"diffbook": json.dumps({"recipe": SMOKE.to_json()}), "sha256": "0"},
        "stem.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
    }
    refused(by_hand(tmp_path / "hole.safetensors", header, size), words)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**27) + b"{" + 2**27 * b" ",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}}  ',
        b"\x80\x04\x95",  # how a pickle begins
    ],
    ids=["length", "long", "empty", "list", "beyond", "pickle"],
)
def test_foreign_heads(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    refused(path, "is damaged or no safetensors file|was not written by diffbook")
    with pytest.raises(WeightsError):
        read_header(path)


@pytest.mark.parametrize(
    "description, words",
    [
        ("{", "its description is no JSON"),
        (100_000 * "[", "its description is no JSON"),
        ("[]", "no object of JSON"),
        ("{}", "its description has no recipe"),
        ('{"recipe": 5}', "a recipe is an object of JSON, not 5"),
        ('{"recipe": {"kind": ["Diffusion"]}}', "unknown kind of recipe"),
        ('{"recipe": {"kind": "Recipe"}}', "unknown kind of recipe"),
    ],
)
def test_foreign_descriptions(tmp_path, description, words):
    import safetensors.torch

    path = tmp_path / "file.safetensors"
    metadata = {"diffbook": description, "sha256": weights._digest(SMALL)}
    safetensors.torch.save_file(SMALL, path, metadata)
    refused(path, words)


@pytest.mark.parametrize(
    "recipe, words",
    [
        (changed(network="os.system"), "network is 'os.system'"),
        (changed(network=["UNet"]), "network is .*no str"),
        (changed(options=["a"]), "options is .*no dict"),
        (changed(seed="1"), "seed is '1', no int"),
        (changed(lr="0.1"), "lr is '0.1', no float"),
        (changed(T=True), "T is True, no int"),
        (changed(flip=1), "flip is 1, no bool"),
        (changed(name=10_000 * "n" + "\n", flip=None), "flip is None"),
        (changed(name="../outside"), "a recipe's name has letters"),
        (changed(name="/outside"), "a recipe's name has letters"),
        (changed(name=".."), "a recipe's name has letters"),
        (changed(name="a\\b"), "a recipe's name has letters"),
        (changed(name="a\x1b[2J\n"), "a recipe's name has letters"),
        (changed(name=""), "a recipe's name has letters"),
        (changed(schedule="none"), "schedule is 'none'"),
        (changed(predicts="pixels"), "predicts is 'pixels'"),
        (changed(T=10**12), "T must lie in 1…1000000, the recipe says 1000000000000"),
        (changed(size=10**9), "size must lie in 1…4096"),
        (changed(size=-1), "size must lie in 1…4096"),
        (changed(command="rm"), "not a recipe of this version"),
        (options(widths=[]), "its recipe makes no network"),
        (options(widths=[-8, 16]), "its recipe makes no network"),
        (options(blocks="many"), "its recipe makes no network"),
        (options(command="rm"), "its recipe makes no network"),
        (options(blocks=2), "does not fit the network"),
        (options(patch=4), "does not fit the network"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_foreign_recipes(tmp_path, recipe, words, capsys):
    path = file_of(tmp_path / "file.safetensors", recipe)
    refused(path, words)
    assert main(["sample", str(path), "--to", str(tmp_path / "x.png")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("diffbook: ") and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def first(tensor):
    """The stored weights with another first tensor."""
    return SMALL | {next(iter(SMALL)): tensor(next(iter(SMALL.values())))}


@pytest.mark.parametrize(
    "tensors, words",
    [
        (first(lambda t: t.to(torch.int8)), r"as torch\.int8, the network as torch\.float32"),
        (first(lambda t: t > 0), r"as torch\.bool"),
        (first(lambda t: t.to(torch.complex64)), r"as torch\.complex64"),
        (first(lambda t: t * float("nan")), "infinite or no numbers"),
        (first(lambda t: (t.half() + 1) * float("inf")), "infinite or no numbers"),
    ],
    ids=["int8", "bool", "complex", "nan", "inf"],
)
def test_wrong_numbers(tmp_path, tensors, words):
    refused(file_of(tmp_path / "file.safetensors", SMOKE.to_json(), tensors), words)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_is_welcome(tmp_path, precision):
    tensors = {name: tensor.to(precision) for name, tensor in SMALL.items()}
    network, recipe = load_model(file_of(tmp_path / "file.safetensors", SMOKE.to_json(), tensors))
    assert recipe == SMOKE and {p.dtype for p in network.parameters()} == {torch.float32}


def test_loading_touches_neither_data_nor_another_model(tmp_path, monkeypatch):
    """A recipe names data and an autoencoder; until somebody asks for them, they stay names."""
    recipe = replace(SMOKE, data=f"folder:64:{tmp_path / 'private'}", autoencoder=str(tmp_path / "other"))
    path = file_of(tmp_path / "file.safetensors", recipe.to_json())
    opened = []
    real = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", lambda path, kind: opened.append(path) or real(path, kind))
    for name in ("image_set", "image_folder", "_read_images", "_download"):
        monkeypatch.setattr(data, name, lambda *arguments: pytest.fail("data were looked for"))
    assert load_model(path)[1] == recipe
    assert set(opened) == {path}


def test_stored_recipes_are_read_back():
    for recipe in RECIPES.values():
        assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
