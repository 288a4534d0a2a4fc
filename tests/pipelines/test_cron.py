"""Schedules as robfig/cron reads them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from components.errors import ConfigError
from pipelines.cron import shortest, six_fields


@pytest.mark.parametrize(
    ("schedule", "hours"),
    [
        ("0 2 * * 6", 7 * 24),
        ("@hourly", 1),
        ("@every 1h30m", 1.5),
        ("*/15 * * * *", 0.25),
        ("0 22,2 * * *", 4),
        ("0 0 1 * *", 28 * 24),
        ("0 0 1 * mon", 24),
        ("30 8-18/5 * * MON-FRI", 5),
        ("0 0 29 2 *", 4 * 365.25 * 24),
    ],
)
def test_the_shortest_time_between_two_starts(schedule: str, hours: float) -> None:
    assert shortest(schedule) == timedelta(hours=hours)


@pytest.mark.parametrize(
    "schedule", ["0 2 * *", "61 * * * *", "a * * * *", "* * * * 1-", "@every day", "*/0 * * * *", ""]
)
def test_what_is_no_schedule_is_refused(schedule: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        shortest(schedule)


def test_cron_expressions_begin_with_seconds() -> None:
    assert six_fields(" 0 3  * * 1 ") == "0 0 3 * * 1"
    assert six_fields("5 0 3 * * 1") == "5 0 3 * * 1"
    assert six_fields("@daily") == "@daily"


@pytest.mark.parametrize("schedule", ["", "0 3 * *", "99 3 * * *", "0 3 * * mun", "60 0 3 * * 1", "0 0 0 3 * * 1"])
def test_what_is_no_cron_expression_is_refused(schedule: str) -> None:
    with pytest.raises(ConfigError, match="is no cron expression"):
        six_fields(schedule)
