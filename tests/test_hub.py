"""Models from the Hugging Face Hub, without a network; and from the folder that an export left."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from diffbook import weights
from diffbook.recipes import RECIPES
from diffbook.weights import from_hub, load_model, write_tensors

SMOKE = RECIPES["fashion-smoke"]


def stored(folder: Path) -> Path:
    """A file of the smoke model's weights."""
    path = folder / "model.safetensors"
    write_tensors(path, SMOKE.build().state_dict(), {"recipe": SMOKE.to_json()})
    return path


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
    with pytest.raises(ValueError, match="need huggingface_hub: pip install huggingface_hub"):
        load_model("hf:somebody/fashion")


def test_the_folder_of_an_exported_model(tmp_path: Path) -> None:
    stored(tmp_path)
    assert load_model(tmp_path)[1] == SMOKE
    (tmp_path / "best.safetensors").write_text("of a run, and not looked at")
    assert load_model(tmp_path)[1] == SMOKE
    (tmp_path / "another.safetensors").write_text("which of the two?")
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*, nor one model that diffbook export wrote"):
        load_model(tmp_path)
