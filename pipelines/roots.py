"""Root models and data files: found, identified by their bytes, and checked as far as that costs nothing, before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from components.checkpoints.identity import identify
from components.checkpoints.reference import Checkpoint, open_checkpoint
from components.errors import CheckpointError, DataError, RealignError
from components.evaluation.judges import make_judge
from components.evaluation.judges.models import model_identity
from components.evaluation.judges.settings import Judging, OwnModel, judges_in
from components.evaluation.prompts import load_prompt_set
from components.masks.data import PreferenceData, load_preferences, load_prompts
from components.records import file_sha256
from pipelines.config import RunConfig

ALIGNED, UNALIGNED = "aligned", "unaligned"


@dataclass(frozen=True)
class Roots:
    """What the run starts from. A finetune that cannot be identified fails alone; its error waits here."""

    models: dict[str, str]
    """`aligned`, `unaligned` or `finetune:<name>` -> SHA-256 identity."""
    errors: dict[str, RealignError]
    """The same keys, of models that could not be identified."""
    files: dict[str, str]
    """Path of a data file or of a judge's model -> SHA-256; `PreferenceData.where` or `SetSettings.files` of a hub dataset ->
    SHA-256 of its rows."""
    capability: dict[str, str] = field(default_factory=dict)
    """Capability task -> identity of what it asks."""


def find_roots(config: RunConfig, cache: Path) -> Roots:
    """Identify every model (hashes are cached by size, mtime and inode) and check every data file.

    Raises DataError that lists what is wrong with the data files: a run whose data is broken must not start.
    """
    paths: dict[str, tuple[Path, Path | None, bool]] = {
        ALIGNED: (config.aligned, config.aligned_base, config.aligned_base_equal)
    }
    if config.unaligned is not None and config.needs_unaligned:
        paths[UNALIGNED] = (config.unaligned, None, False)
    for finetune in config.finetunes:
        paths[f"finetune:{finetune.name}"] = (finetune.path, config.base, finetune.base_equal)
    models: dict[str, str] = {}
    errors: dict[str, RealignError] = {}

    def one(key: str) -> None:
        path, base, declared = paths[key]
        factors = config.mask.track == "factors" and key != UNALIGNED
        try:
            with readable(path):
                checkpoint = open_checkpoint(path, base=base, base_declared_equal=declared, factors=factors)
                _require_room(checkpoint, config.evaluation.max_new_tokens)
                models[key] = identify(checkpoint, cache=cache).sha256
        except RealignError as error:
            errors[key] = error

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(one, paths))
    files = _check_files(config, cache)
    return Roots(models=models, errors=errors, files=files, capability=_capability(config))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A CheckpointError in place of whatever reading `path` raises: files of any content may lie there, and one finetune's must
    not end the run for all."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error


def _require_room(checkpoint: Checkpoint, max_new_tokens: int) -> None:
    """How long prompts are, a tokenizer says later; answers that leave them no room at all are known now."""
    positions = checkpoint.config.get("max_position_embeddings")
    if isinstance(positions, int) and positions <= max_new_tokens:
        raise CheckpointError(
            f"{checkpoint.path} has {positions} positions and evaluation.max_new_tokens is {max_new_tokens}: "
            "no prompt would fit; lower it"
        )


def _check_files(config: RunConfig, cache: Path) -> dict[str, str]:
    problems: list[str] = []
    files: dict[str, str] = {}

    def check(where: Path | str, identify: Callable[[], str]) -> None:
        try:
            files[str(where)] = identify()
        except RealignError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{where}: {error.strerror or error}; make it readable")

    for pairs in (config.mask.preferences, config.mask.preferences_dev):
        if pairs is not None:
            check(pairs.where, partial(_pairs, pairs))
    for finetune in config.finetunes:
        if finetune.anchor is not None:
            check(finetune.anchor, partial(_file, finetune.anchor, load_prompts))
    for chosen in config.evaluation.sets:
        check(chosen.files, partial(lambda s: load_prompt_set(s).sha256, chosen))
    problems += judge_problems(config.evaluation.judge)
    for judge in judges_in(config.evaluation.judge):
        if isinstance(judge, OwnModel) and judge.directory is not None:
            check(judge.directory, partial(model_identity, judge.directory, cache=cache))
    if problems:
        raise DataError("\n".join(problems))
    return files


def judge_problems(settings: Judging) -> list[str]:
    """What keeps judges from judging, as far as it can be known without their weights."""
    try:
        make_judge(settings)
    except RealignError as error:
        return [str(error)]
    return []


def _capability(config: RunConfig) -> dict[str, str]:
    """Raises ConfigError that lists every task that cannot be asked."""
    if config.evaluation.capability is None:
        return {}
    from components.evaluation.capability.tasks import load_tasks

    return {task.name: task.identity for task in load_tasks(config.evaluation.capability)}


def _file(path: Path, load: Callable[[Path], object]) -> str:
    load(path)
    return file_sha256(path)


def _pairs(data: PreferenceData) -> str:
    """What identifies preference data, once it was read whole."""
    if data.prompts is not None:
        return _file(data.prompts, load_prompts)
    found = load_preferences(data)
    return found.sha256() if data.file is None else file_sha256(data.file)
