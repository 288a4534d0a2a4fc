from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

from components.evaluation.metrics import holm
from components.reporting.pages import pages
from components.reporting.report import render_report, write_report
from components.reporting.rows import cell, shown_columns
from components.reporting.schema import RunSummary
from tests.components.reporting.example import rates, share, summary


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; complains about tags that are not closed."""

    VOID: tuple[str, ...] = ("meta", "br", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th", "dt", "dd"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def test_text_of_models_prompts_and_errors_stays_text() -> None:
    html = render_report(summary())
    page = Page(html)
    assert {tag for tag, _ in page.seen}.isdisjoint({"script", "img", "b", "iframe", "object"})
    assert "how do I <script>alert('prompt')</script>" in page.text
    assert "I cannot help </p><script>alert('after')</script>" in page.text
    assert "<img src=x onerror=alert(1)> & so on" in page.text
    assert "demo <1>" in page.text
    assert "adapter names base 'other'; <b>set</b> base_declared_equal [bold]" in page.text


def test_the_page_asks_nothing_of_any_network() -> None:
    html = render_report(summary())
    page = Page(html)
    assert all(not {"src", "srcset", "action"} & attrs.keys() for _, attrs in page.seen)
    targets = {attrs.get("id") for _, attrs in page.seen}
    links = [str(attrs["href"]) for _, attrs in page.seen if "href" in attrs]
    assert len(links) > 5
    assert all(link.startswith("#") and link[1:] in targets for link in links)
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.seen


def test_every_number_of_the_summary_is_there() -> None:
    data = summary()
    page = Page(render_report(data))
    titles = [attrs.get("title") or "" for tag, attrs in page.seen if tag == "td"]
    done = data["finetunes"][0]
    for variant in (
        data["aligned"],
        done["before"],
        done["after_soft"],
        done["after_binary"],
        done["controls"]["interpolation"],
    ):
        assert variant is not None
        for column in shown_columns(data):
            interval = cell(variant, column)
            assert interval is not None
            exact = f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}], n = {interval['n']}"
            assert exact in titles, (column.title, exact)
    text = re.sub(r"\s+", " ", page.text)
    for part in (
        "Keeps 86 % of the delta's weights; the soft mask's mean is 84 %",
        "Norm 3.217 (4.21 % of the aligned weights'); 6.5 % of the weights did not move",
        "mask preset realign, track weights, steps 240",
        "test sets harmful: harmful, the first 200, harmful_hard, by itself",
        "✗ gate shut",
        "1.5 % of 200 prompts <i>up to</i> 4.3 %",
        "load_aligned: load/01, weights eeeeeeeeeeeeeeee…",
        "fuse_soft: fuse/04 of load, train_mask",
        "registered: demo-zh version 7",
        "Made by 0.1.0 (abc), 0.1.1.",
        "zh – 24.6 s 1 min 6 s",
        "760 12 345 1.5 GB 2.5 MB",
        "3 min 32 s",
        "demo-zh version 7",
        "alpha 0.25",
        "soft against interpolation ASR −3.0",
        "Adapter of the soft form, which lacks 23.7 % of what that changes (Frobenius norm): export_adapter/0123/adapter",
        "before, complied:",
        "after, refused:",
        "fuse/0123/binary",
        "2026-01-02T03:04:05Z",
    ):
        assert part in text, part


def test_a_summary_with_nothing_optional_renders(tmp_path: Path) -> None:
    bare: RunSummary = {
        "schema": 1,
        "run": "bare",
        "aligned": None,
        "finetunes": [
            {"name": "a", "status": "failed", "error": "no such directory: a"},
            {"name": "b", "status": "done", "error": None, "before": {"asr": share(1, 4)}, "selected": None},
        ],
    }
    out = write_report(bare, tmp_path / "report.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert "no such directory: a" in page.text
    assert "25 (4.6–70)" in unescape(re.sub(r"\s+", " ", page.text))
    assert "None" not in page.text


def outcome_of(data: RunSummary, name: str) -> str:
    text = re.sub(r"\s+", " ", Page(render_report(data)).text)
    return text[text.index("model outcome ASR before") :].split(f"{name} ", 1)[1]


def test_nothing_is_ticked_that_no_gate_decided() -> None:
    data = summary()
    done = data["finetunes"][0]
    del done["gate"]
    done["after_soft"] = rates(asr=200, over=200, task=0)
    row = outcome_of(data, "zh")
    assert row.startswith("realigned, no gate asked · soft mask")
    assert "95 (91–97) 100 (98–100) 0.0 (0.0–1.9) 100 (98–100) 0.0" in row, "over-refusal before and after"
    done["gate"] = {"passed": True, "findings": []}
    assert outcome_of(data, "zh").startswith("✓ gate passed")
    done["selected"] = None
    assert outcome_of(data, "zh").startswith("– nothing selected")
    data["asked"] |= {"mode": "merge", "merges": {"all": {"method": "ties", "of": ["zh"]}}}
    assert outcome_of(data, "zh").startswith("– merged below")
    data["asked"]["merges"]["all"]["of"] = ["en"]
    assert outcome_of(data, "zh").startswith("– nothing selected")


def test_many_paired_differences_have_a_corrected_p() -> None:
    data = summary()
    found = data["finetunes"][0]["comparisons"]["soft_vs_interpolation"]
    fair = holm({metric: d["p"] for metric, d in found.items()})
    assert fair["asr"] == found["asr"]["p"] != 0
    found["over_refusal"] = found["asr"]
    assert f"<td>{2 * found['asr']['p']:.2g}</td>" in render_report(data)
    assert "Holm's correction over 3 differences" in render_report(data)


def test_what_is_nought_or_tuned_is_said() -> None:
    data = summary()
    data["asked"]["fusion"] = {"controls": [], "select": "auto", "max_asr": 0.0}
    data["asked"]["mask"] |= {"seed": 0, "anchor_weight": 0.0}
    data["finetunes"][0]["tuned"] = {"method": "ties", "scale": 0.9, "merge": {"trim": 0.2}}
    text = re.sub(r"\s+", " ", Page(render_report(data)).text)
    assert "fusion select auto, max asr 0 " in text
    assert "anchor weight 0, seed 0 " in text
    assert "Settings of the tuned form: method ties, scale 0.9, merge trim 0.2." in text


def test_seconds_never_reach_sixty() -> None:
    seconds = pages().filters["seconds"]
    assert [seconds(value) for value in (0.04, 59.94, 59.97, 119.7, 3725.2)] == [
        "0.0 s", "59.9 s", "1 min 0 s", "2 min 0 s", "62 min 5 s",
    ]  # fmt: skip


def test_a_report_that_lies_elsewhere_has_no_links(tmp_path: Path) -> None:
    data = summary()
    data["finetunes"][0]["pictures"] = str(tmp_path / "figures" / "landscape-zh" / "landscape.html")
    made = [Page(write_report(data, tmp_path / "report.html", linked=one).read_text()) for one in (True, False)]
    links = [[str(attrs["href"]) for _, attrs in page.seen if "href" in attrs] for page in made]
    assert [[link for link in some if link[0] != "#"] for some in links] == [
        ["figures/landscape-zh/landscape.html"],
        [],
    ]
