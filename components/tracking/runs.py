"""A pipeline run in MLflow: a projection of what its stages have left behind, made while it goes on and when it has ended.

One MLflow run per pipeline run and one nested run per finetune, with stages as prefixes of metric names. Everything is
looked up by tags before it is made and metrics carry the times of the records, so replaying a projection after an
outage is the same call and changes nothing.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.errors import TrackingError
from components.tracked import Point, TrackedRun, content_hash, flat
from components.tracking.address import address_of, database_of, default_uri, is_local, is_server
from components.tracking.local import ARTIFACTS, move_artifacts
from components.tracking.names import ATTACHED_TAG, DIFFERING_TAG, FINGERPRINT_TAG, MAKER_TAG, PROJECTED_TAG
from components.tracking.registry import Registered, Registry, log_metrics
from components.tracking.server import error_code, talking

_BATCH = 100
_PARAM_CHARS = 6000


class Tracker(Registry):
    """A tracking server (or a local sqlite file) and one experiment on it."""

    def __init__(self, *, uri: str | None, experiment: str, workspace: Path) -> None:
        """`uri` None means MLFLOW_TRACKING_URI, or else sqlite in the workspace, artifacts beside it. Raises TrackingError when
        out of reach."""
        super().__init__(address_of(uri, workspace))
        self._written: dict[str, tuple[str, str]] = {}
        self._token = uuid.uuid4().hex
        self._about = f"the experiment {experiment}"
        with talking(self.uri, self._about):
            self.experiment_id = self._experiment(experiment, workspace)

    def project(self, run: TrackedRun, *, run_id: str | None = None, ended: bool = True) -> dict[str, str]:
        """Make MLflow show `run` and its children; returns the run id of "" (the run itself) and of each child by name.

        The run is found by `run_id`, else by the environment's MLFLOW_RUN_ID (Kubeflow sets it), else by its
        fingerprint, else made. A run that somebody else opened is left open, and so is one that has not `ended`. A replay
        writes nothing twice, and what this tracker has written itself it does not even look at again.
        """
        given = run_id or os.environ.get("MLFLOW_RUN_ID")
        close = ended and not given
        with talking(self.uri, self._about):
            if given:
                self.experiment_id = self.client.get_run(given).info.experiment_id
            top = given or self._place(run, run.fingerprint, None)
            ids = {"": top}
            for child in run.children:
                identity = f"{run.fingerprint}/{child.fingerprint}"
                ids[child.name] = self._place(child, identity, top)
                self._write(child, ids[child.name], identity, close=ended)
            self._write(run, top, run.fingerprint, close=close)
        return ids

    def attach(self, identity: str, files: Sequence[Path], *, content: str) -> None:
        """Show files with the run of that fingerprint (or the environment's MLFLOW_RUN_ID), which `project` has made. `content`
        is the identity of what they say: where the run has it already, nothing is written."""
        given = os.environ.get("MLFLOW_RUN_ID")
        with talking(self.uri, self._about):
            runs = [self.client.get_run(given)] if given else self._runs(identity)
            if not runs:
                raise TrackingError(f"tracking at {self.uri} has no run {identity}; run again to have it shown")
            found = runs[0]
            if found.data.tags.get(ATTACHED_TAG) == content:
                return
            for path in files:
                self.upload(found.info.run_id, path)
            self.client.set_tag(found.info.run_id, ATTACHED_TAG, content)

    def address(self, identity: str) -> str | None:
        """Of the page of the run of that fingerprint (or the environment's MLFLOW_RUN_ID); None where it has none, or where the
        store is a file, which has no pages."""
        given = os.environ.get("MLFLOW_RUN_ID")
        if not is_server(self.uri):
            return None
        with talking(self.uri, self._about):
            runs = [self.client.get_run(given)] if given else self._runs(identity)
        infos = [run.info for run in runs[:1]]
        return next((f"{self.uri.rstrip('/')}/#/experiments/{i.experiment_id}/runs/{i.run_id}" for i in infos), None)

    def register(self, asked: Registered, *, experiment_id: str | None = None) -> str:
        """As Registry.register, in the tracker's own experiment."""
        return super().register(asked, experiment_id=experiment_id or self.experiment_id)

    def _experiment(self, name: str, workspace: Path) -> str:
        from mlflow.exceptions import MlflowException

        # A server chooses its own artifact root; locally MLflow would write into the current directory.
        root = (workspace / ARTIFACTS).resolve().as_uri() if is_local(self.uri) else None
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=root))
            except MlflowException as error:
                if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)  # somebody made it meanwhile
        require_active(found, name, self.uri)
        old = str(found.artifact_location)
        if self.uri == default_uri(workspace) and old != root and old.endswith(f"/{ARTIFACTS}"):
            move_artifacts(database_of(self.uri), old, str(root))
        return str(found.experiment_id)

    def _runs(self, identity: str, parent: str | None = None) -> list[Any]:
        """Those with that identity, the earliest first."""
        query = f"tags.`{FINGERPRINT_TAG}` = '{identity}'"
        if parent is not None:
            query += f" and tags.`mlflow.parentRunId` = '{parent}'"
        return list(self.client.search_runs([self.experiment_id], query, order_by=["attributes.start_time ASC"]))

    def _make(self, run: TrackedRun, identity: str, parent: str | None) -> None:
        tags = {FINGERPRINT_TAG: identity, MAKER_TAG: self._token}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        self.client.create_run(self.experiment_id, run.started_ms, tags, run.name)

    def _place(self, run: TrackedRun, identity: str, parent: str | None) -> str:
        """The id of the MLflow run with that identity, which is made where there is none.

        mlflow asks again for what a server has done without its answer arriving, so one call can make a run twice: of runs
        with the token of one tracker the first stays.
        """
        if identity in self._written:
            return self._written[identity][0]
        found = self._runs(identity, parent)
        if not found:
            self._make(run, identity, parent)
            found = self._runs(identity, parent)
        if not found:
            raise TrackingError(f"tracking at {self.uri} does not show the run that was made there; run again")
        first = found[0]
        made_by = {self._token, first.data.tags.get(MAKER_TAG, self._token)}
        for double in found[1:]:
            if double.data.tags.get(MAKER_TAG) in made_by and not discard(self.client, double.info.run_id):
                self.client.delete_tag(double.info.run_id, FINGERPRINT_TAG)  # nobody finds it any more
        return str(first.info.run_id)

    def _write(self, run: TrackedRun, run_id: str, identity: str, *, close: bool) -> None:
        # What is shown of a run that goes on is not all of it, even where the end adds nothing but that it ended.
        mark = content_hash(run) if close else f"open {content_hash(run)}"
        if self._written.get(identity) == (run_id, mark):
            return
        data = self.client.get_run(run_id).data
        if data.tags.get(PROJECTED_TAG) != mark:
            params = {key: value[:_PARAM_CHARS] for key, value in flat(run.params).items()}
            # A parameter is written once in MLflow; what a replay has otherwise is said, not dropped.
            differing = sorted(key for key, value in params.items() if data.params.get(key, value) != value)
            self._log_params(run_id, {key: value for key, value in params.items() if key not in data.params})
            values = [Point(name, 0, value) for name, value in run.metrics.items()]
            log_metrics(self.client, run_id, [*values, *run.series], run.started_ms)
            for artifact in run.artifacts:
                self.upload(run_id, artifact)
            self._set_tags(run_id, {**run.tags, FINGERPRINT_TAG: identity})
            if differing:
                self.client.set_tag(run_id, DIFFERING_TAG, ", ".join(differing))
            if close:
                self.client.set_terminated(run_id, run.status, run.ended_ms)
            self.client.set_tag(run_id, PROJECTED_TAG, mark)
        self._written[identity] = (run_id, mark)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(entities), _BATCH):
            self.client.log_batch(run_id, params=entities[start : start + _BATCH])

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, str(value)) for key, value in tags.items()]
        for start in range(0, len(entities), _BATCH):
            self.client.log_batch(run_id, tags=entities[start : start + _BATCH])


def require_active(experiment: Any, name: str, uri: str) -> None:
    """Raises TrackingError for an experiment that was deleted: its name stays taken."""
    if experiment.lifecycle_stage != "active":
        raise TrackingError(f"experiment {name!r} on {uri} is deleted; restore it or choose another name")


def discard(client: Any, run_id: str) -> bool:
    """Delete a run; who may write and not delete (the right EDIT) ends it as killed. Whether it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_run(run_id)
    except MlflowException as error:
        if error.get_http_status_code() != 403:
            raise
        client.set_terminated(run_id, "KILLED")
        return False
    return True
