"""Noise schedules: β_t, α_t = 1 - β_t, ᾱ_t = α_1 … α_t and what follows from them.

Tables are float64 on the CPU and have T+1 entries: index 0 is the clean image (β_0 = 0, ᾱ_0 = 1), so that
``schedule.alpha_bar[t]`` is the ᾱ_t of the page. Roots and quotients are taken in float64 and only the
results are cast to the dtype of the data: 1 - ᾱ_1 = 1e-4 would be lost in bfloat16, and with it all noise of
the first steps.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

# A chain that keeps more signal than this at t = T does not end at N(0, I).
MAX_ALPHA_BAR_T = 0.01


class NoiseSchedule:
    """The numbers of one forward process, nothing else.

    Args:
        beta: the variances β_1, …, β_T, shape ``(T,)``, each inside (0, 1).

    Attributes:
        T: number of steps.
        beta: β_t, float64, shape ``(T+1,)``, ``beta[0] = 0``, :eq:`def-forward-step`.
        alpha: α_t = 1 - β_t, shape ``(T+1,)``.
        alpha_bar: ᾱ_t = ∏_{s≤t} α_s, shape ``(T+1,)``, ``alpha_bar[0] = 1``, :eq:`def-alpha-bar`.

    Raises:
        ValueError: ``beta`` is not a non-empty vector of numbers inside (0, 1).

    Warns:
        UserWarning: more than 1 % of the signal's variance is left at T (ᾱ_T > 0.01). The usual slip is to
            change T and keep the β of another T.
    """

    def __init__(self, beta: Tensor) -> None:
        beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu")
        if beta.ndim != 1 or len(beta) == 0:
            raise ValueError(f"beta must be a vector of at least one number, got shape {tuple(beta.shape)}")
        outside = ~((beta > 0) & (beta < 1))  # written so that NaN counts as outside
        if outside.any():
            t = int(outside.nonzero()[0, 0]) + 1
            raise ValueError(f"every beta_t must lie inside (0, 1), but beta_{t} = {beta[t - 1].item():g}")
        self.T = len(beta)
        self.beta = torch.cat([torch.zeros(1, dtype=torch.float64), beta])
        self.alpha = 1 - self.beta
        self.alpha_bar = torch.cumprod(self.alpha, dim=0)
        self._cast: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        left = self.alpha_bar[-1].item()
        if left > MAX_ALPHA_BAR_T:
            warnings.warn(
                f"alpha_bar_T = {left:.3g} at T = {self.T}: x_T is far from N(0, I). "
                "When T is changed, beta has to be rescaled with it.",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        return f"NoiseSchedule(T={self.T}, alpha_bar_T={self.alpha_bar[-1].item():.3g})"

    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 - ᾱ_t), shape ``(T+1,)``; infinite at t = 0, :eq:`def-snr`."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def log_snr(self) -> Tensor:
        """Natural logarithm of :meth:`snr`, shape ``(T+1,)``, :eq:`def-snr`."""
        return torch.log(self.alpha_bar) - torch.log1p(-self.alpha_bar)

    @property
    def posterior_variance(self) -> Tensor:
        """β̃_t = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) · β_t, :eq:`eq-posterior-variance`; shape ``(T+1,)``, β̃_0 = β̃_1 = 0."""
        table = torch.zeros_like(self.beta)
        table[1:] = (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:]) * self.beta[1:]
        return table

    # The coefficients that the equations of the book ask for, by name.
    @property
    def sqrt_alpha(self) -> Tensor:
        """√α_t, shape ``(T+1,)``."""
        return self.alpha.sqrt()

    @property
    def sqrt_beta(self) -> Tensor:
        """√β_t, shape ``(T+1,)``."""
        return self.beta.sqrt()

    @property
    def sqrt_alpha_bar(self) -> Tensor:
        """√ᾱ_t, shape ``(T+1,)``."""
        return self.alpha_bar.sqrt()

    @property
    def sqrt_one_minus_alpha_bar(self) -> Tensor:
        """√(1 - ᾱ_t), shape ``(T+1,)``."""
        return (1 - self.alpha_bar).sqrt()

    @property
    def posterior_mean_x_0(self) -> Tensor:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0), √ᾱ_{t-1} β_t / (1 - ᾱ_t), :eq:`eq-posterior-mean`."""
        table = torch.zeros_like(self.beta)
        table[1:] = self.alpha_bar[:-1].sqrt() * self.beta[1:] / (1 - self.alpha_bar[1:])
        return table

    @property
    def posterior_mean_x_t(self) -> Tensor:
        """Weight of x_t in that mean, √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t), :eq:`eq-posterior-mean`."""
        table = torch.ones_like(self.beta)
        table[1:] = self.alpha[1:].sqrt() * (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:])
        return table

    def at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Look up a table at the times ``t``, ready to multiply ``x``.

        Args:
            name: a table of this class, for example ``"sqrt_alpha_bar"``.
            t: times 1…T, int64, shape ``(B,)``, checked by :func:`check_time`.
            x: the data to multiply, shape ``(B, …)``, float32 or float64.

        Returns:
            The entries in the dtype and on the device of ``x``, shape ``(B, 1, …, 1)``.
        """
        key = (name, x.dtype, x.device)
        if key not in self._cast:  # computed in float64, cast once: a table on the CPU would stall a GPU
            self._cast[key] = getattr(self, name).to(dtype=x.dtype, device=x.device)
        return self._cast[key][t].reshape(-1, *[1] * (x.ndim - 1))


def linear_schedule(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """β_t that grows linearly from ``beta_start`` at t = 1 to ``beta_end`` at t = T, :eq:`def-linear-schedule`.

    Source: Ho et al. (2020), section 4.

    Raises:
        ValueError: T < 1, or not 0 < beta_start ≤ beta_end < 1.
    """
    _check_steps(T)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"need 0 < beta_start <= beta_end < 1, got beta_start = {beta_start} and beta_end = {beta_end}"
        )
    return NoiseSchedule(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))


def cosine_schedule(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """ᾱ_t that falls like a squared cosine, β_t cut at ``max_beta``, :eq:`def-cosine-schedule`.

    Source: Nichol & Dhariwal (2021), eq. 17.

    Raises:
        ValueError: T < 1, s < 0, or max_beta outside (0, 1).
    """
    _check_steps(T)
    if not s >= 0:
        raise ValueError(f"the offset s must not be negative, got {s}")
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta must lie inside (0, 1), got {max_beta}")
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    return NoiseSchedule((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def check_time(t: Tensor | int, x: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return ``t`` as an int64 tensor ``(B,)`` on the device of ``x``; a plain int stands for the whole batch.

    The values are checked where that costs nothing, on the CPU: on a GPU a look at them would make the host
    wait at every training step.

    Raises:
        ValueError: wrong shape or dtype, or a value outside 1…T.
    """
    if isinstance(t, int) and not isinstance(t, bool):
        if not 1 <= t <= schedule.T:
            raise ValueError(f"t must lie in 1…{schedule.T}, got {t}")
        return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
    if not isinstance(t, Tensor) or t.dtype != torch.int64:
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"t must be an int64 tensor of shape (B,), got {kind}")
    if t.shape != (len(x),):
        raise ValueError(f"t must have shape ({len(x)},), one time a sample, got {tuple(t.shape)}")
    if t.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (t < 1) | (t > schedule.T)
        if outside.any():
            raise ValueError(f"t must lie in 1…{schedule.T}, got {t[outside][0].item()}")
    return t.to(x.device)


def _check_steps(T: int) -> None:
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"T must be a whole number of at least 1, got {T!r}")
