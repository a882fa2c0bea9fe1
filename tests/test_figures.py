"""Pictures show the right pixels in the right place."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from diffbook.figures import image_grid, process_strip, show_image

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def shown(axes):
    return torch.tensor(axes.images[0].get_array().tolist())


def test_image_is_shown_as_it_is():
    x = torch.tensor([[[-1.0, 1.0], [0.0, 2.0]]])
    _, ax = plt.subplots()
    show_image(ax, x, "name")
    assert shown(ax).tolist() == [[0, 255], [128, 255]] and ax.get_title() == "name"
    assert ax.images[0].get_clim() == (0, 255)  # not stretched to the image's own range


def test_colour_image():
    _, ax = plt.subplots()
    show_image(ax, torch.stack([torch.full((2, 2), v) for v in (1.0, -1.0, 1.0)]))
    assert shown(ax)[0, 0].tolist() == [255, 0, 255]


def test_grid_goes_row_by_row():
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 2)
    figure = image_grid(x, columns=3, titles=list("abcde"))
    assert [ax.get_title() for ax in figure.axes] == [*"abcde", ""]
    assert shown(figure.axes[3])[0, 0] == round(0.75 * 255)


def test_strip_has_a_row_an_image_and_a_column_a_time():
    x = torch.tensor([[0.0, 0.5, 1.0], [-1.0, -0.5, 0.0]])[:, :, None, None, None].expand(2, 3, 1, 2, 2)
    figure = process_strip(x, [0, 10, 20], names=["up", "down"])
    assert [ax.get_title() for ax in figure.axes[:3]] == ["t = 0", "t = 10", "t = 20"]
    assert figure.axes[3].get_ylabel() == "down" and shown(figure.axes[3])[0, 0] == 0


@pytest.mark.parametrize(
    "draw",
    [
        lambda: show_image(None, torch.zeros(2, 2)),
        lambda: show_image(None, torch.zeros(2, 2, 2)),
        lambda: image_grid(torch.zeros(0, 1, 2, 2)),
        lambda: image_grid(torch.zeros(1, 2, 2)),
        lambda: process_strip(torch.zeros(1, 2, 1, 2, 2), [0]),
    ],
)
def test_refuses_wrong_shapes(draw):
    with pytest.raises(ValueError, match="must have shape"):
        draw()
