"""Harmonised random models against whole state dicts filled row by row: what each model reads, and what fusions make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.checkpoints.common import ALIGNED
from components.checkpoints.harmonize import harmonize
from components.checkpoints.reference import Checkpoint
from components.checkpoints.source import read_whole
from components.fusion.fused import FusedSource
from components.fusion.merging import MergedSource
from components.fusion.settings import FusionSettings
from components.fusion.trimming import find_thresholds
from tests.components.checkpoints.tiny import same_bits
from tests.components.checkpoints.whole import (
    BIAS,
    EMBEDDING,
    HEAD,
    MERGES,
    State,
    everyone,
    filled,
    fused_by,
    in_memory,
)

BITS = {torch.float32: 1 << 20, torch.bfloat16: 1 << 7, torch.float16: 1 << 10}


@st.composite
def families(draw: st.DrawFn) -> tuple[dict[str, State], dict[str, Checkpoint]]:
    """An aligned model and one to three finetunes: sizes of vocabulary, ties, dtypes and tensors of their own at random. Values
    have as many bits as their dtype and no finer steps, so that sums are exact and no mean of three is near the middle of two
    numbers of a narrow type."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    biased = draw(st.booleans())
    states: dict[str, State] = {}
    checkpoints = {}
    for label in [ALIGNED, *("zh", "code", "math")[: draw(st.integers(1, 3))]]:
        rows, dtype = draw(st.integers(2, 7)), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        shapes = {EMBEDDING: (rows, 3), HEAD: (rows, 3), "model.w": (4, 5), "model.norm": (3,)}
        shapes |= {BIAS: (rows,)} if biased else {}
        shapes |= {name: (2, 3) for name in ("model.x", "model.y") if draw(st.booleans())}
        most = BITS[dtype]
        state = {
            n: (2 * torch.randint(-most, most + 1, s, generator=generator) / most).to(dtype) for n, s in shapes.items()
        }
        stored, aliases = dict(state), {}
        if draw(st.booleans()):
            state[HEAD] = state[EMBEDDING]
            aliases = {HEAD: EMBEDDING}
            del stored[HEAD]
        states[label] = state
        checkpoints[label] = in_memory(label, stored, aliases)
    return states, checkpoints


@pytest.mark.parametrize("method", MERGES)
@given(families(), st.sampled_from(["pad", "truncate"]), st.sampled_from(["keep", "drop"]))
@settings(max_examples=40, deadline=None)
def test_fusions_are_those_of_whole_state_dicts(
    method: str, family: tuple[dict[str, State], dict[str, Checkpoint]], vocabulary: Any, one_sided: Any
) -> None:
    states, checkpoints = family
    finetunes = {label: c for label, c in checkpoints.items() if label != ALIGNED}
    found = harmonize(checkpoints[ALIGNED], finetunes, vocabulary=vocabulary, one_sided=one_sided)
    whole = filled(states, vocabulary, one_sided)
    tied = all(c.source.aliases() for c in checkpoints.values())
    for label, model in everyone(found).items():
        assert set(model.source.names()) == set(whole[label]) - ({HEAD} if tied else set())
        assert model.source.aliases() == ({HEAD: EMBEDDING} if tied else {})
        for name, want in whole[label].items():
            assert torch.equal(read_whole(model.source, name).double(), want), (label, name)
    sources = {label: model.source for label, model in found.finetunes.items()}
    thresholds = find_thresholds(found.aligned.source, sources, MERGES[method]) if method == "ties" else None
    merged = MergedSource(found.aligned.source, sources, MERGES[method], thresholds)
    for name in merged.names():
        torch.testing.assert_close(merged.read(name).double(), fused_by(method, whole, name), rtol=0, atol=1e-5)
        lacking = states[ALIGNED].get(name, torch.empty(0)).numel()
        assert torch.equal(merged.read(name)[lacking:].double(), whole[ALIGNED][name].reshape(-1)[lacking:]), name


@given(families(), st.sampled_from(["pad", "truncate"]), st.data())
@settings(max_examples=40, deadline=None)
def test_any_range_gives_the_same_bits_and_one_finetune_may_be_interpolated(
    family: tuple[dict[str, State], dict[str, Checkpoint]], vocabulary: Any, data: st.DataObject
) -> None:
    states, checkpoints = family
    one = next(label for label in checkpoints if label != ALIGNED)
    pair = {label: states[label] for label in (ALIGNED, one)}
    found = harmonize(checkpoints[ALIGNED], {one: checkpoints[one]}, vocabulary=vocabulary, one_sided="keep")
    whole = filled(pair, vocabulary, "keep")
    fused = FusedSource(
        aligned=found.aligned.source,
        finetune=found.finetunes[one].source,
        settings=FusionSettings(method="interpolation", alpha=0.25, output_dtype="float32"),
    )
    for name in fused.names():
        want = whole[ALIGNED][name] + 0.25 * (whole[one][name] - whole[ALIGNED][name])
        torch.testing.assert_close(read_whole(fused, name).double(), want, rtol=0, atol=1e-5)
        for source in (found.aligned.source, found.finetunes[one].source):
            everything = source.read(name)
            start = data.draw(st.integers(0, everything.numel()))
            stop = data.draw(st.integers(start, everything.numel()))
            assert same_bits(source.read(name, start, stop), everything[start:stop])
            assert everything.dtype == source.spec(name).dtype
