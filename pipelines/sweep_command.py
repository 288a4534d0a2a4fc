"""`realign sweep`: the settings that keep most skill at the demanded safety, found on dev sets, then run in full."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from components.errors import ConfigError, EvaluationError, GateError, RealignError, StorageError, TrackingError
from components.evaluation.execution import EvaluationExecution
from components.leases import Lease, LeaseLost, acquire, try_acquire
from components.reporting.schema import Interval, read_summary
from components.storage import Workspace, storage_errors, write_atomic
from components.sweeps.result import SweepResult, sweep_result
from components.sweeps.settings import SweepSettings
from components.sweeps.space import tuning_of
from pipelines.config import RunConfig, load_config
from pipelines.display import progress_display, teller
from pipelines.driver import RunState, run_stages
from pipelines.place import settled
from pipelines.preflight import require_memory
from pipelines.roots import find_roots
from pipelines.run import realign
from pipelines.sweep_section import defaults_of, sweep_problems
from pipelines.sweep_text import front_lines, lines_against_own
from pipelines.sweep_tracking import track_sweep
from pipelines.sweep_winner import TUNED, tuned_yaml
from pipelines.sweeps import SWEEPS, Target, is_needed, target_of
from ray_jobs.submit import processes
from ray_jobs.sweep_trials import Sweeping, sweep_target

RESULT, FRONT = "sweep.json", "front.csv"


def sweep_command(
    path: Path, root: Path | None = None, *, trials: int | None = None, actors: int | None = None, full: bool = True
) -> list[str]:
    """Sweep every target of a run config, then run it with what was found. Returns a line for each thing that failed.

    `trials`, `actors`: in place of the config's. Raises RealignError for what keeps all of it from starting, and where no
    target could be swept; GateError as `realign` does.
    """
    config = _with_section(load_config(path), path, trials)
    workspace = Workspace(root or Path("runs") / config.name)
    workspace.prepare()
    settled(config.tracking.uri, workspace.root)
    state = _prepared(config, workspace)
    results, failed = _swept_all(state, actors)
    if not results:
        raise EvaluationError("nothing was swept:\n" + "\n".join(failed))
    written = _write(state, results)
    for name, result in results.items():
        sys.stdout.write("\n".join(front_lines(result)) + "\n\n")
        if not result["picked"]["meets"]:
            failed.append(f"{name}: no candidate meets every demand")
    sys.stdout.write("".join(f"{one}\n" for one in written.values()))
    try:
        artifacts = [one for name, one in written.items() if name != TUNED]
        track_sweep(config, workspace.root, results, artifacts=artifacts)
    except TrackingError as error:
        failed.append(f"tracking: {error}")
    for line in failed:
        sys.stderr.write(f"realign: {line}\n")
    return failed + (_run_in_full(written[TUNED], workspace) if full else [])


def _with_section(config: RunConfig, path: Path, trials: int | None) -> RunConfig:
    """The config with a section `sweep`, its own or the usual one."""
    section = config.sweep or SweepSettings()
    section = section if trials is None else section.model_copy(update={"trials": trials})
    config = config.model_copy(update={"sweep": section})
    if problems := sweep_problems(config):
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return config


def _prepared(config: RunConfig, workspace: Workspace) -> RunState:
    """Models loaded and masks trained, as far as that was not done."""
    roots = find_roots(config, workspace.root / ".identities")
    require_memory(config, workspace, roots)
    with progress_display(workspace) as watch:
        return run_stages(config, workspace, roots, watch, is_needed, noted=False)


def _swept_all(state: RunState, actors: int | None) -> tuple[dict[str, SweepResult], list[str]]:
    """By target; and a line for each that failed. A failed one never stops the others."""
    targets, results, failed = [], dict[str, SweepResult](), list[str]()
    for name in state.config.targets:
        try:
            targets.append(target_of(state, name))
        except RealignError as error:
            failed.append(f"{name}: {error}")
    if not targets:
        return results, failed
    how = _execution(state.config, actors, targets[0].sweeping)
    with processes(how):
        for one in targets:
            try:
                results[one.name] = _swept(one, how, state.config)
            except RealignError as error:
                failed.append(f"{one.name}: {error}")
    return results, failed


def _execution(config: RunConfig, actors: int | None, sweeping: Sweeping) -> EvaluationExecution:
    how = config.execution.sweep
    if actors is not None:
        return how.model_copy(update={"actors": actors})
    if "actors" in how.model_fields_set or how.device != "cpu":
        return how
    return how.model_copy(update={"actors": _default_actors(config, sweeping)})


def _default_actors(config: RunConfig, sweeping: Sweeping) -> int:
    """On the CPU as many as there are CPUs, and room in the memory for: each has a model and a judge of its own."""
    import torch

    from components.evaluation.judges.models import resident_bytes
    from components.limits import available_cpus, available_memory
    from components.masks.memory import PROCESS_HOST

    source = sweeping.owner.source
    dtype: torch.dtype = getattr(torch, sweeping.evaluation.dtype)
    weights: int = sum(source.spec(name).numel for name in source.names()) * dtype.itemsize
    each = PROCESS_HOST + weights + resident_bytes(sweeping.evaluation.judge)
    cpus = (config.execution.workers or available_cpus()) // config.execution.threads
    return max(1, min(cpus, sweeping.sweep.trials, available_memory() // each))


def _swept(one: Target, how: EvaluationExecution, config: RunConfig) -> SweepResult:
    """A target's candidates, tried by one process at a time in a workspace. Raises StorageError when another one took over."""
    sweeping = one.sweeping
    with _lease(one) as lease:
        started_ms = one.started_ms()
        try:
            scored = sweep_target(
                sweeping,
                how,
                state_dir=one.directory,
                earlier=one.earlier,
                keep_going=lease.check,
                progress=teller(one.name, "candidates"),
            )
        except LeaseLost as error:
            raise StorageError(f"{error}, for this one was silent too long; sweep again to go on") from error
    return sweep_result(
        one.name,
        scored,
        sweep=sweeping.sweep,
        defaults=sweeping.defaults,
        own=sweeping.own,
        prompts={name: len(asked) for name, asked in sweeping.questions.items()},
        started_ms=started_ms,
        confidence=config.evaluation.confidence,
        interval=config.evaluation.interval,
    )


def _lease(one: Target) -> Lease:
    """Of a target's candidates; while another process sweeps them this one waits, and says so."""
    path = one.directory / ".lease"
    with storage_errors(one.directory):
        lease = try_acquire(path)
        if lease is None:
            sys.stderr.write(f"realign: {one.name}: another process sweeps it in this workspace; waiting for its end\n")
            lease = acquire(path, done=lambda: False)
    assert lease is not None
    return lease


def _write(state: RunState, results: Mapping[str, SweepResult]) -> dict[str, Path]:
    """Everything that is to be kept, by file name. Raises StorageError."""
    from components.reporting.sweep_plot import write_front

    out = state.workspace.root / SWEEPS
    tuned = {
        name: tuning_of(one["picked"]["candidate"], defaults_of(state.config, name)) for name, one in results.items()
    }
    texts = {
        RESULT: json.dumps({"schema": 1, "run": state.config.name, "targets": list(results.values())}, indent=1) + "\n",
        FRONT: _table(results),
        TUNED: tuned_yaml(state.config, tuned),
    }
    with storage_errors(out):
        for name, text in texts.items():
            write_atomic(out / name, text)
    pictures = {f"{name}.png": out / f"{name}.png" for name in results}
    for name, result in results.items():
        write_front(result, out / f"{name}.png")
    return {name: out / name for name in texts} | pictures


def _table(results: Mapping[str, SweepResult]) -> str:
    """The fronts and the run's own settings, a row each."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for one in results.values() for name in one["picked"]["rates"]))
    columns = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["target", "number", "on_front", "own", "picked", "meets", *columns, "candidate"])
    for name, result in results.items():
        front, own = [one["number"] for one in result["front"]], [one["number"] for one in result["own"]]
        rows = {one["number"]: one for one in (*result["front"], *result["own"], result["picked"])}
        for number, one in sorted(rows.items()):
            rates = [_cell(one["rates"].get(name), key) for name in names for key in ("value", "low", "high")]
            said = [number in front, number in own, number == result["picked"]["number"], one["meets"]]
            writer.writerow([name, number, *map(str, said), *rates, json.dumps(one["candidate"])])
    return text.getvalue()


def _cell(rate: Interval | None, key: str) -> float | str:
    return "" if rate is None else rate[key]  # type: ignore[literal-required]


def _run_in_full(tuned: Path, workspace: Workspace) -> list[str]:
    """As `realign run` does; then how the winners do against the run's own settings, where nobody chose by the prompts."""
    shut: GateError | None = None
    try:
        failed = realign(load_config(tuned), workspace.root)
    except GateError as error:
        shut = error
    for line in lines_against_own(read_summary(workspace.root / "summary.json")):
        sys.stdout.write(f"{line}\n")
    if shut is not None:
        raise shut
    return failed
