"""Parameters of a mergekit YAML: numbers, conditions on a tensor's name and gradients over layers, worked out per tensor.

The rules are those of mergekit 0.1.5. The first condition whose filter is a part of the tensor's name counts. A gradient of
n numbers is spread evenly from the first layer to the last, between two numbers in a straight line; what belongs to no layer
(embedding, final norm, head) takes its first number. Light on purpose: no torch.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

Patterned = float | dict[str, float]
"""One number for all tensors, or shell pattern -> number, of which the first that matches counts."""

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Condition:
    """A number, or a gradient of several, for tensors whose name contains `filter` (None: for all)."""

    filter: str | None
    values: tuple[float, ...]

    def holds(self, name: str) -> bool:
        """Whether the tensor is meant."""
        return self.filter is None or self.filter in name

    def at(self, position: float) -> float:
        """The value at `position`, 0 the first layer and 1 the last."""
        place = position * (len(self.values) - 1)
        low = int(place)
        high = min(low + 1, len(self.values) - 1)
        return (1 - (place - low)) * self.values[low] + (place - low) * self.values[high]


Setting = tuple[Condition, ...]
"""What a key of `parameters` says: conditions, the first that holds counts."""


def parse_setting(value: Any) -> Setting:
    """The parsed value of a YAML key as conditions. Raises ValueError that says what cannot be read."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return tuple(_condition(item) for item in value)
    return (_condition(value),)


def _condition(value: Any) -> Condition:
    if not isinstance(value, dict):
        return Condition(None, _numbers(value))
    unknown = sorted(str(key) for key in value.keys() - {"filter", "value"})
    if unknown or "value" not in value:
        what = f"unknown key {unknown[0]}" if unknown else "it has no value"
        raise ValueError(f"a condition is `value` and perhaps `filter`: {what}")
    only = value.get("filter")
    if only is not None and not isinstance(only, str):
        raise ValueError(f"a filter is text (given: {only!r})")
    return Condition(None if only == "*" else only, _numbers(value["value"]))


def _numbers(value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("an empty list says nothing")
    return tuple(_number(one) for one in values)


def _number(value: Any) -> float:
    # YAML 1.1 reads 1e-5 as text; mergekit takes it as the number that was meant.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"not a number: {value!r}")  # noqa: TRY004 - one kind of error for whoever collects them
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"not a number: {value!r}") from None
    if number != number or abs(number) == float("inf"):
        raise ValueError(f"not a finite number: {value!r}")
    return number


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to: the first number between dots in its name."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def positions(names: Sequence[str]) -> dict[str, float]:
    """tensor -> its place in a gradient: 0 the first layer and 1 the last. A model of one layer has its end there."""
    layers = {name: layer_of(name) for name in names}
    last = max((i for i in layers.values() if i is not None), default=0)
    return {name: 0.0 if i is None else (i / last if last else 1.0) for name, i in layers.items()}


def resolve(scopes: Sequence[Setting | None], at: Mapping[str, float]) -> dict[str, float]:
    """tensor -> value, for the tensors in `at` (their positions) that any scope speaks of; earlier scopes go first."""
    found: dict[str, float] = {}
    for name, position in at.items():
        conditions = (c for scope in scopes if scope for c in scope if c.holds(name))
        first = next(conditions, None)
        if first is not None:
            found[name] = first.at(position)
    return found


def patterned(values: Mapping[str, float]) -> Patterned:
    """The same numbers as one number, or as few patterns as whole layers and same-named tensors of all layers allow."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    common = Counter(values.values()).most_common(1)[0][0]
    patterns = _grouped({name: value for name, value in values.items() if value != common}, values)
    patterns["*"] = common
    if any(first_match(patterns, name) != value for name, value in values.items()):
        # A star reaches over dots, so a pattern can catch a longer name than was meant.
        return {**{escape(name): value for name, value in values.items() if value != common}, "*": common}
    return patterns


def first_match(patterns: Mapping[str, float], name: str) -> float | None:
    """The value of the first pattern that a tensor's name matches."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), None)


def _grouped(rest: Mapping[str, float], values: Mapping[str, float]) -> dict[str, float]:
    """Patterns for `rest`: a layer with one value, a tensor that has one value in every layer, else the name itself."""
    layers: dict[str, set[float]] = defaultdict(set)
    everywhere: dict[str, set[float]] = defaultdict(set)
    for name, value in values.items():
        layers[_whole_layer(name)].add(value)
        everywhere[_all_layers(name)].add(value)
    single: dict[str, float] = {}
    wide: dict[str, float] = {}
    for name, value in rest.items():
        if layer_of(name) is not None and len(everywhere[_all_layers(name)]) == 1:
            wide[_all_layers(name)] = value
        elif layer_of(name) is not None and len(layers[_whole_layer(name)]) == 1:
            wide[_whole_layer(name)] = value
        else:
            single[escape(name)] = value
    return {**single, **wide}


def _whole_layer(name: str) -> str:
    found = _LAYER.search(name)
    return f"{escape(name[: found.end()])}*" if found else escape(name)


def _all_layers(name: str) -> str:
    found = _LAYER.search(name)
    return f"{escape(name[: found.start()])}.*.{escape(name[found.end() :])}" if found else escape(name)
