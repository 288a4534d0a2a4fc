"""The model card of a realigned model: what the summary says of it, as hub metadata and in words.

Metadata as in https://github.com/huggingface/hub-docs/blob/main/modelcard.md: `model-index` holds every rate of the selected
form's test sets with its dataset and split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from components.reporting.pages import METRIC_NAMES
from components.reporting.report_lineage import Made, lineage
from components.reporting.rows import compact, confidence_of, level, same_tasks
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
_ALL, _ALL_HARMFUL = "all test sets that count", "all harmful test sets that count"
"""Stand for sets together; no set can have such a name."""
_MARKUP = re.compile(r"([\\`*\[\]!|#~])")
_PLACE = re.compile(r"(?<![\w/])/[\w.~-]|~/|(?:file|sqlite):/")
"""A place on somebody's machine."""


@dataclass(frozen=True)
class Source:
    """A model that went into it."""

    role: str
    name: str
    hub: str | None
    """Its id on the hub, where that is known."""
    license: str | None
    """As its own card names it."""

    @property
    def called(self) -> str:
        """By its id on the hub, where it has one: a cache names it by a hash."""
        return self.hub or self.name


def run_card(summary: RunSummary, one: FinetuneSummary, sources: Sequence[Source], *, adapter: bool = False) -> str:
    """README.md for the selected form's directory. No place on this machine is in it. `adapter`: it is a LoRA adapter, not a
    whole model."""
    rates = selected_rates(one)
    told = [f"The {one.get('selected')} form of a safety realignment of {_made_of(sources)}.", ""]
    told += [*_rates_table(summary, one, rates), *_landscape(one), *_gate(one), *_lineage(lineage(summary, one))]
    front = _front(sources, adapter=adapter)
    return _card(summary, one, sources, front, [*_results(summary, rates or {}), *_landscape_results(one)], told)


def adapter_card(summary: RunSummary, one: FinetuneSummary, sources: Sequence[Source]) -> str:
    """README.md for the directory of the adapter that was exported from a form. Rates are its own, the gate's decision the
    form's. `sources`: the aligned model, which it goes on, first."""
    adapter, rates = one["adapter"], one.get("after_adapter")
    made = (
        f"A LoRA adapter over {_cell(sources[0].called)}, exported from the {adapter['form']} form of a safety realignment of "
        f"{_made_of(sources)}. It lacks {100 * adapter['error']:.3g} % of what that form changes (Frobenius norm)."
    )
    told = [made, "", *(_rates_table(summary, one, rates) or ["It was not measured itself.", ""])]
    gate = one.get("gate")
    if gate is not None:
        became = "passed its gate" if gate["passed"] else "did not pass its gate"
        told += [f"The {adapter['form']} form {became}; the adapter was held to none.", ""]
    told += _lineage(lineage(summary, one, ends=("export_adapter", "evaluate_adapter")))
    front = _front(sources[:1], adapter=True)
    return _card(summary, one, sources, front, list(_results(summary, rates or {})), told)


def _card(
    summary: RunSummary,
    one: FinetuneSummary,
    sources: Sequence[Source],
    front: dict[str, Any],
    results: list[dict[str, Any]],
    told: list[str],
) -> str:
    licenses = {s.license for s in sources}
    if len(licenses) == 1 and None not in licenses:
        front["license"] = licenses.pop()
    if results:
        front["model-index"] = [{"name": f"{summary['run']}-{one['name']}", "results": results}]
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---"]
    lines += [f"# {_cell(summary['run'])}: {_cell(one['name'])}, realigned", "", *told, *_notes(one)]
    if "license" not in front:
        said = "; ".join(f"{_cell(s.called)}: {_cell(s.license or 'not stated')}" for s in sources)
        lines += [f"License of what it was made from: {said}.", ""]
    return "\n".join(lines)


def _made_of(sources: Sequence[Source]) -> str:
    """`zh (finetune) towards org/aligned (aligned)`: the aligned model is the first."""
    aligned, *others = [f"{_cell(s.called)} ({_cell(s.role)})" for s in sources]
    return f"{' and '.join(others)} towards {aligned}" if others else aligned


def _front(bases: Sequence[Source], *, adapter: bool) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    known = list(dict.fromkeys(s.hub for s in bases if s.hub is not None))
    if known:
        front |= {"base_model": known, "base_model_relation": "adapter" if adapter else "merge"}
    front["tags"] = ["realign", "safety", *([] if adapter else ["merge"])]
    return front


def _results(summary: RunSummary, rates: Rates) -> Iterator[dict[str, Any]]:
    """A result for each dataset: of the headline rates, then of every set (groups are left to the summary)."""
    overall = [_metric(m, rates[m], summary) for m in _SHOWN if m in rates]  # type: ignore[literal-required]
    if overall:
        yield _result(_ALL, {"type": _ALL, "name": _ALL}, overall)
    for name, metrics in rates.get("sets", {}).items():
        if "/" not in name and metrics:
            measured = [_metric(metric, interval, summary) for metric, interval in metrics.items()]
            yield _result(name, _dataset(summary, name), measured)


def _landscape_results(one: FinetuneSummary) -> Iterator[dict[str, Any]]:
    drawn = one.get("landscape", {}).get("realigned")
    if drawn is not None and "visage" in drawn:
        visage = drawn["visage"]
        args = {"low": visage["low"], "high": visage["high"], "directions": visage["n"]}
        metric = {"type": "visage", "value": visage["value"], "name": "VISAGE, 0 to 100", "args": args}
        yield _result("landscape", {"type": _ALL_HARMFUL, "name": _ALL_HARMFUL}, [metric])


def _result(name: str, dataset: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    task = {"type": "text-generation", "name": f"safety realignment, {name}"}
    return {"task": task, "dataset": {**dataset, "split": "test"}, "metrics": metrics}


def _metric(metric: str, interval: Interval, summary: RunSummary) -> dict[str, Any]:
    args = {"low": interval["low"], "high": interval["high"], "n": interval["n"], "confidence": confidence_of(summary)}
    return {"type": metric, "value": interval["value"], "name": _TITLES.get(metric, metric), "args": args}


def _dataset(summary: RunSummary, name: str) -> dict[str, Any]:
    """What the hub calls it, where it lies there; else the set's name."""
    told = summary.get("asked", {}).get("sets", {}).get(f"test {name}", {})
    found = {"type": told.get("hub") or name, "name": name}
    for key, given in (("config", "config"), ("revision", "revision")):
        if told.get(given):
            found[key] = told[given]
    return found


def _rates_table(summary: RunSummary, one: FinetuneSummary, rates: Rates | None) -> list[str]:
    """The aligned model's `task` over other tasks than this model's own stands nowhere: no pair of them says anything."""
    if not rates:
        return []
    before, aligned = one.get("before") or {}, summary["aligned"] or {}
    lines = []
    for metric in _SHOWN:
        paired = metric != "task" or same_tasks(aligned, rates)
        cells = [found.get(metric) for found in (aligned if paired else {}, before, rates)]
        if any(cells):
            said = [METRIC_NAMES[metric], *(compact(c) for c in cells), str(cells[-1]["n"] if cells[-1] else "–")]  # type: ignore[index, arg-type]
            lines.append(f"| {' | '.join(said)} |")
    for name, metrics in rates.get("sets", {}).items():
        for metric, interval in metrics.items():
            if metric in _SHOWN and "/" not in name:
                others = [found.get("sets", {}).get(name, {}).get(metric) for found in (aligned, before)]
                said = [
                    f"{METRIC_NAMES[metric]}, set {_cell(name)}",
                    *map(compact, [*others, interval]),
                    str(interval["n"]),
                ]
                lines.append(f"| {' | '.join(said)} |")
    percent = f"Percent ({level(confidence_of(summary))} interval)"
    head = [
        "## Measured",
        "",
        f"{percent} on test prompts; the first lines are over all sets that count.",
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
    return lines + ([f"Registered as {_cell(registry['name'])} version {registry['version']}.", ""] if registry else [])


def _notes(one: FinetuneSummary) -> list[str]:
    """Those that name places on the machine are counted."""
    notes = one.get("notes", [])
    told = [f"- {_cell(note)}" for note in notes if not _PLACE.search(note)]
    if len(told) < len(notes):
        told.append(f"- {len(notes) - len(told)} more, which name files of the machine, are in the run's summary.json.")
    return ["## Notes", "", *told, ""] if told else []


def _lineage(made: Sequence[Made]) -> list[str]:
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
    """Text that stays text in Markdown, on one line."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split())).replace("<", "&lt;")
