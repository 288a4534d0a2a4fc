"""Whether a space is one, and what is meant where it does not say.

Light on purpose: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError

from components.fusion.merge_settings import OWN_FIELDS as MERGE_FIELDS
from components.fusion.merge_settings import MergeSettings
from components.fusion.recipe import MERGE_METHODS, ONE_FINETUNE_METHODS
from components.fusion.settings import NEEDS_UNALIGNED, OF_FORM, OWN_FIELDS, REQUIRED, FusionSettings
from components.sweeps.settings import Dimension, Range, Space
from components.sweeps.space import EVERY_METHOD, WHOLE, Tuning, is_used

_OPEN = ("layers", "merge.layers", "merge.weights", "merge.densities")
"""Keys behind which a pattern of tensor names or a finetune's name stands."""
_USUAL: dict[str, Dimension] = {
    "form": ("soft", "binary"),
    "alpha": Range(low=0, high=1),
    "gamma": Range(low=0, high=1),
    "rank": Range(low=1, high=64, log=True),
    "similarity": Range(low=0, high=1),
    "merge.t": Range(low=0, high=1),
}
"""What a method cannot do without, where the space has nothing."""


@dataclass(frozen=True)
class Given:
    """What there is to fuse."""

    mask: bool = True
    unaligned: bool = False
    finetunes: tuple[str, ...] = ()
    """Those of a merge; none where the target is one finetune."""


def options(given: Given) -> list[str]:
    """The keys that a space may have."""
    own = sorted({field for method in ONE_FINETUNE_METHODS for field in OWN_FIELDS[method]} | EVERY_METHOD)
    keys = ["method", *(f"{field}.<pattern>" if field in _OPEN else field for field in own)]
    if given.finetunes:
        behind = {"layers": ".<pattern>", "weights": ".<finetune>", "densities": ".<finetune>"}
        fields = sorted({field for fields in MERGE_FIELDS.values() for field in fields})
        keys += ["merge.method", *(f"merge.{field}{behind.get(field, '')}" for field in fields)]
    return keys


def complete_space(space: Space, given: Given, defaults: Tuning) -> Space:
    """With ranges for the numbers that a method of the space cannot do without; where the space is empty, what makes sense for
    the run."""
    found = dict(space) or _sensible(given, defaults)
    for method in _choices(found, "method", defaults.fusion.method):
        needed = REQUIRED.get(str(method), ())
        if "similarity" in OWN_FIELDS.get(str(method), ()) and "lowest" not in found:
            needed = ("similarity",)
        if method != defaults.fusion.method:
            found |= {key: _USUAL[key] for key in needed if key not in found}
    if "slerp" in _choices(found, "merge.method", None) and defaults.merge and defaults.merge.method != "slerp":
        found.setdefault("merge.t", _USUAL["merge.t"])
    return found


def _sensible(given: Given, defaults: Tuning) -> Space:
    """Both forms of the mask with what bends each, and the ways without a mask that the run has models for."""
    methods = [*(["masked"] if given.mask else []), "interpolation", *(["resta"] if given.unaligned else [])]
    space: Space = {"method": tuple(methods)}
    if given.mask:
        space |= {
            "form": ("soft", "binary"),
            "scale": Range(low=0.5, high=1.5),
            "threshold": Range(low=-2, high=2),
            "temperature": Range(low=0.25, high=4, log=True),
        }
    if defaults.merge is not None:
        own = MERGE_FIELDS[defaults.merge.method]
        space |= {"merge.scale": Range(low=0.3, high=1.5)} if "scale" in own else {}
        space |= {"merge.density": Range(low=0.1, high=1)} if "density" in own else {}
        space |= {f"merge.weights.{n}": Range(low=0.3, high=1.5) for n in given.finetunes if "weights" in own}
        space |= {"merge.t": Range(low=0, high=1)} if "t" in own else {}
    return space


def space_problems(space: Space, given: Given, defaults: Tuning) -> list[str]:
    """Keys that no fusion has (with those there are), values that a key cannot take, methods that lack what they need, keys
    that no candidate has a use for."""
    there = options(given)
    unknown = [key for key in space if not _known(key, given)]
    problems = []
    if unknown:
        hint = (
            ""
            if given.finetunes or not any(key.startswith("merge.") for key in unknown)
            else "merge.… is for mode: merge; "
        )
        problems.append(f"space: no setting {', '.join(map(repr, unknown))} ({hint}there are {', '.join(there)})")
    known = {key: dimension for key, dimension in space.items() if key not in unknown}
    for key, dimension in known.items():
        problems += [f"space.{key}: {problem}" for problem in _value_problems(key, dimension)]
    problems += list(_lacking(known, given, defaults))
    if {"similarity", "lowest"} <= known.keys():
        problems.append("space: similarity and lowest say the same in two ways; keep one of them")
    return problems + ([] if problems else list(_useless(known, given, defaults)))


def _known(key: str, given: Given) -> bool:
    field, behind = _split(key)
    if field not in _OPEN:
        return key in options(given)
    if field.startswith("merge.") and not given.finetunes:
        return False
    return behind in given.finetunes if field in ("merge.weights", "merge.densities") else behind != ""


def _split(key: str) -> tuple[str, str]:
    """Field, and the pattern or name behind it."""
    for field in _OPEN:
        if key.startswith(f"{field}."):
            return field, key.removeprefix(f"{field}.")
    return key, ""


def _value_problems(key: str, dimension: Dimension) -> Iterator[str]:
    adapter, words = _adapter(key)
    if isinstance(dimension, Range):
        if words:
            yield f"a range has no meaning; give a list of {', '.join(words)}"
            return
        if key in WHOLE and (dimension.low % 1 or dimension.high % 1):
            yield f"whole numbers only, not {dimension.low:g} … {dimension.high:g}"
            return
    elif not dimension:
        yield "an empty list; give a value or remove the key"
    elif len(set(dimension)) < len(dimension):
        yield "a value stands in the list twice"
    for value in (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension:
        try:
            adapter.validate_python(
                int(value) if key in WHOLE and isinstance(value, float) and value % 1 == 0 else value
            )
        except ValidationError as error:
            yield f"{value!r}: there are {', '.join(words)}" if words else f"{value!r}: {error.errors()[0]['msg']}"


def _adapter(key: str) -> tuple[TypeAdapter[Any], list[str]]:
    """What checks a key's values, and the words that it takes where it takes no numbers."""
    field, _ = _split(key)
    if field == "merge.densities":
        field = "merge.density"
    elif field in _OPEN:
        return TypeAdapter(Annotated[float, *FusionSettings.model_fields["alpha"].metadata]), []
    model: Any = MergeSettings if field.startswith("merge.") else FusionSettings
    info = model.model_fields[field.removeprefix("merge.")]
    if field == "method":
        return TypeAdapter(Any), list(ONE_FINETUNE_METHODS)
    words = [word for kind in (info.annotation, *get_args(info.annotation)) for word in get_args(kind)]
    annotated: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return TypeAdapter(annotated), [word for word in words if isinstance(word, str)]


def _lacking(space: Space, given: Given, defaults: Tuning) -> Iterator[str]:
    for method in _choices(space, "method", defaults.fusion.method):
        if method not in ONE_FINETUNE_METHODS:
            yield f"space.method: {method!r}: there are {', '.join(ONE_FINETUNE_METHODS)}"
        elif method == "masked" and not given.mask:
            yield "space.method: masked needs a trained mask, and this run trains none"
        elif method in NEEDS_UNALIGNED and not given.unaligned:
            yield f"space.method: {method} needs `unaligned`, the model that the aligned one was made from"
    if len(given.finetunes) > 2 and "slerp" in _choices(space, "merge.method", None):
        yield f"space.merge.method: slerp is between two models, and {len(given.finetunes)} are merged"


def _useless(space: Space, given: Given, defaults: Tuning) -> Iterator[str]:
    """Keys that would be ignored."""
    full = complete_space(space, given, defaults)
    methods = _choices(full, "method", defaults.fusion.method)
    merges = _choices(full, "merge.method", defaults.merge.method if defaults.merge else None)
    for key in space:
        if any(
            is_used(key, *one)
            for method in methods
            for one in product([method], _forms(full, method, defaults), merges)
        ):
            continue
        field = _split(key)[0].removeprefix("merge.")
        if key.startswith("merge."):
            users = [method for method in MERGE_METHODS if field in MERGE_FIELDS[method]]
        else:
            users = [method for method in ONE_FINETUNE_METHODS if field in OWN_FIELDS[method]]
        form = f" with form {OF_FORM[key]}" if key in OF_FORM else ""
        yield f"space.{key}: no candidate has a use for it, only those of {', '.join(users)}{form}"


def _forms(space: Space, method: str, defaults: Tuning) -> tuple[Any, ...]:
    return _choices(space, "form", defaults.fusion.form if method == defaults.fusion.method else None)


def _choices(space: Space, key: str, usual: str | None) -> tuple[Any, ...]:
    found = space.get(key, (usual,))
    return found if isinstance(found, tuple) else (usual,)
