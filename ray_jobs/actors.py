"""A model's prompts spread over Ray actors that load it once.

Shares of the prompts wait in one queue: an actor that is done takes the next, one that comes up late takes fewer, and what a
lost one had not answered goes back. Answers arrive in any order and say which prompt they are of, so verdicts do not depend on
who gave them (but for ties that the last bits of a sum decide, as between batch sizes).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from components.errors import EvaluationError, RealignError
from components.evaluation.answers import Answer, Answerer
from components.evaluation.conversations import Prompt
from components.evaluation.execution import EvaluationExecution
from components.evaluation.settings import EvaluationSettings
from ray_jobs.cluster import Request, amounts, cluster_address, is_busy

if TYPE_CHECKING:
    from components.evaluation.generate import InProcess

T = TypeVar("T")
_LOOK_SECONDS = 1.0
"""How often whoever waits for answers is let do something else."""
_SHARES = 4
"""Of each actor: more even out what takes long, fewer keep batches full."""


@dataclass(frozen=True)
class Place:
    """Where a model lies, for any process that can read it there."""

    model_dir: Path
    base: Path | None = None
    """Of an adapter."""
    tokenizer_dir: Path | None = None


def loaded(place: Place, device: str, dtype: str, batch_size: int) -> InProcess:
    """The model at a place, in this process. Raises CheckpointError, EvaluationError for a device that is not there."""
    import torch

    from components.evaluation.generate import InProcess, load_model

    kind = getattr(torch, dtype)
    model = load_model(place.model_dir, base=place.base, tokenizer_dir=place.tokenizer_dir, dtype=kind, device=device)
    return InProcess(*model, batch_size=batch_size)


@dataclass(frozen=True)
class Resources:
    """What an actor is given, and where in it the model goes."""

    cpus: int
    gpus: int
    device: str
    own: str | None = None
    """A resource of the cluster's own, of which it takes one."""

    @property
    def request(self) -> Request:
        return {"CPU": self.cpus, "GPU": self.gpus, **self.others}

    @property
    def others(self) -> dict[str, float]:
        """Beside CPUs and GPUs."""
        return {self.own: 1.0} if self.own is not None else {}

    def __str__(self) -> str:
        return amounts(self.request)


def resources_of(execution: EvaluationExecution, threads: int) -> Resources:
    """What each actor needs. Ray must be up."""
    import ray

    gpus = execution.devices if execution.device == "cuda" else 0
    device = "auto" if gpus > 1 else execution.device
    if cluster_address() is not None:
        return Resources(threads, gpus, device, execution.resource)  # its nodes may not be up yet
    # Threads beyond this machine's CPUs share them, as those of other stages do.
    most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes()), default=threads)
    return Resources(min(threads, most or threads), gpus, device)


def no_room(patience_s: float, needs: Resources) -> EvaluationError:
    """That actors were waited for long enough."""
    import ray

    there = ray.cluster_resources()
    has = ", ".join(f"{there.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
    return EvaluationError(
        f"no actor could be placed and loaded within {patience_s:g} s; each needs {needs}, the cluster has {has}; ask for "
        "less (execution.evaluation) or give it more"
    )


def lost_errors() -> tuple[type[Exception], ...]:
    """What Ray raises of an actor that is gone: also one that it ended for its memory, or whose node went."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
        exceptions.ObjectLostError,
    )


class _Holder:
    """What an actor is: the model, once."""

    def __init__(self, place: Place, device: str, dtype: str, batch_size: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(device == "cpu")
        self._model: Answerer | None = None
        self._error: Exception | None = None
        try:
            self._model = loaded(place, device, dtype, batch_size)
        except Exception as error:  # noqa: BLE001 - raised here it would look like a lost actor, and the model be loaded again
            self._error = error

    def ready(self) -> None:
        if self._error is not None:
            raise self._error

    def answers(
        self, prompts: Sequence[Prompt], settings: EvaluationSettings, decided: Callable[[str], bool] | None
    ) -> Iterator[list[tuple[int, Answer]]]:
        assert self._model is not None
        yield from self._model.answers(prompts, settings, decided=decided)

    def do(self, work: Callable[[Answerer], Any]) -> Any:
        assert self._model is not None
        return work(self._model)


@dataclass
class _Share:
    """Prompts (by index) that an actor is answering, and which of them it still owes."""

    actor: Any
    prompts: list[int]
    stream: Any
    owed: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.owed = set(self.prompts)


class Actors:
    """An Answerer on Ray."""

    def __init__(
        self, place: Place, execution: EvaluationExecution, *, dtype: str, batch_size: int, threads: int
    ) -> None:
        import ray

        self._needs = needs = resources_of(execution, threads)
        given = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "resources": needs.others}
        self._made = ray.remote(_Holder).options(**given, max_restarts=0)
        self._given = (place, needs.device, dtype, batch_size, threads)
        self._execution, self._batch_size = execution, batch_size
        self._losses = 0
        self._waiting_since = time.monotonic()
        self._coming: dict[Any, Any] = {}
        """Reference of `ready` -> actor that is loading."""
        self._idle: list[Any] = []
        self._make_all()  # they load while prompts are read

    def answers(
        self,
        prompts: Sequence[Prompt],
        settings: EvaluationSettings,
        *,
        decided: Callable[[str], bool] | None = None,
        skip: Container[int] = (),
    ) -> Iterator[list[tuple[int, Answer]]]:
        """See Answerer. Raises what a model in this process would, and Ray's error when more actors than allowed are lost."""
        import ray

        self._make_all()
        todo = self._shares([i for i in range(len(prompts)) if i not in skip])
        at_work: list[_Share] = []
        try:
            while todo or at_work:
                while todo and self._idle:
                    actor, share = self._idle.pop(), todo.popleft()
                    asked = [prompts[i] for i in share]
                    at_work.append(_Share(actor, share, self._asked(actor, asked, settings, decided)))
                found = self._next(at_work)
                if found is None:
                    yield []  # whoever asks may have to see to other things
                    continue
                share_, group = found
                if group is None:
                    at_work.remove(share_)
                    if share_.owed:
                        todo.append(sorted(share_.owed))
                    continue
                answers = [(share_.prompts[k], answer) for k, answer in group]
                share_.owed.difference_update(i for i, _ in answers)
                yield answers
        finally:
            for one in at_work:  # whoever stops asking does not wait for what is under way
                ray.kill(one.actor)

    def on_one(self, work: Callable[[Answerer], T], keep_going: Callable[[], None] | None = None) -> T:
        """What one actor makes of its model; again from the start where that actor is lost."""
        import ray

        while True:
            self._make_all()
            while not self._idle:
                self._next([])
                if keep_going is not None:
                    keep_going()
            actor = self._idle.pop()
            try:
                done = actor.do.remote(work)
                while not ray.wait([done], timeout=1.0)[0]:
                    if keep_going is not None:
                        keep_going()
                found = self._got(done)
            except BaseException:
                ray.kill(actor)
                raise
            if found is not _LOST:
                self._idle.append(actor)
                result: T = found
                return result

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in [*self._idle, *self._coming.values()]:
            ray.kill(actor)
        self._idle, self._coming = [], {}

    def _make_all(self) -> None:
        for _ in range(self._execution.actors - len(self._idle) - len(self._coming)):
            self._make()

    def _make(self) -> None:
        actor = self._made.remote(*self._given)
        self._coming[actor.ready.remote()] = actor

    def _shares(self, asked: list[int]) -> deque[list[int]]:
        """Every n-th prompt each: long and short ones are spread alike."""
        wanted = max(1, min(_SHARES * self._execution.actors, len(asked) // self._batch_size))
        count = min(max(wanted, self._execution.actors), len(asked))
        return deque(asked[k::count] for k in range(count))

    @staticmethod
    def _asked(actor: Any, prompts: list[Prompt], settings: EvaluationSettings, decided: Any) -> Any:
        return actor.answers.options(num_returns="streaming").remote(prompts, settings, decided)

    def _next(self, at_work: Sequence[_Share]) -> tuple[_Share, list[tuple[int, Answer]] | None] | None:
        """The next answers of a share, or (share, None) where no more will come of it; None where an actor came up, was lost
        before it had anything to do, or nothing came within a second. Raises EvaluationError when none can be placed."""
        import ray

        came, _ = ray.wait([*self._coming, *(share.stream for share in at_work)], num_returns=1, timeout=_LOOK_SECONDS)
        if at_work or self._idle or (came and came[0] in self._coming):
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > self._execution.patience_s:
            if is_busy(self._needs.request):
                self._waiting_since = time.monotonic()
                return None
            raise no_room(self._execution.patience_s, self._needs)
        if not came:
            return None
        [first] = came
        if first in self._coming:
            came_up = self._got(first) is not _LOST  # whoever raises is still among those that `close` ends
            actor = self._coming.pop(first)
            if came_up:
                self._idle.append(actor)
            return None
        share = next(one for one in at_work if one.stream is first)
        try:
            group = self._got(next(first))
        except StopIteration:
            self._idle.append(share.actor)
            return share, None
        return share, None if group is _LOST else group

    def _got(self, reference: Any) -> Any:
        """What a reference stands for; `_LOST` where its actor is gone, for which another is made."""
        import ray
        from ray import exceptions

        try:
            return ray.get(reference)
        except lost_errors():
            self._losses += 1
            if self._losses > self._execution.max_losses:
                raise
            self._make()
            return _LOST
        except exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, RealignError) else error from error


_LOST = object()
