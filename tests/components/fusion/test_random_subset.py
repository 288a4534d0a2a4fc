"""The random control has exactly as many ones as it should, anywhere, from any slice."""

from __future__ import annotations

import pytest
import torch

from components.fusion.random_subset import RandomSubset
from components.masks.concrete import hash_words


def _words(name: str, n: int, seed: int = 7) -> torch.Tensor:
    return torch.cat(list(hash_words(seed=seed, name=f"random_mask/{name}", step=0, start=0, stop=n)))


@pytest.mark.parametrize("count", [0, 1, 30_000, 70_000])
def test_exact_count_and_equal_to_sorting(count: int) -> None:
    n = 70_000
    bits = RandomSubset(seed=7, name="w", numel=n, count=count).bits(0, n)
    assert int(bits.sum()) == count
    order = sorted(range(n), key=lambda i: (int(words[i]), i)) if (words := _words("w", n).tolist()) else []
    want = torch.zeros(n, dtype=torch.bool)
    want[order[:count]] = True
    assert torch.equal(bits, want)


def test_any_slice_and_equal_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """With words of 3 values nearly everything is a tie, which positions must break."""
    import components.fusion.random_subset as module

    def coarse(**range_: object) -> object:
        for words in hash_words(**range_):  # type: ignore[arg-type]
            yield words.remainder(3)

    monkeypatch.setattr(module, "hash_words", coarse)
    n = 70_000  # more than one block of the noise
    for count in (5, 30_000, 69_000):
        subset = RandomSubset(seed=1, name="w", numel=n, count=count)
        whole = subset.bits(0, n)
        assert int(whole.sum()) == count
        for start, stop in ((0, 1), (65_530, 65_545), (1_000, 69_999)):
            assert torch.equal(subset.bits(start, stop), whole[start:stop])


def test_seeds_and_names_give_independent_masks() -> None:
    n, count = 40_000, 10_000
    masks = [
        RandomSubset(seed=s, name=name, numel=n, count=count).bits(0, n) for s, name in ((0, "a"), (1, "a"), (0, "b"))
    ]
    for i in range(3):
        for j in range(i):
            both = int((masks[i] & masks[j]).sum())
            assert abs(both - n / 16) < 6 * (n * (1 / 16) * (15 / 16)) ** 0.5  # 6 standard deviations
    # no drift along the tensor
    assert abs(int(masks[0][: n // 2].sum()) - count / 2) < 6 * (n / 2 * 3 / 16) ** 0.5
