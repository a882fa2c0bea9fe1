"""The code behind the book: schedules, exact Gaussian worlds, diffusion, sampling, data.

Read the modules in this order; each imports only from those before it::

    schedule → gaussian → diffusion → sampling → data → unet → classifier → recipes → weights → processes
    → runs → training → planning → evaluation → figures → notebook → bench
    → exchange → cli

Conventions that hold everywhere:

- Images are float32 tensors of shape ``(B, C, H, W)`` with values in [-1, 1].
- Time is an int64 tensor ``t`` of shape ``(B,)`` with values in 1, …, T; index 0 is clean data.
- Tables of a schedule have T+1 entries, so ``schedule.alpha_bar[t]`` is the ᾱ_t of the page.
- ``N(mean, variance)``: the second argument is always a variance.
- A *denoiser* is a callable ``model(x_t, t) -> eps``.
"""

__version__ = "0.1.0"
