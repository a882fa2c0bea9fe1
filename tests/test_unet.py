"""The networks: sizes, shapes, what they depend on; and how they become denoisers."""

import math

import pytest
import torch

from diffbook.classifier import Classifier
from diffbook.diffusion import q_sample, v_target
from diffbook.recipes import RECIPES
from diffbook.sampling import as_eps, ddim_sample, guided, timesteps
from diffbook.schedule import cosine_schedule, linear_schedule
from diffbook.unet import LiteUNet, UNet, group_norm, time_embedding

SMALL = {"channels": 2, "widths": (8, 16), "blocks": 1, "attention": (1,), "patch": 2, "classes": 3}


@pytest.fixture(params=[UNet, LiteUNet])
def network(request):
    """A small network whose zero layers are filled, so that every path counts."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = request.param(**SMALL)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, 8, 12, generator=generator), torch.tensor([1, 10, 100, 1000]), torch.tensor([0, 1, 2, 3])


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_papers_network_has_35_7_million_parameters():
    paper = UNet(3, (128, 256, 256, 256), blocks=2, attention=(1,), dropout=0.1)
    assert parameters(paper) == 35_746_307
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )
    assert parameters(other) == parameters(paper)


def test_sizes_of_the_recipes():
    sizes = {name: parameters(recipe.build()) for name, recipe in RECIPES.items()}
    assert 1_000_000 <= sizes["fashion-cpu"] <= 1_200_000
    assert 6_000_000 <= sizes["fashion-gpu"] <= 7_000_000


def test_time_embedding_is_the_formula():
    e = time_embedding(torch.tensor([1, 700]), 8)
    for i in range(4):
        angle = 700 * 10_000 ** (-i / 3)
        assert e[1, i].item() == pytest.approx(math.sin(angle), abs=2e-4)
        assert e[1, 4 + i].item() == pytest.approx(math.cos(angle), abs=2e-4)
    assert e.shape == (2, 8) and e.dtype == torch.float32
    with pytest.raises(ValueError, match="even and at least 4, got 7"):
        time_embedding(torch.tensor([1]), 7)


@pytest.mark.parametrize("width, groups", [(2, 1), (8, 2), (16, 4), (48, 12), (96, 24), (128, 32), (256, 32)])
def test_groups_have_at_least_four_channels(width, groups):
    assert group_norm(width).num_groups == groups


def test_a_new_network_returns_zero_and_every_residual_branch_adds_nothing():
    network = UNet(**SMALL)
    x = torch.randn(1, 2, 8, 8)
    assert not network(x, torch.tensor([5])).any()
    block = network.down[0][0]
    h = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(h, torch.randn(1, 32)), h)


def test_depends_on_x_t_and_y(network, batch):
    x, t, y = batch
    out = network(x, t, y)
    assert out.shape == x.shape and out.dtype == x.dtype

    def change(*arguments):
        return (network(*arguments) - out).abs().flatten(1).max(1).values

    assert (change(x + 0.1, t, y) > 1e-3).all()
    assert (change(x, t + 50, y) > 1e-4).all()
    assert (change(x, t, (y + 1) % 4) > 1e-3).all()
    moved = x.clone()
    moved[0] += 1
    assert change(moved, t, y)[0] > 1e-3 and (change(moved, t, y)[1:] < 1e-5).all()  # one sample is not another's


def test_reaches_across_the_whole_image(network, batch):
    x, t, y = batch
    x.requires_grad_(True)
    network(x, t, y)[0, 0, 0, 0].backward()
    assert x.grad[0, :, -1, -1].abs().min() > 0 and not x.grad[1:].any()


def test_no_label_is_the_null_class(network, batch):
    x, t, _ = batch
    assert torch.equal(network(x, t), network(x, t, torch.full((4,), 3)))


def test_gradient_flows_into_every_parameter(network, batch):
    x, t, y = batch
    network(x, t, y).square().mean().backward()
    empty = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert empty == []


def test_dtypes_and_memory_formats(network, batch):
    x, t, y = batch
    out = network(x, t, y)
    assert network(x.double(), t, y).dtype == torch.float64
    assert torch.allclose(network(x.double(), t, y).float(), out, atol=1e-6)
    assert torch.allclose(network(x, t.float(), y.int()), out, atol=1e-6)  # what an exported model is called with
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, t, y)
    assert half.dtype == torch.float32 and torch.allclose(half, out, atol=0.1)
    last = network.to(memory_format=torch.channels_last)
    assert torch.allclose(last(x.to(memory_format=torch.channels_last), t, y), out, atol=1e-5)
    double = network.double()
    assert torch.allclose(double(x.double(), t, y).float(), out, atol=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(4, 1, 8, 8)}, r"shape \(B, 2, H, W\) with H and W multiples of 4, got \(4, 1, 8, 8\)"),
        ({"x": torch.zeros(4, 2, 8, 6)}, r"multiples of 4, got \(4, 2, 8, 6\)"),
        ({"x": torch.zeros(2, 8, 8)}, r"got \(2, 8, 8\)"),
        ({"t": torch.tensor([1])}, r"t must have shape \(4,\), one time a sample, got \(1,\)"),
        ({"y": torch.tensor([[1]])}, r"y must have shape \(4,\)"),
        ({"y": torch.tensor([0, 1, 2, 4])}, r"labels must lie in 0…3, got \[0, 1, 2, 4\]"),
        ({"y": torch.tensor([0, 1, 2, -1])}, r"labels must lie in 0…3"),
    ],
)
def test_wrong_input(network, batch, change, words):
    x, t, y = batch
    arguments = {"x": x, "t": t, "y": y} | change
    with pytest.raises(ValueError, match=words):
        network(**arguments)


def test_wrong_construction():
    with pytest.raises(ValueError, match="at least one width"):
        UNet(1, ())
    with pytest.raises(ValueError, match=r"attention at existing levels; got .* attention \(2,\)"):
        UNet(1, (8, 8), attention=(2,))
    with pytest.raises(ValueError, match="heads must divide the width 8, got 3"):
        UNet(1, (8,), heads=3)
    with pytest.raises(ValueError, match="attention at level 1 only"):
        LiteUNet(1, (8, 8), attention=(0,))
    with pytest.raises(ValueError, match="takes no labels"):
        UNet(1, (8,))(torch.zeros(1, 1, 4, 4), torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"shape \(B, 1, 28, 28\), got \(2, 1, 8, 8\)"):
        Classifier()(torch.zeros(2, 1, 8, 8))


def test_as_eps_turns_every_prediction_into_the_noise():
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    eps = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    t = torch.tensor([1, 20, 300, 700, 1000])
    for schedule in (linear_schedule(), cosine_schedule()):
        x_t = q_sample(x_0, eps, t, schedule)
        outputs = {"eps": eps, "x_0": x_0, "v": v_target(x_0, eps, t, schedule)}
        for predicts, output in outputs.items():
            found = as_eps(lambda x, time, output=output: output, schedule, predicts=predicts)(x_t, t)
            assert torch.allclose(found, eps, atol=1e-10)
    with pytest.raises(ValueError, match=r"predicts must be .* got 'noise'"):
        as_eps(lambda x, t: x, schedule, predicts="noise")


def test_guidance(network, batch):
    x, t, y = batch
    y = y % 3
    c, u = network(x, t, y), network(x, t)
    assert torch.equal(guided(network, y, w=1)(x, t), c)
    assert torch.allclose(guided(network, y, w=0)(x, t), u, atol=1e-6)
    assert torch.allclose(guided(network, y, w=2.5)(x, t), u + 2.5 * (c - u), atol=1e-5)
    assert torch.allclose(guided(network, y, w=2, null=0)(x, t), 2 * c - network(x, t, 0 * y), atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance with w = 2 needs the null class"):
        guided(lambda x, t, y: x, y, w=2)


def test_guiding_v_or_eps_is_the_same(network, batch):
    x, t, y = batch
    y, schedule = y % 3, cosine_schedule()

    def eps_network(x_t, time, labels):
        return as_eps(lambda a, b: network(a, b, labels), schedule, "v")(x_t, time)

    a = as_eps(guided(network, y, w=3), schedule, "v")(x, t)
    assert torch.allclose(a, guided(eps_network, y, w=3, null=3)(x, t), atol=1e-4)


def test_a_network_of_float32_samples_in_float64(network):
    x_T = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoiser = as_eps(guided(network, torch.tensor([0, 1])), cosine_schedule(), predicts="v")
    x = ddim_sample(denoiser, x_T, cosine_schedule(), timesteps(1000, 4), clip=1.0)
    assert x.dtype == torch.float64 and x.isfinite().all()


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu(network, batch):
    expected = network(*batch)
    network.cuda()
    found = network(*(argument.cuda() for argument in batch))
    assert torch.allclose(found.cpu(), expected, atol=1e-2)
