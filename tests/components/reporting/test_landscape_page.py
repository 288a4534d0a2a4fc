"""Pictures and page of landscapes: what is in them, what is not, and that nothing runs or is asked for."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from components.errors import EvaluationError
from components.landscape.schema import LandscapeResult, Mark
from components.reporting.landscape_lines import lines_png
from components.reporting.landscape_page import PAGE, render_landscapes, scans_of, write_pictures
from components.reporting.landscape_planes import planes_png
from tests.components.reporting.example_landscape import (
    EVIL,
    estimate,
    plane,
    random_line,
    result,
    towards_line,
)
from tests.components.reporting.test_report import Page

AFTER = f"after {EVIL}"


class Landscape(Page):
    """A page with scripts: `text` is what is read, `scripts` what is not."""

    VOID = (*Page.VOID, "source")

    def __init__(self, html: str) -> None:
        self.scripts: list[tuple[str | None, str]] = []
        super().__init__(html)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.seen[-1][1].get("type"), data))
        else:
            super().handle_data(data)


def three() -> dict[str, LandscapeResult]:
    """Not every model has every scan; one is at 100 everywhere, one breaks, one cannot be asked for its task."""
    far: list[Mark] = [{"name": EVIL, "at": [2.4], "off": 0.1}]
    to_finetune = towards_line(0.4, visage=81, extra=far)
    broken, dumb = random_line(0.28, visage=76, broken=True, task=False), plane(0.3, visage=70.7, task=False)
    return {
        "aligned": result("/m/aligned", random_line(0.33, visage=84.2), to_finetune, plane(0.4, visage=83.1)),
        "before": result("/m/zh", random_line(-0.9, visage=0.0), plane(0.1, visage=3.3, refined=True)),
        AFTER: result("/m/<b>", broken, dumb),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures") / "new"
    paths = write_pictures(out, three(), title=f"run {EVIL}")
    assert [path.name for path in paths] == ["random.png", "to_finetune.png", "plane.png", PAGE]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    return out


@pytest.fixture(scope="module")
def page(written: Path) -> Landscape:
    return Landscape((written / PAGE).read_text())


def colours(png: bytes) -> int:
    pixels = np.ascontiguousarray(255 * imread(BytesIO(png)), dtype=np.uint8)
    return len(np.unique(pixels.view(np.uint32)))


def test_pictures_show_something(written: Path) -> None:
    sizes = {path.stem: imread(path).shape for path in written.glob("*.png")}
    assert all(colours(path.read_bytes()) > 100 for path in written.glob("*.png"))
    assert sizes["random"][1] > sizes["to_finetune"][1] > 800, "as wide as there are models"


def test_the_same_landscapes_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, three(), title=f"run {EVIL}")
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_every_number_is_on_the_page(page: Landscape) -> None:
    titles = [attrs.get("title") or "" for tag, attrs in page.seen if tag == "td"]
    for visage in (84.2, 0.0, 76.0):
        found = estimate(visage, 3)
        said = f"{visage:.4f}; over prompts {found['prompts_low']:.4f} to {found['prompts_high']:.4f}"
        assert f"{said}; over 3 directions {found['low']:.4f} to {found['high']:.4f}" in titles
    assert titles.count("83.1000; over prompts 81.0225 to 85.1775") == 7, "overview; ASR and harmful, of all and each"
    assert re.search(r"aligned\s+84\.2 \(80\.0–88\.4\)prompts 82\.1–86\.3", page.text)
    assert "0.6 (0.57–0.63)" in page.text  # width
    assert "50.0 (47.5–52.5)" in page.text  # share, percent
    assert re.search(r"aligned +50 +10 ", page.text), "means of task and over-refusal"
    assert re.search(r"harmful_system +harmful +80", page.text)
    assert "finetune 1 0.0 " in " ".join(page.text.split()), "where a mark lies, and how far off"


def test_a_basin_that_reaches_the_end_is_at_least_that_wide() -> None:
    models = {"wide": result("m", random_line(0.6, visage=95))}
    text = Landscape(render_landscapes(models, {"random": (PIXEL, PIXEL)}, title="t")).text
    assert "≥ 0.6" in text


def test_what_was_asked_is_said(page: Landscape) -> None:
    assert "α goes from −0.5 to 1.5 on the way from the model, at 0, to finetune, at 1." in page.text
    assert "every tensor is as long as the model's own; seed 0." in page.text
    assert "3 directions" in page.text
    assert "of one direction" not in page.text
    assert "aligned: /m/aligned" in page.text


def test_names_stay_text(page: Landscape) -> None:
    assert AFTER in page.text
    assert f"run {EVIL}" in page.text
    assert "/m/<b>" in page.text
    assert {tag for tag, _ in page.seen}.isdisjoint({"b", "iframe", "object", "link"})
    data = [text for kind, text in page.scripts if kind == "application/json"]
    assert "<" not in data[0]
    assert json.loads(data[0])["models"][2]["name"] == AFTER


def test_the_script_is_there_once_and_nothing_else_may_run(page: Landscape, written: Path) -> None:
    run = [text for kind, text in page.scripts if kind is None]
    assert len(run) == 2, "plotly, and what turns the surfaces"
    assert sum("plotly.js v" in text for text in run) == 1
    policy = next(attrs["content"] for _, attrs in page.seen if "http-equiv" in attrs)
    allowed = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in run)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
    assert all(not key.startswith("on") for _, attrs in page.seen for key in attrs)


def test_the_page_asks_nothing_of_any_network(page: Landscape) -> None:
    asked = [
        value for _, attrs in page.seen for key, value in attrs.items() if key in ("src", "href", "srcset", "action")
    ]
    assert len(asked) == 6, "three pictures, each for light and dark"
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in asked)
    own = next(text for kind, text in page.scripts if kind is None and "plotly.js v" not in text)
    assert "showSendToCloud: false" in own


def test_the_page_has_the_pictures_that_lie_beside_it(page: Landscape, written: Path) -> None:
    shown = [attrs["src"] for tag, attrs in page.seen if tag == "img"]
    for name, src in zip(("random", "to_finetune", "plane"), shown, strict=True):
        assert src is not None
        assert b64decode(src.removeprefix("data:image/png;base64,")) == (written / f"{name}.png").read_bytes()


PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def test_lines_need_no_script() -> None:
    html = render_landscapes(
        {"one": result("m", random_line(0.3, visage=80, directions=1))}, {"random": (PIXEL, PIXEL)}, title="t"
    )
    page = Landscape(html)
    assert page.scripts == []
    assert "script-src" not in html
    assert "prompts 78.0–82.0" in page.text
    assert len(html) < 30_000


@pytest.mark.parametrize("models", [1, 5])
def test_any_number_of_models_stands_side_by_side(models: int) -> None:
    lines = {f"$m_{i}$ ^": random_line(0.1 * i, visage=20 * i, directions=1 + i % 2) for i in range(models)}
    assert colours(lines_png(lines, confidence=0.95)) > 100
    planes = {f"m{i}": plane(0.1 * i, visage=20 * i, refined=True, task=i % 2 == 0) for i in range(models)}
    assert colours(planes_png(planes, confidence=0.95, dark=True)) > 100


def test_points_on_a_line_of_a_plane_are_drawn_as_points() -> None:
    scan = plane(0.4, visage=80)
    scan["directions"][0]["points"] = [p for p in scan["directions"][0]["points"] if p["at"][1] == 0]
    assert colours(planes_png({"one": scan}, confidence=0.95)) > 100


def test_what_cannot_be_drawn_is_said() -> None:
    line = result("m", random_line(0.3, visage=80))
    other = plane(0.3, visage=80)
    with pytest.raises(EvaluationError, match="no landscape to draw"):
        scans_of({})
    with pytest.raises(EvaluationError, match="scan random: a line of one model and a plane of another"):
        scans_of({"a": line, "b": {**line, "scans": {"random": other}}})
    with pytest.raises(EvaluationError, match=r"scan '\.\./x': not a name for a file"):
        scans_of({"a": {**line, "scans": {"../x": other}}})
    empty = random_line(0.3, visage=80)
    empty["directions"] = []
    with pytest.raises(EvaluationError, match="scan random: no points of a"):
        scans_of({"a": result("m", empty)})
