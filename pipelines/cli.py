"""The command line. Heavy imports wait inside the commands: `realign --help` must answer at once."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from components.errors import ConfigError, RealignError
from pipelines import cli_compare, cli_doctor, cli_pipeline, cli_registry, cli_step, cli_sweep
from pipelines.interrupts import interruptible

app = typer.Typer(
    name="realign",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
testbed = typer.Typer(help="Small real models with a known safety behaviour.", no_args_is_help=True)
app.add_typer(testbed, name="testbed")
cli_sweep.add_to(app)
cli_step.add_to(app)
cli_pipeline.add_to(app)
cli_doctor.add_to(app)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"realign {version('safety-realign')}")
        except PackageNotFoundError:
            raise ConfigError(
                "safety-realign is not installed, so nobody knows its version; pip install -e ."
            ) from None
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Give finetunes of a safely aligned language model their safety back, keep their skill, and prove both."""


class Size(StrEnum):
    demo = "demo"
    minute = "minute"
    tiny = "tiny"


class Architecture(StrEnum):
    llama = "llama"
    qwen = "qwen"


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The run config (YAML).")],
    workspace: Annotated[
        Path | None, typer.Option(help="Where results are kept; by default runs/<name of the run>.")
    ] = None,
) -> None:
    """Realign every finetune of a run config: train masks, fuse, evaluate, register, summarise.

    Run it again to continue: what has a record is not run again.
    """
    with interruptible("the same command continues"):
        from pipelines.config import load_config
        from pipelines.run import realign

        loaded = load_config(config)
        failures = realign(loaded, workspace or Path("runs") / loaded.name)
    if failures:
        raise typer.Exit(2)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The run config (YAML).")],
    workspace: Annotated[
        Path | None, typer.Option(help="Where results would be kept; its disk is looked at, nothing is written.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes, all alike.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs of a node.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of a node.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of a GPU.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of a node's memory.")] = None,
    disk: Annotated[float | None, typer.Option(help="GiB free for the workspace.")] = None,
    tflops: Annotated[float | None, typer.Option(help="What one GPU sustains (not its peak), for times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, sizes in bytes.")] = False,
) -> None:
    """Say what each stage of a run would take (memory, disk, time), what does not fit, and what would.

    Nothing is written and no weights are read. What is not given is looked up on this machine. Exit status 2 when something
    does not fit.
    """
    from pipelines.config import load_config
    from pipelines.inputs import open_models
    from pipelines.machine import described, measure
    from pipelines.plan_text import plan_json, plan_lines
    from pipelines.resources import plan as make_plan

    loaded = load_config(config)
    cluster = described(
        workspace or Path("runs") / loaded.name,
        loaded.execution,
        {"nodes": nodes, "cpus": cpus, "gpus": gpus, "gpu_memory": gpu_memory, "memory": memory, "disk": disk},
    )
    rates = measure(None if tflops is None else tflops * 1e12)
    found = make_plan(loaded, open_models(loaded), cluster, rates)
    typer.echo(plan_json(found, loaded).rstrip() if as_json else "\n".join(plan_lines(found, loaded)))
    if found.problems:
        raise typer.Exit(2)


@app.command()
def fuse(
    out: Annotated[str, typer.Option(help="The directory, or s3://bucket/prefix, that the fused model gets.")],
    aligned: Annotated[
        str | None,
        typer.Option(help="The aligned model: a directory, s3://bucket/prefix, or owner/name@revision of the hub."),
    ] = None,
    finetune: Annotated[
        list[str] | None,
        typer.Option(help="A finetune of it (full, or a LoRA adapter), as name=model. Several for a merge."),
    ] = None,
    mergekit: Annotated[
        Path | None, typer.Option(help="A mergekit config to carry over, instead of models, method and numbers.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="task_arithmetic, average, ties, dare, dare_ties or slerp, of one finetune or several and with or without "
            "--mask; masked, interpolation, resta, safe_lora, safe_merge or lox, of one. By default task_arithmetic."
        ),
    ] = None,
    unaligned: Annotated[
        str | None, typer.Option(help="What the aligned model was made from; some methods need it.")
    ] = None,
    safe: Annotated[str | None, typer.Option(help="safe_merge: a finetune that was made safe.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A trained mask's directory.")] = None,
    form: Annotated[str | None, typer.Option(help="Of the mask: soft or binary.")] = None,
    rescale: Annotated[str | None, typer.Option(help="Of the mask: mean (divide by its mean) or none.")] = None,
    scale: Annotated[float | None, typer.Option(help="λ, the factor on the task vector; 1 by default.")] = None,
    weight: Annotated[list[str] | None, typer.Option(help="A finetune's own factor, as name=number.")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="A factor for tensors of a name, as pattern=number (*.mlp.*=0.5); first match."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of a task vector that stays; ties: 0.2, dare: 0.8.")
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="ties: by tensor (the default), or over the whole model.")
    ] = None,
    aggregate: Annotated[str | None, typer.Option(help="ties: mean (the default) or sum of those that agree.")] = None,
    seed: Annotated[int | None, typer.Option(help="dare: which weights are dropped; 0 by default.")] = None,
    t: Annotated[float | None, typer.Option(help="slerp needs it: where between the two, 0 to 1.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="interpolation needs it: 0 is the aligned model, 1 the finetune.")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="resta and lox need it: factor on the safety vector.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="lox needs it: rank of what is added to each matrix.")] = None,
    similarity: Annotated[
        float | None,
        typer.Option(help="safe_lora, safe_merge: restore matrices of at most this cosine,"),
    ] = None,
    lowest: Annotated[
        int | None, typer.Option(min=1, help="or so many of the lowest; one of the two is needed.")
    ] = None,
    safe_share: Annotated[
        float | None, typer.Option(help="safe_merge: share of the safe part; 0.2 by default.")
    ] = None,
    vocabulary: Annotated[
        str,
        typer.Option(help="Where numbers of tokens differ: error, pad (the most) or truncate (the aligned model's)."),
    ] = "error",
    one_sided: Annotated[
        str, typer.Option(help="Where not all have a tensor: error, keep, or drop what the aligned model lacks.")
    ] = "error",
    rounding: Annotated[str | None, typer.Option(help="To bf16: nearest (the default) or stochastic.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default what holds all models' weights.")
    ] = None,
    max_shard: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Working side by side; by default one a CPU, 8 at most.")
    ] = None,
    durable: Annotated[bool, typer.Option(help="Wait until the model would survive a power cut.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there, once the new model is whole.")] = False,
) -> None:
    """Fuse finetunes with the aligned model into one model directory, ready for transformers.

    The model has its name when it is whole; run the same command again to go on after an interruption.
    """
    with interruptible("the same command continues"):
        from pipelines.fuse_command import Typed, fuse_typed

        fuse_typed(
            Typed(
                aligned=aligned, finetunes=finetune or [], method=method, mergekit=mergekit, weights=weight or [],
                layers=layer or [], max_shard=max_shard,
                numbers={
                    "form": form, "rescale": rescale, "scale": scale, "density": density, "threshold": threshold,
                    "aggregate": aggregate, "seed": seed, "t": t, "alpha": alpha, "gamma": gamma, "rank": rank,
                    "similarity": similarity, "lowest": lowest, "safe_share": safe_share,
                },
                output={"output_dtype": dtype, "rounding": rounding},
                others={
                    "unaligned": unaligned, "safe": safe, "mask": mask, "vocabulary": vocabulary, "one_sided": one_sided
                },
            ),
            out, processes=processes, durable=durable, overwrite=overwrite,
        )  # fmt: skip


@app.command()
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models as name=DIRECTORY or name=https://host/v1#MODEL; the first is what others are held to."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML with a section `evaluation`, as a run config has it, and perhaps a `gate`."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where answers, rates and decisions go.")] = None,
    base: Annotated[Path | None, typer.Option(help="What models that are adapters are over.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto: over all GPUs.")] = "cpu",
    actors: Annotated[
        int, typer.Option(min=1, help="Processes (Ray actors) that share the prompts, each with the model.")
    ] = 1,
    devices: Annotated[int, typer.Option(min=1, help="GPUs of each actor, where there are several.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of the models: float32, bfloat16 or float16; as the config says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The largest; halved where memory wants it.")] = 128,
    key_variable: Annotated[
        str | None, typer.Option(help="The environment variable with an API's key; for api.openai.com OPENAI_API_KEY.")
    ] = None,
    how_many: Annotated[
        float | None, typer.Option(help="Say instead how many prompts show a rate to within this much, like 0.03.")
    ] = None,
) -> None:
    """Ask models the same prompts, judge every answer, compare them, and hold them to a gate.

    Exit status 3 when the gate is shut. The same command goes on after an interruption.
    """
    from pipelines.evaluate_command import evaluate_command
    from pipelines.evaluate_text import how_many_lines
    from pipelines.evaluated_models import Runtime

    if how_many is not None:
        typer.echo("\n".join(how_many_lines(how_many)))
        return
    if not models or config is None or out is None:
        raise ConfigError("give models, --config and --out, or --how-many")
    _require_dtype(dtype)
    with interruptible("the same command continues"):
        evaluate_command(models, config, out, Runtime(base, device, dtype, batch_size, actors, devices, key_variable))


@app.command()
def landscape(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Models as name=DIRECTORY, all of one architecture; each is marked in the others' landscapes."
        ),
    ],
    config: Annotated[
        Path,
        typer.Option(help="YAML with a section `evaluation`, as a run config has it, and perhaps `landscape`."),
    ],
    out: Annotated[Path, typer.Option(help="Where figures, points and pictures go.")],
    axes: Annotated[
        list[str] | None,
        typer.Option(
            help="random:3 (three random directions), towards=MODEL (a name given or a directory), or two with a comma for a "
            "plane; again for another scan. By default as the config says, or random:3."
        ),
    ] = None,
    points: Annotated[int | None, typer.Option(min=3, help="Of each axis; 21 as published.")] = None,
    bounds: Annotated[
        str | None,
        typer.Option(
            "--range", help="Of each axis, as LOW:HIGH in lengths of the direction; -0.5:0.5, towards: -0.5:1.5."
        ),
    ] = None,
    refine: Annotated[
        float | None,
        typer.Option(help="Begin with few points and add until VISAGE (0 to 100) is known to within this."),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Of each set only the first so many; 80 as published.")
    ] = None,
    sets: Annotated[str | None, typer.Option(help="Test sets, with commas between; by default all that count.")] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes (Ray actors), each with a model that it moves; as many as CPUs, on cuda 1."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    devices: Annotated[int, typer.Option(min=1, help="GPUs of each actor.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of the models: float32, bfloat16 or float16; as the config says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The largest; halved where memory wants it.")] = 128,
    base: Annotated[Path | None, typer.Option(help="What models that are adapters are over.")] = None,
) -> None:
    """Draw how safe models stay as their weights move, and score it (VISAGE).

    The same command goes on after an interruption.
    """
    from pipelines.evaluated_models import Runtime
    from pipelines.landscape_axes import Options
    from pipelines.landscape_command import landscape_command

    _require_dtype(dtype)
    options = Options(axes or (), points, bounds, refine, prompts, sets)
    with interruptible("the same command continues"):
        runtime = Runtime(base, device, dtype, batch_size, devices=devices)
        landscape_command(models, config, out, options, runtime, actors=actors)


@app.command()
def sets(
    name: Annotated[str | None, typer.Argument(help="One of them, for what to write in a config.")] = None,
) -> None:
    """List the published prompt sets that a config can name, with licences and where they lie."""
    from pipelines.sets_command import sets_lines

    typer.echo("\n".join(sets_lines(name)))


@app.command()
def status(workspace: Annotated[Path, typer.Argument(help="The workspace directory of a run.")]) -> None:
    """Say where a run stands, also while it runs or after it was killed."""
    from pipelines.status import run_status

    for line in run_status(workspace):
        typer.echo(line)


@testbed.command("build")
def testbed_build(
    directory: Annotated[Path, typer.Argument(help="Where the family goes.")],
    seed: Annotated[int, typer.Option(help="Another seed, another world and other models.")] = 0,
    size: Annotated[
        Size, typer.Option(help="demo: the whole family; minute: a smaller one for tests; tiny: one finetune only.")
    ] = Size.demo,
    architecture: Annotated[Architecture, typer.Option(help="Which architecture.")] = Architecture.llama,
) -> None:
    """Train a family: unaligned and aligned model, finetunes, data, and a run config for `realign run`."""
    with interruptible("the same command continues after the last phase that ended"):
        from components.testbed.family import build_family

        where = build_family(
            directory,
            seed=seed,
            size=size.value,
            architecture=architecture.value,
            cache=_cache() / "testbed",
            progress=_phase,
        )
    typer.echo(f"{where}/realign.yaml")


cli_compare.add_to(app)
cli_registry.add_to(app)


def _require_dtype(dtype: str | None) -> None:
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: give float32, bfloat16 or float16")


def _phase(values: dict[str, Any]) -> None:
    seconds = f" in {values['seconds']} s" if "seconds" in values else ""
    typer.echo(f"testbed: {values['phase']} {values['event']}{seconds}", err=True)


def _cache() -> Path:
    """Where things are kept that any run may use again."""
    given = os.environ.get("REALIGN_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "safety-realign"


def main() -> None:
    """Entry point: a RealignError is one line without a traceback, and its class's exit code."""
    try:
        app()
    except RealignError as error:
        sys.stderr.write(f"realign: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as end:
        if sys.argv[1:2] == ["fuse"] and not end.code:
            # Nothing of it is left running; where torch was needed, to take its modules apart takes a third of its import.
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(0)
        raise


if __name__ == "__main__":
    main()
