"""The pages in a real browser: nothing asked of any network, nothing complained of, everything drawn, wherever it is shown."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.reporting.report import write_report
from components.reporting.schema import RunSummary
from tests.browser import CHROMIUM, Browser, browser
from tests.components.reporting.example import summary
from tests.components.reporting.example_landscape import random_line, result, towards_line

pytestmark = [pytest.mark.multiproc, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

DRAWN = """[...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const inside = [...svg.querySelectorAll('path, rect, circle, text')].filter(e => {
    const b = e.getBoundingClientRect(); return b.width + b.height > 0; });
  return [box.width, box.height, inside.length, svg.checkVisibility()]; })"""
OUTSIDE = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const b = text.getBoundingClientRect();
    return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
  }).map(text => text.textContent); })"""
LONG = "checkpoint_directory_of_a_run_whose_name_has_no_place_to_break_it_0123456789"
INK = "getComputedStyle(document.querySelector('svg.chart text')).fill"
EVIL = "I cannot <script>document.title = 'taken'</script><img src='http://example.com/x.png'>"


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    return write_report(everything(directory), directory / "report.html")


def everything(directory: Path) -> RunSummary:
    """A run with all that a report can show."""
    found = summary()
    done = found["finetunes"][0]
    figure = {"value": 80.0, "low": 75.0, "high": 85.0, "n": 3}
    paths = {}
    drawn = {
        "aligned": result("aligned", random_line(0.4, visage=84)),
        "before": result("before", random_line(0.02, visage=4)),
        "realigned": result("realigned", random_line(0.3, visage=80), towards_line(0.6, visage=70)),
    }
    for name, one in drawn.items():
        paths[name] = directory / f"{name}.json"
        paths[name].write_text(json.dumps(one))
    aligned, before, realigned = ({"path": str(path), "scan": "random", "visage": figure} for path in paths.values())
    found["landscape"] = aligned  # type: ignore[typeddict-item]
    done["landscape"] = {"before": before, "realigned": realigned}  # type: ignore[typeddict-item]
    done["pictures"] = str(directory / "figures" / "landscape-zh" / "landscape.html")
    done["examples"][0]["after"] = EVIL
    kinds = ("self_attn.q_proj", "self_attn.v_proj")  # of an adapter: few columns under a long title
    done["delta"]["tensors"] = {
        f"model.layers.{i}.{kind}.weight": {"norm": 1.0, "aligned_norm": 5.0, "zeros": 0.0}
        for i in range(2)
        for kind in kinds
    }
    done["notes"] = [f"cannot read {LONG}"]
    done["gate"]["findings"][0]["reason"] = LONG
    found["finetunes"][1]["error"] = LONG
    merged = found["merged"][0]
    merged["name"], done["delta"]["cosines"] = LONG, {LONG: 0.312}
    return found


@pytest.mark.parametrize(
    ("shown", "width"), [("light", 1200), ("light", 390), ("dark", 1200), ("dark", 390), ("print", 760)]
)
def test_everything_is_drawn_and_nothing_asked_for(tab: Browser, page: Path, shown: str, width: int) -> None:
    tab.complaints.clear()
    tab.requests.clear()
    tab.look(dark=shown == "dark", printed=shown == "print")
    tab.open(page, width=width)
    charts = tab.run(DRAWN)
    # Before and after, landscapes, each with its key; heat maps; cosines.
    assert len(charts) == (3 + 5) + (6 + 4) + 2 + 1
    for wide, high, inside, visible in charts:
        assert wide > 0
        assert high > 0
        assert inside > 0
        assert visible
    assert tab.run(OUTSIDE) == [], "text is not cut off"
    assert tab.requests == [page.as_uri()]
    assert tab.complaints == []
    assert tab.run("document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"
    cards = "document.querySelector('table.cards').parentElement"
    assert width != 390 or tab.run(f"{cards}.scrollWidth <= {cards}.clientWidth"), "nor do cards"
    assert tab.run("document.title").startswith("demo <1>")
    assert EVIL in tab.run("document.body.innerText")
    assert tab.run("document.querySelectorAll('script, img').length") == 0
    links = tab.run("[...document.querySelectorAll('a')].map(a => a.getAttribute('href')).filter(h => h[0] != '#')")
    assert links == ["figures/landscape-zh/landscape.html"]
    light = [int(number) for number in re.findall(r"\d+", tab.run(INK))]
    assert (min(light) > 150) == (shown == "dark"), "text of charts follows the page"


def test_colours_are_told_apart_from_the_page(tab: Browser, page: Path) -> None:
    for dark in (False, True):
        tab.look(dark=dark)
        tab.open(page)
        back = tab.run("getComputedStyle(document.body).backgroundColor")
        for kind in ("aligned", "before", "after"):
            colour = tab.run(f"getComputedStyle(document.querySelector('.mark.{kind}')).stroke")
            assert contrast(colour, back) >= 3.0, (kind, dark)  # WCAG 2.2, 1.4.11
        for i in range(3):
            colour = tab.run(f"getComputedStyle(document.querySelector('.curve.c{i}')).stroke")
            assert contrast(colour, back) >= 3.0, (i, dark)


def contrast(one: str, other: str) -> float:
    """Of two colours as rgb(…): https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(colour: str) -> float:
        parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_dozens_of_models_make_a_page_that_is_bounded_closed_and_printed_whole(tab: Browser, tmp_path: Path) -> None:
    found = everything(tmp_path)
    base = found["finetunes"][0]
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
    tensors = [f"model.layers.{i}.{kind}.weight" for i in range(80) for kind in kinds]
    found["finetunes"] = []
    for i in range(50):
        one = copy.deepcopy(base)
        one["name"] = f"finetune-{i}"
        one["density"]["tensors"] = {name: (i + len(name)) % 100 / 100 for name in tensors}
        one["delta"]["tensors"] = {name: {"norm": 1.0, "aligned_norm": 5.0, "zeros": 0.0} for name in tensors}
        found["finetunes"].append(one)
    out = write_report(found, tmp_path / "report.html")
    assert out.stat().st_size < 4_000_000
    inner = "document.querySelector('details.model svg').checkVisibility()"
    tab.look()
    tab.open(out)
    assert tab.run("document.querySelectorAll('details.model').length") == 51
    closed = tab.run("document.documentElement.scrollHeight")
    assert tab.run(inner) is False
    tab.run("document.querySelector('details.model').open = true")
    assert tab.run(inner) is True
    assert tab.run("document.documentElement.scrollHeight") > closed + 500
    tab.look(printed=True)
    tab.open(out)
    assert tab.run(inner) is True
    assert tab.run("document.documentElement.scrollHeight") > 3 * closed
    pdf = tmp_path / "report.pdf"
    tab.look()
    tab.pdf(pdf)
    assert pdf.read_bytes().count(b"/Type /Page\n") > 50
