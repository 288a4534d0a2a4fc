"""Kubeflow Pipelines over its API: start a compiled pipeline, put it on a schedule, say how runs stand, end them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp_server_api
import yaml
from kfp import client as kfp_client
from urllib3.exceptions import HTTPError

from components.errors import ConfigError, PipelineError, listed

EXPERIMENT = "realign"
_PAGE = 100
_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class Endpoint:
    """Where Kubeflow Pipelines is, and who asks."""

    host: str
    ui: str
    """Address of its pages, for links."""
    namespace: str | None
    """Of the user, where Kubeflow serves several."""
    token: str | None
    ca_cert: str | None


def find_endpoint(
    host: str | None = None,
    namespace: str | None = None,
    token_file: Path | None = None,
    ca_cert: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Endpoint:
    """What is given, else what Kubeflow's own variables say. Raises ConfigError where no address is known."""
    host = host or environment.get(kfp_client.client.KF_PIPELINES_ENDPOINT_ENV)
    if not host:
        raise ConfigError(
            "where is Kubeflow Pipelines? Give --host, or set KF_PIPELINES_ENDPOINT (after `kubectl port-forward -n kubeflow "
            "svc/ml-pipeline-ui 8080:80` it is http://localhost:8080)"
        )
    if urlsplit(host).scheme not in ("http", "https"):
        raise ConfigError(f"{host} is no address of Kubeflow Pipelines: it begins with http:// or https://")
    host = host.rstrip("/")
    given = environment.get("KF_PIPELINES_SA_TOKEN_PATH")
    source = token_file or (Path(given) if given else None)
    try:
        token = source.read_text().strip() if source is not None else None
    except OSError as error:
        raise ConfigError(f"{source}: the token cannot be read: {error.strerror}") from error
    return Endpoint(
        host=host,
        ui=(environment.get(kfp_client.client.KF_PIPELINES_UI_ENDPOINT_ENV) or host).rstrip("/"),
        namespace=namespace,
        token=token or None,
        ca_cert=str(ca_cert) if ca_cert is not None else None,
    )


@dataclass(frozen=True)
class Package:
    """A compiled pipeline, and what a run of it is to have in place of its defaults."""

    path: Path
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.spec["pipelineInfo"]["name"])

    @property
    def spec(self) -> dict[str, Any]:
        """Raises ConfigError for a file that is none of ours."""
        try:
            found = next(iter(yaml.safe_load_all(self.path.read_text())))
            there = set(found["root"]["inputDefinitions"]["parameters"])
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, KeyError, TypeError, StopIteration, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path} is no compiled pipeline; `realign pipeline compile` makes one") from error
        unknown = sorted(set(self.arguments) - there)
        if unknown:
            raise ConfigError(f"{self.path} has no parameter {', '.join(unknown)} (there: {', '.join(sorted(there))})")
        return dict(found)


@dataclass(frozen=True)
class Listed:
    """A run or a schedule, as it is listed."""

    id: str
    name: str
    state: str
    when: str
    """Of a run when it began, of a schedule its cron expression."""
    url: str


class Kubeflow:
    """Kubeflow Pipelines at an endpoint. Methods raise PipelineError for what it refuses or cannot do."""

    def __init__(self, endpoint: Endpoint, experiment: str | None = None) -> None:
        self._endpoint = endpoint
        default = os.environ.get(kfp_client.client.KF_PIPELINES_DEFAULT_EXPERIMENT_NAME)
        self._experiment = experiment or default or EXPERIMENT
        # Asked first: the library itself waits half a minute for a server that is not there, and prints tracebacks.
        healthy = self._asked(self._health)
        if healthy.multi_user and not endpoint.namespace:
            raise ConfigError(f"{endpoint.host} serves several users: give --namespace")
        self._client = self._asked(self._connected)

    def submit(self, package: Package, *, name: str | None, service_account: str | None) -> Listed:
        """Start a run. Its pods are `service_account`'s; None: of whichever Kubeflow gives them."""
        name = name or f"{package.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        made = self._asked(
            self._client.create_run_from_pipeline_package,
            str(package.path),
            arguments=dict(package.arguments),
            run_name=name,
            experiment_id=self._experiment_id(),
            service_account=service_account,
        )
        return self._run(made.run_info)

    def schedule(
        self, package: Package, *, name: str, cron: str, service_account: str | None
    ) -> tuple[Listed, list[str]]:
        """Start a run of it whenever the cron expression says, in place of the schedules of this name: one at a time, and none
        is made up for. The new schedule, and the ids of those that it has replaced. `cron`: as `six_fields` has it.

        Old ones are put out first and deleted last, so that there are never two that start runs, and never none for good.
        """
        described = f"{package.name}, by `realign pipeline schedule`"  # raises before anything is asked
        experiment = self._experiment_id()
        old = [one for one in self._schedules() if one.display_name == name]
        try:
            for one in old:
                self._asked(self._client.disable_recurring_run, one.recurring_run_id)
            made = self._asked(
                self._client.create_recurring_run,
                experiment_id=experiment,
                job_name=name,
                description=described,
                cron_expression=cron,
                max_concurrency="1",  # an int64, which JSON of protocol buffers writes as a string
                no_catchup=True,
                params=dict(package.arguments),
                pipeline_package_path=str(package.path),
                service_account=service_account,
            )
        except BaseException:  # Ctrl-C too
            for one in old:
                if one.status == "ENABLED":
                    self._asked(self._client.enable_recurring_run, one.recurring_run_id)
            raise
        for one in old:
            self._asked(self._client.delete_recurring_run, one.recurring_run_id)
        return self._schedule(made), [one.recurring_run_id for one in old]

    def unschedule(self, name: str) -> list[str]:
        """Delete the schedules of this name; runs that have begun go on. Ids of them."""
        found = self._schedules()
        mine = [one for one in found if one.display_name == name]
        if not mine:
            there = listed(sorted({one.display_name for one in found})) or "none"
            raise PipelineError(f"there is no schedule {name} in the experiment {self._experiment} (there: {there})")
        for one in mine:
            self._asked(self._client.delete_recurring_run, one.recurring_run_id)
        return [one.recurring_run_id for one in mine]

    def runs(self, limit: int) -> list[Listed]:
        """The latest runs of the experiment, newest first."""
        experiment = self._known_experiment()
        if experiment is None:
            return []
        asking = {"page_size": min(limit, _PAGE), "sort_by": "created_at desc", "experiment_id": experiment}
        return [self._run(one) for one in self._pages(self._client.list_runs, "runs", limit, **asking)]

    def schedules(self) -> list[Listed]:
        """Those of the experiment."""
        return [self._schedule(one) for one in self._schedules()]

    def cancel(self, run: str) -> None:
        """End a run: its pods are asked to end, and a step that is asked stops its job."""
        self._asked(self._client.terminate_run, run)

    def _schedules(self) -> list[Any]:
        experiment = self._known_experiment()
        if experiment is None:
            return []
        asking = {"page_size": _PAGE, "experiment_id": experiment}
        return self._pages(self._client.list_recurring_runs, "recurring_runs", None, **asking)

    def _pages(self, ask: Callable[..., Any], field: str, limit: int | None, **asking: Any) -> list[Any]:
        found: list[Any] = []
        token = ""
        while True:
            answer = self._asked(ask, page_token=token, **asking)
            found += getattr(answer, field) or []
            token = answer.next_page_token or ""
            if not token or (limit is not None and len(found) >= limit):
                return found[:limit]

    def _experiment_id(self) -> str:
        made = self._asked(self._client.create_experiment, self._experiment, namespace=self._endpoint.namespace)
        return str(made.experiment_id)

    def _known_experiment(self) -> str | None:
        try:
            found = self._asked(
                self._client.get_experiment, experiment_name=self._experiment, namespace=self._endpoint.namespace
            )
        except ValueError as error:
            if str(error).startswith("No experiment"):
                return None  # nothing was ever started in it
            raise PipelineError(f"{error} Give another --experiment.") from error
        return str(found.experiment_id)

    def _run(self, one: Any) -> Listed:
        url = f"{self._endpoint.ui}/#/runs/details/{one.run_id}"
        return Listed(one.run_id, one.display_name, str(one.state or "PENDING"), _shown(one.created_at), url)

    def _schedule(self, one: Any) -> Listed:
        url = f"{self._endpoint.ui}/#/recurringrun/details/{one.recurring_run_id}"
        cron = one.trigger.cron_schedule.cron if one.trigger and one.trigger.cron_schedule else "not by cron"
        return Listed(one.recurring_run_id, one.display_name, str(one.status or "ENABLED"), cron, url)

    def _health(self) -> Any:
        asked = self._endpoint
        settings = kfp_server_api.Configuration(host=asked.host)
        settings.retries = 1
        if asked.ca_cert:
            settings.ssl_ca_cert = asked.ca_cert
        if asked.token:
            settings.api_key, settings.api_key_prefix = {"authorization": asked.token}, {"authorization": "Bearer"}
        api = kfp_server_api.HealthzServiceApi(kfp_server_api.ApiClient(settings))
        return api.healthz_service_get_healthz(_request_timeout=_TIMEOUT_SECONDS)

    def _connected(self) -> Any:
        asked = self._endpoint
        # Any name but this one keeps the library from asking for the user's file of settings.
        return kfp_client.Client(
            host=asked.host,
            ui_host=asked.ui,
            namespace=asked.namespace or "kubeflow",
            existing_token=asked.token,
            ssl_ca_cert=asked.ca_cert,
        )

    def _asked(self, ask: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What the server answers; what the library prints meanwhile is dropped."""
        try:
            with _quiet():
                return ask(*arguments, **named)
        except kfp_server_api.ApiException as error:
            raise PipelineError(self._refusal(error)) from error
        except (HTTPError, OSError, TimeoutError) as error:
            raise PipelineError(
                f"Kubeflow Pipelines does not answer at {self._endpoint.host} ({type(error).__name__}); is the address right, "
                "and does a port-forward still run?"
            ) from error

    def _refusal(self, error: Any) -> str:
        if error.status in (401, 403):
            remedy = "give --token-file (or KF_PIPELINES_SA_TOKEN_PATH) with a token that may do this in the namespace"
            return f"{self._endpoint.host} refuses ({error.status} {error.reason}); {remedy}"
        return f"{self._endpoint.host} answers {error.status}: {_message(error.body) or error.reason}"


def _message(body: Any) -> str:
    """The server's own words."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        found = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError:
        return text.strip()[:500]
    words = (found.get("message") or found.get("error")) if isinstance(found, dict) else None
    return str(words or text).strip()[:500]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _shown(when: Any) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M") if isinstance(when, datetime) else ""
