"""What a run was asked to do, in a few lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.reporting.schema import RunSummary

_SHOWN = 12
"""Names in a line; the rest is counted."""
_MASK = (
    "preset",
    "track",
    "granularity",
    "steps",
    "batch_size",
    "learning_rate",
    "loss",
    "anchor_weight",
    "dtype",
    "seed",
)
_FUSION = ("controls", "select", "max_asr", "adapter", "tuned")
"""Of the settings those that say most; `asked` in summary.json has all."""


def asked_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """(what, in words); nothing of a summary that does not say."""
    asked = summary.get("asked")
    if asked is None:
        return []
    found = [("mode", _mode(asked)), ("aligned model", str(asked["aligned"])), ("finetunes", _finetunes(asked))]
    for split, said in (("test", "test sets"), ("dev", "dev sets (they choose, and are not reported)")):
        found.append((said, _sets(asked["sets"], split)))
    if "capability" in asked:
        found.append(("capability tasks", _names([task["task"] for task in asked["capability"]["tasks"]])))
    found += [("judge", in_words(asked["judge"])), ("answers", in_words(asked["evaluation"]))]
    found += [("mask", in_words(_some(asked["mask"], _MASK))), ("fusion", in_words(_some(asked["fusion"], _FUSION)))]
    if "landscape" in asked:
        scans = asked["landscape"].get("scans", [])
        found.append(("landscape", _names([str(scan.get("name", "")) for scan in scans]) or "as by default"))
    found.append(("gate", "; ".join(asked["gate"]) or "none"))
    return [(what, said) for what, said in found if said]


def _some(settings: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: settings[key] for key in keys if key in settings}


def in_words(value: Any) -> str:
    """A setting, or settings, as `name value, name value`; what is not set is left out."""
    if isinstance(value, Mapping):
        parts = [(key.replace("_", " "), in_words(one)) for key, one in value.items()]
        return ", ".join(f"{key} ({said})" if ", " in said else f"{key} {said}" for key, said in parts if said)
    if isinstance(value, list | tuple):
        return " and ".join(said for one in value if (said := in_words(one)))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _mode(asked: Mapping[str, Any]) -> str:
    if asked["mode"] == "each":
        lent = ", ".join(f"{name} with the mask of {owner}" for name, owner in asked.get("mask_of", {}).items())
        return "every finetune by itself" + (f"; {lent}" if lent else "")
    return "merged under one mask: " + "; ".join(f"{n} ({in_words(m)})" for n, m in asked.get("merges", {}).items())


def _finetunes(asked: Mapping[str, Any]) -> str:
    kinds: dict[str, list[str]] = {}
    for name, kind in asked["finetunes"].items():
        kinds.setdefault(kind, []).append(name)
    return "; ".join(f"{_names(names)} ({kind})" for kind, names in kinds.items())


def _sets(sets: Mapping[str, Mapping[str, Any]], split: str) -> str:
    kinds: dict[str, list[str]] = {}
    for name, one in sets.items():
        if name.partition(" ")[0] == split:
            limit = f", the first {one['limit']}" if one.get("limit") else ""
            alone = "" if one["counts"] else ", by itself"
            attack = f", attack {one['attack']['kind']}" if "attack" in one else ""
            kinds.setdefault(str(one["kind"]), []).append(name.partition(" ")[2] + attack + limit + alone)
    return "; ".join(f"{kind}: {_names(names)}" for kind, names in kinds.items())


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
