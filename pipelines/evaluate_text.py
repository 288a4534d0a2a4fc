"""What `realign evaluate` prints of rates and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.errors import ConfigError
from components.evaluation.compare import compare_groups
from components.evaluation.gates import Decision
from components.evaluation.metrics import holm, how_many, paired_difference
from components.evaluation.outcomes import HEADLINES, Outcome, grouped
from components.evaluation.prompts import PromptSet
from components.reporting.comparison import Compared
from components.reporting.rows import level
from components.reporting.schema import Difference, Rates
from pipelines.sections import EvaluationSection

_SHOWN_RATES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.5)


def how_many_lines(half_width: float, confidence: float = 0.95) -> list[str]:
    """For several rates the number of prompts that shows them to ± `half_width`. Raises ConfigError for no width."""
    if not 0 < half_width < 0.5:
        raise ConfigError(f"--how-many {half_width:g}: give half an interval's width between 0 and 0.5, like 0.03")

    def precise(value: float, low: float, high: float) -> bool:
        return max(high - value, value - low) <= half_width

    lines = [f"prompts for ±{half_width:g} at {level(confidence)} (Wilson's interval), by the rate that is shown"]
    return lines + [f"  {rate:4.0%}  {how_many(precise, rate, confidence=confidence):8,}" for rate in _SHOWN_RATES]


def told_lines(
    settings: EvaluationSection,
    sets: Sequence[PromptSet],
    rates: Mapping[str, Rates],
    outcomes: Mapping[str, dict[str, list[Outcome]]],
    others: Sequence[Compared],
    decisions: Mapping[str, Decision],
) -> list[str]:
    """What is printed: rates, differences to the first model, tasks, groups, the gate."""
    width = max(map(len, rates))
    lines = [" " * width + "".join(f"  {metric:>20}" for metric in HEADLINES)]
    for name, found in rates.items():
        cells = [_interval(found.get(metric)) for metric in HEADLINES]
        lines.append(f"{name:{width}}" + "".join(f"  {cell:>20}" for cell in cells))
    first = next(iter(rates))
    for other in others:
        lines += [
            f"{other.name} − {first}: {metric} {_difference(one)}, p {other.adjusted[metric]:.2g} "
            f"(McNemar, Holm over {len(other.differences)})"
            for metric, one in other.differences.items()
        ]
    lines += _set_lines(sets, rates)
    lines += _task_lines(settings, rates, outcomes)
    lines += group_lines(sets, rates, outcomes, confidence=settings.confidence)
    lines += [note for one in sets for note in one.notes]
    for name, decision in decisions.items():
        lines.append(f"gate, {name}: {'passed' if decision.passed else 'shut'}")
        lines += [f"  {'✓' if one.passed else '✗'} {one.requirement}: {one.reason}" for one in decision.findings]
    return lines


def _set_lines(sets: Sequence[PromptSet], rates: Mapping[str, Rates]) -> list[str]:
    """Every set's own rate of each model; a star where it counts above."""
    lines = ["by set (* counts in the rates above)"]
    width = max(len(one.name) for one in sets)
    for one in sets:
        found = [measured["sets"][one.name] for measured in rates.values()]
        [metric] = [metric for metric in ("asr", "over_refusal", "task") if metric in found[0]]
        cells = "  ".join(f"{name} {_interval(cell[metric])}" for name, cell in zip(rates, found, strict=True))
        star = "*" if one.counts else " "
        lines.append(f"  {one.name:{width}}{star} {found[0][metric]['n']:>6,}  {metric:12}  {cells}")
    return lines


def _task_lines(
    settings: EvaluationSection, rates: Mapping[str, Rates], outcomes: Mapping[str, dict[str, list[Outcome]]]
) -> list[str]:
    """Each capability task of each model, the others beside the first."""
    first, *others = rates
    tasks = [task.name for task in settings.capability.tasks] if settings.capability else []
    apart: dict[str, dict[str, Difference]] = {
        name: {
            task: paired_difference(
                *([o.exact is True for o in outcomes[one][task]] for one in (name, first)),
                confidence=settings.confidence,
            )
            for task in tasks
        }
        for name in others
    }
    lines = []
    for task in tasks:
        lines.append(f"{task}, {first}: {_interval(rates[first]['sets'][task]['task'])}")
        for name in others:
            adjusted = holm({one: found["p"] for one, found in apart[name].items()})
            lines.append(
                f"{task}, {name}: {_interval(rates[name]['sets'][task]['task'])}, {_difference(apart[name][task])}, "
                f"p {adjusted[task]:.2g} (McNemar, Holm over {len(tasks)})"
            )
    return lines


def group_lines(
    sets: Sequence[PromptSet],
    rates: Mapping[str, Rates],
    outcomes: Mapping[str, Mapping[str, list[Outcome]]],
    *,
    confidence: float,
) -> list[str]:
    """A block for each model and set with groups; the p of a block's differences are adjusted for all of them together."""
    first = next(iter(rates))
    lines: list[str] = []
    for one in sets:
        groups = list(grouped(outcomes[first][one.name]))
        for model in rates if groups else ():
            measured = {group: rates[model]["sets"][f"{one.name}/{group}"] for group in groups}
            metrics = [metric for metric in HEADLINES if metric in measured[groups[0]]]
            apart: dict[str, dict[str, Difference]] = {}
            if model != first:
                own, other = outcomes[model][one.name], outcomes[first][one.name]
                apart = compare_groups(one, own, other, confidence=confidence)
            adjusted = holm({f"{g}/{m}": found["p"] for g, some in apart.items() for m, found in some.items()})
            against = f", − {first} (p: McNemar, Holm over {len(adjusted)})" if apart else ""
            lines.append(f"{one.name} by group, {model}: {', '.join(metrics)}{against}")
            width = max(map(len, groups))
            for group in groups:
                cells = [f"{measured[group][metrics[0]]['n']:>6,}"]
                for metric in metrics:
                    found = measured[group][metric]
                    cells.append(f"{found['value']:>7.1%} ({found['low']:.1%}–{found['high']:.1%})".ljust(24))
                    if apart:
                        p = adjusted[f"{group}/{metric}"]
                        cells.append(f"{apart[group][metric]['diff']:+.1%}, p {p:.2g}".ljust(18))
                lines.append(f"  {group:{width}}" + "  ".join(cells).rstrip())
    return lines


def _interval(found: Any) -> str:
    return "" if found is None else f"{found['value']:.1%} ({found['low']:.1%}–{found['high']:.1%})"


def _difference(found: Difference) -> str:
    return f"{found['diff']:+.1%} ({found['low']:+.1%} to {found['high']:+.1%})"
