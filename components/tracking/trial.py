"""What a run does on a server, done once in small and taken away again, to see whether it may."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from components.tracking.address import is_server
from components.tracking.registry import Registry
from components.tracking.runs import discard, require_active
from components.tracking.server import error_code, talking

_TAG = "realign.doctor"


def try_reading(uri: str) -> None:
    """Open it and ask for experiments. Raises TrackingError."""
    registry = Registry(uri)
    with talking(registry.uri):
        registry.client.search_experiments(max_results=1)


def try_writing(uri: str, experiment: str, models: Sequence[str]) -> str:
    """A run with a file in the experiment, and a change of those registered models that are there, or else a model made and
    deleted. What stays that anybody would see; empty for nothing.

    Raises TrackingError as a run would. MLflow removes runs and experiments for good only by `mlflow gc`: the run stays as a
    deleted one; and where the experiment is not there, so does another one in its place, for a name that was deleted cannot be
    had again.
    """
    registry = Registry(uri)
    client = registry.client
    deleted = False
    with talking(registry.uri, f"the experiment {experiment}"), _experiment(registry, experiment) as where:
        run_id = client.create_run(where, run_name="realign doctor").info.run_id
        try:
            if is_server(uri):  # without one, artifacts are files of this machine
                _upload(registry, run_id)
        finally:
            deleted = discard(client, run_id)
    there = [name for name in models if _exists(registry, name)]
    for name in there:
        with talking(registry.uri, f"the registered model {name}"):
            client.set_registered_model_tag(name, _TAG, "tried")
            client.delete_registered_model_tag(name, _TAG)
    if models and not there:
        with talking(registry.uri, "registered models"):
            name = _own_name()
            client.create_registered_model(name)
            client.delete_registered_model(name)
    return "" if deleted else f"a run named 'realign doctor' stays in {experiment}, for this user may not delete it"


@contextlib.contextmanager
def _experiment(registry: Registry, name: str) -> Iterator[str]:
    """The id of that experiment, or of one that is deleted afterwards."""
    found = registry.client.get_experiment_by_name(name)
    if found is not None:
        require_active(found, name, registry.uri)
        yield str(found.experiment_id)
        return
    made = str(registry.client.create_experiment(_own_name()))
    try:
        yield made
    finally:
        registry.client.delete_experiment(made)


def _upload(registry: Registry, run_id: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "realign-doctor.txt"
        path.write_text("whether files arrive\n")
        registry.upload(run_id, path)


def _exists(registry: Registry, name: str) -> bool:
    from mlflow.exceptions import MlflowException

    with talking(registry.uri, f"the registered model {name}"):
        try:
            registry.client.get_registered_model(name)
        except MlflowException as error:
            if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
    return True


def _own_name() -> str:
    return f"realign-doctor-{uuid.uuid4().hex[:12]}"
