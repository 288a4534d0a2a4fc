"""What a chart draws: every interval where it belongs, every text as text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from components.reporting.charts import SHAPES, Line, Mark, interval_chart, key
from components.reporting.cosines import matrix_svg, most_alike
from components.reporting.heat_map import OUTSIDE, Grid, grid_svg, norm_grid, thinned
from components.reporting.rows import shortened
from tests.components.reporting.example import share


def drawn(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def with_class(root: ET.Element, name: str) -> list[ET.Element]:
    return [node for node in root.iter() if name in (node.get("class") or "").split()]


def ticks(root: ET.Element) -> dict[float, float]:
    """Number under the axis -> its place."""
    return {float(node.text or ""): float(node.get("x") or "") for node in with_class(root, "tick")}


def reach(node: ET.Element) -> tuple[float, float]:
    found = re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", node.get("d") or "")
    assert found is not None
    return float(found[1]), float(found[2])


def test_intervals_reach_from_their_low_to_their_high_end() -> None:
    before, after = share(30, 40), share(10, 40)
    root = drawn(interval_chart([Line("zh", (Mark("before", before), Mark("after", after)))], title="ASR"))
    at = ticks(root)
    assert list(at) == [0, 25, 50, 75, 100]
    per_point = (at[100] - at[0]) / 100
    for kind, interval in (("before", before), ("after", after)):
        [line] = [node for node in with_class(root, "reach") if kind in str(node.get("class"))]
        wanted = (at[0] + 100 * interval[end] * per_point for end in ("low", "high"))
        assert reach(line) == pytest.approx(tuple(wanted), abs=0.06)
    [circle] = with_class(root, "hollow")
    assert float(circle.get("cx") or "") == pytest.approx(at[75], abs=0.06)
    [diamond] = with_class(root, "diamond")
    assert float(re.findall(r"[\d.]+", diamond.get("d") or "")[0]) == pytest.approx(at[25], abs=0.06)
    [join] = with_class(root, "join")
    assert [float(x) for x in re.findall(r"[\d.]+", join.get("d") or "")][::2] == pytest.approx(
        [at[75], at[25]], abs=0.06
    )


def test_only_what_changed_is_joined() -> None:
    marks = {kind: Mark(kind, share(i + 1, 40)) for i, kind in enumerate(SHAPES)}
    joined = {
        kinds: len(with_class(drawn(interval_chart([Line("zh", tuple(marks[k] for k in kinds))], title="ASR")), "join"))
        for kinds in (("aligned", "before"), ("aligned", "after"), ("aligned", "before", "after"), ("first", "second"))
    }
    assert list(joined.values()) == [0, 0, 1, 1]


def test_small_rates_have_an_axis_of_their_own() -> None:
    small = share(1, 240)
    at = ticks(drawn(interval_chart([Line("zh", (Mark("after", small),))], title="over-refusal", whole=False)))
    assert max(at) >= 100 * small["high"]
    assert max(at) < 5
    none = ticks(drawn(interval_chart([Line("zh", ())], title="over-refusal", whole=False)))
    assert max(none) > 0


def test_kinds_of_marks_have_shapes_beside_their_colours() -> None:
    assert len({SHAPES[kind] for kind in ("aligned", "before", "after")}) == 3
    assert SHAPES["first"] != SHAPES["second"]
    told = key({"before": "<b>", "after": "after"})
    assert "&lt;b&gt;" in told
    assert "<circle" in told


def test_names_stay_text() -> None:
    evil = "<script>alert(1)</script> & more"
    root = drawn(interval_chart([Line(evil, (Mark("after", share(1, 4)),))], title=evil))
    assert not [node for node in root.iter() if "script" in node.tag]
    assert [node.text for node in root.iter() if node.tag.endswith("title")][:2] == [evil, evil]
    assert with_class(root, "label")[0].text == shortened(evil, 16)
    assert len(shortened(evil, 16)) == 16


def test_cosines_stand_in_the_matrix() -> None:
    cosines = {"a": {"b": 0.5, "<c>": -0.25}, "b": {"a": 0.5}, "<c>": {"a": -0.25}}
    root = drawn(matrix_svg(cosines))
    said = {node.text for node in root.iter() if node.tag.endswith("title")}
    assert {"a, b: 0.500", "a, <c>: -0.250", "b, b: 1.000"} <= said
    assert "b, <c>" not in " ".join(str(text) for text in said)
    fills = [node.get("fill") for node in root.iter() if node.tag.endswith("rect")]
    assert fills.count("#0072b2") == 3, "1 is blue"
    assert len(fills) == 7
    assert most_alike({"a": {"b": 0.1, "c": -0.4}, "b": {"a": 0.1, "c": 0.2}, "c": {}}, 2) == [
        ("a", "c", -0.4),
        ("b", "c", 0.2),
    ]


def test_norms_of_a_cell_add_as_squares() -> None:
    grid = norm_grid({
        "model.layers.2.mlp.experts.0.up_proj.weight": {"norm": 3.0, "aligned_norm": 6.0},
        "model.layers.2.mlp.experts.1.up_proj.weight": {"norm": 4.0, "aligned_norm": 8.0},
        "model.layers.2.mlp.bias": {"norm": 1.0, "aligned_norm": 0.0},
        "lm_head.weight": {"norm": 0.0, "aligned_norm": 2.0},
    })  # fmt: skip
    assert grid.cells["2", "mlp.experts.up_proj"] == pytest.approx(0.5)  # 5 of 10
    assert grid.cells[OUTSIDE, "lm_head"] == 0.0
    assert ("2", "mlp.bias") not in grid.cells
    root = drawn(grid_svg(grid, title="norms", most=0.5))
    assert [node.get("fill") for node in root.iter() if node.tag.endswith("rect")] == ["#fde725", "#440154"]


def test_many_layers_become_few_rows() -> None:
    cells = {(str(i), "up"): i / 100 for i in range(7)} | {(OUTSIDE, "head"): 1.0}
    grid = thinned(Grid((OUTSIDE, *map(str, range(7))), ("head", "up"), cells), 3)
    assert grid.layers == (OUTSIDE, "0–2", "3–5", "6")
    assert grid.cells == {
        (OUTSIDE, "head"): 1.0,
        ("0–2", "up"): pytest.approx(0.01),
        ("3–5", "up"): pytest.approx(0.04),
        ("6", "up"): pytest.approx(0.06),
    }
    assert thinned(grid, 3) is grid
