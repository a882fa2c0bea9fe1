"""The named small networks in whose features images are compared: one knows classes, the other captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbook.unet import group_norm


class Classifier(nn.Module):
    """Three convolutions and two linear layers.

    Group normalisation and no dropout: it computes the same in training and in evaluation, one image at a time
    or many.

    Args:
        channels: C of the images.
        size: height and width, a multiple of 4.
        width: channels of the first convolution; the others have twice as many.
        features: numbers that :meth:`features` gives for an image.
        classes: K.
    """

    def __init__(
        self, channels: int = 1, size: int = 28, width: int = 32, features: int = 128, classes: int = 10
    ) -> None:
        super().__init__()
        self.input_shape = (channels, size, size)
        self.convolutions = nn.Sequential(
            *[nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(width, 2 * width, 3, padding=1), nn.GroupNorm(8, 2 * width), nn.ReLU()],
            *[nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GroupNorm(8, 2 * width), nn.ReLU(), nn.MaxPool2d(2)],
        )
        self.linear = nn.Linear(2 * width * (size // 4) ** 2, features)
        self.head = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, shape ``(B, features)``, for images ``(B, C, H, W)`` in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        if x.shape[1:] != self.input_shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.input_shape))}), got {tuple(x.shape)}")
        return F.relu(self.linear(self.convolutions(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(B, K)``."""
        return self.head(self.features(x))


class CaptionMatcher(nn.Module):
    """Images and captions as vectors, near each other where they belong together.

    A caption is coded by no network: it is the sum of one fixed random vector a word, so that two captions are the
    nearer the more words they share. The convolutions learn to say the code of an image's caption.

    Args:
        channels, size: C of the images, and their height and width.
        widths: channels of the convolutions; before each but the first, height and width are halved.
        features: D, the length of the vectors.
        words: V, the number of words; word V is "no word".

    Source: the idea of Radford et al. (2021), with a code in the place of their text encoder.
    """

    codes: Tensor

    def __init__(self, channels: int, size: int, widths: Sequence[int], features: int, words: int) -> None:
        super().__init__()
        self.input_shape = (channels, size, size)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False)):
            layers += [nn.MaxPool2d(2)] if i else []
            layers += [nn.Conv2d(a, b, 3, padding=1), group_norm(b), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(widths[-1], features)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        # Not stored with the weights: the seed says it all.
        codes = torch.randn(words + 1, features, generator=torch.Generator().manual_seed(0))
        codes[words] = 0
        self.register_buffer("codes", codes, persistent=False)

    def features(self, x: Tensor) -> Tensor:
        """What an image looks like, shape ``(B, D)``, each row of the length √D, for images in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        if x.shape[1:] != self.input_shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.input_shape))}), got {tuple(x.shape)}")
        return _of_root_length(self.linear(self.convolutions(x)))

    def code(self, y: Tensor) -> Tensor:
        """What a caption says, shape ``(B, D)``, each row of the length √D, for word numbers ``(B, L)``."""
        return _of_root_length(self.codes[y].sum(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits that the i-th of B images belongs to the j-th of M captions, shape ``(B, M)``."""
        return self.log_scale.exp() / self.codes.shape[1] * self.features(x) @ self.code(y).T


def _of_root_length(v: Tensor) -> Tensor:
    """Rows scaled to the length √D, so that a number of them is about 1."""
    return F.normalize(v, dim=1) * v.shape[1] ** 0.5
