"""Write the tables of the page "Full-size training": what was trained on what, what the recipes for a GPU will cost.

    python tools/full_size.py

The first comes from the model cards that lie beside the weights, the second is counted from the recipes. Run it when
weights or recipes have changed; a test holds page, cards and recipes together.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from diffbook.planning import megaflops, memory
from diffbook.recipes import RECIPES, Recipe
from diffbook.weights import model_card, write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book" / "full-size-training.md"
CARDS = sorted((ROOT / "src" / "diffbook" / "assets" / "weights").glob("*.json"))
ON_GPU = [name for name in RECIPES if name.endswith("-gpu")]
# how a model's quality is named, and in which field of its card it stands; the first that is there counts
QUALITY = {
    "frechet_distance": "Fréchet distance {:.2f}",
    "psnr": "{:.1f} dB",
    "accuracy": "{:.1%} right",
    "top_1": "{:.0%} first of 100",
}


def quality(card: dict[str, Any]) -> str:
    """What is measured of a model, in a few words."""
    for name, text in QUALITY.items():
        for result in card.get("quality", []):
            value = result.get(name)
            value = value["share"] if isinstance(value, dict) else value  # it comes with the bounds of its interval
            if isinstance(value, float):  # of a composition there are many
                return text.format(value)
    return ""


def trained() -> str:
    """A row for each model of the package, from its card."""
    rows = []
    for path in CARDS:
        card = model_card(path.stem)
        rows.append(
            f"| `{path.stem}` | {quality(card)} | {card['cpu_seconds'] / 60:.0f} | "
            f"{card['images'] / 1e6:.1f} | {card['parameters'] / 1e6:.1f} |"
        )
    head = "| model | measured | core-minutes | images, M | parameters, M |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows)


def planned() -> str:
    """A row for each recipe for a GPU: counted and estimated, not measured."""
    rows = []
    for name in ON_GPU:
        recipe = RECIPES[name]
        work, parameters = megaflops(recipe), sum(p.numel() for p in recipe.build().parameters())
        rows.append(
            f"| `{name}` | {parameters / 1e6:.1f} | {work / 1e3:.1f} | {recipe.images / 1e6:.0f} | "
            f"{steps(recipe):,} | {work * recipe.images / 1e9:,.0f} | {memory(recipe) / 1024:.1f} |"
        )
    head = (
        "| recipe | parameters, M | GFLOP an image | images, M | steps | PFLOP in all | GiB |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows)


def steps(recipe: Recipe) -> int:
    """Steps of the optimizer in a whole run."""
    return math.ceil(recipe.images / recipe.batch)


def blocks() -> dict[str, str]:
    """What stands between the marks of the page."""
    return {"trained": trained(), "planned": planned()}


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, text in blocks().items():
        marked = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        page = marked.sub(lambda _, n=name, t=text: f"<!-- {n} -->\n\n{t}\n\n<!-- /{n} -->", page)  # type: ignore[misc]
    write_atomically(PAGE, page.encode())


if __name__ == "__main__":
    main()
