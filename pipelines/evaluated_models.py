"""The models that `realign evaluate` is given: opened one after the other, asked everything, and let go."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from components.errors import ConfigError
from components.evaluation.execution import EvaluationExecution
from components.evaluation.judges.settings import JudgeExecution
from components.evaluation.outcomes import Outcome
from components.evaluation.prompts import PromptSet
from components.limits import available_cpus
from pipelines.sections import EvaluationSection, is_adapter

if TYPE_CHECKING:
    from components.evaluation.answers import Answerer
    from components.evaluation.capability.tasks import LoadedTask
    from components.evaluation.judges.base import Judge

STATE = ".state"
"""Where answers are kept until all models have theirs."""
JUDGED_AT_ONCE = 16
"""Answers, at most: their logits are held, and guards' instructions are long."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Named:
    """A model on the command line."""

    name: str
    explicit: bool
    """Whether the name was given, or is the end of the place."""
    place: str
    """A directory, or `URL#model` of an API."""

    @property
    def served(self) -> bool:
        """Whether it is behind an API."""
        return self.place.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Runtime:
    """How, not what."""

    base: Path | None
    """Of models that are adapters."""
    device: str
    dtype: str | None
    """None: as the settings say."""
    batch_size: int
    actors: int = 1
    devices: int = 1
    """Of each actor."""
    key_variable: str | None = None
    """Of APIs."""

    @property
    def judging(self) -> JudgeExecution:
        """Judges with a model of their own run where the models do."""
        device = "cuda" if self.device == "auto" else self.device  # a judge is not spread over devices
        return JudgeExecution(device=device, batch_size=min(self.batch_size, JUDGED_AT_ONCE))


def named_models(given: Sequence[str]) -> list[Named]:
    """`name=place`, or a place whose last part is its name. Raises ConfigError for a name given twice."""
    found: list[Named] = []
    for one in given:
        name, equals, place = one.partition("=")
        if not equals or "/" in name:
            name, place = one.rstrip("/").replace("#", "/").rsplit("/", 1)[-1], one
        if not _NAME.fullmatch(name) or not place or any(name == other.name for other in found):
            raise ConfigError(f"{one}: give each model a name of its own (letters, digits, - _ .), as name=model")
        found.append(Named(name, place != one, place))
    return found


def check_models(models: Sequence[Named], runtime: Runtime) -> None:
    """What would keep any of the models from being asked, before the first is. Raises ConfigError that lists it."""
    problems = []
    for one in models:
        place = Path(one.place)
        if one.served:
            if not one.place.partition("#")[2]:
                problems.append(f"{one.place}: say which model of the API, as {one.place.rstrip('#')}#model")
        elif not place.is_dir():
            problems.append(f"{one.place}: no directory with a model")
        elif is_adapter(place) and runtime.base is None:
            problems.append(f"{one.place} is an adapter; say of what by --base")
    if runtime.actors > 1 and runtime.device not in ("cpu", "cuda"):
        problems.append(f"--device {runtime.device}: actors compute on cpu or cuda, which of the GPUs Ray says")
    if runtime.actors == 1 and runtime.devices > 1:
        problems.append("--devices is of several actors; one model over all GPUs is --device auto")
    if runtime.device != "cpu" and not all(one.served for one in models):
        import torch

        if not torch.cuda.is_available():
            problems.append(f"--device {runtime.device}: no GPU that torch can use here; give cpu")
    if problems:
        raise ConfigError("\n".join(problems))


@contextmanager
def workers(models: Sequence[Named], runtime: Runtime) -> Iterator[None]:
    """What actors need, for all models in turn; nothing where there are none."""
    if runtime.actors == 1 or all(one.served for one in models):
        yield
        return
    from ray_jobs.submit import started_ray

    with started_ray(max(available_cpus(), runtime.actors)):
        yield


def outcomes_of(
    one: Named,
    settings: EvaluationSection,
    sets: Sequence[PromptSet],
    tasks: Sequence[LoadedTask],
    judge: Judge,
    out: Path,
    runtime: Runtime,
) -> dict[str, list[Outcome]]:
    """Every set and task of a model, which is gone from the memory when they are done."""
    from components.evaluation.evaluate import evaluate

    options: dict[str, Any] = {
        "out_dir": out / one.name,
        "state_dir": out / STATE / hashlib.sha256(identity_of(one, runtime).encode()).hexdigest()[:20],
        "progress": partial(_tell, one.name),
    }
    with _opened(one, runtime, settings.dtype) as answerer:
        outcomes = evaluate(answerer, sets=sets, settings=settings, judge=judge, **options).outcomes
        if settings.capability is None:
            return outcomes
        from ray_jobs.answering import capability_of

        found = capability_of(answerer, tasks, settings.capability, **options)
    sys.stderr.write("".join(f"{one.name}: {note}\n" for note in found.notes))
    return outcomes | found.outcomes


@contextmanager
def _opened(model: Named, runtime: Runtime, dtype: str) -> Iterator[Answerer]:
    if model.served:
        from components.evaluation.api import ApiModel, ApiSettings

        url, _, served = model.place.partition("#")
        if not served:
            raise ConfigError(f"{model.place}: say which model of the API, as {url}#model")
        try:
            settings = ApiSettings(url=url, model=served, key_variable=runtime.key_variable)
        except ValidationError as error:
            raise ConfigError(f"{model.name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
        yield ApiModel(settings)
        return
    from ray_jobs.actors import Place, loaded
    from ray_jobs.answering import answering

    base = runtime.base and runtime.base.resolve()
    place = Place(Path(model.place).resolve(), base=base, tokenizer_dir=base)  # used where it has no tokenizer
    if runtime.actors == 1:
        yield loaded(place, runtime.device, dtype, runtime.batch_size)
        return
    device: Any = "cpu" if runtime.device == "cpu" else "cuda"
    execution = EvaluationExecution(actors=runtime.actors, device=device, devices=runtime.devices)
    threads = max(1, available_cpus() // runtime.actors)
    with answering(place, execution, dtype=dtype, batch_size=runtime.batch_size, threads=threads) as found:
        yield found


def identity_of(model: Named, runtime: Runtime) -> str:
    """What tells that a place holds another model now."""
    place = Path(model.place)
    if not place.is_dir():
        return json.dumps([model.name, model.place])  # a server asked twice may answer otherwise
    directories = [one.resolve() for one in (place, runtime.base) if one is not None]
    files = [file for one in directories if one.is_dir() for file in sorted(one.iterdir()) if file.is_file()]
    seen = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return json.dumps([*map(str, directories), seen])


def _tell(name: str, told: Mapping[str, Any]) -> None:
    if not sys.stderr.isatty():
        if told["done"] == told["total"]:
            sys.stderr.write(f"{name}: {told['set']} {told['done']}/{told['total']}\n")
    else:
        end = "\r\x1b[K" if told["done"] == told["total"] else ""
        sys.stderr.write(f"\r\x1b[K{name}: {told['set']} {told['done']}/{told['total']}{end}")
        sys.stderr.flush()
