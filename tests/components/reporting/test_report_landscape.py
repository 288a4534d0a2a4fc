"""The report's curves: at their points as measured, and nothing where there is no file."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import fmean

import pytest

from components.reporting.report_landscape import curve_charts, read_results
from components.reporting.schema import RunSummary
from tests.components.reporting.example import summary
from tests.components.reporting.example_landscape import plane, random_line, result, towards_line


def with_files(directory: Path) -> RunSummary:
    found = summary()
    results = {
        "aligned": result("aligned", random_line(0.4, visage=84)),
        "between": result("aligned", towards_line(0.5, visage=60)),
        "realigned": result("realigned", random_line(0.3, visage=80), plane(0.3, visage=75)),
    }
    for name, one in results.items():
        (directory / name).write_text(json.dumps(one))
    found["landscape"] = {"path": str(directory / "aligned")}
    found["finetunes"][0]["landscape"] = {
        "between": {"path": str(directory / "between")},
        "before": {"path": str(directory / "gone")},
        "realigned": {"path": str(directory / "realigned")},
    }
    return found


def test_scans_stand_under_the_models_that_have_them(tmp_path: Path) -> None:
    found = with_files(tmp_path)
    results = read_results(found, found["finetunes"][0])
    assert {name: list(one["scans"]) for name, one in results.items()} == {
        "aligned": ["random", "to_finetune"],
        "realigned": ["random", "plane"],
    }
    drawings = curve_charts(results)
    assert [(one.scan, len(one.charts)) for one in drawings] == [("random", 2), ("to_finetune", 1)]
    assert drawings[0].curves == ["ASR", "task (sums)", "over-refusal (benign)"]


def test_files_that_are_not_whole_are_left_out(tmp_path: Path) -> None:
    found = with_files(tmp_path)
    for broken in ("{}", "[1]", "{", '{"schema": 1, "model": "m", "scans": {"random": {}}}'):
        (tmp_path / "realigned").write_text(broken)
        assert list(read_results(found, found["finetunes"][0])) == ["aligned"], broken


def test_a_curve_is_the_mean_over_directions(tmp_path: Path) -> None:
    scan = random_line(0.3, visage=80)
    [drawing] = curve_charts({"realigned": result("realigned", scan)})
    root = ET.fromstring(drawing.charts[0])
    heights = {n.text: float(n.get("y") or "") - 4 for n in root.iter() if n.get("class") == "tick end"}
    per_percent = (heights["100"] - heights["0"]) / 100
    [attack] = [n for n in root.iter() if n.get("class") == "curve c0"]
    drawn = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", attack.get("d") or "")]
    for i, y in enumerate(drawn):
        mean = fmean(100 * one["points"][i]["rates"]["*"]["asr"] for one in scan["directions"])
        assert (y - heights["0"]) / per_percent == pytest.approx(mean, abs=0.05), i
    assert len(drawn) == 21
    assert "realigned, VISAGE 80.0" in [n.text for n in root.iter()]
    assert "finetune" not in [n.text for n in root.iter()], "too far off to be marked"


def test_a_model_on_the_way_is_marked(tmp_path: Path) -> None:
    [drawing] = curve_charts({"aligned": result("aligned", towards_line(0.5, visage=60))})
    root = ET.fromstring(drawing.charts[0])
    assert not [n.text for n in root.iter() if "VISAGE" in (n.text or "")], "it is of random directions alone"
    ticks = [n.text for n in root.iter() if "tick" in (n.get("class") or "")]
    names = [text for text in ticks if text in ("aligned", "realigned", "finetune")]
    assert names == ["aligned", "realigned", "finetune"]
    lines = [float((n.get("d") or "")[1:].split()[0]) for n in root.iter() if n.get("class") == "here"]
    assert lines == [pytest.approx(36 + 294 * (at + 0.5) / 2, abs=0.06) for at in (0.0, 0.86, 1.0)]
