"""The comparisons for chapters 10 and 11: what is varied, what is equal, what is counted, and that they go on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import compare_autoencoders
import compare_spaces
import pytest
import torch

from diffbook.data import IMAGE_SETS, emoji64
from diffbook.recipes import find_recipe


def parameters(recipe) -> int:
    return sum(p.numel() for p in recipe.build().parameters())


def test_autoencoders_change_one_thing() -> None:
    base = compare_autoencoders.BASE.to_json()
    for name, recipe in compare_autoencoders.VARIANTS.items():
        changed = {key for key, value in recipe.to_json().items() if value != base[key]} - {"name"}
        assert len(changed) == (name != "f8"), (name, changed)
    shipped = find_recipe("emoji-vae").to_json()
    assert {k for k in base if base[k] != shipped[k]} == {"name", "images", "warmup"}


def test_compression_factors() -> None:
    for name, f, latents in (("f4", 4, 1024), ("f8", 8, 256), ("f16", 16, 64)):
        C, H, W = compare_autoencoders.VARIANTS[name].build().latent_shape
        assert latents == C * H * W and H == W == 64 // f


def test_both_spaces_have_models_of_one_size_at_equal_compute() -> None:
    pixel, latent = compare_spaces.PIXEL, compare_spaces.at_equal_compute()
    assert parameters(latent) == pytest.approx(parameters(pixel), rel=0.05)
    same = {k for k, v in pixel.to_json().items() if latent.to_json()[k] == v}
    assert {"network", "data", "batch", "lr", "warmup", "ema", "T", "schedule", "predicts", "label_drop"} <= same
    forward = [compare_spaces.flops(compare_spaces.one_step(r)) for r in (pixel, latent)]
    assert latent.images / pixel.images == pytest.approx(forward[0] / forward[1], rel=1e-3)
    assert forward[0] > 5 * forward[1]


def test_saved_bytes_counts_each_storage_once() -> None:
    w = torch.ones(1000, requires_grad=True)

    def work() -> None:
        (w * w).sum().backward()  # w is kept twice, and is one storage

    assert compare_spaces.saved_bytes(work) == 4000


def test_comparison_of_autoencoders_goes_on(tmp_path, monkeypatch) -> None:
    module = compare_autoencoders
    few = {split: emoji64(split).part(torch.arange(70)) for split in ("train", "test")}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(IMAGE_SETS, "emoji64", lambda split="train": few[split])
    monkeypatch.setattr(module, "emoji64", few.__getitem__)
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "a.json")
    monkeypatch.setattr(module, "PICTURES", tmp_path / "a.png")
    monkeypatch.setattr(module, "SAMPLES", 8)
    monkeypatch.setattr(module, "STEPS", 2)
    options = module.BASE.options | {"widths": [8, 8, 8], "blocks": 1}
    tiny = replace(module.BASE, options=options, images=64)
    monkeypatch.setattr(module, "VARIANTS", {"f8": tiny, "kl-0": replace(tiny, name="kl-0", kl_weight=0.0)})
    net = {"channels": 4, "widths": [8, 8], "blocks": 1, "attention": [1], "classes": 9}
    monkeypatch.setattr(module, "LATENT", replace(module.LATENT, options=net, images=128))
    monkeypatch.setattr(sys, "argv", ["compare_autoencoders.py", "--only", "f8"])
    module.main()
    first = (tmp_path / "a.json").read_text()
    found = json.loads(first)
    (row,) = found["autoencoders"]
    assert (row["f"], row["latents"], row["compression"]) == (8, 256, 48)
    assert row["psnr_worst"] < row["psnr"] and row["psnr_disturbed"] <= row["psnr"] + 0.1
    values = {r["scale"]: r["value"] for r in found["diffused"]}
    assert values["one"] == 1 != values["fitted"] == pytest.approx(1 / row["std"], rel=1e-3)
    assert values["tenth"] == pytest.approx(values["fitted"] / 10, rel=1e-3)
    module.main()
    assert (tmp_path / "a.json").read_text() == first
    monkeypatch.setattr(sys, "argv", ["compare_autoencoders.py"])
    module.main()
    found = json.loads((tmp_path / "a.json").read_text())
    assert [r["variant"] for r in found["autoencoders"]] == ["f8", "kl-0"]
    assert [r["scale"] for r in found["diffused"][3:]] == ["fitted", "one"]
