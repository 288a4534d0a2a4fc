"""`realign doctor`: whether this machine, the workspace and the services around it are fit for a run, each with its remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from components.errors import RealignError

if TYPE_CHECKING:
    from pipelines.config import RunConfig

Grade = Literal["ok", "note", "wrong"]
_SIGNS: dict[Grade, str] = {"ok": "✓", "note": "!", "wrong": "✗"}


class Finding(NamedTuple):
    """What was looked at, how it is, and what to do where it is not as it should be.

    `note`: a run works, but less well or not in every way; `wrong`: a run would fail.
    """

    grade: Grade
    what: str
    found: str
    remedy: str = ""


Check = Callable[[], Sequence[Finding]]


def examine(config: Path | None, workspace: Path | None, uri: str | None) -> list[Finding]:
    """Look at everything; what goes wrong with one check is a finding and keeps no other from being made.

    `config`: a run config, whose needs are looked at, too. `workspace`: by default that of the config, or runs/. `uri`: of
    the tracking server; by default the config's, or the environment's MLFLOW_TRACKING_URI.
    """
    from pipelines.doctor_disk import disk_findings
    from pipelines.doctor_machine import (
        device_findings,
        limit_findings,
        package_findings,
        tool_findings,
    )
    from pipelines.doctor_services import Services

    loaded, findings = _config(config)
    root = workspace or (Path("runs") / loaded.name if loaded is not None else Path("runs"))
    services = Services(loaded, root, uri)
    checks: dict[str, Check] = {
        "packages": package_findings,
        "tools": tool_findings,
        "devices": device_findings,
        "limits": limit_findings,
        "workspace": lambda: disk_findings(root),
        "ray": services.ray,
        "tracking": services.tracking,
        "tokens": services.tokens,
        "judges": services.judges,
    }
    for what, check in checks.items():
        try:
            findings += check()
        except RealignError as error:
            findings.append(wrong(what, error))
        except Exception as error:  # noqa: BLE001 - a check that breaks says something of the machine, and others go on
            remedy = "this check broke before it could tell: see that what it names works by itself"
            findings.append(Finding("wrong", what, f"{type(error).__name__}: {error}", remedy))
    return findings


def wrong(what: str, error: RealignError) -> Finding:
    """Of an error, whose message says after its last semicolon what to do."""
    found, _, remedy = str(error).rpartition("; ")
    return Finding("wrong", what, found, remedy) if found else Finding("wrong", what, remedy, "mend it and look again")


def doctor_lines(findings: Sequence[Finding]) -> list[str]:
    """For a person: a line for each finding, its remedy below it, and a last line that sums up."""
    wide = max(len(one.what) for one in findings)
    lines = []
    for one in findings:
        lines.append(f"{_SIGNS[one.grade]} {one.what:{wide}}  {one.found}")
        if one.remedy:
            lines.append(f"  {'':{wide}}  → {one.remedy}")
    wrong, notes = (sum(one.grade == grade for one in findings) for grade in ("wrong", "note"))
    if wrong:
        return [*lines, "", f"{wrong} wrong, {notes} to know of: a run would fail"]
    return [*lines, "", f"nothing wrong, {notes} to know of" if notes else "nothing wrong"]


def doctor_json(findings: Sequence[Finding]) -> str:
    """For a program."""
    return json.dumps({"fit": fit(findings), "findings": [one._asdict() for one in findings]}, indent=1)


def fit(findings: Sequence[Finding]) -> bool:
    """Whether nothing is wrong."""
    return all(one.grade != "wrong" for one in findings)


def _config(path: Path | None) -> tuple[RunConfig | None, list[Finding]]:
    if path is None:
        return None, []
    from pipelines.config import load_config

    try:
        loaded = load_config(path)
    except RealignError as error:
        return None, [Finding("wrong", "config", str(error), "correct it; what it would need is not looked at")]
    return loaded, [Finding("ok", "config", f"{path}: run {loaded.name}, {len(loaded.finetunes)} finetunes")]
