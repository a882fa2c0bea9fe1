"""Latent diffusion with captions: the text encoder, the network on latents, and the two models put together.

A caption is a row of word numbers, ``(B, L)``, int64. The number V, one above the last word, stands for "no word": it
fills up short captions, and a caption of nothing else is the null caption. So a network here is called as every
conditional network of the book, ``network(z_t, t, y)``, and :func:`diffbook.sampling.guided` works as it does for
classes, with V in the place of the null class.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbook.autoencoder import SpatialVAE
from diffbook.data import emoji_rows
from diffbook.sampling import as_eps, dpmpp_2m_sample, guided, trailing_timesteps
from diffbook.schedule import NoiseSchedule
from diffbook.unet import Attention as SelfAttention
from diffbook.unet import ResBlock, group_norm, time_embedding, zeroed


class UnknownWordWarning(UserWarning):
    """A caption holds a word that the model has never seen."""


class Vocabulary:
    """Words and their numbers.

    Args:
        words: V different words; the i-th has the number i.
        length: L, how many words a caption may have.
    """

    def __init__(self, words: Sequence[str], length: int) -> None:
        self.words, self.length, self.null = tuple(words), length, len(words)
        self.number = {word: i for i, word in enumerate(self.words)}
        if len(self.number) != len(self.words) or not self.words or length < 1:
            raise ValueError(f"need different words, at least one, and a length of at least 1, got length {length}")

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions as word numbers, int64, shape ``(B, L)``. Case does not matter; "" is the null caption.

        Words that are not in the vocabulary are left out, and words beyond the L-th too; each time a
        :class:`UnknownWordWarning` names them.
        """
        rows = torch.full((len(captions), self.length), self.null)
        for row, caption in zip(rows, captions, strict=True):
            words = caption.lower().split()
            known = [word for word in words if word in self.number]
            if unknown := [word for word in words if word not in self.number]:
                warnings.warn(f"unknown words are left out: {', '.join(unknown)}", UnknownWordWarning, stacklevel=2)
            if beyond := known[self.length :]:
                too_long = f"only {self.length} words are read, left out are: {' '.join(beyond)}"
                warnings.warn(too_long, UnknownWordWarning, stacklevel=2)
            numbers = [self.number[word] for word in known[: self.length]]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return rows

    def decode(self, y: Tensor) -> list[str]:
        """The captions of word numbers ``(B, L)``."""
        return [" ".join(self.words[i] for i in row if i != self.null) for row in y.tolist()]


class Attention(nn.Module):
    """Multi-head attention of tokens ``(B, N, C)`` to a context ``(B, M, D)``; returns ``(B, N, C)``.

    Each token asks with its query, and gets the mean of the values, weighted by how well their keys fit,
    :eq:`def-cross-attention`. With the tokens themselves as context it is self-attention.

    Source: Vaswani et al. (2017), eq. 1.
    """

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(context, 2 * width)
        self.project = nn.Linear(width, width)
        nn.init.zeros_(self.project.weight)  # starts as "add nothing", as the residual blocks do
        nn.init.zeros_(self.project.bias)

    def forward(self, h: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask``, boolean, ``(B, M)``: which entries of the context may be looked at; all if it is left out."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or M, C / heads)

        k, v = self.key_value(context).chunk(2, dim=2)
        allowed = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(split(self.query(h)), split(k), split(v), attn_mask=allowed)
        return self.project(out.transpose(1, 2).flatten(2))


class CaptionEncoder(nn.Module):
    """From word numbers to a row of features, one a word, that know of the other words, :eq:`def-caption-encoder`.

    A first feature, "start", is there for every caption, so that the null caption has something to look at.
    """

    def __init__(self, words: int, length: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.words = words
        self.embed = nn.Embedding(words + 1, width)
        self.place = nn.Parameter(0.02 * torch.randn(length + 1, width))
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), _mlp(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, 1 + L, width)``, and which of them stand for the start or a word, ``(B, 1 + L)``.

        Raises:
            ValueError: word numbers of another shape or outside 0…V.
        """
        length = len(self.place) - 1
        if y.ndim != 2 or y.shape[1] != length:
            raise ValueError(f"y must have shape (B, {length}), word numbers, got {tuple(y.shape)}")
        if y.device.type == "cpu" and ((y < 0) | (y > self.words)).any():
            raise ValueError(f"word numbers must lie in 0…{self.words}, got {y.tolist()}")
        start = torch.full_like(y[:, :1], self.words)
        mask = torch.cat([torch.ones_like(start, dtype=torch.bool), y != self.words], dim=1)
        h = self.embed(torch.cat([start, y], dim=1)) + self.place
        n = self.norm1(h)
        h = h + self.attention(n, n, mask)
        h = h + self.mlp(self.norm2(h))
        return self.norm(h), mask


class Stage(nn.Module):
    """Residual blocks, self-attention over the places, and attention of each place to the words of the caption."""

    def __init__(self, width: int, blocks: int, embedding: int, text: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ResBlock(width, width, embedding) for _ in range(blocks)])
        self.attention = SelfAttention(width, heads)
        self.norm, self.cross = group_norm(width), Attention(width, text, heads)

    def forward(self, h: Tensor, embedding: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, embedding)
        h = self.attention(h)
        places = self.norm(h).flatten(2).transpose(1, 2)  # (B, H·W, C)
        return h + self.cross(places, words, mask).transpose(1, 2).reshape(h.shape)


class CaptionUNet(nn.Module):
    """A U-Net on latents that is told the time and a caption.

    The whole caption goes into the embedding, as a class does; its words are looked at one by one in each stage.
    The skip connections are those of :class:`diffbook.unet.LiteUNet`: one a level, added.

    Args:
        latent: shape (C, H, W) of a latent.
        words, length: V and L of the captions, see :class:`Vocabulary`.
        widths: channels inside, a number for each level; from level to level height and width are halved.
        blocks: residual blocks a stage.
        heads: of all attention.
        text: width of the caption's features.
    """

    def __init__(
        self,
        latent: Sequence[int],
        words: int,
        length: int,
        widths: Sequence[int],
        blocks: int = 2,
        heads: int = 4,
        text: int = 128,
    ) -> None:
        super().__init__()
        C, H, W = self.latent = tuple(latent)
        multiple = 2 ** (len(widths) - 1)
        if not widths or blocks < 1 or H % multiple or W % multiple:
            raise ValueError(
                f"need widths, blocks of at least 1, and a latent whose sides are multiples of {multiple}; "
                f"got widths {tuple(widths)}, blocks {blocks}, latent {self.latent}"
            )
        self.classes = words  # the null label, for guided()
        base, E = widths[0], 2 * widths[0]

        def stage(width: int) -> Stage:
            return Stage(width, blocks, E, text, heads)

        self.caption, self.pooled = CaptionEncoder(words, length, text), nn.Linear(text, E)
        self.time = nn.Sequential(nn.Linear(base, E), nn.SiLU(), nn.Linear(E, E))
        self.stem = nn.Conv2d(C, base, 3, padding=1)
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList([stage(width) for width in widths[:-1]])
        self.shrink = nn.ModuleList([nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs])
        self.middle = nn.ModuleList([stage(widths[-1]), stage(widths[-1])])
        self.grow = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in reversed(pairs)])
        self.up = nn.ModuleList([stage(width) for width in reversed(widths[:-1])])
        self.head = nn.Sequential(group_norm(base), nn.SiLU(), zeroed(nn.Conv2d(base, C, 3, padding=1)))

    def forward(self, z: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output, of the shape and dtype of ``z``.

        Args:
            z: noisy latents, shape ``(B, C, H, W)``.
            t: times 1…T, shape ``(B,)``.
            y: word numbers, shape ``(B, L)``; left out, the null caption for all.

        Raises:
            ValueError: a wrong shape, or a word number outside 0…V.
        """
        if z.shape[1:] != self.latent or t.shape != z.shape[:1]:
            shapes = f"{tuple(z.shape)} and {tuple(t.shape)}"
            raise ValueError(f"z must have shape (B, {', '.join(map(str, self.latent))}) and t (B,), got {shapes}")
        if y is None:
            y = torch.full((len(z), len(self.caption.place) - 1), self.classes, device=z.device)
        if len(y) != len(z):
            raise ValueError(f"y must have a caption for each of the {len(z)} latents, got {len(y)}")
        words, mask = self.caption(y)
        weight = mask.to(words.dtype)[:, :, None]
        pooled = self.pooled((weight * words).sum(1) / weight.sum(1))
        embedding = F.silu(self.time(time_embedding(t, self.stem.out_channels)) + pooled)
        told = (embedding, words, mask)
        h, skips = self.stem(z.to(self.stem.weight.dtype)), []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            h = stage(h, *told)
            skips.append(h)
            h = shrink(h)
        for stage in self.middle:
            h = stage(h, *told)
        for grow, stage in zip(self.grow, self.up, strict=True):
            h = stage(F.interpolate(grow(h), scale_factor=2) + skips.pop(), *told)
        return self.head(h).to(z.dtype)


def _mlp(width: int) -> nn.Sequential:
    last = nn.Linear(4 * width, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), last)


@dataclass(frozen=True)
class LatentSet:
    """Latents with captions, in the place of images with labels: z_0 of :eq:`def-latent-loss`.

    Attributes:
        z: scaled latents, float32, shape ``(N, C, H, W)``.
        labels: word numbers of the captions, int64, shape ``(N, L)``.
    """

    z: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.z)

    def x(self, index: Tensor | slice) -> Tensor:
        """The latents of an index, shape ``(B, C, H, W)``."""
        return self.z[index]

    def to(self, device: torch.device | str) -> LatentSet:
        """The same set with its tensors on a device."""
        return LatentSet(self.z.to(device), self.labels.to(device))


def emoji_vocabulary() -> Vocabulary:
    """The words of the training captions of emoji64, in the order of the alphabet; captions of up to 12 words."""
    return Vocabulary(sorted({word for row in emoji_rows("train") for word in row.caption.split()}), length=12)


@torch.no_grad()
def to_latents(autoencoder: SpatialVAE, x: Tensor) -> Tensor:
    """z_0 of images, the scaled mean of q(z | x), :eq:`def-latent-diffusion`, shape ``(B, *latent_shape)``."""
    mean, _ = autoencoder.encode(x)
    return autoencoder.scale * mean


@torch.no_grad()
def from_latents(autoencoder: SpatialVAE, z: Tensor) -> Tensor:
    """Images of scaled latents, :eq:`def-latent-diffusion`, clipped to [-1, 1]. (The latents have no bounds.)"""
    return autoencoder.decode(z / autoencoder.scale).clamp(-1, 1)


class LatentDiffusion:
    """An autoencoder and a diffusion model of its latents, :eq:`def-latent-diffusion`: pictures of captions.

    Args:
        autoencoder: with its fitted scale.
        network: called as ``network(z_t, t, y)``.
        schedule: the noise schedule it was trained with.
        vocabulary: of its captions.
        predicts: what it returns, see :func:`diffbook.sampling.as_eps`.
    """

    def __init__(
        self,
        autoencoder: SpatialVAE,
        network: CaptionUNet,
        schedule: NoiseSchedule,
        vocabulary: Vocabulary,
        predicts: str = "v",
    ) -> None:
        if network.latent != autoencoder.latent_shape or network.classes != vocabulary.null:
            raise ValueError(
                f"the parts do not fit: latents {network.latent} and {autoencoder.latent_shape}, "
                f"words {network.classes} and {vocabulary.null}"
            )
        self.autoencoder, self.network, self.schedule = autoencoder, network, schedule
        self.vocabulary, self.predicts = vocabulary, predicts

    def sample(
        self, captions: Sequence[str], steps: int = 20, w: float = 3.0, seed: int = 0, batch: int = 50
    ) -> Tensor:
        """A picture for each caption, shape ``(B, C, H, W)``, in [-1, 1].

        z_T is noise, z_0 comes out of the reverse process by DPM-Solver++(2M), and the decoder makes x of it. The
        i-th picture depends on its caption, the seed and i alone.

        Args:
            steps: network calls, twice as many with guidance.
            w: weight of the guidance, see :func:`diffbook.sampling.guided`.
            batch: how many are drawn at a time.
        """
        device, times = self.network.stem.weight.device, trailing_timesteps(self.schedule.T, steps)
        y, x = self.vocabulary.encode(captions).to(device), []
        for numbers in torch.arange(len(y)).split(batch):
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in numbers.tolist()]
            z_T = torch.stack([torch.randn(self.network.latent, generator=g) for g in generators]).to(device)
            denoiser = as_eps(guided(self.network, y[numbers], w), self.schedule, self.predicts)
            x.append(from_latents(self.autoencoder, dpmpp_2m_sample(denoiser, z_T, self.schedule, times)))
        return torch.cat(x)
