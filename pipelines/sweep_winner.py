"""The run config with what a sweep found in it: `tuned.yaml`, which anybody can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from components.sweeps.space import Tuning
from pipelines.config import RunConfig

TUNED = "tuned.yaml"


def tuned_yaml(config: RunConfig, tuned: Mapping[str, Tuning]) -> str:
    """The config, its paths absolute and without the sweep, with settings of its own for each finetune or merge in `tuned`,
    which are then served."""
    data = config.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"sweep"})
    fusion = data.setdefault("fusion", {})
    fusion["tuned"] = {**fusion.get("tuned", {}), **{name: _written(one) for name, one in tuned.items()}}
    if config.fusion.select in ("soft", "binary"):
        fusion["select"] = "auto"  # what the sweep was made for
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _written(tuning: Tuning) -> dict[str, Any]:
    merge = (
        {} if tuning.merge is None else {"merge": _plain(tuning.merge.model_dump(mode="json", exclude_defaults=True))}
    )
    return {**_plain(tuning.fusion.model_dump(mode="json", exclude_defaults=True)), **merge}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Patterns as the mapping that people write."""
    return {key: _mapping(value) for key, value in settings.items()}


def _mapping(value: Any) -> Any:
    if isinstance(value, list):
        return dict(value)
    return {key: _mapping(one) for key, one in value.items()} if isinstance(value, dict) else value
