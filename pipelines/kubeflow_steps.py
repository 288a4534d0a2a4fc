"""What the steps of the Kubeflow pipeline do, as ordinary functions: submit a part of the run as a job of the Ray cluster and
pass on what became of it.

An *item* travels through the steps of one finetune, merge or run: its name, which nodes of the graph are not to be had, and
what went wrong. It stays small where all goes well, for the items of all models together travel as one argument.

A failed stage is a status, never an exception: one that raises would keep Kubeflow from joining the others. What raises is a
fault that another try may mend (the head is away), and Kubeflow tries again; the job is found again by its id.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.errors import ClusterAwayError, ClusterError, ConfigError, RealignError, listed
from pipelines.config import RunConfig, load_config
from pipelines.graph import expand
from pipelines.parts import LOST, Parts, narrowed, parts_of, to_do
from ray_jobs.jobs import Job, JobEnd, run_job

CONFIG = Path("config")
"""What messages call the config that a pipeline carries."""
PROGRAM = "realign"
"""On the Ray pods."""
_JOB_TRIES = 3
"""How often a job is begun that fails without an answer: its driver was killed, or lost with the head."""
_LONGEST_LINE = 1000
"""Characters of an error; the log of its step has all of it."""


Item = dict[str, Any]
"""What steps hand on, as `_item` makes it. Plain JSON; Kubeflow makes floats of numbers, so there are none."""


@dataclass(frozen=True)
class Place:
    """The parameters that every step has."""

    run: str
    """Id of the pipeline run."""
    config: str
    """Text of the run config; its paths are those of the cluster."""
    finetunes: str
    """Names, with commas between, of those that are wanted; empty: all."""
    workspace: str
    ray_address: str
    pending_seconds: float
    """How long a stage may wait for a node; 0: as the config says."""

    @property
    def text(self) -> str:
        """Of the config that is run."""
        return narrowed(self.config, self.finetunes)

    def loaded(self) -> RunConfig:
        return load_config(CONFIG, far=self.text)


def jobs_of_run(run: str) -> str:
    """What the ids of all jobs of a pipeline run begin with."""
    return f"realign-{_hash(run)[:12]}-"


def submission_id(run: str, of: str, steps: Sequence[str]) -> str:
    """The id of a step's job: the same at every try, another in every pipeline run."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join((of or "run", *steps)))[:60]
    return f"{jobs_of_run(run)}{readable}-{_hash(json.dumps([run, of, *steps]))[:8]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _ended(place: Place, of: str, steps: Sequence[str], *, lost: Sequence[str] = (), tracked: bool = False) -> JobEnd:
    """Run a part of the run as a job, to its end. Raises ClusterAwayError; what else the cluster refuses has failed."""
    command = [PROGRAM, "step", "-", "--workspace", place.workspace, "--steps", ",".join(steps)]
    command += ["--of", of] if of else []
    command += ["--lost", ",".join(lost)] if lost else []
    command += ["--patience", str(place.pending_seconds)] if place.pending_seconds else []
    # Of a tracking server's run, where Kubeflow's plugin has made one for this step. An id means nothing on another server.
    names = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI") if tracked and os.environ.get("MLFLOW_RUN_ID") else ()
    job = Job(
        address=place.ray_address,
        entrypoint=shlex.join(command),
        submission_id=submission_id(place.run, of, steps),
        env={"REALIGN_CONFIG": place.text} | {name: os.environ[name] for name in names if name in os.environ},
    )
    try:
        for _ in range(_JOB_TRIES):
            end = run_job(job)
            if end["answer"] or end["status"] != "failed":
                break
    except ClusterAwayError:
        raise
    except ClusterError as error:
        return {"status": "failed", "answer": {}, "error": str(error)}
    return end


def plan(place: Place, compiled: str) -> list[Item]:
    """Load the aligned model; an item for each finetune. `compiled`: what the pipeline has, as `parts_json` wrote it.

    Raises ConfigError for a config that cannot be run, or not by this pipeline.
    """
    config, has = place.loaded(), _parts(compiled)
    asked = parts_of(config)
    lacking = has.lacking(asked)
    if asked.mode != has.mode or lacking:
        stages = f"stages that the pipeline does not have: {', '.join(lacking)}"
        what = stages if asked.mode == has.mode else f"mode: {asked.mode}"
        raise ConfigError(
            f"this config asks for {what}; it was compiled for another one: `realign pipeline compile` makes the right one"
        )
    end = _ended(place, "", ["plan"])
    if "finetunes" not in end["answer"]:
        raise RealignError(end["error"])
    lost = _lost(end["answer"].get("nodes", {}))
    return [_item(one["name"], lost, [end["error"]]) for one in end["answer"]["finetunes"]]


def parts_json(parts: Parts) -> str:
    return json.dumps(asdict(parts))


def _parts(text: str) -> Parts:
    found = json.loads(text)
    return Parts(found.pop("mode"), **{place: tuple(map(tuple, levels)) for place, levels in found.items()})


def run_stages(place: Place, stages: Sequence[str], item: Item) -> Item:
    """Run stages for an item's model, or for the run: those that have anything to do and do not stand on what failed. Where
    there are none, there is no job."""
    name, lost, errors = str(item["name"]), dict(item.get("lost", {})), list(item.get("errors", ()))
    nodes = expand(place.loaded(), far=True)
    mine = [n for n in nodes if (n.finetune or "") == name and n.step.kind == "stage" and n.step.stage in stages]
    left = to_do(nodes, lost, name or None, stages)
    known = sorted(lost)
    lost |= {node.id: "skipped" for node in mine if node not in left}
    if not left:
        said = "nothing to do" if not mine else "skipped: it stands on what failed"
        print(f"realign: {name or 'the run'}: {', '.join(stages)}: {said}", flush=True)
        return _item(name, lost, errors)
    wanted = [stage for stage in stages if any(node.step.stage == stage for node in left)]
    end = _ended(place, name, wanted, lost=known)
    status = "done" if end["status"] == "done" else "failed"
    found: dict[str, str] = end["answer"].get("nodes") or {node.id: status for node in left}
    return _item(name, lost | _lost(found), [*errors, end["error"]])


def _lost(nodes: Mapping[str, str]) -> dict[str, str]:
    return {name: status for name, status in nodes.items() if status in LOST}


def join(place: Place, stages: Sequence[str], ended: Sequence[Item]) -> list[Item]:
    """What stands on all finetunes, once they have ended. An item for each merge, or where there are none, for the run."""
    lost = {name: status for item in ended for name, status in item["lost"].items()}
    together = _item("", lost, [line for item in ended for line in item["errors"]])
    if stages:
        together = run_stages(place, stages, together)
    names = [merge.name for merge in place.loaded().merges] or [""]
    return [_item(name, together["lost"], together["errors"]) for name in names]


def gate(place: Place, items: Sequence[Item], metrics: Any, table: Path) -> dict[str, Any]:
    """Decide the gates and write the summary, whatever became of the stages.

    Returns `passed` (target -> passed, shut, or none where nothing was decided) and `failed` (a line for each thing that went
    wrong).

    Args:
        metrics: a dsl.Metrics, which gets the headline rates as `<target>/after_soft/asr`.
        table: a Markdown file.
    """
    end = _ended(place, "", ["gate"])
    answer = end["answer"]
    errors = _once([*(line for item in items for line in item["errors"]), end["error"]])
    for target, rates in answer.get("rates", {}).items():
        for name, value in rates.items():
            if name.count("/") == 1 and not name.endswith(("_low", "_high")):  # the table and the report have the rest
                metrics.log_metric(f"{target}/{name}", value)
    words = {True: "passed", False: "shut", None: "none"}
    passed = {target: words[found] for target, found in answer.get("passed", {}).items()}
    found = [f"- {target}: {_finding(one)}" for target in _shut(passed) for one in answer["findings"].get(target, ())]
    sections = [answer.get("table", ""), _section("Gate", found), _section("Errors", [f"- {one}" for one in errors])]
    table.write_text("\n".join(section for section in sections if section) or "There is nothing to show.\n")
    return {"passed": passed, "failed": errors}


def _shut(passed: Mapping[str, str]) -> list[str]:
    return [target for target, found in passed.items() if found == "shut"]


def _finding(found: Any) -> str:
    """A finding of the gate: a line, or what `components.reporting.schema.GateFinding` has."""
    return found if isinstance(found, str) else f"{found['requirement']}: {found['reason']}"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines, ""]) if lines else ""


def publish(place: Place, decided: Mapping[str, Any], report: Path, summary: Path, links: Path) -> dict[str, Any]:
    """Track, register, promote, and bring report and summary here; `links` is a Markdown file with what was registered where.
    What failed is in the answer, and raised by `verdict` when all of it is there to see."""
    end = _ended(place, "", ["publish"], tracked=True)
    answer = end["answer"]
    files = {name: gzip.decompress(base64.b64decode(packed)) for name, packed in answer.get("files", {}).items()}
    report.write_bytes(files.get("report.html", b"<p>There is no report: see the log of this step.</p>\n"))
    summary.write_bytes(files.get("summary.json", b"{}\n"))
    address = answer.get("mlflow")
    lines = [
        f"[The run in MLflow]({address})"
        if address
        else "Tracked in a file of the workspace, which has no page to link to.",
        "",
    ]
    for target, entry in answer.get("registered", {}).items():
        became = {True: ", in service (champion)", False: ", not promoted"}.get(entry.get("promoted"), "")
        lines.append(f"- {target}: {entry['name']} version {entry['version']}{became}")
    links.write_text("\n".join(lines) + "\n")
    # What the gates decided, `verdict` says itself; where they could not be asked, the answer has it.
    shut = "" if decided["passed"] else answer.get("shut", "")
    told = [*answer.get("failed", ()), shut] if "failed" in answer else [*decided["failed"], end["error"]]
    return {"passed": decided["passed"], "failed": _once(told)}


def verdict(published: Mapping[str, Any]) -> None:
    """Fail the pipeline's run, last of all, where anything failed or a gate is shut. Raises RealignError with every line."""
    shut = _shut(published["passed"])
    lines = [*published["failed"], *([f"the gate is shut for {', '.join(shut)}"] if shut else [])]
    if lines:
        raise RealignError(listed(lines, limit=50))


def _item(name: str, lost: Mapping[str, str], errors: Sequence[str]) -> Item:
    """
    Args:
        name: of a finetune or merge; empty for the run.
        lost: node of the graph -> failed or skipped.
        errors: lines.
    """
    return {"name": name, "lost": dict(lost), "errors": _once(errors)}


def _once(lines: Sequence[str]) -> list[str]:
    return [line for line in dict.fromkeys(line[:_LONGEST_LINE] for line in lines) if line]
