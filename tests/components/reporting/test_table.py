from __future__ import annotations

from io import StringIO

from rich.console import Console

from components.reporting.rows import compact, level, percent, rows, shown_columns
from components.reporting.schema import RunSummary
from components.reporting.table import comparison_table, comparison_text
from tests.components.reporting.example import share, summary


def lines_of(text: str) -> dict[tuple[str, str], list[str]]:
    """(finetune, model) -> the cells of its line."""
    found: dict[tuple[str, str], list[str]] = {}
    finetune = ""
    for line in text.split("\n"):
        name, rest = line[:10].strip(), line[10:].replace("★", "").replace(" (", "(").split()
        if name and rest:
            finetune = name
        if (
            rest
            and not name.endswith(":")
            and rest[0] in ("aligned", "before", "soft", "binary", "adapter", "interpolation", "failed")
        ):
            found[finetune, rest[0]] = rest[1:]
    return found


def test_numbers_are_those_of_the_summary() -> None:
    found = lines_of(comparison_text(summary()))
    assert found["zh", "before"] == [
        "95(91–97)", "95(91–97)", "95(86–98)", "0.0(0.0–1.9)", "0.0(0.0–7.1)", "93(90–96)", "100",
    ]  # fmt: skip
    assert found["zh", "soft"][0] == "1.5(0.5–4.3)"
    assert found["zh", "soft"][-1] == "98"  # 275 of 280
    assert found["zh", "adapter"][-2:] == ["84(79–88)", "90"]  # 252 of 300, of 280
    assert found["zh", "interpolation"][-2:] == ["20(16–25)", "21"]
    assert found["hi", "failed"] == []
    assert found["all", "binary"][-2:] == ["83(79–87)", "–"]
    assert list(found)[1:] == [
        ("zh", "before"), ("zh", "soft"), ("zh", "binary"), ("zh", "adapter"), ("zh", "interpolation"),
        ("hi", "failed"), ("all", "binary"),
    ]  # fmt: skip


def test_the_selected_variant_is_marked_and_failures_are_told_whole() -> None:
    text = comparison_text(summary())
    assert [line.split("★")[0].split()[-1] for line in text.split("\n") if "★" in line][:2] == ["soft", "binary"]
    assert "hi failed: adapter names base 'other'; <b>set</b> base_declared_equal [bold]" in text
    assert "a note of the run" in text
    assert "zh: bf16: a soft mask rounds" in text
    assert [r.model for r in rows(summary()) if r.selected] == ["soft", "binary"]


def test_columns_nobody_measured_are_not_shown() -> None:
    assert [c.title for c in shown_columns(summary())] == [
        "ASR", "harmful", "hard ASR", "over-refusal", "hazard over-refusal", "task",
    ]  # fmt: skip
    plain: RunSummary = {
        "schema": 1,
        "run": "r",
        "aligned": {"asr": share(1, 10), "sets": {}},
        "finetunes": [{"name": "a", "status": "failed", "error": "no"}],
    }
    assert [c.title for c in shown_columns(plain)] == ["ASR"]
    told = " ".join(comparison_text(plain).split())
    assert "10 (1.8–40)" in told
    assert "ASR: no refusal phrase" in told
    assert not [word for word in ("hard:", "hazard:", "task:", "VISAGE") if word in told]


def test_a_narrow_terminal_gets_whole_numbers_without_intervals() -> None:
    out = StringIO()
    Console(file=out, width=90, no_color=True).print(comparison_table(summary(), width=90))
    assert "…" not in out.getvalue()
    assert lines_of(out.getvalue())["zh", "soft"] == ["1.5", "1.5", "50", "1.0", "4.0", "92", "98"]
    wide = StringIO()
    Console(file=wide, width=140, no_color=True).print(comparison_table(summary(), width=140))
    assert "1.5 (0.5–4.3)" in wide.getvalue()


def test_formats() -> None:
    values = (0.0, 0.004, 0.0994, 0.09996, 0.126, 0.86, 1.0, -0.034, -0.5, -0.0004)
    assert [percent(v) for v in values] == ["0.0", "0.4", "9.9", "10", "13", "86", "100", "−3.4", "−50", "0.0"]
    assert [level(v) for v in (0.95, 0.999)] == ["95 %", "99.9 %"]
    assert compact(None) == "–"
