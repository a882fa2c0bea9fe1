"""The network: a U-Net that is told the time and, if it likes, a class.

:class:`UNet` is the network of Ho et al. (2020, appendix B), for images or latents of any number of channels.
:class:`LiteUNet` keeps its blocks and leaves out what a CPU cannot afford: pixels are folded into channels, every
level hands over one skip connection, and that is added instead of concatenated.

Both are called ``network(x, t, y)``: ``x`` of shape ``(B, C, H, W)``, times ``t`` ``(B,)``, classes ``y`` ``(B,)``.
All conditions are summed into one vector a sample, the *embedding* ``(B, E)``, which every residual block adds to
its features. The best speed comes with ``network.to(memory_format=torch.channels_last)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of the time at wavelengths from 2π to 20,000π, :eq:`def-time-embedding`.

    Inner products depend on differences of times only, :eq:`eq-embedding-inner-product`.

    Args:
        t: times, shape ``(B,)``.
        width: numbers a time, even.

    Returns:
        float32, shape ``(B, width)``: ``width / 2`` sines, then as many cosines.

    Raises:
        ValueError: an odd width, or one below 4.

    Source: Vaswani et al. (2017), section 3.5.
    """
    if width < 4 or width % 2:
        raise ValueError(f"the width of a time embedding must be even and at least 4, got {width}")
    half = width // 2
    frequency = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def group_norm(width: int) -> nn.GroupNorm:
    """At most 32 groups, of at least four channels (the whole width if it is less).

    A group of one channel would subtract exactly what the embedding adds to that channel, :eq:`eq-norm-blind`: such
    a network would be blind to the time and the class.
    """
    groups = max(g for g in range(1, 33) if width % g == 0 and (width // g >= 4 or g == 1))
    return nn.GroupNorm(groups, width)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all parameters 0: the branch that ends with it starts as "add nothing", :eq:`eq-zero-start`."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x + two convolutions of x; the embedding is added between them. ``(B, C, H, W)`` to ``(B, C', H, W)``."""

    def __init__(self, width_in: int, width: int, embedding: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.embed = nn.Linear(embedding, width)
        self.norm2, self.conv2 = group_norm(width), zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embed(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """x + self-attention over all H·W positions of x, :eq:`def-attention`; keeps the shape ``(B, C, H, W)``."""

    def __init__(self, width: int, heads: int = 1) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.norm = group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.project = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).contiguous()  # the channels of a position side by side
        qkv = qkv.view(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H·W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.project(h.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2))


class Layers(nn.ModuleList):
    """Layers in a row; residual blocks are given the embedding."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, embedding) if isinstance(layer, ResBlock) else layer(h)
        return h


class UNet(nn.Module):
    """The U-Net of Ho et al. (2020).

    Args:
        channels: C of the images or latents.
        widths: channels inside, a number for each level; from level to level height and width are halved.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: the levels, 0 the finest, whose blocks are followed by self-attention; the middle always has it.
        heads: of the attention.
        patch: fold squares of patch×patch pixels into channels first, and unfold them at the end.
        classes: K, for a class-conditional network; label K then stands for "no class". None: it takes no labels.
        dropout: in the residual blocks.

    With ``channels=3, widths=(128, 256, 256, 256), attention=(1,), dropout=0.1`` it is the paper's network for
    CIFAR-10, 35.7 million parameters.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: int = 2,
        attention: Sequence[int] = (),
        heads: int = 1,
        patch: int = 1,
        classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not widths or blocks < 1 or patch < 1 or any(not 0 <= i < len(widths) for i in attention):
            raise ValueError(
                "need at least one width, one block a level, patch >= 1 and attention at existing levels; "
                f"got widths {tuple(widths)}, blocks {blocks}, patch {patch}, attention {tuple(attention)}"
            )
        self.channels, self.patch, self.classes = channels, patch, classes
        self.multiple = patch * 2 ** (len(widths) - 1)  # height and width must be multiples of this
        base, E = widths[0], 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(base, E), nn.SiLU(), nn.Linear(E, E))
        self.label = None if classes is None else nn.Embedding(classes + 1, E)
        self.stem = nn.Conv2d(channels * patch**2, base, 3, padding=1)
        self.head = nn.Sequential(
            group_norm(base), nn.SiLU(), zeroed(nn.Conv2d(base, channels * patch**2, 3, padding=1))
        )
        self.build(tuple(widths), blocks, tuple(attention), heads, E, dropout)

    def build(
        self, widths: tuple[int, ...], blocks: int, attention: tuple[int, ...], heads: int, E: int, dropout: float
    ) -> None:
        """Make the layers between stem and head."""

        def block(width_in: int, level: int) -> list[nn.Module]:
            attend = [Attention(widths[level], heads)] if level in attention else []
            return [ResBlock(width_in, widths[level], E, dropout), *attend]

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips, levels = widths[0], [widths[0]], range(len(widths))
        for level in levels:
            for _ in range(blocks):
                self.down.append(Layers(block(width, level)))
                width = widths[level]
                skips.append(width)
            if level < levels[-1]:
                self.down.append(Layers([nn.Conv2d(width, width, 3, stride=2, padding=1)]))
                skips.append(width)
        first, last = ResBlock(width, width, E, dropout), ResBlock(width, width, E, dropout)
        self.middle = Layers([first, Attention(width, heads), last])
        for level in reversed(levels):
            for i in range(blocks + 1):
                layers = block(width + skips.pop(), level)
                width = widths[level]
                if level > 0 and i == blocks:
                    layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
                self.up.append(Layers(layers))

    def body(self, h: Tensor, embedding: Tensor) -> Tensor:
        """From the stem's features to the head's, both ``(B, widths[0], H, W)``."""
        skips = [h]
        for layers in self.down:
            h = layers(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for layers in self.up:
            h = layers(torch.cat([h, skips.pop()], dim=1), embedding)
        return h

    def embedding(self, t: Tensor, y: Tensor | None) -> Tensor:
        """All conditions as one vector a sample, ``(B, E)``; another condition would be added here."""
        e = self.time(time_embedding(t, self.stem.out_channels).to(self.stem.weight.dtype))
        if self.label is not None and self.classes is not None:
            e = e + self.label(torch.full_like(t, self.classes, dtype=torch.int64) if y is None else y)
        return F.silu(e)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output, of the shape and dtype of ``x``.

        Args:
            x: noisy data, shape ``(B, C, H, W)``.
            t: times 1…T, shape ``(B,)``.
            y: classes 0…K-1, or K for none, int64, shape ``(B,)``. Left out, it is K for all.

        Raises:
            ValueError: a wrong shape, labels for a network without classes, or a label outside 0…K.
        """
        self.check(x, t, y)
        h = x.to(self.stem.weight.dtype)  # float64 from a sampler is computed in the network's precision
        h = self.stem(F.pixel_unshuffle(h, self.patch))
        h = self.head(self.body(h, self.embedding(t, y)))
        return F.pixel_shuffle(h, self.patch).to(x.dtype)

    def check(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Raise the errors that :meth:`forward` names."""
        m = self.multiple
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] % m or x.shape[3] % m:
            shape = f"(B, {self.channels}, H, W) with H and W multiples of {m}"
            raise ValueError(f"x must have shape {shape}, got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({len(x)},), one time a sample, got {tuple(t.shape)}")
        if y is None:
            return
        if self.classes is None:
            raise ValueError("this network takes no labels: it was built with classes=None")
        if y.shape != t.shape:
            raise ValueError(f"y must have shape ({len(x)},), one label a sample, got {tuple(y.shape)}")
        # On a GPU a look at the values would make the host wait.
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and ((y < 0) | (y > self.classes)).any():
            raise ValueError(f"labels must lie in 0…{self.classes}, got {y.tolist()}")


class LiteUNet(UNet):
    """A U-Net for the CPU: the work of :class:`UNet` that costs most is left out.

    One skip connection a level, added, so that the blocks on the way up are no wider than those on the way down;
    1×1 convolutions before the upsampling instead of 3×3 after it; ``blocks`` residual blocks a level on the way
    up as well; the coarsest level is the middle. With ``patch=2`` an image of 28×28 is worked on at 14×14 and 7×7.
    The arguments are those of :class:`UNet`; ``attention`` may only name the coarsest level.
    """

    def build(
        self, widths: tuple[int, ...], blocks: int, attention: tuple[int, ...], heads: int, E: int, dropout: float
    ) -> None:
        if any(i != len(widths) - 1 for i in attention):
            raise ValueError(f"LiteUNet has attention at level {len(widths) - 1} only, got {attention}")

        def level(width: int) -> Layers:
            return Layers([ResBlock(width, width, E, dropout) for _ in range(blocks)])

        pairs = list(itertools.pairwise(widths))
        attend = [Attention(widths[-1], heads)] if attention else []
        self.down = nn.ModuleList([level(width) for width in widths[:-1]])
        self.shrink = nn.ModuleList([nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs])
        self.middle = Layers([*level(widths[-1]), *attend, *level(widths[-1])])
        self.grow = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in reversed(pairs)])
        self.up = nn.ModuleList([level(width) for width in reversed(widths[:-1])])

    def body(self, h: Tensor, embedding: Tensor) -> Tensor:
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            h = blocks(h, embedding)
            skips.append(h)
            h = shrink(h)
        h = self.middle(h, embedding)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            h = blocks(F.interpolate(grow(h), scale_factor=2) + skips.pop(), embedding)
        return h
