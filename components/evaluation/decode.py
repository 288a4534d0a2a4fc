"""Decoding many prompts: rows leave a batch as soon as they have ended, and others take their places.

transformers' own `generate` carries every row to the end of the longest and copies the whole key-value cache at each token;
both cost more than the model does when answers are short and of mixed lengths. This loop gives the same tokens (a test holds it
to `generate`) and asks of a model only what its `forward` says it takes. The longest prompts come first: whoever joins then
fits into the columns that are filled, and a batch that is too large for the memory fails at once.

Shapes: B places in the batch, P padded prompt length, L columns in the cache, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.evaluation.answers import End
from components.evaluation.cache import can_join, can_leave, make_cache

CHECK_EVERY = 4
"""Tokens between two looks at whether an answer is decided: decoding 128 rows costs about a small model's step."""
LEAVE_AT = 0.75
"""When at most this share of the places is still used, others come in, or the cache is copied once without those that left."""
_SLACK = 64
"""Columns beyond what a prompt and its answer need: how seldom columns that nobody needs any more are forgotten."""


@dataclass
class Row:
    """One answer in the making: its tokens without the end token, and what ended it (a token, where the model did)."""

    tokens: list[int] = field(default_factory=list)
    end: End = "limit"
    end_token: int | None = None
    open: bool = True
    index: int = 0
    """Which of the prompts it answers."""
    broken: bool = False
    """The model's numbers for it were none, if only after it had ended."""

    def close(self, end: End) -> None:
        self.open, self.end = False, end


Choose = Callable[[torch.Tensor, Sequence[Row]], torch.Tensor]
"""(logits [B, V] in fp32, the rows at those places) -> tokens [B]."""


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: those of the generation config, as a server takes them, else the tokenizer's."""
    stated = model.generation_config.eos_token_id if model.generation_config is not None else None
    if stated is None:
        stated = tokenizer.eos_token_id
    return set() if stated is None else {stated} if isinstance(stated, int) else set(stated)


def pad_token(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int:
    """What fills a batch up. No row looks at it, so any token does where the tokenizer names none."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else min(ends, default=0)


def most_likely(logits_BV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Greedy: the first of the largest."""
    del rows
    return logits_BV.argmax(-1)


@dataclass(frozen=True)
class Limits:
    """When an answer is over."""

    ends: set[int]
    """Tokens that end one."""
    max_new_tokens: int
    decided: Callable[[list[list[int]]], list[bool]] | None = None
    """Shown unfinished answers every few tokens, says which need not go on."""


@dataclass
class Work:
    """What decoding cost."""

    rows: int = 0
    """Σ over forward passes of the rows in them."""
    passes: int = 0


@torch.inference_mode()
def greedy(
    *,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad: int,
    ends: set[int],
    max_new_tokens: int,
    decided: Callable[[list[list[int]]], list[bool]] | None = None,
    all_done: Callable[[bool], bool] | None = None,
) -> list[Row]:
    """The most likely continuation of each prompt (token ids), in the prompts' order, all in one batch.

    `all_done` is told after each token whether every row here has ended, and says whether to stop: a forward of a model whose
    weights are spread over processes needs them all. Raises EvaluationError for a model that keeps no key-value cache.
    """
    limits = Limits(ends, max_new_tokens, decided)
    batch = _Batch(model, pad, limits, most_likely, longest=max(map(len, prompts)), work=Work())
    batch.join([(Row(index=i), prompt) for i, prompt in enumerate(prompts)])
    rows = list(batch.rows)
    while not (all_done or bool)(not batch.open()):
        batch.leave()
        batch.step()
    return rows


@torch.inference_mode()
def decode(
    *,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad: int,
    limits: Limits,
    places: int,
    choose: Choose = most_likely,
    work: Work | None = None,
) -> Iterator[list[Row]]:
    """A continuation of every prompt (token ids), as soon as they are there: those that ended together.

    Args:
        places: the largest batch; half as many, and again, where that does not fit into the memory.
        choose: which token follows.
        work: counts passes.

    Raises EvaluationError for a model that keeps no key-value cache, OutOfMemoryError where a single row does not fit.
    """
    work = work or Work()
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
    while waiting:
        batch = _Batch(model, pad, limits, choose, longest=len(prompts[waiting[0]]), work=work)
        try:
            yield from _through(batch, waiting, prompts, places)
        except torch.OutOfMemoryError:
            if places == 1:
                raise
            places = max(1, places // 2)
        unfinished = sorted((row.index for row in batch.rows if row.open), key=lambda i: (-len(prompts[i]), i))
        waiting.extendleft(reversed(unfinished))


def _through(batch: _Batch, waiting: deque[int], prompts: Sequence[Sequence[int]], places: int) -> Iterator[list[Row]]:
    """One batch until nobody is left in it."""
    while True:
        free = places - batch.open()
        if batch.rows and not batch.open():
            return
        if waiting and (not batch.rows or (batch.joinable and batch.open() <= LEAVE_AT * places)):
            taken = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            try:
                batch.join([(Row(index=i), prompts[i]) for i in taken])
            except torch.OutOfMemoryError:
                waiting.extendleft(reversed(taken))
                raise
        else:
            batch.leave()
            batch.step()
        if ended := batch.ended():
            yield ended


class _Batch:
    """Rows under way, and what the model remembers of them."""

    def __init__(
        self, model: PreTrainedModel, pad: int, limits: Limits, choose: Choose, *, longest: int, work: Work
    ) -> None:
        self._model, self._pad, self._limits, self._choose, self._work = model, pad, limits, choose, work
        needed = longest + limits.max_new_tokens
        most = (
            getattr(model.config, "max_position_embeddings", None) or needed + _SLACK
        )  # some masks have no more columns
        self._room = max(needed, min(needed + _SLACK, most))
        self._cache = make_cache(model, self._room)
        self.joinable = can_join(self._cache)
        self.rows: list[Row] = []
        """By place; a row that has ended stays until its place is taken or the cache is copied."""
        self._told: set[int] = set()
        self._takes = inspect.signature(model.forward).parameters

    def open(self) -> int:
        """Rows that go on."""
        return sum(row.open for row in self.rows)

    def columns(self) -> int:
        """Columns filled."""
        return int(self._cache.get_seq_length())

    def ended(self) -> list[Row]:
        """Rows that ended since this was last asked."""
        found = [row for row in self.rows if not row.open and row.index not in self._told]
        self._told.update(row.index for row in found)
        return found

    def join(self, added: Sequence[tuple[Row, Sequence[int]]]) -> None:
        """Read prompts, none longer than the columns that are filled, and put them in free places."""
        first = not self.rows
        longest = max(len(prompt) for _, prompt in added)
        cache = self._cache if first else make_cache(self._model, longest)
        device = self._model.device
        ids_BP = torch.tensor([[self._pad] * (longest - len(p)) + list(p) for _, p in added], device=device)
        mask_BL = torch.zeros(len(added), self._room, dtype=torch.long, device=device)
        end = longest if first else self.columns()
        for place, (_, prompt) in enumerate(added):
            mask_BL[place, end - len(prompt) :] = 1
        positions_BP = (mask_BL[:, end - longest : end].cumsum(-1) - 1).clamp(min=0)
        logits_BV = self._forward(ids_BP, mask_BL[:, end - longest : end], positions_BP, cache)
        rows = [row for row, _ in added]
        chosen_B, positions_B = self._extended(rows, logits_BV), positions_BP[:, -1] + 1
        if first:
            self.rows, self._mask_BL, self._last_B, self._positions_B = rows, mask_BL, chosen_B, positions_B
            return
        places = [place for place, row in enumerate(self.rows) if not row.open][: len(rows)]
        broken = [place for place in places if self.rows[place].broken]
        for layer, other in zip(self._cache.layers, cache.layers, strict=True):
            layer.clear(broken)
            layer.take_in(other, places)
        for place, row in zip(places, rows, strict=True):
            self.rows[place] = row
        self._mask_BL[places], self._last_B[places], self._positions_B[places] = mask_BL, chosen_B, positions_B

    def step(self) -> None:
        """One more token for every row."""
        if self.columns() == self._room:
            self._forget()
        mask_BL = self._mask_BL[:, : self.columns() + 1]
        logits_BV = self._forward(self._last_B[:, None], mask_BL, self._positions_B[:, None], self._cache)
        # A row that has ended may stay for long: its positions must not run out of the model's.
        going_on = torch.tensor([row.open for row in self.rows], device=self._positions_B.device)
        self._positions_B = self._positions_B + going_on
        self._last_B = self._extended(self.rows, logits_BV)

    def leave(self) -> None:
        """Take out the rows that have ended, where they are many enough to be worth a copy of the others."""
        kept = [place for place, row in enumerate(self.rows) if row.open]
        if 0 < len(kept) <= LEAVE_AT * len(self.rows) and can_leave(self._cache):
            places = torch.tensor(kept)  # on the CPU: layers may lie on several devices
            self._cache.batch_select_indices(places)
            self._mask_BL, self._last_B = self._mask_BL[places], self._last_B[places]
            self._positions_B = self._positions_B[places]
            self.rows = [self.rows[place] for place in kept]

    def _forget(self) -> None:
        """Columns that no open row looks at."""
        is_open = torch.tensor([row.open for row in self.rows], device=self._model.device)
        columns = int(self._mask_BL[is_open].argmax(-1).min())
        for layer in self._cache.layers:
            layer.move_left(columns)
        self._mask_BL = torch.cat([self._mask_BL[:, columns:], torch.ones_like(self._mask_BL[:, :columns])], 1)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [B, V] of the token after the last, fp32."""
        optional: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in optional.items() if name in self._takes}
        out = self._model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
        self._work.rows += len(ids)
        self._work.passes += 1
        logits: torch.Tensor = out.logits[:, -1].float().to(ids.device)
        return logits

    def _extended(self, rows: Sequence[Row], logits_BV: torch.Tensor) -> torch.Tensor:
        """Give every open row its next token, and close those that are over; the tokens."""
        broken_B = ~logits_BV.amax(-1).isfinite()  # the largest is NaN where any is; infinite, it has no likelihood
        for place in broken_B.nonzero()[:, 0].tolist():
            rows[place].broken = True
            if rows[place].open:
                rows[place].close("broken")
            logits_BV[place] = 0.0
        chosen_B = self._choose(logits_BV, rows)
        looked_at = []
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            if not row.open:
                continue
            if token in self._limits.ends:
                row.close("model")
                row.end_token = token
                continue
            row.tokens.append(token)
            if len(row.tokens) % CHECK_EVERY == 0:
                looked_at.append(row)
        if self._limits.decided is not None and looked_at:
            for row, known in zip(looked_at, self._limits.decided([r.tokens for r in looked_at]), strict=True):
                if known:
                    row.close("decided")
        for row in rows:
            if row.open and len(row.tokens) == self._limits.max_new_tokens:
                row.close("limit")
        return chosen_B
