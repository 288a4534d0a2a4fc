"""The Kubeflow pipeline of a run config, made from the graph (`parts.py`): a plan, a loop over finetunes, one over merges where
there are any, gate, publication, and a verdict that alone may fail the run.

Steps are lightweight components: a few lines that call a function of `kubeflow_steps.py`, which submits a job to a Ray cluster.
Loop items go whole from step to step, conditions are taken inside steps, and nothing is cached: what is there already, the
workspace's records know. Kubeflow reads the annotations of the functions below when they are made components, so they are no
strings here (no `from __future__ import annotations`).
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from kfp import dsl
from kfp import kubernetes as pod

from components.errors import ConfigError
from components.storage import storage_errors, write_atomic
from pipelines.config import load_config
from pipelines.kubeflow_steps import parts_json
from pipelines.parts import Level, Parts, parts_of

RAY_ADDRESS = "http://realign-head-svc.realign.svc:8265"
TOKEN_SECRET, TOKEN_KEY = "realign-ray-token", "auth_token"
_RETRIES = 3
_LONGEST_CONFIG = 80_000
"""Characters as JSON: it travels in one argument beside the items, and Linux takes 128 KiB."""


def plan(
    run: str,
    config: str,
    finetunes: str,
    workspace: str,
    ray_address: str,
    pending_seconds: float,
    compiled: str,
) -> list[dict[str, Any]]:
    """Load the aligned model; what there is to do for whom."""
    from pipelines import kubeflow_steps as steps

    place = steps.Place(run, config, finetunes, workspace, ray_address, pending_seconds)
    return steps.plan(place, compiled)


def stages(
    run: str,
    config: str,
    finetunes: str,
    workspace: str,
    ray_address: str,
    pending_seconds: float,
    wanted: str,
    item: dict[str, Any],
) -> dict[str, Any]:
    """Run stages of one finetune, merge, or of the run itself, as a job of the Ray cluster."""
    from pipelines import kubeflow_steps as steps

    place = steps.Place(run, config, finetunes, workspace, ray_address, pending_seconds)
    return steps.run_stages(place, wanted.split(","), item)


def join(
    run: str,
    config: str,
    finetunes: str,
    workspace: str,
    ray_address: str,
    pending_seconds: float,
    wanted: str,
    ended: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Wait for all finetunes, and run what stands on all of them."""
    from pipelines import kubeflow_steps as steps

    place = steps.Place(run, config, finetunes, workspace, ray_address, pending_seconds)
    return steps.join(place, [one for one in wanted.split(",") if one], ended)


def gate(
    run: str,
    config: str,
    finetunes: str,
    workspace: str,
    ray_address: str,
    pending_seconds: float,
    once: dict[str, Any],
    ended: list[dict[str, Any]],
    rates: dsl.Output[dsl.Metrics],
    table: dsl.Output[dsl.Markdown],
) -> dict[str, Any]:
    """Decide which realigned models may serve, and show every model's rates."""
    from pathlib import Path

    from pipelines import kubeflow_steps as steps

    place = steps.Place(run, config, finetunes, workspace, ray_address, pending_seconds)
    return steps.gate(place, [once, *ended], rates, Path(table.path))


def publish(
    run: str,
    config: str,
    finetunes: str,
    workspace: str,
    ray_address: str,
    pending_seconds: float,
    decided: dict[str, Any],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Artifact],
    links: dsl.Output[dsl.Markdown],
) -> dict[str, Any]:
    """Track, register and promote; bring the report."""
    from pathlib import Path

    from pipelines import kubeflow_steps as steps

    place = steps.Place(run, config, finetunes, workspace, ray_address, pending_seconds)
    files = (Path(report.path), Path(summary.path), Path(links.path))
    return steps.publish(place, decided, *files)


def verdict(published: dict[str, Any]) -> None:
    """Fail where anything failed; all of it is there to see by now."""
    from pipelines import kubeflow_steps as steps

    steps.verdict(published)


def compile_pipeline(source: Path, out: Path, *, image: str, parallel: int = 8) -> None:
    """Write the pipeline of a run config, whose paths are those of the cluster and must be absolute.

    Args:
        image: of realign, for the steps.
        parallel: models whose steps go on at once; 0: all of them.

    Raises ConfigError for a config that cannot be run, StorageError where `out` cannot be written.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{out}: a compiled pipeline is a .yaml file; name it so")
    made = make_pipeline(source, image=image, parallel=parallel)
    # Kubeflow's own writer puts defaults into comments at the top, and breaks the file where one has several lines.
    documents = [json_format.MessageToDict(one) for one in (made.pipeline_spec, made.platform_spec)]
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, "# Made by `realign pipeline compile`.\n" + yaml.safe_dump_all(documents, allow_unicode=True))


def make_pipeline(source: Path, *, image: str, parallel: int = 8) -> Any:
    """The pipeline of a run config, as `compile_pipeline` has it."""
    text = read_config(source)
    found = load_config(source, far=text)
    parts = parts_of(found)
    name = f"realign-{found.name}"

    def pipeline(
        config: str = text,
        finetunes: str = "",
        workspace: str = f"/workspace/{found.name}",
        ray_address: str = RAY_ADDRESS,
        pending_seconds: float = 0.0,
    ) -> None:
        place = {
            "run": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            "config": config,
            "finetunes": finetunes,
            "workspace": workspace,
            "ray_address": ray_address,
            "pending_seconds": pending_seconds,
        }
        _connect(_Steps(image, place), parts, parallel)

    described = dsl.pipeline(
        name=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        display_name=name,
        description="Realigns finetunes, measures them, and puts those in service whose gate passes.",
    )
    return described(pipeline)


def read_config(source: Path) -> str:
    """The text of a config that is to travel with a pipeline. Raises ConfigError."""
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{source}: cannot be read: {reason}") from error
    if len(json.dumps(text)) > _LONGEST_CONFIG:
        raise ConfigError(
            f"{source} has more than {_LONGEST_CONFIG} characters as JSON, too many for a step's arguments"
        )
    return text


def _connect(steps: "_Steps", parts: Parts, parallel: int) -> None:
    """Say what runs after what; how, `_Steps` knows."""
    planned = steps.make(plan, "plan", compiled=parts_json(parts))
    once = steps.chain(parts.once, {"name": ""}, after=planned)
    with dsl.ParallelFor(planned.output, name="finetunes", parallelism=parallel) as item:
        last = steps.chain(parts.finetune, item)
    ended = dsl.Collected(last.output)
    if parts.merge or parts.joined:
        ended = steps.make(join, _titled(parts.joined) or "join", wanted=_wanted(parts.joined), ended=ended).output
    if parts.merge:
        with dsl.ParallelFor(ended, name="merges", parallelism=parallel) as item:
            last = steps.chain(parts.merge, item)
        ended = dsl.Collected(last.output)
    decided = steps.make(gate, "gate", once=once.output, ended=ended)
    published = steps.make(publish, "publish", decided=decided.outputs["Output"])
    steps.verdict(published.outputs["Output"])


def _wanted(levels: Sequence[Level]) -> str:
    return ",".join(stage for level in levels for stage in level)


def _titled(levels: Sequence[Level]) -> str:
    return _wanted(levels).replace("_", " ").replace(",", ", ")


class _Steps:
    """Makes the steps of one pipeline."""

    def __init__(self, image: str, place: dict[str, Any]) -> None:
        self._image, self._place = image, place
        self._components: dict[str, Any] = {}

    def chain(self, levels: Sequence[Level], item: Any, *, after: Any = None) -> Any:
        """A step for each level, which the item goes through whole; the last one."""
        task = None
        for level in levels:
            task = self.make(stages, _titled([level]), wanted=_wanted([level]), item=item)
            if after is not None:
                task.after(after)
            item, after = task.output, None
        return task

    def make(self, function: Callable[..., Any], title: str, **arguments: Any) -> Any:
        """A step that talks to the Ray cluster: with its token, and tried again where the head was away."""
        task = self._task(function, title, **self._place, **arguments)
        task.set_retry(num_retries=_RETRIES, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        task.set_env_variable("RAY_AUTH_MODE", "token")
        pod.use_secret_as_env(task, secret_name=TOKEN_SECRET, secret_key_to_env={TOKEN_KEY: "RAY_AUTH_TOKEN"})
        return task

    def verdict(self, published: Any) -> None:
        """The last step: what it raises is meant, and not tried again."""
        self._task(verdict, "verdict", published=published)

    def _task(self, function: Callable[..., Any], title: str, **arguments: Any) -> Any:
        name = function.__name__
        if name not in self._components:
            made = dsl.component(base_image=self._image, install_kfp_package=False)
            self._components[name] = made(function)
        task = self._components[name](**arguments)
        task.set_display_name(title)
        task.set_caching_options(False)
        task.set_cpu_request("100m").set_cpu_limit("1").set_memory_request("256Mi").set_memory_limit("1Gi")
        pod.set_security_context(task, run_as_non_root=True)
        return task
