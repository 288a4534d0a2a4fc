"""`realign pipeline`: the run as a Kubeflow pipeline."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.errors import ClusterError, ConfigError, PipelineError
from pipelines.interrupts import interruptible

if TYPE_CHECKING:
    from pipelines.kubeflow_client import Kubeflow, Listed, Package

pipeline = typer.Typer(help="The run as a Kubeflow pipeline: make it, start it, schedule it.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="The compiled pipeline (YAML).")]
Host = Annotated[str | None, typer.Option(help="Of Kubeflow Pipelines; by default KF_PIPELINES_ENDPOINT.")]
Namespace = Annotated[str | None, typer.Option(help="Of the user, where Kubeflow serves several.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="A file with the token to show; by default KF_PIPELINES_SA_TOKEN_PATH.")
]
CaCert = Annotated[Path | None, typer.Option(help="The certificate that signs the host's.")]
Experiment = Annotated[str | None, typer.Option(help="By default KF_PIPELINES_DEFAULT_EXPERIMENT_NAME, or realign.")]
Account = Annotated[
    str | None, typer.Option(help="The service account of the steps' pods; by default whichever Kubeflow gives them.")
]
Config = Annotated[Path | None, typer.Option(help="Another run config than the one that was compiled in.")]
Finetunes = Annotated[str | None, typer.Option(help="Only these, with commas between.")]
Workspace = Annotated[str | None, typer.Option(help="Where results are kept, as the Ray pods see it.")]
RayAddress = Annotated[str | None, typer.Option(help="Of the Ray head's dashboard, as the steps see it.")]
Pending = Annotated[
    float | None, typer.Option(min=0, help="How long a stage may wait for a node; by default as the config says.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(pipeline, name="pipeline")


@pipeline.command("compile")
def compile_command(
    config: Annotated[Path, typer.Argument(help="The run config (YAML); its paths are absolute, the Ray pods' own.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    image: Annotated[str, typer.Option(help="Of realign, for the steps: name@sha256:…, as the Ray pods have it.")],
    parallel: Annotated[int, typer.Option(min=0, help="Models whose steps go on at once; 0: all of them.")] = 8,
    allow_tag: Annotated[
        bool, typer.Option("--allow-tag", help="Take an image without a digest, for a cluster to try things on.")
    ] = False,
) -> None:
    """Write the pipeline of a run config. Nothing that its paths name is looked for here."""
    if "@sha256:" not in image and not allow_tag:
        raise ConfigError(
            f"{image}: a tag can move from one step to the next; name a digest (…@sha256:…), or --allow-tag"
        )
    from pipelines.kubeflow import compile_pipeline

    compile_pipeline(config, out, image=image, parallel=parallel)
    typer.echo(str(out))


@pipeline.command()
def submit(
    file: File,
    name: Annotated[str | None, typer.Option(help="Of the run; by default the pipeline's and the time.")] = None,
    config: Config = None,
    finetunes: Finetunes = None,
    workspace: Workspace = None,
    ray_address: RayAddress = None,
    pending_seconds: Pending = None,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    experiment: Experiment = None,
    service_account: Account = None,
) -> None:
    """Start a run of a compiled pipeline and print its address."""
    package = _package(file, config, finetunes, workspace, ray_address, pending_seconds)
    with interruptible("look with `realign pipeline list` whether the run was started"):
        kubeflow = _kubeflow(host, namespace, token_file, ca_cert, experiment)
        run = kubeflow.submit(package, name=name, service_account=service_account)
    typer.echo(f"{run.id} {run.name}\n{run.url}")


@pipeline.command()
def schedule(
    file: File,
    name: Annotated[str, typer.Option(help="Of the schedule; one of the same name is replaced.")],
    cron: Annotated[str, typer.Option(help="When, e.g. '0 3 * * 1' (minute hour day month weekday).")],
    config: Config = None,
    finetunes: Finetunes = None,
    workspace: Workspace = None,
    ray_address: RayAddress = None,
    pending_seconds: Pending = None,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    experiment: Experiment = None,
    service_account: Account = None,
) -> None:
    """Start a run of a compiled pipeline again and again: never two at once, and none is made up for."""
    from pipelines.cron import six_fields

    package, cron = _package(file, config, finetunes, workspace, ray_address, pending_seconds), six_fields(cron)
    with interruptible("the same command again leaves one schedule of this name"):
        kubeflow = _kubeflow(host, namespace, token_file, ca_cert, experiment)
        made, replaced = kubeflow.schedule(package, name=name, cron=cron, service_account=service_account)
    typer.echo(f"{made.id} {made.name} ({made.when})\n{made.url}")
    if replaced:
        typer.echo(f"replaced {', '.join(replaced)}")


@pipeline.command()
def unschedule(
    name: Annotated[str, typer.Argument(help="Of the schedule; `realign pipeline list` shows them.")],
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    experiment: Experiment = None,
) -> None:
    """Remove a schedule; runs that it has started go on."""
    with interruptible("the same command continues"):
        removed = _kubeflow(host, namespace, token_file, ca_cert, experiment).unschedule(name)
    typer.echo(f"removed {', '.join(removed)}")


@pipeline.command("list")
def list_command(
    limit: Annotated[int, typer.Option(min=1, help="Runs to show, the latest first.")] = 20,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    experiment: Experiment = None,
    as_json: AsJson = False,
) -> None:
    """Show runs and schedules, and how they stand."""
    with interruptible("nothing was changed"):
        kubeflow = _kubeflow(host, namespace, token_file, ca_cert, experiment)
        runs, schedules = kubeflow.runs(limit), kubeflow.schedules()
    if as_json:
        found = {"runs": [asdict(one) for one in runs], "schedules": [asdict(one) for one in schedules]}
        typer.echo(json.dumps(found, indent=1))
        return
    typer.echo("\n".join([*_lines("runs", runs), *_lines("schedules", schedules)]))


@pipeline.command()
def cancel(
    run: Annotated[str, typer.Argument(help="Id of the run.")],
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray head, as this machine sees it: stop the run's jobs here too, with RAY_AUTH_TOKEN."
        ),
    ] = None,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    experiment: Experiment = None,
) -> None:
    """End a run. Steps that are asked to end stop their jobs; with --ray-address those that are there now are stopped in any
    case, also where Kubeflow does not answer."""
    with interruptible("the same command continues"):
        away: PipelineError | None = None
        try:
            _kubeflow(host, namespace, token_file, ca_cert, experiment).cancel(run)
            typer.echo(f"{run} is asked to end")
        except PipelineError as error:
            if ray_address is None:
                raise
            away = PipelineError(f"{error}\nthe run itself goes on with its next steps: cancel it again")
        if ray_address is not None:
            from pipelines.kubeflow_steps import jobs_of_run
            from ray_jobs.jobs import stop_jobs

            try:
                stopped = stop_jobs(ray_address, jobs_of_run(run))
            except ClusterError as error:
                if away is None:
                    raise
                raise PipelineError(f"{away}\n{error}") from error
            typer.echo(f"stopped {', '.join(stopped)}" if stopped else "no job of it was running")
        if away is not None:
            raise away


def _kubeflow(
    host: str | None, namespace: str | None, token_file: Path | None, ca_cert: Path | None, experiment: str | None
) -> Kubeflow:
    from pipelines.kubeflow_client import Kubeflow, find_endpoint

    return Kubeflow(find_endpoint(host, namespace, token_file, ca_cert), experiment)


def _package(
    file: Path,
    config: Path | None,
    finetunes: str | None,
    workspace: str | None,
    ray_address: str | None,
    pending_seconds: float | None,
) -> Package:
    """A compiled pipeline and its arguments, all of it checked before anything is asked. Raises ConfigError."""
    from pipelines.config import load_config
    from pipelines.kubeflow_client import Package
    from pipelines.parts import narrowed

    given: dict[str, Any] = {
        "finetunes": finetunes,
        "workspace": workspace,
        "ray_address": ray_address,
        "pending_seconds": pending_seconds,
    }
    if config is not None:
        from pipelines.kubeflow import read_config

        given["config"] = read_config(config)
        load_config(config, far=given["config"])
    package = Package(file, {name: value for name, value in given.items() if value is not None})
    text = given.get("config") or package.spec["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"]
    if finetunes:
        load_config(Path(f"{config or file}, with these finetunes"), far=narrowed(text, finetunes))
    return package


def _lines(title: str, rows: list[Listed]) -> list[str]:
    if not rows:
        return [f"{title}: none"]
    widths = [max(len(getattr(row, key)) for row in rows) for key in ("name", "state", "when")]
    return [
        f"{title}:",
        *(f"  {r.name:{widths[0]}}  {r.state:{widths[1]}}  {r.when:{widths[2]}}  {r.id}" for r in rows),
    ]
