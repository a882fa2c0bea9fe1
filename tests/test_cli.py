"""The command ``diffbook``, as a user calls it."""

import json
import subprocess
import sys

import pytest

import diffbook
from diffbook.cli import main


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "diffbook.cli", *arguments], capture_output=True, text=True)


def test_data_as_json():
    done = run("data", "fashion-subset", "--split", "test", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert result["shape"] == [1000, 1, 28, 28] and set(result["classes"].values()) == {100}
    assert result["min"] == -1 and result["max"] == 1


def test_data_for_people(capsys):
    assert main(["data", "two-moons", "--seed", "3"]) == 0
    assert "shape     [10000, 2]" in capsys.readouterr().out


def test_seed_changes_toy_data(capsys):
    def first(seed):
        main(["data", "swiss-roll", "--seed", str(seed), "--json"])
        return capsys.readouterr().out

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["data", "mnist"], "unknown data set 'mnist'; there are fashion-mnist"),
        (["data", "fashion-subset", "--split", "x"], "split must be one of train, test, got 'x'"),
        (["data", "digits", "--device", "nonsense"], "device 'nonsense' cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(arguments, words, capsys):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1 and err.startswith("diffbook: ")


def test_no_network_and_no_data(capsys, monkeypatch, tmp_path):
    import diffbook.data

    def offline(*arguments, **keywords):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr(diffbook.data, "DEBIAN_FOLDER", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DIFFBOOK_DATA", raising=False)
    assert main(["data", "fashion-mnist"]) == 1
    err = capsys.readouterr().err
    assert "could not be downloaded (Network is unreachable)" in err and err.count("\n") == 1


def test_help_and_version():
    assert "fetch, check and describe" in run("--help").stdout
    assert "--device" in run("data", "--help").stdout
    assert run("--version").stdout.strip() == f"diffbook {diffbook.__version__}"
    assert run().returncode == 2 and run("fly").returncode == 2
