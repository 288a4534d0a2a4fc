"""`realign compare`: two runs side by side, from their summaries and, where they are at hand, their answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from components.errors import StorageError
from components.evaluation.outcomes import HEADLINES, read_answers
from components.records import Record
from components.reporting.pages import METRIC_NAMES
from components.reporting.report_cost import CostLine
from components.reporting.rows import compact, percent
from components.reporting.runs_compared import (
    Answered,
    ASet,
    Comparison,
    Measurement,
    Pair,
    Run,
    compare_runs,
    comparison_json,
)
from components.reporting.runs_compared_page import write_runs_compared
from components.reporting.schema import RunSummary, read_summary, shown_models
from components.storage import Workspace

SUMMARY = "summary.json"


def compare_command(first: Path, second: Path, *, as_json: bool, html: Path | None) -> None:
    """Print the comparison, and write the page where one is wanted. Raises DataError, StorageError, ConfigError."""
    summaries = [read_summary(_file(one)) for one in (first, second)]
    runs = [
        Run(label, summary, _answers(summary, _file(one).parent))
        for label, summary, one in zip(_labels((first, second), summaries), summaries, (first, second), strict=True)
    ]
    found = compare_runs(*runs)
    if html is not None:
        write_runs_compared(found, html)
    if as_json:
        sys.stdout.write(json.dumps(comparison_json(found), indent=1, allow_nan=False) + "\n")
        return
    lines = comparison_lines(found)
    sys.stdout.write("\n".join([*lines, *([str(html)] if html is not None else [])]) + "\n")


def _file(run: Path) -> Path:
    return run / SUMMARY if run.is_dir() else run


def _labels(places: Sequence[Path], summaries: Sequence[RunSummary]) -> list[str]:
    """The runs' names; where they are the same, the last parts of their places, as many as tell them apart."""
    names = [summary["run"] for summary in summaries]
    parts = [_file(place).resolve().parent.parts for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        if names[0] != names[1]:
            break
        names = [str(Path(*one[-count:])) for one in parts]
    return names if names[0] != names[1] else [f"{names[0]} ({n})" for n in ("first", "second")]


def _answers(summary: RunSummary, root: Path) -> dict[tuple[str, str], Answered]:
    """By model and variant, of those evaluations whose records lie in the workspace."""
    workspace = Workspace(root)
    found = {}
    owners = [("", summary.get("records", {})), *((o["name"], o.get("records", {})) for o in shown_models(summary))]
    for name, records in owners:
        for step, told in records.items():
            if step.startswith("evaluate_"):
                stage, _, fingerprint = told["reference"].partition("/")
                record = workspace.record(stage, fingerprint)
                if record is not None:
                    found[name, step.removeprefix("evaluate_")] = _answered(
                        record, workspace.result_dir(stage, fingerprint)
                    )
    return found


def _answered(record: Record, directory: Path) -> Answered:
    tasks = record.semantics.get("capability", {}).get("tasks", [])
    sets = [ASet(s["name"], s["kind"], s["headline"]) for s in record.semantics["sets"] if s["split"] == "test"]
    sets += [ASet(task["name"], "task", task["headline"]) for task in tasks]
    try:
        return Answered(sets, {s.name: read_answers(directory / "test" / "answers" / f"{s.name}.jsonl") for s in sets})
    except (ValueError, TypeError) as error:
        raise StorageError(f"{directory}: its answers cannot be read ({error}); remove it and run again") from error


def comparison_lines(found: Comparison) -> list[str]:
    """For a terminal: a block for each model, a line for each metric, then what was set otherwise and what it took."""
    first, second = found.labels
    lines = [
        f"{first} and {second}: percent with {found.levels}; differences are {second} less {first}, paired, p by McNemar, "
        "Holm-corrected over the sets that count"
    ]
    lines += [f"{model} in {run}: {why}" for model, run, why in found.without]
    for pair in found.pairs:
        lines += ["", _title(pair) + (": one and the same evaluation in both" if pair.same else "")]
        shown = [_measurement(line) for line in _shown(pair)]
        lines += _table([("", first, second, "difference"), *shown] if shown else [])
        lines += [f"  {pair.unpaired}"] if pair.unpaired else []
    for label, only in zip(found.labels, found.only, strict=True):
        lines += ["", f"only in {label}: {', '.join(only)}"] if only else []
    lines += ["", *_settings(found)]
    costs = [
        f"{label}: {_cost(cost)}" for label, cost in zip(found.labels, found.cost, strict=True) if cost is not None
    ]
    return [*lines, "", "cost:", *(f"  {line}" for line in costs)] if costs else lines


def _title(pair: Pair) -> str:
    if not pair.model:
        return "aligned model"
    a, b = pair.variants
    return f"{pair.model}, {a}" if a == b else f"{pair.model}, {a} and {b}"


def _shown(pair: Pair) -> list[Measurement]:
    """The rates over all sets that count, and those of single sets that say something else; --json and --html have all."""
    if pair.same:
        return []
    overall = {line.metric: (line.first, line.second) for line in pair.lines if line.set is None}
    told = [x for x in pair.lines if x.metric in HEADLINES and (x.first, x.second) != overall.get(x.metric)]
    return [line for line in pair.lines if line.set is None] + [line for line in told if line.set is not None]


def _measurement(line: Measurement) -> tuple[str, ...]:
    name = METRIC_NAMES[line.metric] + (f" of {line.set}" if line.set is not None else "")
    d = line.difference
    if d is None:
        return name, compact(line.first), compact(line.second), "–"
    sign = "+" if d["diff"] > 0 else ""
    said = f"{sign}{percent(d['diff'])} ({percent(d['low'])} to {percent(d['high'])})"
    if line.adjusted is not None:
        said += f", p {line.adjusted:.2g}"
    elif "p" in d:
        said += f", raw p {d['p']:.2g}"
    return name, compact(line.first), compact(line.second), said


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    return [f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]


def _settings(found: Comparison) -> list[str]:
    if not found.settings_known:
        return ["settings: a summary does not say; run it again with this version to have them compared"]
    if not found.settings:
        return ["settings: the same"]
    return ["settings that differ:", *(f"  {name}: {a} | {b}" for name, a, b in found.settings)]


def _cost(cost: CostLine) -> str:
    known = {"prompts answered": cost.prompts, "tokens generated": cost.tokens}
    parts = [f"{cost.total:.0f} s of stages", *(f"{n:,} {what}" for what, n in known.items() if n is not None)]
    return ", ".join([*parts, *([f"{cost.peak / 1e9:.2f} GB at most"] if cost.peak is not None else [])])
