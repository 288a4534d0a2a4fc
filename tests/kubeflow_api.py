"""A stand-in for the API server of Kubeflow Pipelines, on loopback. Every request is held against Kubeflow's own definitions
(the generated client kfp_server_api): paths, methods, query fields, bodies and their types; so are its own answers.

What it cannot show is what a server does with a run: here nothing runs.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from kfp_server_api import models

SERVICES = ("ExperimentService", "RunService", "RecurringRunService", "HealthzService")


@dataclass(frozen=True)
class Operation:
    """One of the API, as its definition says."""

    name: str
    method: str
    path: re.Pattern[str]
    query: frozenset[str]
    body: str | None
    """Type of its body."""
    answer: str


@cache
def operations() -> tuple[Operation, ...]:
    """Read from the sources of the generated client, which has no table of them."""
    found = []
    for service in SERVICES:
        for name, function in inspect.getmembers(getattr(kfp_server_api, f"{service}Api"), inspect.isfunction):
            if not name.endswith("_with_http_info"):
                continue
            source = inspect.getsource(function)
            path, method = re.findall(r"call_api\(\s*'([^']+)', '([A-Z]+)'", source)[0]
            body = re.findall(r"body_params = local_var_params\['(\w+)'\]", source)
            kind = re.findall(rf":type {body[0]}: (\S+)", source)[0] if body else None
            found.append(
                Operation(
                    name=name.removesuffix("_with_http_info"),
                    method=method,
                    path=re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/:]+)", path)),
                    query=frozenset(re.findall(r"query_params\.append\(\('(\w+)'", source)),
                    body=kind,
                    answer=re.findall(r"response_type='([^']+)'", source)[0],
                )
            )
    return tuple(found)


def misfits(value: Any, kind: str, where: str) -> list[str]:
    """What of a JSON value is not of that type of the definitions."""
    if value is None:
        return []
    if kind.startswith("list["):
        if not isinstance(value, list):
            return [f"{where}: no list: {value!r}"]
        return [p for i, one in enumerate(value) for p in misfits(one, kind[5:-1], f"{where}[{i}]")]
    if kind.startswith("dict("):
        if not isinstance(value, dict):
            return [f"{where}: no object: {value!r}"]
        return [p for k, one in value.items() for p in misfits(one, kind[:-1].split(", ", 1)[1], f"{where}.{k}")]
    plain = {"str": str, "bool": bool, "float": int | float, "object": object, "datetime": str}
    if kind == "int":
        # int64 is a string in the JSON of protocol buffers; both are taken.
        good = isinstance(value, int) and not isinstance(value, bool)
        return (
            [] if good or (isinstance(value, str) and value.lstrip("-").isdigit()) else [f"{where}: no int: {value!r}"]
        )
    if kind in plain:
        return [] if isinstance(value, plain[kind]) else [f"{where}: no {kind}: {value!r}"]
    model = getattr(models, kind)
    if not model.openapi_types:
        allowed = [v for k, v in vars(model).items() if k.isupper()]
        return [] if value in allowed else [f"{where}: {value!r} is none of {allowed}"]
    if not isinstance(value, dict):
        return [f"{where}: no {kind}: {value!r}"]
    kinds = {model.attribute_map[name]: of for name, of in model.openapi_types.items()}
    unknown = [f"{where}.{key}: {kind} has no such field" for key in value if key not in kinds]
    return unknown + [p for k, one in value.items() if k in kinds for p in misfits(one, kinds[k], f"{where}.{k}")]


class RefusedError(Exception):
    """What a request is answered with instead."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class KubeflowApi:
    """The server's state. `problems` must stay empty: whatever did not fit the definitions is in it."""

    token: str | None = None
    multi_user: bool = False
    page: int = 100
    """No page has more."""
    host: str = ""
    problems: list[str] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    """Operation, what its path and query say, and its body; in order."""
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    recurring: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    """Operations that end in an internal error."""

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Any:
        """The JSON that a request is answered with. Raises RefusedError."""
        parts = urlsplit(target)
        found = [(o, m) for o in operations() if o.method == method and (m := o.path.fullmatch(parts.path))]
        if not found:
            self.problems.append(f"{method} {parts.path} is no operation")
            raise RefusedError(404, "Not Found")
        operation, match = found[0]
        if self.token is not None and operation.name != "healthz_service_get_healthz":
            given = headers.get("authorization")
            if given is None:
                raise RefusedError(401, "Request header error: there is no user identity header.")
            if given != f"Bearer {self.token}":
                raise RefusedError(403, "this user may not do that")
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.problems += [f"{operation.name} has no query field {key}" for key in query if key not in operation.query]
        data = json.loads(body) if body else None
        if operation.body is None and data is not None:
            self.problems.append(f"{operation.name} takes no body")
        if operation.body is not None:
            self.problems += misfits(data, operation.body, operation.body)
        given = {**query, **{key: unquote(value) for key, value in match.groupdict().items()}}
        self.asked.append((operation.name, given, data))
        if operation.name in self.broken:
            raise RefusedError(500, "Internal server error: out of order")
        answer = getattr(self, operation.name)(given, data)
        self.problems += misfits(answer, operation.answer, f"answer of {operation.name}")
        return answer

    def healthz_service_get_healthz(self, given: dict[str, str], body: Any) -> Any:
        return {"multi_user": self.multi_user}

    def experiment_service_list_experiments(self, given: dict[str, str], body: Any) -> Any:
        return self._page(self.experiments, "experiments", given)

    def experiment_service_create_experiment(self, given: dict[str, str], body: Any) -> Any:
        made = {**body, "experiment_id": str(uuid.uuid4()), "created_at": _now(), "storage_state": "AVAILABLE"}
        self.experiments[made["experiment_id"]] = made
        return made

    def run_service_create_run(self, given: dict[str, str], body: Any) -> Any:
        self._check_started(body)
        made = {
            **body,
            "run_id": str(uuid.uuid4()),
            "created_at": _now(),
            "state": "PENDING",
            "storage_state": "AVAILABLE",
        }
        self.runs[made["run_id"]] = made
        return made

    def run_service_list_runs(self, given: dict[str, str], body: Any) -> Any:
        return self._page(self.runs, "runs", given)

    def run_service_terminate_run(self, given: dict[str, str], body: Any) -> Any:
        self._one(self.runs, "Run", given["run_id"])["state"] = "CANCELING"
        return {}

    def recurring_run_service_create_recurring_run(self, given: dict[str, str], body: Any) -> Any:
        self._check_started(body)
        cron = (body.get("trigger") or {}).get("cron_schedule", {}).get("cron", "")
        if len(cron.split()) != 6:
            raise RefusedError(400, f"Invalid input error: Schedule cron is not supported: {cron!r}")
        if not 1 <= int(body.get("max_concurrency") or 0) <= 10:
            raise RefusedError(
                400, "Invalid input error: Max concurrency of the recurring run must be in range [1, 10]"
            )
        made = {**body, "recurring_run_id": str(uuid.uuid4()), "created_at": _now(), "status": f"{body['mode']}D"}
        self.recurring[made["recurring_run_id"]] = made
        return made

    def recurring_run_service_list_recurring_runs(self, given: dict[str, str], body: Any) -> Any:
        return self._page(self.recurring, "recurringRuns", given)

    def recurring_run_service_disable_recurring_run(self, given: dict[str, str], body: Any) -> Any:
        self._one(self.recurring, "RecurringRun", given["recurring_run_id"])["status"] = "DISABLED"
        return {}

    def recurring_run_service_enable_recurring_run(self, given: dict[str, str], body: Any) -> Any:
        self._one(self.recurring, "RecurringRun", given["recurring_run_id"])["status"] = "ENABLED"
        return {}

    def recurring_run_service_delete_recurring_run(self, given: dict[str, str], body: Any) -> Any:
        self._one(self.recurring, "RecurringRun", given["recurring_run_id"])
        del self.recurring[given["recurring_run_id"]]
        return {}

    def _one(self, all_of_them: dict[str, dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
        if name not in all_of_them:
            raise RefusedError(404, f"{kind} {name} not found.")
        return all_of_them[name]

    def _check_started(self, body: dict[str, Any]) -> None:
        """As Kubeflow looks at what it is to run: an experiment that is there, a pipeline, parameters that it has."""
        if body.get("experiment_id") not in self.experiments:
            raise RefusedError(404, f"Experiment {body.get('experiment_id')} not found.")
        spec = json_format.ParseDict(body["pipeline_spec"]["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
        known = set(spec.root.input_definitions.parameters)
        unknown = set((body.get("runtime_config") or {}).get("parameters") or {}) - known
        if unknown:
            raise RefusedError(400, f"Invalid input error: the pipeline has no parameters {sorted(unknown)}")

    def _page(self, all_of_them: dict[str, dict[str, Any]], field_name: str, given: dict[str, str]) -> Any:
        found = [one for one in all_of_them.values() if _asked_for(one, given)]
        if self.multi_user and "experiment_id" not in given and not given.get("namespace"):
            raise RefusedError(400, "Invalid input error: a namespace is needed in multi-user mode.")
        if given.get("sort_by", "").endswith(" desc"):
            found.reverse()
        begin = int(given.get("page_token") or 0)
        size = min(int(given.get("page_size") or 20), self.page)
        answer: dict[str, Any] = {field_name: found[begin : begin + size], "total_size": len(found)}
        if begin + size < len(found):
            answer["next_page_token"] = str(begin + size)
        return answer


def _asked_for(one: dict[str, Any], given: dict[str, str]) -> bool:
    predicates = json.loads(given.get("filter") or "{}").get("predicates", [])
    assert all(p["operation"] == 1 for p in predicates), "only EQUALS is known here"
    wanted = {p["key"]: p["stringValue"] for p in predicates}
    wanted |= {key: given[key] for key in ("experiment_id", "namespace") if given.get(key)}
    return all(one.get(key) == value for key, value in wanted.items())


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def kubeflow_api(**settings: Any) -> Iterator[KubeflowApi]:
    """A server that answers; ends with nothing that did not fit the definitions."""
    state = KubeflowApi(**settings)

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                status, answer = 200, state.answer(self.command, self.path, self.headers, body)
            except RefusedError as error:
                status, answer = error.status, {"error": str(error), "code": 5, "message": str(error)}
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _serve  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.host = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
    assert not state.problems, state.problems
