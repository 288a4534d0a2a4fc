"""Action `card`: the model card beside every selected model's weights, a projection of the summary.

It is written anew by every run and is no output of the stage that made the weights: what is registered and how the gate
decided is known later, and the record's check of its files must not fail for it.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from components.reporting.model_card import Source, adapter_card, run_card
from components.reporting.schema import FinetuneSummary, RunSummary, shown_models
from components.storage import storage_errors, write_atomic
from pipelines.driver import RunState

CARD = "README.md"
_HUB_CACHE = re.compile(r"models--([A-Za-z0-9][\w.-]*)--([A-Za-z0-9][\w.-]*)")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def write_cards(run: RunState, summary: RunSummary) -> list[Path]:
    """Write `README.md` into the directory of each model's selected form and of its exported adapter; their paths. One that an
    earlier run wrote beside weights that are selected no more is taken away: what it says of them does not hold. Raises
    StorageError."""
    cards: dict[Path, str] = {}
    others: set[Path] = set()
    for entry in shown_models(summary):
        others |= {Path(str(directory)) / CARD for directory in entry.get("fused", {}).values()}
        others |= {Path(entry["adapter"]["path"]) / CARD} if "adapter" in entry else set()
        cards |= _cards(run, summary, entry)
    for path in others - cards.keys():
        with storage_errors(path):
            path.unlink(missing_ok=True)
    for path, card in cards.items():
        with storage_errors(path):
            write_atomic(path, card)
    return list(cards)


def _cards(run: RunState, summary: RunSummary, entry: FinetuneSummary) -> dict[Path, str]:
    """Of one model; none where it failed or nothing is selected."""
    form = entry.get("selected")
    directory = dict(entry.get("fused", {})).get(form) if form else None
    if entry["status"] != "done" or directory is None:
        return {}
    members = run.config.members(entry["name"])
    sources = [_source("aligned", run.config.aligned), *(_source(one.name, one.path) for one in members)]
    factors = run.config.mask.track == "factors"
    cards = {Path(str(directory)) / CARD: run_card(summary, entry, sources, adapter=factors)}
    if "adapter" in entry:
        cards[Path(entry["adapter"]["path"]) / CARD] = adapter_card(summary, entry, sources)
    return cards


def _source(role: str, path: Path) -> Source:
    """What is known of an input: its id on the hub where it lies in a cache of it, and the license that its card names."""
    cached = next((found for part in path.resolve().parts if (found := _HUB_CACHE.fullmatch(part))), None)
    return Source(role, path.name, f"{cached[1]}/{cached[2]}" if cached else None, _license(path / CARD))


def _license(card: Path) -> str | None:
    try:
        front = _FRONT.match(card.read_text(encoding="utf-8"))
        told = yaml.safe_load(front[1]) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # no card, or none that a hub would read either
        return None
    found = told.get("license") if isinstance(told, dict) else None
    return found if isinstance(found, str) else None
