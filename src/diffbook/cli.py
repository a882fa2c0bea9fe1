"""The command ``diffbook``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

import diffbook
from diffbook.data import IMAGE_SETS, TOY_SETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it succeeded; 1 after an error, which is told in one line; 2 for arguments that argparse refuses.
    """
    options = _parser().parse_args(arguments)
    try:
        result = options.command(options)
    except (ValueError, OSError) as error:
        print(f"diffbook: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("diffbook: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:10} {value}")
    return 0


def data(options: argparse.Namespace) -> dict[str, object]:
    """Fetch a data set if need be, check it, and describe it."""
    device = _device(options.device)
    if options.name in IMAGE_SETS:
        images = IMAGE_SETS[options.name](*([] if options.name == "digits" else [options.split])).to(device)
        x = images.x()
        counts = dict(zip(images.classes, images.labels.bincount().tolist(), strict=True))
        result: dict[str, object] = {"name": options.name, "shape": list(x.shape), "classes": counts}
    elif options.name in TOY_SETS:
        generator = torch.Generator().manual_seed(options.seed)
        x = TOY_SETS[options.name](10_000, generator=generator).to(device)
        result = {"name": options.name, "shape": list(x.shape)}
    else:
        raise ValueError(f"unknown data set {options.name!r}; there are {', '.join([*IMAGE_SETS, *TOY_SETS])}")
    return result | {
        "min": round(x.min().item(), 4),
        "max": round(x.max().item(), 4),
        "mean": round(x.mean().item(), 4),
        "variance": round(x.var(correction=0).item(), 4),
    }


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # CUDA raises either, depending on how torch was built
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); try --device cpu") from error
    return device


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    common.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    common.add_argument("--json", action="store_true", help="print one JSON object, for programs")

    parser = argparse.ArgumentParser(prog="diffbook", description="The code behind the book, as commands.")
    parser.add_argument("--version", action="version", version=f"diffbook {diffbook.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("data", parents=[common], help="fetch, check and describe a data set")
    p.add_argument("name", metavar="NAME", help=f"one of {', '.join([*IMAGE_SETS, *TOY_SETS])}")
    p.add_argument("--split", default="train", help="train or test (default: train)")
    p.set_defaults(command=data)
    return parser


if __name__ == "__main__":
    sys.exit(main())
