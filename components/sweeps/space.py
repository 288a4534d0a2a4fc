"""From a space to candidates, and from a candidate to settings. What a candidate's method has no use for is no part of it.

Light on purpose: no torch, and optuna only where its own types are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from components.errors import ConfigError
from components.fusion.merge_settings import OWN_FIELDS as MERGE_FIELDS
from components.fusion.merge_settings import MergeSettings
from components.fusion.recipe import told
from components.fusion.settings import OF_FORM, OWN_FIELDS, FusionSettings
from components.sweeps.settings import Dimension, Range, Space, Value
from components.sweeps.trials import Candidate

EVERY_METHOD = frozenset({"output_dtype", "rounding"})
"""Settings that all methods have a use for."""
WHOLE = frozenset({"rank", "lowest", "merge.seed"})
"""Keys of whole numbers."""
_FIRST = ("method", "form", "merge.method")
"""Keys that decide which others have a use, in the order in which they are asked."""
_EITHER = {"similarity": "lowest", "lowest": "similarity"}


class Tuning(BaseModel):
    """What a candidate stands for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fusion: FusionSettings
    merge: MergeSettings | None = None
    """How the finetunes become one, of a target that is several."""


class Trial(Protocol):
    """What is needed of optuna's Trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Value]) -> Value: ...


def suggest(space: Space, trial: Trial, defaults: Tuning) -> Candidate:
    """One candidate of a complete space, asked of an optuna-like trial key by key, those that its method has a use for.

    A key with one value is not asked. Keys come in the order method, form, merge.method, then the space's.
    """
    found: Candidate = {}
    for key in (*(key for key in _FIRST if key in space), *(key for key in space if key not in _FIRST)):
        if is_used(key, *_deciding(found, defaults)):
            found[key] = _asked(trial, key, space[key])
    return found


def _asked(trial: Trial, key: str, dimension: Dimension) -> Value:
    if not isinstance(dimension, Range):
        return dimension[0] if len(dimension) == 1 else trial.suggest_categorical(key, dimension)
    low, high = dimension.low, dimension.high
    if key in WHOLE:
        return int(low) if low == high else trial.suggest_int(key, int(low), int(high), log=dimension.log)
    return low if low == high else trial.suggest_float(key, low, high, log=dimension.log)


def is_used(key: str, method: str, form: str | None, merge_method: str | None) -> bool:
    """Whether candidates of these methods have the key."""
    if key == "method":
        return True
    if key.startswith("merge."):
        field = key.split(".")[1]
        return merge_method is not None and (field == "method" or field in MERGE_FIELDS[merge_method])
    field = key.split(".")[0]
    if field in EVERY_METHOD:
        return True
    return field in OWN_FIELDS[method] and OF_FORM.get(field, form) == form


def _deciding(candidate: Candidate, defaults: Tuning) -> tuple[str, str | None, str | None]:
    """Method, form and merge method of what a candidate says so far."""
    method = str(candidate.get("method", defaults.fusion.method))
    usual = defaults.fusion.form if method == defaults.fusion.method else None
    form = candidate.get("form", usual)
    merge = candidate.get("merge.method", defaults.merge.method if defaults.merge else None)
    return method, None if form is None else str(form), None if merge is None else str(merge)


def tuning_of(candidate: Candidate, defaults: Tuning) -> Tuning:
    """The settings that a candidate stands for: what it does not say is as in `defaults` where the method is the same. Raises
    ConfigError for settings that do not fit each other."""
    own = {key: value for key, value in candidate.items() if not key.startswith("merge.")}
    merging = {key.removeprefix("merge."): value for key, value in candidate.items() if key.startswith("merge.")}
    try:
        merge = None if defaults.merge is None else MergeSettings(**_merge_fields(merging, defaults.merge))
        return Tuning(fusion=FusionSettings(**_fusion_fields(own, defaults.fusion)), merge=merge)
    except ValidationError as error:
        said = ", ".join(f"{key}: {value}" for key, value in candidate.items())
        raise ConfigError(f"candidate ({said}): {told(error)}") from error


def _fusion_fields(own: Candidate, defaults: FusionSettings) -> dict[str, Any]:
    usual = defaults.model_dump(exclude_defaults=True)
    method, form = own.get("method", defaults.method), own.get("form", usual.get("form"))
    if method != defaults.method:
        usual = {field: value for field, value in usual.items() if field not in OWN_FIELDS[defaults.method]}
    usual = {
        field: value
        for field, value in usual.items()
        if OF_FORM.get(field, form) == form and _EITHER.get(field, "") not in own
    }
    return _joined(usual, own)


def _merge_fields(own: Candidate, defaults: MergeSettings) -> dict[str, Any]:
    same = own.get("method", defaults.method) == defaults.method
    return _joined({f: getattr(defaults, f) for f in MergeSettings.model_fields} if same else {}, own)


def _joined(usual: dict[str, Any], own: Candidate) -> dict[str, Any]:
    """Fields with those that a candidate says in place of the usual ones; of mappings entry by entry, its own first."""
    fields = dict(usual)
    for key, value in own.items():
        if "." not in key:
            fields[key] = value
    for field in dict.fromkeys(key.split(".")[0] for key in own if "." in key):
        said = {key.removeprefix(f"{field}."): value for key, value in own.items() if key.startswith(f"{field}.")}
        rest = dict(usual.get(field, ()))
        fields[field] = said | {name: value for name, value in rest.items() if name not in said}
    return fields


class _OutsideError(Exception):
    """A value that is not in the space."""


class _Given:
    """A trial whose values are there already."""

    def __init__(self, values: Candidate) -> None:
        self._values = values

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._number(name, low, high))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self._number(name, low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Value]) -> Value:
        if name not in self._values or self._values[name] not in choices:
            raise _OutsideError(name)
        return self._values[name]

    def _number(self, name: str, low: float, high: float) -> float:
        value = self._values.get(name)
        if isinstance(value, str) or value is None or not low <= value <= high:
            raise _OutsideError(name)
        return value


def expressed(tuning: Tuning, space: Space, defaults: Tuning) -> Candidate | None:
    """Settings as a candidate of the space; None where it has none that stands for just these."""
    said: Candidate = {**_values(tuning.fusion, "")}
    if tuning.merge is not None:
        said |= _values(tuning.merge, "merge.")
    for key in space:  # a factor that nobody gave is 1
        if (
            key.split(".")[-2:-1]
            and key not in said
            and key.removeprefix("merge.").split(".")[0] in ("layers", "weights")
        ):
            said[key] = 1.0
    try:
        found = suggest(space, _Given(said), defaults)
    except _OutsideError:
        return None
    return found if same_tuning(tuning_of(found, defaults), tuning) else None


def same_tuning(first: Tuning, second: Tuning) -> bool:
    """Whether they fuse to the same weights as far as the settings tell: a factor of 1 is none."""
    return _plain(first) == _plain(second)


def _plain(tuning: Tuning) -> dict[str, Any]:
    plain = tuning.model_dump(mode="json")
    for part in filter(None, (plain["fusion"], plain["merge"])):
        if all(factor == 1 for _, factor in part["layers"]):
            part["layers"] = []
        part["weights"] = {name: one for name, one in part.get("weights", {}).items() if one != 1}
    return plain


def _values(settings: BaseModel, prefix: str) -> Candidate:
    found: Candidate = {}
    for field, value in settings:
        if isinstance(value, float | int | str | bool):
            found[f"{prefix}{field}"] = value
        elif isinstance(value, tuple | dict):
            found |= {f"{prefix}{field}.{name}": one for name, one in dict(value).items() if isinstance(one, float)}
    return found
