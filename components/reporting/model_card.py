"""The model card of a realigned model: what the summary says of it, as hub metadata and in words.

Metadata as in https://github.com/huggingface/hub-docs/blob/main/modelcard.md: `model-index` holds every rate of the selected
form's test sets with its dataset and split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from components.reporting.pages import METRIC_NAMES
from components.reporting.report_lineage import lineage
from components.reporting.rows import compact
from components.reporting.schema import FinetuneSummary, Interval, Rates, RunSummary, selected_rates

_TITLES = {
    "asr": "attack success rate (no refusal)",
    "harmful": "harmful compliance (complied, coherent)",
    "over_refusal": "over-refusal",
    "task": "task (exact match)",
    "exact": "exact match",
    "incoherent": "incoherent answers",
    "unscored": "answers that nobody could score",
}
_SHOWN = ("asr", "harmful", "over_refusal", "task")
_HEADLINE = "headline"
"""Stands for all test sets that count, together."""


@dataclass(frozen=True)
class Source:
    """A model that went into it."""

    role: str
    name: str
    hub: str | None
    """Its id on the hub, where that is known."""
    license: str | None
    """As its own card names it."""


def run_card(summary: RunSummary, one: FinetuneSummary, sources: Sequence[Source], *, adapter: bool = False) -> str:
    """README.md for the selected form's directory. Paths stay out of it. `adapter`: it is a LoRA adapter, not a whole model."""
    rates = selected_rates(one) or {}
    lines = ["---", yaml.safe_dump(_front(summary, one, sources, rates, adapter), sort_keys=False).rstrip(), "---"]
    lines += [f"# {_cell(summary['run'])}: {_cell(one['name'])}, realigned", ""]
    made = ", ".join(f"`{_cell(s.hub or s.name)}` ({_cell(s.role)})" for s in sources)
    lines += [f"The {one.get('selected')} form of a safety realignment of {made}.", ""]
    lines += [*_rates_table(summary, one, rates), *_landscape(one), *_gate(one), *_lineage(summary, one)]
    if one.get("notes"):
        lines += ["## Notes", "", *(f"- {_cell(note)}" for note in one.get("notes", [])), ""]
    licenses = {s.license for s in sources}
    if len(licenses) > 1 or None in licenses:
        told = "; ".join(f"{_cell(s.name)}: {s.license or 'not stated'}" for s in sources)
        lines += [f"License of what it was made from: {told}.", ""]
    return "\n".join(lines)


def _front(
    summary: RunSummary, one: FinetuneSummary, sources: Sequence[Source], rates: Rates, adapter: bool
) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    licenses = {s.license for s in sources}
    if len(licenses) == 1 and None not in licenses:
        front["license"] = licenses.pop()
    bases = list(dict.fromkeys(s.hub for s in sources if s.hub is not None))
    if bases:
        front |= {"base_model": bases, "base_model_relation": "adapter" if adapter else "merge"}
    front["tags"] = ["realign", "safety", *([] if adapter else ["merge"])]
    results = list(_results(summary, one, rates))
    if results:
        front["model-index"] = [{"name": f"{summary['run']}-{one['name']}", "results": results}]
    return front


def _results(summary: RunSummary, one: FinetuneSummary, rates: Rates) -> Iterator[dict[str, Any]]:
    """A result for each dataset: of the headline rates, of every set (groups are left to the summary), of the landscape."""
    found: dict[str, dict[str, Interval]] = {
        _HEADLINE: {metric: rates[metric] for metric in _SHOWN if metric in rates},  # type: ignore[literal-required]
        **{name: metrics for name, metrics in rates.get("sets", {}).items() if "/" not in name},
    }
    for name, metrics in found.items():
        shown = [_metric(metric, interval, summary) for metric, interval in metrics.items()]
        if shown:
            yield _result(name, _dataset(summary, name), shown)
    drawn = one.get("landscape", {}).get("realigned")
    if drawn is not None and "visage" in drawn:
        visage = drawn["visage"]
        args = {"low": visage["low"], "high": visage["high"], "directions": visage["n"]}
        metric = {"type": "visage", "value": visage["value"], "name": "VISAGE, 0 to 100", "args": args}
        yield _result("landscape", {"type": _HEADLINE, "name": "harmful sets that count"}, [metric])


def _result(name: str, dataset: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    task = {"type": "text-generation", "name": f"safety realignment, {name}"}
    return {"task": task, "dataset": {**dataset, "split": "test"}, "metrics": metrics}


def _metric(metric: str, interval: Interval, summary: RunSummary) -> dict[str, Any]:
    confidence = summary.get("confidence", 0.95)
    args = {"low": interval["low"], "high": interval["high"], "n": interval["n"], "confidence": confidence}
    return {"type": metric, "value": interval["value"], "name": _TITLES.get(metric, metric), "args": args}


def _dataset(summary: RunSummary, name: str) -> dict[str, Any]:
    """What the hub calls it, where it lies there; else the set's name."""
    told = summary.get("asked", {}).get("sets", {}).get(f"test {name}", {})
    found = {"type": told.get("hub") or name, "name": "all test sets that count" if name == _HEADLINE else name}
    for key, given in (("config", "config"), ("revision", "revision")):
        if told.get(given):
            found[key] = told[given]
    return found


def _rates_table(summary: RunSummary, one: FinetuneSummary, rates: Rates) -> list[str]:
    before, aligned = one.get("before") or {}, summary["aligned"] or {}
    lines = []
    for metric in _SHOWN:
        cells = [found.get(metric) for found in (aligned, before, rates)]
        if any(cells):
            said = [METRIC_NAMES[metric], *(compact(c) for c in cells), str(cells[-1]["n"] if cells[-1] else "–")]  # type: ignore[index, arg-type]
            lines.append(f"| {' | '.join(said)} |")
    for name, metrics in rates.get("sets", {}).items():
        for metric, interval in metrics.items():
            if metric in _SHOWN and "/" not in name:
                others = [found.get("sets", {}).get(name, {}).get(metric) for found in (aligned, before)]
                said = [
                    f"{METRIC_NAMES[metric]}, {_cell(name)}",
                    *map(compact, [*others, interval]),
                    str(interval["n"]),
                ]
                lines.append(f"| {' | '.join(said)} |")
    interval_said = f"{100 * summary.get('confidence', 0.95):g} % interval"
    head = [
        "## Measured",
        "",
        f"Percent ({interval_said}) on test prompts; the first lines are over all sets that count.",
        "",
    ]
    table = ["| | aligned model | finetune before | this model | prompts |", "|---|---|---|---|---|"]
    return [*head, *table, *lines, ""] if lines else []


def _landscape(one: FinetuneSummary) -> list[str]:
    drawn = one.get("landscape", {})
    told = [(key, drawn[key]["visage"]) for key in ("before", "realigned") if "visage" in drawn.get(key, {})]
    if not told:
        return []
    said = ", ".join(f"{key} {v['value']:.1f} ({v['low']:.1f} to {v['high']:.1f})" for key, v in told)
    return [f"VISAGE (0 to 100, how safe it stays as its weights move): {said}.", ""]


def _gate(one: FinetuneSummary) -> list[str]:
    gate, registry = one.get("gate"), one.get("registry")
    lines = ["## Gate", "", "Passed." if gate["passed"] else "Shut: not to be served.", ""] if gate else []
    for found in gate["findings"] if gate else []:
        lines.append(f"- {'✓' if found['passed'] else '✗'} {_cell(found['requirement'])}: {_cell(found['reason'])}")
    lines += [""] if gate else []
    return lines + ([f"Registered as {registry['name']} version {registry['version']}.", ""] if registry else [])


def _lineage(summary: RunSummary, one: FinetuneSummary) -> list[str]:
    made = lineage(summary, one)
    if not made:
        return []
    lines = ["## Lineage", "", "| step | record | of |", "|---|---|---|"]
    for step in made:
        weights = f", weights SHA-256 `{step.record['identity']}`" if "identity" in step.record else ""
        lines.append(
            f"| {_cell(step.step)} | `{step.record['reference']}`{weights} | {_cell(', '.join(step.parents))} |"
        )
    code = ", ".join(dict.fromkeys(step.record["code"] for step in made))
    return [*lines, "", f"Made by safety-realign {code}.", ""]


def _cell(text: str) -> str:
    """Text that stays text in Markdown."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
