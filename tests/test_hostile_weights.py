"""Files of weights from a stranger: what does not fit is refused before it costs memory, and nothing is executed."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffbook import weights
from diffbook.recipes import RECIPES
from diffbook.weights import WeightsError, from_hub, load_model, read_tensors, write_tensors

SMOKE = RECIPES["fashion-smoke"]


def stored(folder: Path, recipe: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """A file of the smoke model's weights, with another recipe or other tensors; its checksum is right."""
    path = folder / "model.safetensors"
    write_tensors(path, SMOKE.build().state_dict() | tensors, {"recipe": recipe or SMOKE.to_json()})
    return path


def test_an_honest_file_is_loaded(tmp_path: Path) -> None:
    network, recipe = load_model(stored(tmp_path))
    assert recipe == SMOKE
    assert all(torch.equal(value, SMOKE.build().state_dict()[name]) for name, value in network.state_dict().items())


HUGE: dict[str, dict[str, Any]] = {
    "wide": {"widths": [2**20, 2**20]},
    "wider than memory": {"widths": [2**40, 2**40]},
    "wider than an integer": {"widths": [2**70, 2**70]},
    "deep": {"blocks": 10**7},
    "many classes": {"classes": 10**12},
    "negative": {"widths": [-8, 16]},
    "no numbers": {"widths": ["8", "16"]},
    "unknown argument": {"wings": 2},
    "a list": {"blocks": [1]},
    "a patch": {"patch": 10**6},
}


@pytest.mark.parametrize("case", HUGE)
def test_a_recipe_that_asks_for_another_network_is_refused_at_once(tmp_path: Path, case: str) -> None:
    resource = pytest.importorskip("resource")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    path = stored(tmp_path, SMOKE.to_json() | {"options": SMOKE.options | HUGE[case]})
    words = "describes no network that fits its tensors|does not fit the network"
    with pytest.raises(WeightsError, match=words) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "memory was taken first"


@pytest.mark.parametrize(
    "recipe",
    [
        {"kind": "Diffusion"},
        {"kind": "os.system", "name": "rm"},
        SMOKE.to_json() | {"network": "__import__"},
        SMOKE.to_json() | {"options": None},
        SMOKE.to_json() | {"options": [1, 2]},
    ],
)
def test_a_recipe_that_is_none(tmp_path: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"holds no recipe of this version|describes no network"):
        load_model(stored(tmp_path, recipe))


def test_a_description_that_is_none(tmp_path: Path) -> None:
    for about in ({}, {"recipe": None}, {"recipe": "text"}):
        path = tmp_path / "m.safetensors"
        write_tensors(path, SMOKE.build().state_dict(), about)
        with pytest.raises(WeightsError, match="holds no recipe of this version"):
            load_model(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    spoilt = SMOKE.build().state_dict()["stem.weight"].clone()
    spoilt[0, 0, 0, 0] = bad
    with pytest.raises(WeightsError, match=r"stem\.weight in .* holds numbers that are not finite"):
        load_model(stored(tmp_path, **{"stem.weight": spoilt}))


def test_a_type_that_is_none_of_weights(tmp_path: Path) -> None:
    wrong = SMOKE.build().state_dict()["stem.weight"].to(torch.int32)
    with pytest.raises(WeightsError, match=r"is of type torch\.int32, which is no type of weights"):
        load_model(stored(tmp_path, **{"stem.weight": wrong}))


def test_foreign_names_and_shapes(tmp_path: Path) -> None:
    for tensors in ({"extra": torch.zeros(1)}, {"stem.weight": torch.zeros(1)}):
        with pytest.raises(WeightsError, match="does not fit the network of its recipe"):
            load_model(stored(tmp_path, **tensors))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


def test_a_pickle_under_another_name_is_not_executed(tmp_path: Path) -> None:
    path, mark = tmp_path / "model.safetensors", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(WeightsError, match="is damaged or no safetensors file"):
        load_model(path)
    torch.save({"a": Payload(mark)}, path)
    with pytest.raises(WeightsError, match="is damaged or no safetensors file"):
        load_model(path)
    assert not mark.exists()


@pytest.mark.parametrize("size", [0, 2**40, 2**63])
def test_a_header_that_claims_to_be_huge(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}" * 100)
    with pytest.raises(WeightsError, match="is damaged or no safetensors file"):
        read_tensors(path)


def test_tensors_that_point_outside_the_file(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(WeightsError, match="is damaged or no safetensors file"):
        read_tensors(path)


def test_a_recipe_that_names_a_folder_reads_nothing_of_it(tmp_path: Path) -> None:
    """Loading a model touches neither data nor autoencoder; both are named for those who ask for them."""
    recipe = replace(SMOKE, data="folder:64:/no/such/folder").to_json()
    network, loaded = load_model(stored(tmp_path, recipe))
    assert loaded.data == "folder:64:/no/such/folder" and not network.training


# models from the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub with one repository, in the place of huggingface_hub; it remembers what it was asked for."""
    folder, asked = tmp_path / "snapshot", {}
    folder.mkdir()
    errors = types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (OSError,), {})  # type: ignore[attr-defined]
    errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (FileNotFoundError,), {})  # type: ignore[attr-defined]

    def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        if repository != "somebody/fashion":
            raise errors.HfHubHTTPError("404 Client Error.\nmore lines")
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    return asked | {"folder": folder, "asked": asked}


def test_a_model_from_the_hub(hub: dict[str, Any]) -> None:
    stored(hub["folder"])
    network, recipe = load_model("hf:somebody/fashion")
    assert recipe == SMOKE and not network.training
    assert hub["asked"] == {
        "repository": "somebody/fashion",
        "revision": None,
        "patterns": ["*.safetensors", "*.json"],  # nothing that could be executed is even fetched
    }
    load_model("hf:somebody/fashion@0123abc")
    assert hub["asked"]["revision"] == "0123abc"
    assert weights.os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_what_the_hub_does_not_have(hub: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"hf:nobody/x could not be fetched \(404 Client Error\.\); look at") as caught:
        load_model("hf:nobody/x")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"holds not exactly one \.safetensors file"):
        load_model("hf:somebody/fashion")  # the repository is empty


@pytest.mark.parametrize("name", ["hf:", "hf:fashion", "hf:a/b/c", "hf:a/b@", "hf:a b/c"])
def test_names_that_are_none(name: str, hub: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is named as hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got"):
        from_hub(name)
    assert not hub["asked"]


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r'need huggingface_hub: pip install "diffbook\[hub\]"'):
        load_model("hf:somebody/fashion")


def test_the_folder_of_an_exported_model(tmp_path: Path) -> None:
    stored(tmp_path)
    assert load_model(tmp_path)[1] == SMOKE
    (tmp_path / "best.safetensors").write_text("of a run, and not looked at")
    assert load_model(tmp_path)[1] == SMOKE
    (tmp_path / "another.safetensors").write_text("which of the two?")
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*, nor one model that diffbook export wrote"):
        load_model(tmp_path)
