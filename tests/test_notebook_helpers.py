"""What the chapters use to show code, results and animations."""

import ast
import inspect
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.animation import FuncAnimation

from diffbook import diffusion, gaussian, schedule
from diffbook.notebook import record, setup, show_animation, show_source

matplotlib.use("Agg")


@pytest.mark.parametrize("obj", [diffusion.q_sample, gaussian.GaussianMixture, schedule.linear_schedule])
def test_shown_source_is_the_package_without_docstrings(obj):
    listing = show_source(obj).data
    code = listing.removeprefix("```python\n").removesuffix("\n```")
    original = ast.parse(inspect.getsource(obj))
    for node in ast.walk(original):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    assert ast.dump(ast.parse(code)) == ast.dump(original)
    assert '"""' not in code


def test_several_sources_in_one_listing():
    code = show_source(diffusion.q_step, diffusion.q_sample).data
    assert code.index("def q_step") < code.index("def q_sample")


def test_record_shows_text_and_keeps_the_value(monkeypatch):
    calls = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: calls.append((a, k)))
    record("ratio", 1.23456, "off by a factor of {}")
    (data,), options = calls[0]
    assert data == {"text/plain": "off by a factor of 1.23"}
    assert options["metadata"] == {"measured": {"name": "ratio", "value": "1.23"}} and options["raw"]


def test_setup_makes_runs_repeatable():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with matplotlib.rc_context():
        setup(3)
        first = torch.randn(3)
        setup(3)
        assert torch.equal(first, torch.randn(3)) and torch.get_num_threads() == 1
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


def test_animation_is_offline_labelled_and_the_same_each_time():
    def player():
        figure, ax = plt.subplots(figsize=(1, 1))
        (line,) = ax.plot([0, 1])
        animation = FuncAnimation(figure, lambda i: line.set_ydata([0, i]), frames=2)
        html = show_animation(animation, 'a "rising" line').data
        plt.close(figure)
        return html

    page = player()
    assert not re.search(r"https?://", page.split("<script")[0]) and "<link" not in page
    assert 'alt="a &quot;rising&quot; line"' in page and 'aria-label="Frame"' in page
    assert page == player()
