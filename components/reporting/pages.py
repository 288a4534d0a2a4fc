"""What all pages share: one engine that escapes every text, a style, ways to write numbers.

No script, no network, no font: a page opens from a disk, on a phone, in print and in ten years.
"""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from components.reporting.rows import compact, percent
from components.reporting.schema import Interval

METRIC_NAMES = {
    "asr": "ASR",
    "harmful": "harmful",
    "over_refusal": "over-refusal",
    "task": "task",
    "exact": "exact",
    "incoherent": "incoherent",
    "unscored": "unscored",
}


def pages() -> Environment:
    """The templates of this package."""
    environment = Environment(
        loader=PackageLoader("components.reporting", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        percent=percent, compact=compact, exact=_exact, seconds=_seconds, count=_count, bytes=_bytes
    )
    return environment


def _exact(interval: Interval | None) -> str:
    """What a cell shows when pointed at: the numbers as they stand in the file."""
    if interval is None:
        return "not measured"
    return f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}], n = {interval['n']}"


def _seconds(value: float) -> str:
    if round(value, 1) < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}".replace(",", "\u202f")


def _bytes(value: int | None) -> str:
    if value is None:
        return "–"
    unit, size = ("GB", 1e9) if value >= 1e9 else ("MB", 1e6)
    return f"{value / size:.3g} {unit}"
