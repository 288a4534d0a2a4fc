"""Cron schedules as KubeRay and Kubeflow read them (robfig/cron): five fields, Kubeflow's with seconds before them."""

from __future__ import annotations

import re
from datetime import date, timedelta
from itertools import pairwise

from components.errors import ConfigError

ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
BOUNDS = ((0, 59, ()), (0, 23, ()), (1, 31, ()), (1, 12, MONTHS), (0, 6, DAYS))
YEARS = 8
"""That are looked through: the 29th of February is in them."""


def shortest(schedule: str) -> timedelta:
    """The shortest time between two starts; the years looked through for one that starts once at most. Raises ValueError."""
    if schedule.startswith("@every "):
        parts = re.findall(r"(\d+(?:\.\d+)?)(h|m|s)", schedule)
        if not parts or "".join(n + unit for n, unit in parts) != schedule.removeprefix("@every "):
            raise ValueError(f"no duration: {schedule}")
        return sum((timedelta(hours=float(n)) / {"h": 1, "m": 60, "s": 3600}[u] for n, u in parts), timedelta())
    fields = ALIASES.get(schedule, schedule).split()
    if len(fields) != len(BOUNDS):
        raise ValueError(f"{len(fields)} fields: {schedule}")
    minutes, hours, days, months, weekdays = (_values(f, *bounds) for f, bounds in zip(fields, BOUNDS, strict=True))
    free = [fields[i].startswith(("*", "?")) for i in (2, 4)]
    first = date(2024, 1, 1)
    starts = []
    for number in range(YEARS * 366):
        day = first + timedelta(days=number)
        on = (day.day in days, day.isoweekday() % 7 in weekdays)
        if day.month in months and (all(on) if any(free) else any(on)):
            starts.append(number * 1440)
    times = sorted(60 * hour + minute for hour in hours for minute in minutes)
    gaps = [b - a for a, b in pairwise(times)] if starts else []
    gaps += [b + times[0] - a - times[-1] for a, b in pairwise(starts)]
    return timedelta(minutes=min(gaps, default=YEARS * 366 * 1440))


def six_fields(schedule: str) -> str:
    """As Kubeflow has it, beginning with seconds: those of the usual five fields are 0. Raises ConfigError."""
    fields = schedule.split()
    five = fields[1:] if len(fields) == 6 else fields
    seconds = fields[0] if len(fields) == 6 else "0"
    try:
        shortest(" ".join(five))
        _values(seconds, 0, 59, ())
    except ValueError as error:
        raise ConfigError(
            f"{schedule!r} is no cron expression ({error}): five fields (minute hour day month weekday), or six with seconds "
            "before them"
        ) from None
    return " ".join(five if five[0].startswith("@") else [seconds, *five])


def _values(field: str, least: int, most: int, names: tuple[str, ...]) -> set[int]:
    found: set[int] = set()
    for part in field.lower().split(","):
        match = re.fullmatch(r"(?:[*?]|(\w+)(?:-(\w+))?)(?:/([1-9]\d*))?", part)
        if match is None:
            raise ValueError(f"no field of a schedule: {field}")
        start, end, step = match.groups()
        low = least if start is None else _number(start, least, names)
        high = _number(end, least, names) if end else (most if start is None or step else low)
        if not least <= low <= high <= most:
            raise ValueError(f"{part} is not within {least}-{most}")
        found |= set(range(low, high + 1, int(step or 1)))
    return found


def _number(word: str, least: int, names: tuple[str, ...]) -> int:
    return least + names.index(word) if word in names else int(word)
