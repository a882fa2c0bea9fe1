"""The named small classifier, in whose features Fréchet distances are measured."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
