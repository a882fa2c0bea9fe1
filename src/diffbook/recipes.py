"""What is trained: one named recipe a model.

A recipe is a frozen dataclass that can be written as JSON. It says everything on which the result depends, and
nothing about where or how a run is kept. All progress is counted in images seen; learning rate and EMA decay are
pure functions of it, so a run that is resumed goes on as if it had never stopped.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbook.autoencoder import VAE, SpatialVAE, elbo, fit_scale
from diffbook.classifier import CaptionMatcher, Classifier
from diffbook.data import ImageSet, folder_size
from diffbook.diffusion import q_sample, v_target
from diffbook.gaussian import kl_diagonal
from diffbook.latent import CaptionUNet, LatentSet
from diffbook.sampling import guided
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule
from diffbook.unet import LiteUNet, UNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "UNet": UNet,
    "LiteUNet": LiteUNet,
    "VAE": VAE,
    "SpatialVAE": SpatialVAE,
    "CaptionUNet": CaptionUNet,
    "Classifier": Classifier,
    "CaptionMatcher": CaptionMatcher,
}
SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}
PREDICTS = ("v", "x_0", "eps")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_MOST = {"T": 1_000_000, "size": 4096}  # of a recipe in a file: one that asks for more is to fill the memory


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all recipes have in common.

    Attributes:
        network, options: a name in ``NETWORKS`` and its arguments.
        data: a name in ``diffbook.data.IMAGE_SETS``.
        images: how many images training sees; batches are whole, so the last one may go beyond.
        lr, warmup: the highest learning rate of AdamW, and after how many images it is reached.
        clip: bound on the norm of the gradient.
        ema: highest decay of the moving average of the weights.
        parts: into how many equal parts a batch is divided, computed one after the other to save memory.
        channels_last: keep the channels of a pixel beside each other in memory; only in bfloat16 on a CPU it is slower.
        autocast: compute the network in bfloat16, compile: with ``torch.compile``; both on a GPU only.
    """

    name: str
    about: str
    network: str
    options: dict[str, Any]
    images: int
    batch: int
    lr: float
    data: str = "fashion-mnist"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    parts: int = 1
    channels_last: bool = True
    autocast: bool = False
    compile: bool = False

    def build(self) -> nn.Module:
        """The network with its first weights, which depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed)
            return NETWORKS[self.network](**self.options)

    def loss(
        self, network: nn.Module, x_0: Tensor, y: Tensor, generator: torch.Generator, rows: slice = slice(None)
    ) -> Tensor:
        """The mean loss of some rows of a batch, a scalar.

        Everything random is drawn for the whole batch, from the generator, on the device of ``x_0``: so the losses of
        equal parts of a batch, wherever they are computed, have the batch's loss as their mean.
        """
        raise TypeError(f"{type(self).__name__} has no loss")

    def augment(self, x_0: Tensor, generator: torch.Generator) -> Tensor:
        """The batch as training sees it; for most recipes as it is."""
        return x_0

    def finish(self, averaged: nn.Module, data: ImageSet | LatentSet) -> None:
        """What is left to do with the averaged network after the last step; for most recipes nothing."""

    def learning_rate(self, images: int) -> float:
        """Linear warm-up, then half a cosine down to 0 at the end of the budget."""
        if images < self.warmup:
            return self.lr * (images + self.batch) / (self.warmup + self.batch)
        done = min((images - self.warmup) / max(self.images - self.warmup, 1), 1.0)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def ema_decay(self, images: int) -> float:
        """min(ema, (1 + n) / (10 + n)) after n = images / batch steps: soon the start is forgotten.

        The weight of the start is :eq:`eq-ema-warmup`.
        """
        n = images / self.batch
        return min(self.ema, (1 + n) / (10 + n))

    def to_json(self) -> dict[str, Any]:
        """All fields, and the kind of recipe, as JSON can hold them."""
        return {"kind": type(self).__name__} | asdict(self)


@dataclass(frozen=True, kw_only=True)
class Diffusion(Recipe):
    """A class-conditional diffusion model of images, or of an autoencoder's latents.

    Attributes:
        autoencoder: the model that makes the latents, a name for :func:`diffbook.weights.load_model`; "" for none.
        size: height and width of the images, or of the latents.
        schedule, T: the noise schedule, ``"linear"`` or ``"cosine"``, and its number of steps.
        predicts: what the network is trained to return: ``"v"``, ``"x_0"`` or ``"eps"``.
        label_drop: the share of labels that is replaced by the null class.
        flip: show each image mirrored half of the time.
    """

    autoencoder: str = ""
    size: int = 28
    schedule: str = "cosine"
    T: int = 1000
    predicts: str = "v"
    label_drop: float = 0.1
    flip: bool = False

    def augment(self, x_0: Tensor, generator: torch.Generator) -> Tensor:
        """Mirror each image, left to right, with probability 1/2, if the recipe says so."""
        if not self.flip:
            return x_0
        mirrored = torch.rand(len(x_0), generator=generator, device=x_0.device) < 0.5
        return torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)

    def denoiser(self, network: Callable[..., Tensor], y: Tensor, w: float = 1.0) -> Callable[..., Tensor]:
        """The network with its labels, called as ``denoiser(x_t, t)``; w is the weight of guidance."""
        return guided(network, y, w)

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule as a table."""
        return _schedule(self.schedule, self.T)

    def loss(
        self, network: nn.Module, x_0: Tensor, y: Tensor, generator: torch.Generator, rows: slice = slice(None)
    ) -> Tensor:
        """Algorithm 1 of Ho et al. (2020), with stratified times: the mean squared error of what is predicted.

        For v this is the loss of ε with a weight, :eq:`eq-v-loss-weights`. The i-th of B images has its time in the
        i-th of B equal parts of 1…T (Kingma et al. 2021). Batches are shuffled, so each image still sees every time
        equally often, :eq:`eq-stratified-unbiased`, but the loss varies less, :eq:`eq-stratified-variance`.
        """
        B, device = len(x_0), x_0.device
        u = (torch.arange(B, device=device) + torch.rand(B, generator=generator, device=device)) / B
        t = 1 + (u * self.T).long().clamp(max=self.T - 1)
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        y = self.drop_labels(y, generator)
        schedule = self.noise_schedule()
        target = {"v": v_target(x_0, eps, t, schedule), "x_0": x_0, "eps": eps}[self.predicts]
        x_t = q_sample(x_0, eps, t, schedule)
        return F.mse_loss(network(x_t[rows], t[rows], y[rows]), target[rows])

    def drop_labels(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """The labels, each replaced by the null label with the probability ``label_drop``, by itself."""
        dropped = torch.rand(len(y), generator=generator, device=y.device) < self.label_drop
        return torch.where(dropped, self.options["classes"], y)


@dataclass(frozen=True, kw_only=True)
class CaptionedDiffusion(Diffusion):
    """A diffusion model of latents that is told captions in the place of classes."""

    def drop_labels(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Captions ``(B, L)``, each replaced as a whole by the null caption with the probability ``label_drop``.

        All conditions go together: the network must learn what pictures look like of which nothing at all is known,
        :eq:`eq-null-caption`.
        """
        dropped = torch.rand(len(y), generator=generator, device=y.device) < self.label_drop
        return torch.where(dropped[:, None], self.options["words"], y)


class WithoutLabels(nn.Module):
    """A network that is called with labels, and does not look at them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(x_t, t)


@dataclass(frozen=True, kw_only=True)
class Unconditional(Diffusion):
    """A diffusion model that is told nothing but the time; its network has no classes."""

    def loss(
        self, network: nn.Module, x_0: Tensor, y: Tensor, generator: torch.Generator, rows: slice = slice(None)
    ) -> Tensor:
        return super().loss(WithoutLabels(network), x_0, y, generator, rows)

    def drop_labels(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Labels as they are: nobody looks at them."""
        return y

    def denoiser(self, network: Callable[..., Tensor], y: Tensor, w: float = 1.0) -> Callable[..., Tensor]:
        """The network alone.

        Raises:
            ValueError: w is not 1; there is nothing to be guided by.
        """
        if w != 1:
            raise ValueError(f"{self.name} knows no classes: the weight of guidance must be 1, got {w}")
        return network


@dataclass(frozen=True, kw_only=True)
class Autoencoding(Recipe):
    """A variational autoencoder of images, without classes: minus the ELBO, in nats a number of the image.

    Both terms are sums over their dimensions before the one division, so the KL divergence has the weight that the
    bound gives it, :eq:`eq-hidden-beta`.
    """

    def loss(
        self, network: nn.Module, x_0: Tensor, y: Tensor, generator: torch.Generator, rows: slice = slice(None)
    ) -> Tensor:
        assert isinstance(network, VAE)
        eps = torch.randn((len(x_0), network.latent), generator=generator, device=x_0.device)
        return -elbo(network, x_0[rows], noise=eps[rows]).total.mean() / x_0[0].numel()


@dataclass(frozen=True, kw_only=True)
class Compression(Recipe):
    """An autoencoder whose latents a diffusion model will learn: mean errors of pixels, and a little KL divergence.

    The loss is :eq:`def-compression-loss`, an ELBO for errors of the density in :eq:`eq-compression-likelihood`.

    Attributes:
        kl_weight: weight of the KL divergence, summed over the latents and divided by the numbers of the image, as both
            errors are. A VAE with σ_x² = 1/2 has the weight 1 for its squared error, :eq:`eq-hidden-beta`.
    """

    kl_weight: float

    def loss(
        self, network: nn.Module, x_0: Tensor, y: Tensor, generator: torch.Generator, rows: slice = slice(None)
    ) -> Tensor:
        assert isinstance(network, SpatialVAE)
        B, x_0 = len(x_0), x_0[rows]
        mean, variance = network.encode(x_0)
        eps = torch.randn((B, *mean.shape[1:]), generator=generator, device=mean.device, dtype=mean.dtype)[rows]
        x = network.decode(mean + variance.sqrt() * eps)
        kl = kl_diagonal(mean, variance, torch.zeros_like(mean), torch.ones_like(mean)).sum() / x_0.numel()
        return F.l1_loss(x, x_0) + F.mse_loss(x, x_0) + self.kl_weight * kl

    def finish(self, averaged: nn.Module, data: ImageSet | LatentSet) -> None:
        """Fit the scale of the latents to the training images."""
        assert isinstance(averaged, SpatialVAE)
        assert isinstance(data, ImageSet)
        fit_scale(averaged, data.x, len(data))


@dataclass(frozen=True, kw_only=True)
class Classification(Recipe):
    """A classifier: cross-entropy, with labels smoothed by 0.1."""

    def loss(
        self, network: nn.Module, x_0: Tensor, y: Tensor, generator: torch.Generator, rows: slice = slice(None)
    ) -> Tensor:
        return F.cross_entropy(network(x_0[rows]), y[rows], label_smoothing=0.1)


@dataclass(frozen=True, kw_only=True)
class Matching(Recipe):
    """A matcher of images and captions: cross-entropy, in a batch, of the caption given the image and the other way.

    Attributes:
        shift: all images of a batch are moved by up to so many pixels, over white.
    """

    shift: int = 0

    def loss(
        self, network: nn.Module, x_0: Tensor, y: Tensor, generator: torch.Generator, rows: slice = slice(None)
    ) -> Tensor:
        if len(x_0[rows]) < len(x_0):
            raise ValueError(
                f"{self.name} compares each image with all captions of its batch, so a batch cannot be divided: "
                "train it with one process and parts = 1"
            )
        size, s = x_0.shape[-1], self.shift
        i, j = torch.randint(0, 2 * s + 1, (2,), generator=generator, device=x_0.device).tolist()
        x = F.pad(x_0, (s, s, s, s), value=1.0)[..., i : i + size, j : j + size]
        logits, own = network(x, y), torch.arange(len(x), device=x.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def recipe_from_json(stored: Any) -> Recipe:
    """The recipe that :meth:`Recipe.to_json` wrote; fields that did not exist then get their defaults.

    Raises:
        ValueError: an unknown kind of recipe; an unknown or missing field; or a value that no recipe has.
    """
    known = (Diffusion, CaptionedDiffusion, Unconditional, Autoencoding, Compression, Classification, Matching)
    kinds: dict[str, type[Recipe]] = {kind.__name__: kind for kind in known}
    if not isinstance(stored, dict):
        raise ValueError(f"a recipe is an object of JSON, not {stored!r:.40}")
    values = dict(stored)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"unknown kind of recipe {kind!r:.40}")
    try:
        recipe = kinds[kind](**values)
    except TypeError as error:
        raise ValueError(f"not a recipe of this version of diffbook: {error}") from error
    for name, wanted in get_type_hints(type(recipe)).items():
        _check_type(name, getattr(recipe, name), wanted)
    known_names: dict[str, Iterable[str]] = {"network": NETWORKS, "schedule": SCHEDULES, "predicts": PREDICTS}
    for name, known_values in known_names.items():
        if getattr(recipe, name, None) not in [None, *known_values]:
            raise ValueError(f"not a recipe of this version of diffbook: {name} is {getattr(recipe, name)!r:.40}")
    if not _NAME.fullmatch(recipe.name):  # files are called by it
        raise ValueError(f"a recipe's name has letters, digits, '.', '_', '+' and '-', this one is {recipe.name!r:.40}")
    for name, most in _MOST.items():
        if not 1 <= getattr(recipe, name, 1) <= most:
            raise ValueError(f"{name} must lie in 1…{most}, the recipe says {getattr(recipe, name)}")
    return recipe


def _check_type(name: str, value: object, wanted: Any) -> None:
    """A stored recipe may come from anywhere: its fields have their types, or it is none."""
    wanted = get_origin(wanted) or wanted
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    if not fits or isinstance(value, bool) != (wanted is bool):  # to Python True is a number
        raise ValueError(f"not a recipe of this version of diffbook: {name} is {value!r:.40}, no {wanted.__name__}")


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def with_data(recipe: Recipe, data: str) -> Recipe:
    """The recipe for other data; sizes follow if it is ``folder:SIZE:PATH``.

    Raises:
        ValueError: see :func:`diffbook.data.folder_size`.
    """
    size = folder_size(data)
    recipe = replace(recipe, data=data)
    if size and isinstance(recipe, Compression):
        return replace(recipe, options=recipe.options | {"size": size})
    if size and isinstance(recipe, Diffusion):
        return replace(recipe, size=size // 8 if recipe.autoencoder else size)  # every autoencoder here has f = 8
    return recipe


def stream(seed: int, purpose: str, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose random numbers depend on these arguments alone."""
    key = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:7], "big"))


@cache
def _schedule(name: str, T: int) -> NoiseSchedule:
    return SCHEDULES[name](T)


_ALL: list[Recipe] = [
    Diffusion(
        name="fashion-cpu",
        about="Fashion-MNIST without a GPU: an evening on a laptop",
        network="LiteUNet",
        options={"channels": 1, "widths": [48, 96], "blocks": 2, "attention": [1], "patch": 2, "classes": 10},
        images=2_000_000,
        batch=32,
        lr=1e-3,
        warmup=10_000,
        ema=0.9995,
    ),
    Diffusion(
        name="fashion-gpu",
        about="Fashion-MNIST on a GPU: the U-Net of Ho et al. (2020) at a fifth of its size",
        network="UNet",
        options={
            "channels": 1,
            "widths": [64, 128, 128],
            "blocks": 2,
            "attention": [1, 2],
            "classes": 10,
            "dropout": 0.1,
        },
        images=4_000_000,
        batch=512,
        lr=1e-3,
        warmup=100_000,
        ema=0.999,
        autocast=True,
        compile=True,
    ),
    Diffusion(
        name="fashion-smoke",
        about="seconds on a CPU: shows that everything works, not that it learns",
        network="LiteUNet",
        options={"channels": 1, "widths": [8, 16], "blocks": 1, "attention": [1], "patch": 2, "classes": 10},
        data="fashion-subset",
        images=1_280,
        batch=32,
        lr=2e-3,
    ),
    Autoencoding(
        name="fashion-vae",
        about="a VAE of Fashion-MNIST with the parameters and the training compute of fashion-cpu",
        network="VAE",
        options={"channels": 1, "size": 28, "widths": [48, 96], "blocks": 2, "latent": 32, "patch": 2, "narrow": 40},
        images=2_000_000,
        batch=32,
        lr=1e-3,
        warmup=10_000,
        clip=5.0,
        ema=0.9995,
    ),
    Compression(
        name="emoji-vae",
        about="the autoencoder of emoji64 without a GPU: 64×64 pixels in 3 colours become 8×8 latents in 4 channels",
        network="SpatialVAE",
        options={"channels": 3, "size": 64, "widths": [48, 96, 128], "blocks": 2, "latent": 4, "patch": 2},
        data="emoji64",
        images=200_000,
        batch=32,
        lr=1.5e-3,
        warmup=5_000,
        kl_weight=5e-3,
    ),
    CaptionedDiffusion(
        name="emoji-ldm",
        about="pictures of captions without a GPU: diffusion on the latents of emoji-vae",
        network="CaptionUNet",
        options={"latent": [4, 8, 8], "words": 1798, "length": 12, "widths": [128, 160], "blocks": 1, "text": 128},
        data="emoji64",
        autoencoder="emoji-vae",
        size=8,
        images=1_600_000,
        batch=64,
        lr=1e-3,
        warmup=20_000,
        ema=0.9995,
    ),
    Compression(
        name="emoji-vae-gpu",
        about="the autoencoder of emoji64 on a GPU, ten times as large",
        network="SpatialVAE",
        options={"channels": 3, "size": 64, "widths": [128, 256, 384], "blocks": 3, "latent": 4, "patch": 2},
        data="emoji64",
        images=4_000_000,
        batch=256,
        lr=5e-4,
        warmup=100_000,
        kl_weight=5e-3,
        autocast=True,
        compile=True,
    ),
    CaptionedDiffusion(
        name="emoji-ldm-gpu",
        about="pictures of captions on a GPU: diffusion on the latents of emoji-vae-gpu, ten times as large",
        network="CaptionUNet",
        options={"latent": [4, 8, 8], "words": 1798, "length": 12, "widths": [320, 512], "blocks": 2, "text": 256},
        data="emoji64",
        autoencoder="emoji-vae-gpu",
        size=8,
        images=20_000_000,
        batch=512,
        lr=5e-4,
        warmup=200_000,
        ema=0.9995,
        autocast=True,
        compile=True,
    ),
    # The paper keeps its learning rate after the warm-up; ours falls to 0 at the end, as everywhere in this book.
    Unconditional(
        name="cifar10-gpu",
        about="CIFAR-10 with the network and the training of Ho et al. (2020): days on a GPU",
        network="UNet",
        options={
            "channels": 3,
            "widths": [128, 256, 256, 256],
            "blocks": 2,
            "attention": [1],
            "dropout": 0.1,
        },
        data="cifar10",
        size=32,
        schedule="linear",
        predicts="eps",
        flip=True,
        images=102_400_000,
        batch=128,
        lr=2e-4,
        warmup=640_000,
        weight_decay=0.0,
        ema=0.9999,
        autocast=True,
        compile=True,
    ),
    Compression(
        name="folder-vae",
        about="an autoencoder of your own images: --data folder:SIZE:PATH",
        network="SpatialVAE",
        options={"channels": 3, "size": 128, "widths": [64, 128, 256], "blocks": 2, "latent": 4, "patch": 2},
        data="folder:128:.",
        images=2_000_000,
        batch=32,
        lr=5e-4,
        warmup=50_000,
        kl_weight=5e-3,
        autocast=True,
        compile=True,
    ),
    Unconditional(
        name="folder-ldm",
        about="diffusion on the latents of your own images: --data folder:SIZE:PATH --autoencoder RUN",
        network="UNet",
        options={"channels": 4, "widths": [192, 384], "blocks": 2, "attention": [0, 1], "heads": 6, "dropout": 0.1},
        data="folder:128:.",
        autoencoder="folder-vae",
        size=16,
        images=10_000_000,
        batch=128,
        lr=3e-4,
        warmup=100_000,
        ema=0.9995,
        autocast=True,
        compile=True,
    ),
    Classification(
        name="fashion-classifier",
        about="the classifier in whose features Fréchet distances are measured",
        network="Classifier",
        options={"channels": 1, "size": 28, "width": 32, "features": 128, "classes": 10},
        images=480_000,
        batch=64,
        lr=2e-3,
        warmup=10_000,
        weight_decay=0.05,
    ),
    Matching(
        name="emoji-matcher",
        about="knows captions of emoji64; pictures are compared in its features",
        network="CaptionMatcher",
        options={"channels": 3, "size": 64, "widths": [24, 48, 96, 96, 96], "features": 128, "words": 1798},
        data="emoji64",
        images=320_000,
        batch=64,
        lr=2e-3,
        warmup=10_000,
        weight_decay=0.05,
        shift=4,
    ),
]
RECIPES = {recipe.name: recipe for recipe in _ALL}
