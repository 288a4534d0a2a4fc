"""A plan as people read it, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from components.masks.memory import Place, RankMemory
from pipelines.config import RunConfig
from pipelines.placement import flow, size
from pipelines.resources import Plan


def plan_json(found: Plan, config: RunConfig) -> str:
    """One object; sizes in bytes, times in seconds (null: not known)."""
    content: dict[str, Any] = {
        "schema": 1,
        "run": config.name,
        "fits": not found.problems,
        "cluster": found.cluster.model_dump(),
        "rates": found.rates.model_dump(),
        "total": {"host": found.host, "disk": found.disk, "scratch": found.scratch, "seconds": found.seconds},
        "stages": [asdict(stage) for stage in found.stages],
        "ranks": {name: [asdict(item) for item in memory.items] for name, memory in found.memory.items()},
        "proposal": _proposal(found, config),
        "problems": found.problems,
        "notes": found.notes,
    }
    return json.dumps(content, indent=1) + "\n"


def _proposal(found: Plan, config: RunConfig) -> dict[str, Any] | None:
    proposal = found.proposal
    if proposal is None:
        return None
    return {
        "execution": proposal.changes(config.execution.mask),
        "mask": proposal.execution.model_dump(mode="json"),
        "device": proposal.need.device,
        "host": proposal.need.host,
        "scratch": proposal.need.disk,
    }


def plan_lines(found: Plan, config: RunConfig) -> Iterator[str]:
    """The table, what one rank holds, what does not fit, and what would."""
    yield f"{config.name} on {_cluster(found)}"
    yield ""
    yield from _table(found)
    yield f"disk: {size(found.disk)} stay, {size(found.scratch)} more while it runs; time: about {_time(found.seconds)}"
    if found.memory:
        yield from _rank(*max(found.memory.items(), key=lambda pair: sum(map(pair[1].peak, _NAMES))))
    yield ""
    yield from (f"DOES NOT FIT  {problem}" for problem in found.problems)
    if found.proposal is not None:
        changes = found.proposal.changes(config.execution.mask)
        takes = found.proposal.need
        told = flow(changes) if changes else "as configured"
        yield f"least costly that fits: {told} ({size(takes.host)} of host memory, {size(takes.device)} of each GPU)"
    yield from found.notes
    yield "Estimates: memory of mask training to about a quarter, times to a factor of two or three (small models take longer)."


def _rank(name: str, memory: RankMemory) -> Iterator[str]:
    """What one rank of the largest training holds."""
    for place, called in _NAMES.items():
        if memory.peak(place):
            yield ""
            yield f"{name}, one rank's {called}: {size(memory.peak(place))} at its peak"
            yield from (f"  {size(item.nbytes):>12}  {item.what}" for item in memory.worst(place)[:8])


_NAMES: dict[Place, str] = {"device": "GPU memory", "host": "host memory", "disk": "offload files"}
_HEADERS = ("step", "host memory", "GPU memory", "disk", "scratch", "CPUs", "time")


def _table(found: Plan) -> Iterator[str]:
    """The same step of several models on one line: how many, and what the largest takes."""
    groups: dict[str, list[Any]] = {}
    for one in found.stages:
        groups.setdefault(one.id.rsplit("/", 1)[-1], []).append(one)
    rows = [_HEADERS]
    for name, members in groups.items():
        times = [m.seconds for m in members]
        rows.append((
            f"{name} × {len(members)}" if len(members) > 1 else name,
            size(max(m.host for m in members)),
            size(max(m.device for m in members)) if any(m.device for m in members) else "",
            size(max(m.disk for m in members)) if any(m.disk for m in members) else "",
            size(max(m.scratch for m in members)) if any(m.scratch for m in members) else "",
            str(max(m.cpus for m in members)),
            _time(None if None in times else max(times)),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADERS))]
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        yield "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def _cluster(found: Plan) -> str:
    cluster = found.cluster
    nodes = f"{cluster.nodes} nodes, each with " if cluster.nodes > 1 else ""
    gpus = f", {cluster.gpus} GPUs of {size(cluster.gpu_memory)}" if cluster.gpus else ", no GPU"
    return f"{nodes}{cluster.cpus} CPUs, {size(cluster.memory)} of memory{gpus}; {size(cluster.disk)} of disk free"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
