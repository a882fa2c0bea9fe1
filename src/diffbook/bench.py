"""Speed, measured against other libraries: the same work, in turn, on this machine.

``diffbook bench`` trains and calls networks of the same architecture (that of Ho et al. 2020) as three libraries write
it: this package, 🤗 diffusers, and denoising-diffusion-pytorch; the latter two come with the extra ``bench``. Each
contestant's training step is what its own users run: its noise schedule, loss and moving average; and for all the same
AdamW and bound on the gradient. Parameters and floating-point operations must agree within 10 %; what differs more is
not compared.

Timings are taken in rounds, in each of which every contestant has its turn, and reported as medians; ratios are taken
within a round, so that what slows the machine down for a while slows all of them. The peak of the machine, by a product
of large matrices, is measured in the same rounds.
"""

from __future__ import annotations

import contextlib
import copy
import re
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from diffbook.planning import flops
from diffbook.processes import Processes
from diffbook.recipes import Unconditional
from diffbook.sampling import ddim_sample, ddpm_sample, dpmpp_2m_sample, timesteps
from diffbook.schedule import linear_schedule
from diffbook.training import State, compile_network, take_step

WIDTHS, SIZE, LR, EMA = (32, 64, 128), 28, 1e-3, 0.999
RECIPE = Unconditional(
    name="bench",
    about="what is compared",
    network="UNet",
    options={"channels": 1, "widths": list(WIDTHS), "blocks": 1, "attention": [1, 2]},
    schedule="linear",
    predicts="eps",
    images=10**9,
    batch=64,
    lr=LR,
    ema=EMA,
)
STEPS, TOLERANCE, MATRIX = 100, 0.1, 1536
STATUS = Path("/proc/self/status")


def _channels_last(device: torch.device, bfloat16: bool) -> bool:
    """Which layout is the faster one for us, as a recipe would choose it."""
    return not (bfloat16 and device.type == "cpu")


class Ours:
    """This package: the training step is :func:`diffbook.training.take_step`."""

    def __init__(self, device: torch.device, bfloat16: bool) -> None:
        recipe = replace(RECIPE, channels_last=_channels_last(device, bfloat16))
        self.state = State(recipe, Processes(device))
        self.network, self.state.autocast = self.state.network, bfloat16

    def step(self, x_0: Tensor) -> None:
        take_step(self.state, x_0, torch.zeros(len(x_0), dtype=torch.int64, device=x_0.device))

    def call(self, x_t: Tensor, t: Tensor) -> Tensor:
        predicted: Tensor = self.network(x_t, t)
        return predicted


class Peer(ABC):
    """A library's network and loss, with the optimizer step that its examples have."""

    network: nn.Module
    loss: Callable[[Tensor], Tensor]
    average: Callable[[], None]

    def __init__(self, device: torch.device, bfloat16: bool) -> None:
        self.device, self.bfloat16 = device, bfloat16
        self.build()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LR, fused=True)  # as ours has it

    @abstractmethod
    def build(self) -> None:
        """Set ``network``, ``loss`` and ``average``."""

    def step(self, x_0: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, self.bfloat16):
            loss = self.loss(x_0)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()
        loss.item()  # ours looks at the loss in every step

    def call(self, x_t: Tensor, t: Tensor) -> Tensor:
        predicted: Tensor = self.network(x_t, t - 1)
        return predicted


class Diffusers(Peer):
    """🤗 diffusers, as in its example of unconditional training."""

    def build(self) -> None:
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        network: Any = UNet2DModel(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            block_out_channels=WIDTHS,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=None,
        )
        self.network = network.to(self.device)
        scheduler: Any = DDPMScheduler(1000)
        average = EMAModel(self.network.parameters(), decay=EMA, use_ema_warmup=True)

        def loss(x_0: Tensor) -> Tensor:
            eps = torch.randn_like(x_0)
            t = torch.randint(0, 1000, (len(x_0),), device=x_0.device)
            return F.mse_loss(self.network(scheduler.add_noise(x_0, eps, t), t).sample, eps)

        self.loss, self.average = loss, lambda: average.step(self.network.parameters())

    def call(self, x_t: Tensor, t: Tensor) -> Tensor:
        predicted: Tensor = self.network(x_t, t - 1).sample
        return predicted


class DenoisingDiffusionPytorch(Peer):
    """denoising-diffusion-pytorch, as in its README."""

    def build(self) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA as Average

        unet = Unet(dim=WIDTHS[0], dim_mults=(1, 2, 4), channels=1, flash_attn=False)
        self.network = unet.to(self.device)
        process = GaussianDiffusion(unet, image_size=SIZE, objective="pred_noise", auto_normalize=False).to(self.device)
        average = Average(process, beta=EMA, update_every=10).to(self.device)
        self.loss, self.average = process, average.update


CONTESTANTS: dict[str, type[Ours] | type[Peer]] = {
    "diffbook": Ours,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": DenoisingDiffusionPytorch,
}
MODULES = {"diffusers": "diffusers", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}


def images(batch: int, device: torch.device) -> Tensor:
    """Noise of the shape of the images; zeros would be computed faster on some hardware."""
    return torch.rand((batch, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1


def work(network: nn.Module) -> tuple[int, float]:
    """Parameters of a network, and operations an image forward and backward, in millions."""
    network = copy.deepcopy(network).cpu()
    x, t = images(1, torch.device("cpu")), torch.ones(1, dtype=torch.int64)

    def forward_and_backward() -> None:
        predicted = network(x, t)
        getattr(predicted, "sample", predicted).square().mean().backward()

    return sum(p.numel() for p in network.parameters()), flops(forward_and_backward) / 1e6


def check_matched(costs: dict[str, tuple[int, float]]) -> None:
    """Refuse a comparison of different amounts of work.

    Raises:
        ValueError: parameters or operations of a contestant differ from ours by more than 10 %.
    """
    ours = costs["diffbook"]
    for name, cost in costs.items():
        for what, a, b in zip(("parameters", "operations"), ours, cost, strict=True):
            if abs(b / a - 1) > TOLERANCE:
                raise ValueError(f"not comparable: {name} has {b / a:.2f} times our {what}; its network has changed")


def present() -> tuple[list[str], list[str]]:
    """Which contestants can be imported, with all that they need, and which cannot."""
    here = [name for name in CONTESTANTS if name not in MODULES or _imports(MODULES[name])]
    return here, [name for name in CONTESTANTS if name not in here]


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:  # of the library, or of something that it should have brought
        return False
    return True


def in_turn(jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds that each job takes, in rounds in which all have their turn; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # nobody always comes after the same one
            _wait(device)
            start = time.perf_counter()
            jobs[name]()
            _wait(device)
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """How many times faster b is than a: median, and the middle half, of the ratios within the rounds."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": _short(middle), "low": _short(low), "high": _short(high)}


def matrix_product(device: torch.device, bfloat16: bool) -> tuple[Callable[[], object], float]:
    """A product of two large matrices, and its operations: what the machine can do at most."""
    n = MATRIX if device.type == "cpu" else 8192
    a, b = (torch.randn((n, n), device=device, dtype=torch.bfloat16 if bfloat16 else None) for _ in range(2))
    return lambda: a @ b, 2.0 * n**3


def compare(
    device: torch.device, rounds: int = 9, batch: int = 64, bfloat16: bool = False, compiled: bool = False
) -> dict[str, Any]:
    """Training steps and network calls of all contestants that are installed.

    Args:
        batch: images a step.
        bfloat16: under autocast; what is small or sensitive stays float32.
        compiled: networks by ``torch.compile``.

    Returns:
        for each contestant its ``images_per_second`` in training and in calls of the network, ``gigaflops``,
        ``share_of_peak``, ``peak_mebibytes`` (not if compiled), and the ``ratio`` of ours to it; what is ``missing``.

    Raises:
        ValueError: the networks are not comparable, see :func:`check_matched`.
    """
    here, missing = present()
    contestants = {name: CONTESTANTS[name](device, bfloat16) for name in here}
    costs = {name: work(contestant.network) for name, contestant in contestants.items()}
    check_matched(costs)
    x, t = (
        images(batch, device),
        torch.randint(1, 1001, (batch,), generator=torch.Generator().manual_seed(0)).to(device),
    )
    for contestant in contestants.values() if compiled else ():
        compile_network(contestant.network)
    product, operations = matrix_product(device, bfloat16)
    steps: dict[str, Callable[[], object]] = {n: _bind(c.step, x) for n, c in contestants.items()}
    training = in_turn(steps | {"product": product}, rounds, device)
    for contestant in contestants.values():
        contestant.network.eval()
    calls = in_turn({n: _call(c, x, t, bfloat16) for n, c in contestants.items()}, rounds, device)
    peak = operations / statistics.median(training["product"]) / 1e9
    rows = {}
    for name, (parameters, megaflops) in costs.items():
        gigaflops = batch * megaflops / statistics.median(training[name]) / 1e3
        rows[name] = {
            "parameters": parameters,
            "megaflops_per_image": round(megaflops, 1),
            "training": _short(batch / statistics.median(training[name])),
            "training_ratio": ratio(training[name], training["diffbook"]),
            "gigaflops": _short(gigaflops),
            "share_of_peak": _short(gigaflops / peak),
            "call": _short(batch / statistics.median(calls[name])),
            "call_ratio": ratio(calls[name], calls["diffbook"]),
            # measured in a process of its own, which does not compile
            "peak_mebibytes": None if compiled else peak_memory(name, device, batch, bfloat16),
        }
    about = {"device": device.type, "threads": torch.get_num_threads(), "batch": batch, "rounds": rounds}
    about |= {"precision": "bfloat16" if bfloat16 else "float32", "compiled": compiled, "torch": torch.__version__}
    return {"about": about, "peak_gigaflops": _short(peak), "contestants": rows, "missing": missing}


def _bind(step: Callable[[Tensor], None], x: Tensor) -> Callable[[], None]:
    return lambda: step(x)


def _call(contestant: Ours | Peer, x: Tensor, t: Tensor, bfloat16: bool) -> Callable[[], object]:
    """A call of the network as a sampler makes it."""

    @torch.no_grad()
    def call() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, bfloat16):
            return contestant.call(x, t)

    return call


def overhead(device: torch.device, rounds: int = 9) -> dict[str, dict[str, Any]]:
    """Milliseconds that a step of a sampler takes besides the network, ours and those of diffusers.

    The network is the identity times a number, on one image of 28×28; both walk the same number of steps.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    schedule, times, x = linear_schedule(), timesteps(1000, STEPS), images(1, device)
    betas = schedule.beta[1:].float().numpy()

    def model(x_t: Tensor, t: Tensor | int) -> Tensor:
        return x_t * 0.1

    def walk(scheduler: Any) -> Callable[[], object]:
        def run() -> Tensor:
            scheduler.set_timesteps(STEPS, device=device)
            x_t = x
            for t in scheduler.timesteps:
                x_t = scheduler.step(model(x_t, t), t, x_t).prev_sample
            return x_t

        return run

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "DDPM": (
            lambda: ddpm_sample(model, x, schedule, times),
            walk(DDPMScheduler(trained_betas=betas, clip_sample=False)),
        ),
        "DDIM": (
            lambda: ddim_sample(model, x, schedule, times),
            walk(DDIMScheduler(trained_betas=betas, clip_sample=False)),
        ),
        "DPM-Solver++(2M)": (
            lambda: dpmpp_2m_sample(model, x, schedule, times),
            walk(DPMSolverMultistepScheduler(trained_betas=betas)),
        ),
    }
    rows = {}
    for name, (ours, theirs) in pairs.items():
        seconds = in_turn({"ours": ours, "theirs": theirs}, rounds, device)
        rows[name] = {
            "diffbook": _short(1e3 * statistics.median(seconds["ours"]) / STEPS),
            "diffusers": _short(1e3 * statistics.median(seconds["theirs"]) / STEPS),
            "ratio": ratio(seconds["theirs"], seconds["ours"]),
        }
    return rows


def tricks(device: torch.device, rounds: int = 9, batch: int = 64) -> dict[str, dict[str, Any]]:
    """What each trick brings: our training step with all that is always on, without one, and with one more.

    Returns:
        for each trick ``about``, and ``gain``, how many times faster the step is with it.
    """
    variants: dict[str, tuple[str, Callable[[State], Callable[[Tensor], object]]]] = {
        "channels_last": ("channels beside each other in memory", _contiguous),
        "attention": ("attention as one fused kernel", _attention_as_products),
        "optimizer": ("AdamW as one fused kernel", _optimizer_tensor_by_tensor),
        "average": ("the moving average of all tensors at once", _average_tensor_by_tensor),
        "resident": ("the data on the device, as bytes", _from_a_loader),
    }
    more = {
        "bfloat16": ("bfloat16 where it is safe", _in_bfloat16),
        "compile": ("torch.compile", _compiled),
    }
    data = torch.randint(0, 256, (4096, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    there, order = data.to(device), torch.randperm(len(data))[:batch]

    def job(change: Callable[[State], Callable[[Tensor], object]]) -> Callable[[], object]:
        state = State(RECIPE, Processes(device))
        step = change(state)
        if change is _from_a_loader:
            return lambda: step(next(iter(_loader(data[order], batch))).to(device))
        return lambda: step(there[order].float() / 127.5 - 1)

    jobs = {name: job(change) for name, (_, change) in (variants | more).items()} | {"all": job(_step_of)}
    seconds = in_turn(jobs, rounds, device)
    rows = {name: {"about": a, "gain": ratio(seconds[name], seconds["all"])} for name, (a, _) in variants.items()}
    return rows | {name: {"about": a, "gain": ratio(seconds["all"], seconds[name])} for name, (a, _) in more.items()}


def _step_of(state: State) -> Callable[[Tensor], object]:
    return lambda x: take_step(state, x, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def _contiguous(state: State) -> Callable[[Tensor], object]:
    state.network.to(memory_format=torch.contiguous_format)
    state.averaged.to(memory_format=torch.contiguous_format)
    return _step_of(state)


def _attention_as_products(state: State) -> Callable[[Tensor], object]:
    def step(x: Tensor) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            _step_of(state)(x)

    return step


def _optimizer_tensor_by_tensor(state: State) -> Callable[[Tensor], object]:
    state.optimizer = torch.optim.AdamW(state.network.parameters(), lr=LR, foreach=False, fused=False)
    return _step_of(state)


def _average_tensor_by_tensor(state: State) -> Callable[[Tensor], object]:
    def one_by_one(averaged: list[Tensor], network: list[Tensor], weight: float) -> None:
        for a, b in zip(averaged, network, strict=True):
            a.lerp_(b, weight)

    def step(x: Tensor) -> None:
        with patch.object(torch, "_foreach_lerp_", one_by_one):
            _step_of(state)(x)

    return step


def _from_a_loader(state: State) -> Callable[[Tensor], object]:
    return _step_of(state)


def _loader(data: Tensor, batch: int) -> DataLoader[Tensor]:
    """Images one at a time, converted and put together into a batch: the usual way."""
    return DataLoader([image.float() / 127.5 - 1 for image in data], batch_size=batch)  # type: ignore[arg-type]


def _in_bfloat16(state: State) -> Callable[[Tensor], object]:
    state.autocast = True
    return _step_of(state) if _channels_last(state.device, True) else _contiguous(state)


def _compiled(state: State) -> Callable[[Tensor], object]:
    compile_network(state.network)
    return _step_of(state)


def table(result: dict[str, Any]) -> str:
    """What :func:`compare`, :func:`overhead` and :func:`tricks` return, as lines for people."""
    lines = _contestants(result) if "contestants" in result else []
    for name, row in result.get("overhead", {}).items():
        ours, theirs, times = row["diffbook"], row["diffusers"], row["ratio"]["median"]
        lines.append(f"{name:28} {ours:g} ms a step besides the network, diffusers {theirs:g} (×{times:g})")
    for row in result.get("tricks", {}).values():
        gain = row["gain"]
        lines.append(f"{row['about']:45} ×{gain['median']:g} ({gain['low']:g} to {gain['high']:g})")
    return "\n".join(lines)


def _contestants(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':28} {'training':>9} {'ours':>6} {'calls':>9} {'ours':>6} {'GFLOP/s':>8} {'peak':>5} {'MiB':>6}"]
    for name, row in result["contestants"].items():
        training, call = (f"×{row[key]['median']:g}" for key in ("training_ratio", "call_ratio"))
        lines.append(
            f"{name:28} {row['training']:9g} {training:>6} {row['call']:9g} {call:>6} {row['gigaflops']:8g} "
            f"{row['share_of_peak']:5.0%} {row['peak_mebibytes'] or '?':>6}"
        )
    about = result["about"]
    lines.append(
        f"images/s, batch {about['batch']}, {about['precision']}, {about['device']}, {about['threads']} threads, "
        f"medians of {about['rounds']} rounds; peak: {result['peak_gigaflops']:g} GFLOP/s in a product of matrices"
    )
    missing = result["missing"]
    return lines + [f"NOT MEASURED: {name} cannot be imported: pip install {name}" for name in missing]


def peak_memory(name: str, device: torch.device, batch: int, bfloat16: bool) -> int | None:
    """MiB that three training steps of a contestant add to a process of its own, weights included; None if unknown.

    On a CPU only Linux tells it.
    """
    if device.type != "cuda" and not STATUS.exists():
        return None
    command = [sys.executable, "-m", "diffbook.bench", name, str(device), str(batch), str(int(bfloat16))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return round(float(done.stdout.splitlines()[-1]))


def _print_peak(name: str, device: torch.device, batch: int, bfloat16: bool) -> None:
    """What :func:`peak_memory` runs. What was loaded and computed once before does not count."""
    x = images(batch, device)
    CONTESTANTS[name](device, bfloat16).step(x[:2])
    before = _peak(device, forget=True)
    contestant = CONTESTANTS[name](device, bfloat16)
    for _ in range(3):
        contestant.step(x)
    print(_peak(device) - before)


def _peak(device: torch.device, forget: bool = False) -> float:
    """Peak memory in MiB so far, or since it was forgotten; on Linux, or of a CUDA device."""
    if device.type == "cuda":
        if forget:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if forget:
        with contextlib.suppress(OSError):  # in some containers it must not be written; the import's peak is lower
            Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def _short(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    _print_peak(sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3]), bool(int(sys.argv[4])))
