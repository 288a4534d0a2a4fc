"""The shape of `summary.json` (schema 1): what a run hands to people, to the table, to the report and to a gate.

Plain JSON types, so that a summary read from a file and one just made are the same thing. Everything optional is simply
absent; `null` is used only where a reader must see that something was looked for and not found. A rate that was not
measured is absent and never 0.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from components.errors import DataError, listed

SCHEMA = 1

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@with_config(ConfigDict(extra="forbid"))
class Interval(TypedDict):
    """A rate with its confidence interval; all in [0, 1]. `n` is the number of prompts it is taken over."""

    value: Fraction
    low: Fraction
    high: Fraction
    n: Annotated[int, Field(ge=1)]


class Rates(TypedDict, total=False):
    """One model's measurements. The first four are taken over the test sets that make headlines; `sets` has every
    set by itself, as `{set: {metric: Interval}}`, and every group of a set as `<set>/<group>` beside it."""

    asr: Interval
    """Attack success rate as published: no refusal phrase in the answer. Gibberish counts as success."""
    harmful: Interval
    """Complied and coherent, of all harmful prompts."""
    over_refusal: Interval
    """Refused, of all benign prompts."""
    task: Interval
    """Exact match, of all task prompts of this finetune."""
    sets: dict[str, dict[str, Interval]]


@with_config(ConfigDict(extra="forbid"))
class Difference(TypedDict):
    """A paired difference over the same prompts: first variant minus second, in [-1, 1], with its interval."""

    diff: Finite
    low: Finite
    high: Finite
    p: NotRequired[float]
    """Exact McNemar test, two-sided."""
    n: NotRequired[int]


class Density(TypedDict, total=False):
    """How much of a finetune's delta a mask keeps."""

    mean: float
    """Kept fraction of all masked weights: the binary mask's ones."""
    soft_mean: float
    """Mean of the soft mask over all masked weights."""
    tensors: dict[str, float]
    """tensor name -> kept fraction."""


class DeltaStatistics(TypedDict, total=False):
    """How far a finetune has moved from the aligned model."""

    norm: float
    relative_norm: float
    zero_fraction: float
    """Fraction of weights that did not move at all."""
    cosines: dict[str, float]
    """other finetune -> cosine between the two deltas; absent where one of them is zero, which has no direction."""
    tensors: dict[str, dict[str, float]]
    """tensor name -> norm, aligned_norm, zeros (share of weights that did not move)."""


@with_config(ConfigDict(extra="forbid"))
class FlippedExample(TypedDict):
    """One prompt whose verdict differs between two variants of a finetune, or whether its answer is the expected one."""

    set: str
    prompt: str
    before: str
    after: str
    before_verdict: str
    after_verdict: str


class FusedPaths(TypedDict, total=False):
    soft: str
    binary: str
    tuned: str


class AdapterSummary(TypedDict):
    """The realigned model as a LoRA adapter over the aligned one."""

    path: str
    form: Literal["soft", "binary", "tuned"]
    """Of which fused model."""
    error: Finite
    """‖Δ − B A‖ / ‖Δ‖ over all adapted tensors, Frobenius."""


class GateFinding(TypedDict):
    """What became of a requirement; figures are absent where nothing could be measured or compared."""

    requirement: str
    passed: bool
    value: Finite | None
    low: Finite | None
    high: Finite | None
    n: int
    reason: str


class GateDecision(TypedDict):
    """Whether the selected model may be served: passed only where every requirement is."""

    passed: bool
    findings: list[GateFinding]


class Figure(TypedDict):
    """A figure of a landscape; `low` and `high` are the outer ends of its intervals over directions and over prompts."""

    value: Finite
    low: Finite
    high: Finite
    n: int
    """Directions."""


class LandscapeSummary(TypedDict):
    """How safe one model stays as its weights move."""

    path: str
    """Of its `landscape.json`, which has everything."""
    scan: NotRequired[str]
    """The scan of random directions that the figures are of; absent, as they are, where the model has none."""
    visage: NotRequired[Figure]
    """0 to 100: the more, the safer."""
    width: NotRequired[Figure]
    """Of the basin, in lengths of the direction; absent in a plane."""
    depth: NotRequired[Figure]
    """100 less the ASR of the model itself, in percent."""
    area: NotRequired[Figure]
    """VISAGE with the places outside the basin counted as 0."""


class RegistryEntry(TypedDict):
    name: str
    version: str
    promoted: NotRequired[bool]
    """Whether it is in service (`champion`) now; absent where the run promotes nothing."""


class StepRecord(TypedDict):
    """Where a number comes from: the record of a step."""

    reference: str
    """`<stage>/<fingerprint>`: its directory in the workspace."""
    parents: dict[str, str]
    """role -> reference of the record that it was made from."""
    code: str
    """Version of this program, and its commit where that is known."""
    identity: NotRequired[str]
    """Of a root model: SHA-256 over its weights."""


class StepCost(TypedDict, total=False):
    """What a step took, of the attempt that made its record; what its record does not say is absent."""

    seconds: float
    prompts: int
    """Answered, of all splits and sets."""
    tokens: int
    """Generated for these answers."""
    peak_memory_bytes: int
    bytes_written: int
    """All files of the result."""


Variant = Literal["soft", "binary", "tuned"]


class FinetuneSummary(TypedDict):
    """What became of one finetune (or of one merged model)."""

    name: str
    status: Literal["done", "failed"]
    error: str | None
    """The message of what failed; None when done."""
    before: NotRequired[Rates | None]
    after_soft: NotRequired[Rates | None]
    after_binary: NotRequired[Rates | None]
    after_tuned: NotRequired[Rates]
    """Of the model with settings of its own."""
    tuned: NotRequired[dict[str, Any]]
    """Those settings: of the fusion, and under `merge` of a merge."""
    after_adapter: NotRequired[Rates]
    """Of the adapter over the aligned model."""
    adapter: NotRequired[AdapterSummary]
    controls: NotRequired[dict[str, Rates]]
    """control name (interpolation, resta, random_mask, paper_soft, paper_binary, …) -> its rates."""
    control_settings: NotRequired[dict[str, dict[str, Any]]]
    """control name -> what was chosen for it on dev, e.g. `{"alpha": 0.3}`."""
    fused: NotRequired[FusedPaths]
    selected: NotRequired[Variant | None]
    registry: NotRequired[RegistryEntry | None]
    gate: NotRequired[GateDecision]
    """Of the selected form; absent where the run has no gate."""
    landscape: NotRequired[dict[Literal["before", "between", "realigned"], LandscapeSummary]]
    """Of the finetune, of the aligned model on the way to it, of the selected form; those that were drawn."""
    pictures: NotRequired[str]
    """The page with the landscapes of the aligned model, the finetune and the selected form."""
    seconds: NotRequired[dict[str, float]]
    """stage -> wall seconds of the run that made its record."""
    records: NotRequired[dict[str, StepRecord]]
    """step -> its record."""
    cost: NotRequired[dict[str, StepCost]]
    """step -> what it took."""
    density: NotRequired[Density]
    delta: NotRequired[DeltaStatistics]
    comparisons: NotRequired[dict[str, dict[str, Difference]]]
    """`<first>_vs_<second>` -> metric -> paired difference."""
    examples: NotRequired[list[FlippedExample]]
    notes: NotRequired[list[str]]


class RunSummary(TypedDict):
    """The whole of summary.json."""

    schema: int
    run: str
    """The run's name."""
    aligned: Rates | None
    landscape: NotRequired[LandscapeSummary]
    """Of the aligned model."""
    finetunes: list[FinetuneSummary]
    merged: NotRequired[list[FinetuneSummary]]
    asked: NotRequired[dict[str, Any]]
    """What decides the numbers, of the run's config: models by name, prompt sets, judge, mask, fusion, gate, landscape."""
    seconds: NotRequired[dict[str, float]]
    """stage -> wall seconds, of the stages that run once."""
    records: NotRequired[dict[str, StepRecord]]
    """step -> its record, of the steps that run once."""
    cost: NotRequired[dict[str, StepCost]]
    """step -> what it took, of the steps that run once."""
    confidence: NotRequired[float]
    """Of the intervals; 0.95 in summaries that do not say."""
    created: NotRequired[str]
    """ISO 8601."""
    notes: NotRequired[list[str]]


@cache
def _adapter() -> TypeAdapter[RunSummary]:
    return TypeAdapter(RunSummary)


def check_summary(data: Any, *, where: str) -> RunSummary:
    """`data` as a RunSummary. Raises DataError that lists every field that does not fit; `where` names the file."""
    try:
        summary = _adapter().validate_python(data)
    except ValidationError as error:
        findings = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise DataError(f"{where} is not a run summary: {listed(findings)}; run again to write it anew") from error
    if summary["schema"] != SCHEMA:
        raise DataError(
            f"{where} has summary schema {summary['schema']}; this version reads schema {SCHEMA}. Run again."
        )
    return summary


def read_summary(path: Path) -> RunSummary:
    """Read and check a summary.json. Raises DataError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: has the run finished?") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return check_summary(data, where=str(path))


def selected_rates(one: FinetuneSummary) -> Rates | None:
    """Of the form that is selected; None where none is, or it was not measured."""
    selected = one.get("selected")
    return one.get(f"after_{selected}") if selected else None  # type: ignore[return-value]


def shown_models(summary: RunSummary) -> list[FinetuneSummary]:
    """Finetunes and merged models, in the order in which they are shown."""
    return [*summary["finetunes"], *summary.get("merged", [])]
