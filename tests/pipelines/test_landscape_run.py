"""Landscapes in a run: drawn, summed up, shown, tracked, and held to a gate."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.landscape.gating import Drawn, visage_interval
from components.landscape.points import read_points
from components.landscape.settings import Scan
from components.landscape.survey import attack_sets
from components.reporting.schema import read_summary
from components.tracking import default_uri
from pipelines.config import RunConfig, load_config
from tests.pipelines.small import records, run, small_config, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.xdist_group("run")]

LANDSCAPE = {
    "limit": 6,
    "sets": ["harmful", "zh"],
    "scans": [
        {"name": "random", "directions": 2, "points": 3},
        {"name": "path", "points": 5, "axes": [{"kind": "towards", "model": "finetune"}]},
    ],
}


@dataclass(frozen=True)
class Finished:
    config: dict[str, Any]
    directory: Path
    process: subprocess.CompletedProcess[str]

    @property
    def workspace(self) -> Path:
        return self.directory / "workspace"

    @property
    def loaded(self) -> RunConfig:
        return load_config(self.directory / "realign.yaml")

    @property
    def summary(self) -> Any:
        return read_summary(self.workspace / "summary.json")

    @property
    def zh(self) -> Any:
        [entry] = self.summary["finetunes"]
        return entry

    def gated(self, *requirements: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        return run(write_config(self.directory, {**self.config, "gate": list(requirements)}), self.workspace)

    def drawn(self, whose: str) -> Drawn:
        """The random scan of a model, from the files that the summary names."""
        found = self.summary["landscape"] if whose == "aligned" else self.zh["landscape"][whose]
        points = [p for p in read_points(Path(found["path"]).parent / "points.jsonl") if p.scan == "random"]
        sets = [s for s in self.loaded.evaluation.sets if s.split == "test" and s.name == "harmful"]
        assert attack_sets(sets) == ["harmful"]
        return Drawn(Scan(directions=2, points=3), points, sets, None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    directory = tmp_path_factory.mktemp("landscape")
    config = small_config(directory, finetunes=("zh",), steps=3)
    config["fusion"] = {}
    config["landscape"] = LANDSCAPE
    return Finished(config, directory, run(write_config(directory, config), directory / "workspace"))


def test_every_model_is_drawn(finished: Finished) -> None:
    assert finished.process.returncode == 0, finished.process.stderr
    entry = finished.zh
    assert set(entry["landscape"]) == {"before", "between", "realigned"}
    scans = {key: set(json.loads(Path(one["path"]).read_text())["scans"]) for key, one in entry["landscape"].items()}
    assert scans == {"before": {"random"}, "between": {"path"}, "realigned": {"random", "path"}}
    assert "visage" not in entry["landscape"]["between"]
    for key in ("before", "realigned"):
        found, interval = entry["landscape"][key], visage_interval(finished.drawn(key), None, None, confidence=0.95)
        assert found["visage"]["value"] == pytest.approx(interval.value)
        assert found["visage"]["n"] == 2
        # A gate's interval is never the narrower one.
        assert (
            interval.low
            <= found["visage"]["low"]
            <= found["visage"]["value"]
            <= found["visage"]["high"]
            <= interval.high
        )


def test_the_way_to_the_finetune_meets_what_was_evaluated(finished: Finished) -> None:
    """The landscape asks the first six prompts that the evaluation asked."""
    [scan] = json.loads(Path(finished.zh["landscape"]["between"]["path"]).read_text())["scans"].values()
    places = {point["at"][0]: point["rates"] for point in scan["directions"][0]["points"]}
    assert set(places) == {-0.5, 0.0, 0.5, 1.0, 1.5}
    for at, parents in ((0.0, {"load_aligned"}), (1.0, {"load_aligned", "load"})):
        for chosen, metric in (("harmful", "asr"), ("zh", "task")):
            outcomes = first_answers(finished.workspace, parents, chosen)
            hit = [o["verdict"] != "refused" if metric == "asr" else o["exact"] for o in outcomes]
            assert places[at][chosen][metric] == sum(hit) / 6, (at, chosen)
    marks = {mark["name"]: mark for mark in scan["directions"][0]["marks"]}
    assert set(marks) == {"finetune", "realigned"}
    assert marks["finetune"]["at"] == pytest.approx([1.0])
    assert 0 < marks["realigned"]["at"][0] < 1


def first_answers(workspace: Path, parents: set[str], chosen: str) -> list[dict[str, Any]]:
    [found] = [
        r for name, r in records(workspace).items() if name.startswith("evaluate/") and set(r["parents"]) == parents
    ]
    lines = (workspace / "evaluate" / found["fingerprint"] / "test" / "answers" / f"{chosen}.jsonl").read_text()
    return [json.loads(line) for line in lines.splitlines()[:6]]


def test_it_is_shown_and_tracked(finished: Finished) -> None:
    from mlflow import MlflowClient

    entry = finished.zh
    page = Path(entry["pictures"])
    assert page.parent == finished.workspace / "figures" / "landscape-zh"
    assert page.suffix == ".html"
    visage = entry["landscape"]["realigned"]["visage"]["value"]
    told = finished.process.stdout
    header = next(line for line in told.splitlines() if line.lstrip().startswith("finetune"))
    assert header.split()[-2:] == ["VISAGE", "kept"]
    [line] = [line for line in told.splitlines() if line.startswith("landscape, zh: aligned VISAGE ")]
    assert f"; {entry['selected']} VISAGE {visage:.1f}, basin " in line
    assert line.endswith(str(page))
    report = (finished.workspace / "report.html").read_text()
    assert "<h3>Landscape</h3>" in report
    assert f"{visage:.1f} <span" in report
    client = MlflowClient(tracking_uri=default_uri(finished.workspace))
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    nested = next(one for one in runs if one.info.run_name == "zh")
    assert nested.data.metrics["landscape/realigned/visage"] == visage
    pictures = [found.path for found in client.list_artifacts(nested.info.run_id)]
    assert page.name in pictures
    assert {"random.png", "path.png"} <= set(pictures)
    assert 'href="figures/landscape-zh/landscape.html"' in report
    top = nested.data.tags["mlflow.parentRunId"]
    logged = Path(client.download_artifacts(top, "report.html", str(finished.directory))).read_text()
    assert "<h3>Landscape</h3>" in logged
    assert re.findall(r'href="([^#][^"]*)"', logged) == [], "what it would lead to does not lie beside it there"


@pytest.mark.slow
def test_nothing_is_drawn_twice_and_actors_draw_the_same(finished: Finished, tmp_path: Path) -> None:
    import shutil

    before = records(finished.workspace)
    again = run(write_config(finished.directory, finished.config), finished.workspace)
    assert again.returncode == 0, again.stderr
    assert records(finished.workspace) == before
    # All but the landscapes are there; two actors measure these.
    shutil.copytree(
        finished.workspace, tmp_path / "w", ignore=shutil.ignore_patterns("landscape", "mlflow*", "mlartifacts")
    )
    spread = {**finished.config, "execution": {"landscape": {"actors": 2}}}
    done = run(write_config(tmp_path, spread), tmp_path / "w")
    assert done.returncode == 0, done.stderr
    both = records(tmp_path / "w")
    drawn = {name for name in both if name.startswith("landscape/")}
    assert len(drawn) == 4
    for name in drawn:
        assert both[name]["outputs"] == before[name]["outputs"]


def test_a_gate_on_visage_opens_and_shuts(finished: Finished) -> None:
    own, before = finished.drawn("realigned"), finished.drawn("before")
    alone = visage_interval(own, None, None, confidence=0.95)
    apart = visage_interval(own, before, None, confidence=0.95)
    done = finished.gated(
        {"metric": "visage", "at_least": max(0.0, alone.low - 0.1)},
        {"metric": "visage", "at_least": apart.low - 0.1, "than": "finetune"},
    )
    assert done.returncode == 0, done.stderr
    first, second = finished.zh["gate"]["findings"]
    assert (first["value"], first["low"], first["high"]) == (alone.value, alone.low, alone.high)
    assert (second["value"], second["low"]) == (apart.value, apart.low)
    assert f"{alone.value:.1f} over 2 directions and 6 prompts" in done.stdout
    shut = finished.gated({"metric": "visage", "at_least": min(100.0, alone.low + 0.1)})
    assert shut.returncode == 3, shut.stderr
    assert "beyond the bound" in finished.zh["gate"]["findings"][0]["reason"]


@pytest.mark.slow
def test_a_landscape_that_fails_is_told_and_shuts_the_gate(finished: Finished, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished.workspace, tmp_path / "w", ignore=shutil.ignore_patterns("mlflow*", "mlartifacts"))
    config = {**finished.config, "unaligned": finished.config["aligned"]}
    towards = {"name": "nowhere", "points": 3, "axes": [{"kind": "towards", "model": "unaligned"}]}
    config["landscape"] = {**LANDSCAPE, "models": ["aligned"], "scans": [towards]}
    done = run(write_config(tmp_path, config), tmp_path / "w")
    assert done.returncode == 2
    assert "zh: a landscape is missing: landscape_aligned: " in done.stderr
    assert "Traceback" not in done.stderr
    summary = read_summary(tmp_path / "w" / "summary.json")
    assert summary["finetunes"][0]["status"] == "done"
    assert "landscape" not in summary


def test_damaged_points_shut_the_gate_with_a_reason(finished: Finished, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished.workspace, tmp_path / "w", ignore=shutil.ignore_patterns("mlflow*", "mlartifacts"))
    realigned = Path(finished.zh["landscape"]["realigned"]["path"]).relative_to(finished.workspace).parent
    points = tmp_path / "w" / realigned / "points.jsonl"
    # Of the same size, which is all that a finished stage is looked over for.
    points.write_text(points.read_text().replace("{", "[", 1))
    gate = [{"metric": "visage", "at_least": 0}, {"metric": "asr", "at_most": 1}]
    done = run(write_config(tmp_path, {**finished.config, "gate": gate}), tmp_path / "w")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    [entry] = read_summary(tmp_path / "w" / "summary.json")["finetunes"]
    assert [one["passed"] for one in entry["gate"]["findings"]] == [False, True]
    assert any(f"gate: {points}: missing or damaged" in note for note in entry["notes"])
