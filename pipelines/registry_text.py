"""The registry in words, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from components.errors import TrackingError
from components.tracking import CHAMPION, EVALUATION_TAG, GATE_TAG, Registry, TrackingUnavailableError, Version
from components.tracking.names import CONFIG_TAG, FINDINGS_TAG, FORM_TAG, WEIGHTS_TAG
from components.tracking.promotions import Ledger, Service
from pipelines.promotion import Promoted

_HEADLINES = ("asr", "harmful", "over_refusal", "task")


@dataclass(frozen=True)
class Described:
    """A version and the headline rates of its last evaluation."""

    version: Version
    rates: dict[str, float]


@dataclass(frozen=True)
class DescribedModel:
    """A registered model: who is in service by its ledger, and versions, the newest first."""

    service: Service
    versions: list[Described]


def described(registry: Registry, name: str | None) -> dict[str, DescribedModel]:
    """Model -> all versions of one, or of every model those with an alias. Raises TrackingError."""
    names = registry.names() if name is None else [name]
    found = {}
    for one in names:
        versions = [version for version in registry.versions(one) if name is not None or version.aliases]
        shown = [Described(version, _rates(registry, version)) for version in versions]
        found[one] = DescribedModel(Ledger(registry, one).look(), shown)
    return found


def models_json(found: dict[str, DescribedModel]) -> str:
    """`[{"name", "champion", "previous", "aliases_are", "versions": [{"version", "aliases", "gate", "findings", …}]}]`: who is
    in service by the ledger, and whether the aliases say so (`written`, `pending`, `astray`)."""
    listed = [
        {
            "name": name,
            "champion": model.service.champion,
            "previous": model.service.previous,
            "aliases_are": model.service.aliases,
            "versions": [_object(one) for one in model.versions],
        }
        for name, model in found.items()
    ]
    return json.dumps(listed, indent=1, allow_nan=False)


def models_lines(found: dict[str, DescribedModel]) -> list[str]:
    """For a person: a line for each model, one where its aliases are not what the ledger says, one for each version, and one
    for where its weights lie."""
    if not found:
        return ["no models are registered here"]
    lines = []
    for name, model in found.items():
        lines.append(name if model.versions else f"{name}: no version has an alias")
        lines += _astray_lines(name, model.service)
        for one in model.versions:
            lines += _version_lines(one)
    return lines


def _astray_lines(name: str, service: Service) -> list[str]:
    if service.aliases == "written":
        return []
    if service.aliases == "pending":
        again = "rollback" if service.kind == "rollback" else "promote"
        return [
            f"  ! a {service.kind or 'promotion'} broke off: version {service.champion} is to be {CHAMPION}; "
            f"`realign {again} {name}` goes on with it"
        ]
    return [
        f"  ! version {service.champion} is in service, and the aliases were moved by hand or by a late promoter: the next "
        "promotion or rollback puts them back"
    ]


def promoted_line(done: Promoted) -> str:
    """What became of a promotion or rollback."""
    if not done.moved:
        return f"{done.version} is in service already ({CHAMPION})"
    before = done.service.previous
    return f"{done.version} is in service ({CHAMPION}); before it " + (
        "nothing was" if before is None else f"version {before} (previous)"
    )


def _version_lines(one: Described) -> Sequence[str]:
    version, tags = one.version, one.version.tags
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    if not version.ours:
        return [f"  version {version.number}{aliases}: registered by another tool"]
    rates = ", ".join(f"{name} {100 * value:.1f} %" for name, value in one.rates.items())
    gate = f"gate {tags.get(GATE_TAG, 'none')}"
    shut = [found for found in _findings(version) if not found["passed"]] if tags.get(GATE_TAG) == "shut" else []
    return [
        f"  version {version.number}{aliases}: {gate}; {rates or 'not measured'}; {tags.get(FORM_TAG, '?')}, "
        f"{_day(version)}",
        *(f"    ✗ {found['requirement']}: {found['reason']}" for found in shut),
        f"    {tags[WEIGHTS_TAG]}",
    ]


def _object(one: Described) -> dict[str, Any]:
    version, tags = one.version, one.version.tags
    return {
        "version": version.number,
        "aliases": list(version.aliases),
        "gate": tags.get(GATE_TAG),
        "findings": _findings(version),
        "rates": one.rates,
        "form": tags.get(FORM_TAG),
        "config": tags.get(CONFIG_TAG),
        "weights": tags.get(WEIGHTS_TAG),
        "sha256": tags.get("sha256"),
        "evaluation": tags.get(EVALUATION_TAG),
        "lineage": {
            key: value for key, value in sorted(tags.items()) if key.startswith(("realign.parent", "realign.id"))
        },
        "registered": _day(version),
    }


def _rates(registry: Registry, version: Version) -> dict[str, float]:
    try:
        measured = registry.metrics(version) if version.ours else {}
    except TrackingUnavailableError:
        raise
    except TrackingError:  # whoever may read the model need not have rights on the experiment that measured it
        return {}
    return {name: measured[f"test/{name}"] for name in _HEADLINES if f"test/{name}" in measured}


def _findings(version: Version) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(version.tags.get(FINDINGS_TAG, "[]"))
    return found


def _day(version: Version) -> str:
    return datetime.fromtimestamp(version.created_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
