"""Model cards lie beside what is selected now, and beside nothing else."""

from __future__ import annotations

from pathlib import Path

from components.reporting.schema import RunSummary
from components.storage import Workspace
from pipelines.cards import write_cards
from pipelines.config import load_config
from pipelines.driver import RunState
from pipelines.roots import Roots
from tests.components.reporting.example import summary
from tests.pipelines.headers import hollow_config


def made(directory: Path) -> tuple[RunState, RunSummary]:
    """A run of one finetune with two forms and an adapter, whose directories are there."""
    run = RunState(
        load_config(hollow_config(directory, "small")), Workspace(directory / "workspace"), Roots({}, {}, {}), {}
    )
    found = summary()
    one = found["finetunes"][0]
    one["name"] = "f0"
    one["fused"] = {"soft": str(directory / "soft"), "binary": str(directory / "binary")}
    one["adapter"]["path"] = str(directory / "adapter")
    for name in ("soft", "binary", "adapter"):
        (directory / name).mkdir()
    found["finetunes"], found["merged"] = [one], []
    return run, found


def carded(directory: Path) -> set[str]:
    return {path.parent.name for path in directory.glob("*/README.md")}


def test_a_card_goes_where_its_form_is_selected_no_more(tmp_path: Path) -> None:
    run, found = made(tmp_path)
    one = found["finetunes"][0]
    one["gate"]["passed"] = True
    assert {path.parent.name for path in write_cards(run, found)} == {"soft", "adapter"}
    assert "\nPassed.\n" in (tmp_path / "soft" / "README.md").read_text()
    one["selected"], one["gate"]["passed"] = "binary", False
    write_cards(run, found)
    assert carded(tmp_path) == {"binary", "adapter"}
    assert "Shut: not to be served." in (tmp_path / "binary" / "README.md").read_text()
    assert "The soft form did not pass its gate" in (tmp_path / "adapter" / "README.md").read_text()
    one["status"], one["error"] = "failed", "no room"
    assert write_cards(run, found) == []
    assert carded(tmp_path) == set()
