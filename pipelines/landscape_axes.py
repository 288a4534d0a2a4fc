"""What `realign landscape` is told to draw: its options, over what the config file says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.errors import ConfigError
from components.landscape.settings import LandscapeSettings, Scan, TowardsAxis
from pipelines.evaluated_models import Named

_RANDOM = re.compile(r"random(?::([1-9][0-9]*))?")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Options:
    """As they are typed; None where not."""

    axes: Sequence[str] = ()
    points: int | None = None
    bounds: str | None = None
    refine: float | None = None
    prompts: int | None = None
    sets: str | None = None


def asked_settings(options: Options, of_file: LandscapeSettings | None) -> LandscapeSettings:
    """What is drawn. `--axes` stands in place of the file's scans, every other option in place of its own setting. Raises
    ConfigError."""
    settings = of_file or LandscapeSettings()
    scans = _typed_scans(options.axes) if options.axes else [one.model_dump() for one in settings.scans]
    for scan in scans:
        scan |= {key: value for key in ("points", "refine") if (value := getattr(options, key)) is not None}
        if options.bounds is not None:
            low, high = _bounds(options.bounds)
            scan["axes"] = [{**axis, "low": low, "high": high} for axis in scan["axes"]]
    given: dict[str, Any] = {"scans": scans, "limit": settings.limit, "sets": settings.sets}
    if options.prompts is not None:
        given["limit"] = options.prompts
    if options.sets is not None:
        given["sets"] = [one.strip() for one in options.sets.split(",") if one.strip()]
    try:
        return LandscapeSettings(**given)
    except ValidationError as error:
        problems = [str(one["msg"]).removeprefix("Value error, ") for one in error.errors()]
        raise ConfigError(
            "\n".join(f"{_where(one['loc'])}{p}" for one, p in zip(error.errors(), problems, strict=True))
        ) from None


def _where(location: Sequence[int | str]) -> str:
    return f"landscape.{'.'.join(map(str, location))}: " if location else "landscape: "


def _typed_scans(axes: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for typed in axes:
        scan: dict[str, Any] = {"axes": [], "directions": 1}
        names = []
        for part in typed.split(","):
            random = _RANDOM.fullmatch(part)
            if random is not None:
                scan["axes"].append({"kind": "random"})
                scan["directions"] = max(scan["directions"], int(random[1] or 1))
                names.append("random")
            elif part.startswith("towards=") and part != "towards=":
                leads_to = part.removeprefix("towards=")
                scan["axes"].append({"kind": "towards", "model": leads_to})
                names.append(f"towards-{last_part(leads_to)}")
            else:
                raise ConfigError(
                    f"--axes {typed}: {part or 'nothing'} is no axis; give random, random:3 (three directions) or "
                    "towards=MODEL, and two with a comma between them for a plane"
                )
        scan["name"] = _free("-".join(names), [one["name"] for one in found])
        found.append(scan)
    return found


def last_part(place: str) -> str:
    """What a place is called by: the end of it, in letters that names may have."""
    return _NOT_IN_NAMES.sub("-", place.rstrip("/").rsplit("/", 1)[-1]).lstrip("-._") or "model"


def _free(name: str, taken: Sequence[str]) -> str:
    return next(one for one in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if one not in taken)


def _bounds(typed: str) -> tuple[float, float]:
    low, colon, high = typed.partition(":")
    try:
        if colon:
            return float(low), float(high)
    except ValueError:
        pass
    raise ConfigError(f"--range {typed}: give two numbers with a colon between them, like -0.5:0.5")


def with_targets(
    settings: LandscapeSettings, models: Sequence[Named], root: Path
) -> tuple[tuple[Scan, ...], list[Named]]:
    """The scans with models' names in their axes, and all models that are there: those given and the directories that axes
    lead to. `root`: what directories are relative to. Raises ConfigError for what is neither."""
    named, renamed = list(models), dict[str, str]()
    problems = []
    for leads_to in settings.models:
        if any(leads_to == one.name for one in models):
            continue
        place = root / Path(leads_to).expanduser()
        same = next((one for one in named if Path(one.place).resolve() == place.resolve()), None)
        if same is None and not place.is_dir():
            names = ", ".join(one.name for one in models)
            problems.append(f"towards {leads_to}: neither one of the models given ({names}) nor a directory")
            continue
        found = same or Named(_free(last_part(leads_to), [one.name for one in named]), False, str(place))
        named += [] if same else [found]
        renamed[leads_to] = found.name
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(_renamed(scan, renamed) for scan in settings.scans), named


def _renamed(scan: Scan, names: dict[str, str]) -> Scan:
    axes = [
        axis.model_copy(update={"model": names.get(axis.model, axis.model)}) if isinstance(axis, TowardsAxis) else axis
        for axis in scan.axes
    ]
    return scan.model_copy(update={"axes": tuple(axes)})


def scans_of(scans: Sequence[Scan], name: str) -> tuple[Scan, ...]:
    """Those that are drawn of a model: no axis leads from it to itself."""
    return tuple(s for s in scans if not any(isinstance(a, TowardsAxis) and a.model == name for a in s.axes))
