"""Models behind an OpenAI-compatible API: vLLM, TGI, `transformers serve`, a vendor's.

The `openai` package retries what may pass (no connection, time-outs, 408, 409, 429, 5xx) with growing pauses, as long as the
server asks for where it does. What then still fails is an answer that failed: it is never counted as safe, and said so.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from components.errors import EvaluationError, listed
from components.evaluation.answers import Answer, End
from components.evaluation.conversations import Prompt

if TYPE_CHECKING:
    from openai import OpenAI

    from components.evaluation.settings import EvaluationSettings


def _plain(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: give an address like https://host/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{parts.scheme}://{parts.hostname}: no name, password or query in the address, it stands in records; keys come "
            "from `key_variable`"
        )
    return url


ApiUrl = Annotated[str, AfterValidator(_plain)]
"""Of an API, up to and with `/v1`."""


class Pressing(BaseModel):
    """How an API is asked, and how hard it may be pressed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_variable: str | None = None
    """The environment variable that holds the key. None: OPENAI_API_KEY for api.openai.com, and no key for anybody else."""

    concurrency: int = Field(default=8, ge=1)
    """Requests under way at once."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    """No more are begun."""

    timeout_s: float = Field(default=120.0, gt=0)
    """For one attempt."""

    retries: int = Field(default=5, ge=0)
    """Attempts after the first."""


class ApiSettings(Pressing):
    """Where a model is served."""

    url: ApiUrl
    """Of the API."""

    model: str = Field(min_length=1)
    """By the name it is served under."""

    @property
    def key_from(self) -> str | None:
        """The environment variable that the key is read from; None where none is sent."""
        return self.key_variable or ("OPENAI_API_KEY" if self.url.startswith("https://api.openai.com/") else None)


class ApiModel:
    """An Answerer: a model behind an API, which cannot be stopped early."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self.api = Api(settings)

    def answers(
        self,
        prompts: Sequence[Prompt],
        settings: EvaluationSettings,
        *,
        decided: Callable[[str], bool] | None = None,
        skip: Container[int] = (),
    ) -> Iterator[list[tuple[int, Answer]]]:
        """See Answerer. Raises EvaluationError for prompts whose answer is begun, which chat APIs have no words for."""
        del decided
        begun = [prompt.id for prompt in prompts if prompt.begun]
        if begun:
            raise EvaluationError(
                f"an API cannot be told how an answer begins ({listed(begun, 3)}); drop the prefix attack"
            )
        asked = [i for i in range(len(prompts)) if i not in skip]
        requests = [(prompts[i].asked(settings.system_prompt), _options(settings, prompts[i])) for i in asked]
        for number, said in self.api.chat_all(requests):
            end: End = "failed" if said.failure else "limit" if said.cut else "model"
            yield [(asked[number], Answer(said.text, end, said.tokens, said.failure))]


def _options(settings: EvaluationSettings, prompt: Prompt) -> dict[str, Any]:
    """Of a request. Servers draw in their own ways: an equal seed gives equal answers of one server only."""
    options: dict[str, Any] = {"max_tokens": settings.max_new_tokens}
    if settings.sampling is None:
        return options | {"temperature": 0.0}
    own = int.from_bytes(hashlib.blake2b(prompt.id.encode(), digest_size=3).digest())
    return options | {
        "temperature": settings.sampling.temperature,
        "top_p": settings.sampling.top_p,
        "seed": settings.sampling.seed + own,
    }


@dataclass(frozen=True)
class Said:
    """What came back. `failure` says why nothing did."""

    text: str
    tokens: int
    cut: bool = False
    """The limit ended it, not the model."""
    failure: str = ""


class Api:
    """A served model. Threads may share it."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._client = _client(settings)
        self._pace = _Pace(settings.requests_per_minute)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Said:
        """One answer; a failure where there is none after all attempts. `options`: of the request (max_tokens, temperature, …).
        Raises EvaluationError for what no attempt can mend: a refused key, a model or path that is not there."""
        asked: Any = [dict(one) for one in messages]
        name = self._settings.model
        return self._said(lambda: self._client.chat.completions.create(model=name, messages=asked, **options))

    def complete(self, text: str, **options: Any) -> Said:
        """`chat` with a text that goes on as it stands: no chat template is put around it, the server's tokenizer puts its
        beginning-of-text token before it."""
        name = self._settings.model
        return self._said(lambda: self._client.completions.create(model=name, prompt=text, **options))

    def _said(self, ask: Callable[[], Any]) -> Said:
        from openai import APIError, APIStatusError, AuthenticationError, NotFoundError, PermissionDeniedError

        self._pace.wait()
        try:
            return _said(ask())
        except (AuthenticationError, NotFoundError, PermissionDeniedError) as error:
            raise EvaluationError(f"{self._settings.url}: {_first_line(error)}; check url, model and key") from error
        except APIStatusError as error:
            return Said("", 0, failure=f"status {error.status_code}: {_first_line(error)}")
        except APIError as error:
            return Said("", 0, failure=_first_line(error))
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # no JSON, or not that of an answer
            return Said("", 0, failure=f"garbage: {_first_line(error)}")

    def require(self, *, chats: bool = True, max_tokens: int) -> None:
        """One small request. Raises EvaluationError where it is not answered: a refused key, an unknown model, nobody there."""
        ask = "Reply with the word yes."
        said = (
            self.chat([{"role": "user", "content": ask}], max_tokens=max_tokens, temperature=0.0)
            if chats
            else self.complete(ask, max_tokens=max_tokens, temperature=0.0)
        )
        if said.failure:
            raise EvaluationError(f"{self._settings.url}: {said.failure}; check url, model and key")

    def chat_all(
        self, requests: Sequence[tuple[Sequence[Mapping[str, str]], dict[str, Any]]]
    ) -> Iterator[tuple[int, Said]]:
        """(index, answer) of many requests, each a conversation and its options, as they come."""
        return self._each(len(requests), lambda i: self.chat(requests[i][0], **requests[i][1]))

    def complete_all(self, texts: Sequence[str], **options: Any) -> Iterator[tuple[int, Said]]:
        """`complete` of many, as they come."""
        return self._each(len(texts), lambda i: self.complete(texts[i], **options))

    def _each(self, n: int, ask: Callable[[int], Said]) -> Iterator[tuple[int, Said]]:
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Said | BaseException]] = queue.SimpleQueue()
        for index in range(n):
            todo.put(index)
        stopped = threading.Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((index, ask(index)))
                except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                    done.put((index, error))

        # Daemons: whoever interrupts does not wait for requests under way, their time-outs and pauses.
        for _ in range(min(self._settings.concurrency, n)):
            threading.Thread(target=work, name="api", daemon=True).start()
        try:
            for _ in range(n):
                index, found = done.get()
                if isinstance(found, BaseException):
                    raise found
                yield index, found
        finally:
            stopped.set()


class _Pace:
    """Lets so many through a minute, evenly."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = time.monotonic()
        self._lock = threading.Lock()

    def wait(self) -> None:
        if not self._gap:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        time.sleep(at - now)


def _client(settings: ApiSettings) -> OpenAI:
    from openai import OpenAI

    key = os.environ.get(settings.key_from or "") or "none"
    return OpenAI(base_url=settings.url, api_key=key, timeout=settings.timeout_s, max_retries=settings.retries)


def _said(found: Any) -> Said:
    """Servers send what they like: an error in JSON, no choices, no text."""
    choices = getattr(found, "choices", None) or [None]
    text = getattr(getattr(choices[0], "message", None), "content", None)
    if text is None:  # of a text that was gone on with, not of a conversation
        text = getattr(choices[0], "text", None)
    if not isinstance(text, str):
        return Said("", 0, failure=f"garbage: an answer without text ({str(found)[:80]!r})")
    usage = getattr(found, "usage", None)
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written
    return Said(text, int(getattr(usage, "completion_tokens", 0) or 0), choices[0].finish_reason == "length")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
