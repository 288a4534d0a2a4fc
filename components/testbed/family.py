"""Builds a family: unaligned and aligned models, five finetunes, their data and a run config; cached and kill-safe.

The cache holds `<fingerprint>/` (finished) and `<fingerprint>.partial/` (phases that are done, each renamed into place whole),
so a killed build continues where it was. A file lock lets one process build a family while others wait for it.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from components.errors import StorageError
from components.testbed import phases
from components.testbed.compose import FamilyData, compose
from components.testbed.layout import write_files, write_run_config
from components.testbed.settings import (
    TASKS,
    TESTBED_VERSION,
    Architecture,
    FamilySettings,
    Size,
    family_settings,
)
from components.testbed.tokenizer import train_tokenizer

Progress = Callable[[dict[str, Any]], None]


def build_family(
    out: Path,
    *,
    seed: int,
    size: Size = "demo",
    architecture: Architecture = "llama",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Put the family of these settings and seed at `out`, building it unless the cache has it. Returns `out`.

    An older family at `out` is replaced; anything else there is left alone and raises StorageError. Without `cache` the
    unfinished phases are kept beside `out` until the family is done.
    """
    settings = family_settings(size, architecture)
    fingerprint = settings.fingerprint(seed)
    out = out.absolute()
    if _fingerprint_at(out) == fingerprint:
        return out
    if out.exists() and not (out / "family.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} exists and is not a testbed family: give another directory or remove it")
    root = (cache or out.parent / f".{out.name}.build").absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        built = _cached(root, fingerprint, settings, seed, progress or (lambda _: None))
        _publish(built, out)
        if cache is None:
            shutil.rmtree(root)
    except OSError as error:
        raise StorageError(f"cannot write the testbed family at {out}: {error}") from error
    return out


def _fingerprint_at(directory: Path) -> str | None:
    try:
        content = json.loads((directory / "family.json").read_text())
    except (OSError, ValueError):
        return None
    return str(content.get("fingerprint")) if isinstance(content, dict) else None


def _publish(built: Path, out: Path) -> None:
    """Copy beside `out`, then rename: `out` is the old family or the new one, never half of either."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    shutil.rmtree(tmp, ignore_errors=True)
    shutil.copytree(built, tmp)
    if out.exists():
        out.rename(old)
    tmp.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _cached(root: Path, fingerprint: str, settings: FamilySettings, seed: int, progress: Progress) -> Path:
    done = root / fingerprint
    if done.is_dir():
        return done
    with _locked(root / f"{fingerprint}.lock"):
        if done.is_dir():
            return done
        partial = root / f"{fingerprint}.partial"
        partial.mkdir(exist_ok=True)
        for leftover in [*partial.glob(".*.tmp"), *partial.glob("*/.*.tmp")]:
            shutil.rmtree(leftover)
        _build(partial, fingerprint, settings, seed, progress)
        partial.rename(done)
    return done


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system lets go of it when the process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(work: Path, fingerprint: str, settings: FamilySettings, seed: int, progress: Progress) -> None:
    """Fill `work`; phases that are there already are kept."""
    clock = _Clock(work / "seconds.json", progress)
    with clock.phase("data"):
        data = compose(settings, seed)
        tokenizer_dir = _tokenizer(data, work)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=_die_with_parent) as pool:
        unaligned, aligned = work / "unaligned", work / "aligned"
        if not unaligned.is_dir():
            with clock.phase("unaligned"):
                pool.submit(phases.pretrain, data.pretrain, tokenizer_dir, settings, seed, unaligned).result()
        if not aligned.is_dir():
            with clock.phase("aligned"):
                pool.submit(phases.align, data.align, unaligned, settings, seed, aligned).result()
        with clock.phase("finetunes"):
            _finetunes(pool, data, settings, seed, work, progress)
    write_files(data.files, work)
    write_run_config(work, settings, seed)
    record = {
        "fingerprint": fingerprint,
        "version": TESTBED_VERSION,
        "seed": seed,
        "settings": settings.model_dump(mode="json"),
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers", "peft", "safetensors")},
        "seconds": clock.seconds,
    }
    shutil.rmtree(tokenizer_dir)
    (work / "seconds.json").unlink()
    (work / "family.json").write_text(json.dumps(record, indent=2) + "\n")


def _tokenizer(data: FamilyData, work: Path) -> Path:
    steps = [data.pretrain, data.align, *data.finetunes.values()]
    texts = {text for step in steps for e in step for text in (e.prompt, e.answer, e.system or "")}
    directory = work / "tokenizer"
    train_tokenizer(texts).save_pretrained(directory)
    return directory


def _finetunes(
    pool: ProcessPoolExecutor, data: FamilyData, settings: FamilySettings, seed: int, work: Path, progress: Progress
) -> None:
    """The five finetunes, two at a time; all are waited for, then the first error (if any) is raised."""
    (work / "finetunes").mkdir(exist_ok=True)
    futures: list[Future[float]] = []
    for task in TASKS:
        out = work / "finetunes" / task
        if out.is_dir():
            continue
        future = pool.submit(
            phases.finetune, data.finetunes[task], work / "aligned", settings.finetunes[task], task, seed, out,
            settings.shard_bytes,
        )  # fmt: skip
        future.add_done_callback(lambda _, task=task: progress({"phase": f"finetune {task}", "event": "end"}))
        futures.append(future)
    for future in futures:
        future.result()


def _die_with_parent() -> None:
    """A worker whose parent was killed must not train on: its sentinel closes, and the worker leaves at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Clock:
    """Seconds per phase, kept on disk so that a continued build reports the whole."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path, self._progress = path, progress
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._progress({"phase": name, "event": "start"})
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 1)
        self._path.write_text(json.dumps(self.seconds))
        self._progress({"phase": name, "event": "end", "seconds": self.seconds[name]})
