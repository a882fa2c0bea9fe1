"""train, sample, evaluate, export and recipes, as a user calls them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diffbook.classifier import Classifier
from diffbook.cli import main
from diffbook.recipes import RECIPES
from diffbook.training import train
from diffbook.weights import checkpoints, load_model, read_tensors, write_tensors


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a short finished run."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", "fashion-smoke", "--folder", str(folder), "--images", "96"]) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier's file, with its first weights."""
    path = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    recipe = RECIPES["fashion-classifier"]
    recipe = recipe.to_json() | {"data": "fashion-subset"}
    torch.manual_seed(0)
    write_tensors(path, Classifier().state_dict(), {"recipe": recipe})
    return path


def as_json(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_train_writes_checkpoint_log_and_samples(run_folder, capsys):
    names = {p.name for p in run_folder.iterdir()}
    assert {"checkpoint-000000000096.safetensors", "log.jsonl", "samples-000000000096.png"} <= names
    with Image.open(run_folder / "samples-000000000096.png") as picture:
        assert picture.size == (10 * 29 + 1, 8 * 29 + 1)
    result = as_json(capsys, "train", "fashion-smoke", "--folder", str(run_folder), "--images", "96")
    assert result["images"] == 96 and result["loss"] > 0  # repeated: finished already


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_same_command_goes_on(tmp_path, number, capsys):
    arguments = ["train", "fashion-smoke", "--folder", str(tmp_path), "--save-every", "1e9"]
    command = [sys.executable, "-m", "diffbook.cli", *arguments, "--images", "12800"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not (tmp_path / "log.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        error = process.stderr.read()
    assert process.returncode == 128 + number and "stopped and saved after" in error and "Traceback" not in error
    done = int(checkpoints(tmp_path)[-1].stem.removeprefix("checkpoint-"))
    assert f"after {done} images" in error and 1600 <= done < 12_800


def test_what_people_expect_of_a_trainer(tmp_path, capsys):
    """Curves for TensorBoard, samples on the way, the last checkpoints, the best weights; and in two sittings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["train", "fashion-smoke", "--images", "640", "--folder", str(tmp_path), "--save-every", "0"]
    options = ["--tensorboard", "--samples-every", "320", "--keep", "2", "--parts", "2"]
    recipe = replace(RECIPES["fashion-smoke"], images=640, parts=2)
    steps = train(recipe, tmp_path, save_every=0)  # a first sitting, without curves
    for step in steps:
        if step.images == 160:
            break
    steps.close()
    result = as_json(capsys, *arguments, *options)
    assert result["images"] == 640 and result["best"] == 640 and result["held_out_loss"] > 0
    assert [p.stem[-3:] for p in checkpoints(tmp_path)] == ["608", "640"]
    assert [p.stem[-3:] for p in sorted(tmp_path.glob("samples-*.png"))] == ["320", "640"]
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("loss")] == list(range(192, 641, 32))
    assert [event.step for event in curves.Scalars("held_out_loss")] == [640]
    assert curves.Scalars("held_out_loss")[0].value == pytest.approx(result["held_out_loss"], abs=1e-5)
    assert [event.step for event in curves.Images("samples")] == [320, 640]
    network, _ = load_model(tmp_path / "best.safetensors")
    assert all(torch.equal(v, load_model(tmp_path)[0].state_dict()[k]) for k, v in network.state_dict().items())


def test_tensorboard_missing_says_what_to_install(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", "fashion-smoke", "--folder", str(tmp_path), "--tensorboard"]) == 1
    assert "needs tensorboard: pip install tensorboard" in capfd.readouterr().err
    assert not checkpoints(tmp_path)


def test_two_processes_by_accelerate_launch(tmp_path, capfd):
    """As README says it: one of them speaks, both end well, and the same command again finds the run finished."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    train_it = ["-m", "diffbook.cli", "train", "fashion-smoke", "--images", "64", "--folder", str(tmp_path), "--json"]
    command = [sys.executable, *launch, *train_it]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["images"] == 64 and [p.stem[-3:] for p in checkpoints(tmp_path)] == ["064"]


def test_sample(run_folder, tmp_path, capsys):
    path = tmp_path / "s.png"
    arguments = ["sample", str(run_folder), "--steps", "2", "--number", "12", "--guidance", "2", "--to", str(path)]
    assert as_json(capsys, *arguments)["images"] == 12
    first = path.read_bytes()
    assert as_json(capsys, *arguments)["file"] == str(path) and path.read_bytes() == first
    as_json(capsys, *arguments, "--seed", "1")
    assert path.read_bytes() != first
    as_json(capsys, *arguments, "--label", "10")
    with Image.open(path) as picture:
        assert picture.size == (10 * 29 + 1, 2 * 29 + 1)


def test_evaluate(run_folder, classifier, capsys):
    arguments = ["--steps", "2", "--number", "20", "--classifier", str(classifier)]
    result = as_json(capsys, "evaluate", str(run_folder), *arguments)
    assert result["frechet_distance"] > 0 and result["images"] == 20 and "fashion-subset, test" in result["reference"]
    assert result["standard_error"] > 0 and result["bias"] > 0 and 0 < result["real"] < result["frechet_distance"]
    assert result["sampler"] == "DDIM" and result["by_number"] == []
    assert as_json(capsys, "evaluate", str(run_folder), *arguments) == result
    other = as_json(capsys, "evaluate", str(run_folder), *arguments, "--sampler", "dpmpp", "--steps", "3")
    assert other["sampler"] == "DPM-Solver++(2M)" and other["frechet_distance"] != result["frechet_distance"]
    assert 0 <= as_json(capsys, "evaluate", str(classifier))["accuracy"] < 0.5


def test_export_and_load(run_folder, tmp_path, capsys):
    quality = tmp_path / "q.json"
    quality.write_text('{"frechet_distance": 9.5}')
    result = as_json(capsys, "export", str(run_folder), "--to", str(tmp_path / "w"), "--quality", str(quality))
    tensors, about = read_tensors(tmp_path / "w" / "fashion-smoke.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16} and result["bytes"] < 60_000
    network, recipe = load_model(result["file"])
    original, _ = load_model(run_folder)
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, original.state_dict()[name].half().float())
    card = json.loads((tmp_path / "w" / "fashion-smoke.json").read_text())
    assert card["images"] == 96 and card["parameters"] == sum(p.numel() for p in network.parameters())
    assert card["recipe"] == about["recipe"] == recipe.to_json() and card["quality"] == [{"frechet_distance": 9.5}]
    assert card["curve"]["rows"][-1][0] == 96 and card["licence"] == "MIT"


def test_recipes(capsys):
    assert as_json(capsys, "recipes").keys() == RECIPES.keys()
    assert as_json(capsys, "recipes", "fashion-cpu")["parameters"] > 1_000_000


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "nothing"], "unknown recipe 'nothing'; there are fashion-cpu"),
        (["train", "fashion-smoke", "--images", "0"], "--images must be at least 1, got 0"),
        (["train", "fashion-smoke", "--parts", "0"], "--parts must be at least 1, got 0"),
        (["train", "fashion-smoke", "--keep", "0"], "--keep must be at least 1, got 0"),
        (["train", "fashion-smoke", "--samples-every", "0"], "--samples-every must be at least 1, got 0"),
        (["train", "fashion-smoke", "--parts", "5"], "a batch of 32 images cannot be divided into 5 equal parts"),
        (["train", "fashion-smoke", "--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["recipes", "nothing"], "unknown recipe 'nothing'"),
        (["sample", "nothing"], "nothing is no file or folder"),
        (["sample", "RUN", "--label", "11"], "--label must lie in 0…10"),
        (["sample", "RUN", "--number", "0"], "--number must be at least 1, got 0"),
        (["sample", "RUN", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["train", "fashion-smoke", "--images", "96", "--seed", "5", "--folder", "RUN"], "seed was 0 and is 5"),
        (["sample", "CLASSIFIER"], "is no diffusion model of images with classes"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(arguments, words, run_folder, classifier, capfd):
    arguments = [{"RUN": str(run_folder), "CLASSIFIER": str(classifier)}.get(a, a) for a in arguments]
    assert main(arguments) == 1
    out, err = capfd.readouterr()
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert out == "" and words in last and last.startswith("diffbook: ") and "Traceback" not in err


def test_a_damaged_checkpoint_is_one_line(tmp_path, capfd):
    (tmp_path / "checkpoint-000000000032.safetensors").write_text("rubbish")
    assert main(["train", "fashion-smoke", "--folder", str(tmp_path)]) == 1
    err = capfd.readouterr().err
    assert "diffbook: " in err and "is damaged or no safetensors file" in err and "Traceback" not in err


def test_bits_per_dim_go_on_where_they_stopped(run_folder, tmp_path, monkeypatch, capsys):
    """Stopped after the first hundred of images and repeated, the command ends with the identical number."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    command = ["evaluate", str(run_folder), "--metric", "bits", "--number", "250", "--times", "3"]
    whole = as_json(capsys, *command)
    assert whole["bits_per_dim"] > 0 and whole["standard_error"] > 0 and whole["images"] == 250
    assert whole["times_per_image"] == 3 and whole["classes"] == "given" and whole["variance"] == "beta"
    (path,) = (tmp_path / "whole" / "diffbook" / "bounds").iterdir()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "parts"))
    stopped = tmp_path / "parts" / "diffbook" / "bounds" / path.name
    stopped.parent.mkdir(parents=True)
    stopped.write_text(json.dumps(json.loads(path.read_text())[:1]))
    assert as_json(capsys, *command) == whole and stopped.read_bytes() == path.read_bytes()

    null = as_json(capsys, *command, "--null", "--variance", "beta_tilde")
    assert null["classes"] == "null" and null["bits_per_dim"] != whole["bits_per_dim"]
    stopped.write_text("[[")
    assert main(command) == 1 and "is damaged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a VAE's run of three steps."""
    folder = tmp_path_factory.mktemp("vae")
    recipe = RECIPES["fashion-vae"]
    options = recipe.options | {"widths": [8, 16], "blocks": 1}
    for _ in train(replace(recipe, options=options, data="fashion-subset", images=96), folder):
        pass
    return str(folder)


def test_a_vae_is_sampled_and_evaluated(vae, classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "s.png"
    assert as_json(capsys, "sample", vae, "--number", "12", "--to", str(path))["images"] == 12
    first = path.read_bytes()
    as_json(capsys, "sample", vae, "--number", "12", "--to", str(path), "--seed", "1")
    assert path.read_bytes() != first
    result = as_json(capsys, "evaluate", vae, "--number", "30", "--classifier", str(classifier))
    assert result["frechet_distance"] > 0 and result["classes"] == "none" and result["sampler"] == "decoder mean"
    bits = ["evaluate", vae, "--metric", "bits", "--number", "150", "--importance"]
    one, many = as_json(capsys, *bits, "1"), as_json(capsys, *bits, "30")
    assert one["importance_samples"] == 1 and one["images"] == 150 and one["standard_error"] > 0
    assert many["bits_per_dim"] < one["bits_per_dim"]
    assert main([*bits, "0"]) == 1 and "--importance must be at least 1, got 0" in capsys.readouterr().err
    assert main(["sample", vae, "--label", "3"]) == 1 and "is a VAE without classes" in capsys.readouterr().err


def test_evaluate_without_classes(run_folder, classifier, capsys):
    arguments = ["evaluate", str(run_folder), "--steps", "2", "--number", "20", "--classifier", str(classifier)]
    given, null = as_json(capsys, *arguments), as_json(capsys, *arguments, "--null")
    assert given["classes"] == "given" and null["classes"] == "null"
    assert given["frechet_distance"] != null["frechet_distance"]


def test_neighbours(run_folder, vae, capsys):
    for folder, classes in ((run_folder, "given"), (vae, "none")):
        arguments = ["evaluate", str(folder), "--metric", "neighbours", "--steps", "2", "--number", "20"]
        result = as_json(capsys, *arguments)
        assert 0 < result["smallest_distance"] <= result["median_distance"] and result["classes"] == classes
        assert result["nearer_than_99_percent_of_test_images"] == 0 and result["images"] == 20
        assert "train, 4500 images" in result["reference"]
