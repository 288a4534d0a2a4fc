"""VISAGE in the table and in the report."""

from __future__ import annotations

from components.reporting.report import render_report
from components.reporting.rows import rows, shown_columns
from components.reporting.schema import LandscapeSummary, RunSummary, check_summary
from components.reporting.table import comparison_text
from tests.components.reporting.example import summary


def drawn(value: float, *, width: float | None = 0.5) -> LandscapeSummary:
    found: LandscapeSummary = {
        "path": "landscape/0123/landscape.json",
        "scan": "random",
        "visage": {"value": value, "low": value - 4, "high": value + 4, "n": 3},
        "depth": {"value": 98.0, "low": 95.0, "high": 100.0, "n": 3},
        "area": {"value": value, "low": value - 4, "high": value + 4, "n": 3},
    }
    if width is not None:
        found["width"] = {"value": width, "low": width - 0.1, "high": width + 0.1, "n": 3}
    return found


def with_landscapes() -> RunSummary:
    found = summary()
    found["landscape"] = drawn(84.0, width=0.91)
    found["finetunes"][0]["landscape"] = {"before": drawn(4.0, width=None), "realigned": drawn(79.5)}
    found["finetunes"][0]["pictures"] = "figures/landscape-zh/landscape.html"
    return check_summary(found, where="here")


def test_visage_is_a_column_of_what_was_drawn() -> None:
    found = with_landscapes()
    assert [column.title for column in shown_columns(found)][-1] == "VISAGE"
    cells = {(row.finetune, row.model): row.cells[-1] for row in rows(found) if row.error is None}
    assert cells["", "aligned"] == {"value": 0.84, "low": 0.8, "high": 0.88, "n": 3}
    assert cells["zh", "before"] == {"value": 0.04, "low": 0.0, "high": 0.08, "n": 3}
    assert cells["zh", "soft"] == {"value": 0.795, "low": 0.755, "high": 0.835, "n": 3}  # the selected form
    assert cells["zh", "binary"] is None
    assert "VISAGE" not in [column.title for column in shown_columns(summary())]


def test_the_table_and_the_report_say_it() -> None:
    text = comparison_text(with_landscapes())
    assert "84 (80–88)" in text
    assert "VISAGE: mean of 100 − ASR where random moves of the weights leave any refusal." in " ".join(text.split())
    [line] = [line for line in text.splitlines() if line.startswith("landscape, zh: ")]
    assert line == (
        "landscape, zh: aligned VISAGE 84.0, basin 0.91 wide; before VISAGE 4.0; soft VISAGE 79.5, basin 0.50 wide; "
        "figures/landscape-zh/landscape.html"
    )
    page = render_report(with_landscapes())
    assert page.count("<h3>Landscape</h3>") == 1
    assert '79.5 <span class="low">(75.5 to 83.5)</span>' in page
    assert '0.91 <span class="low">(0.81 to 1.01)</span>' in page
    assert "<h3>Landscape</h3>" not in render_report(summary())
