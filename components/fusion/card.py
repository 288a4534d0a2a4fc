"""The model card of a fused model: hub metadata, and in words what was fused how, by which record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components.fusion.recipe import Recipe
from components.records import RECORD_FILE

_HUB_ID = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@[\w./-]+)?")
_PATTERNS = 4


def model_card(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """README.md for a directory of weights. Local paths stay out of the metadata, which a hub would take for ids."""
    references = [recipe.aligned, *recipe.finetunes.values()]
    ids = [found[1] for one in references if not Path(one).exists() and (found := _HUB_ID.fullmatch(one))]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "realign"]}
    if ids:
        front |= {"base_model": ids, "base_model_relation": "merge"}
    rows = [("aligned", recipe.aligned), *recipe.finetunes.items()]
    others = {"unaligned": recipe.unaligned, "safe": recipe.safe, "mask": recipe.mask and str(recipe.mask)}
    rows += [(role, one) for role, one in others.items() if one]
    settings = _settings(recipe)
    return "\n".join([
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "# Fused model",
        "",
        f"Made by {_called(recipe)} ({', '.join(record['papers'])}) of:",
        "",
        "| model | is |",
        "|---|---|",
        *(f"| {_cell(name)} | `{_cell(_shown(reference))}` |" for name, reference in rows),
        "",
        *([f"Settings: {settings}.", ""] if settings else []),
        *([f"The tokenizer is that of `{record['tokenizer']}`.", ""] if record["tokenizer"] else []),
        f"{record['parameters']:,} parameters in {', '.join(record['output_dtypes'])}; "
        f"{len(record['unchanged_tensors'])} of {record['tensors']} tensors are the aligned model's, bit for bit.",
        "",
        *([*(f"- {note}" for note in record["notes"]), ""] if record["notes"] else []),
        f"`{RECORD_FILE}` (fingerprint {record['fingerprint']}) says exactly what was read and with which settings.",
        "",
    ])  # fmt: skip


def _called(recipe: Recipe) -> str:
    return recipe.method.replace("_", " ")


def _shown(reference: str) -> str:
    """A local path's last part: the rest says where somebody's files lie."""
    return Path(reference).name if Path(reference).exists() else reference


def _settings(recipe: Recipe) -> str:
    """What is not at its default."""
    found: dict[str, Any] = {}
    for part in (recipe.merge, recipe.fusion):
        if part is not None:
            found |= part.model_dump(mode="json", exclude_defaults=True, exclude={"method", "max_shard_bytes"})
    if recipe.merge is not None and recipe.fusion.method == "interpolation":
        found.pop("alpha", None)
    return ", ".join(f"{key.replace('_', ' ')} {_in_words(value)}" for key, value in found.items())


def _in_words(value: Any) -> str:
    """A number, or numbers by finetune or pattern; of many patterns the first."""
    if isinstance(value, dict):
        return " and ".join(f"{_in_words(one)} ({name})" for name, one in value.items())
    if isinstance(value, list):
        shown = ", ".join(f"{number:g} for `{pattern}`" for pattern, number in value[:_PATTERNS])
        return shown + (f" and {len(value) - _PATTERNS} more in {RECORD_FILE}" if len(value) > _PATTERNS else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
