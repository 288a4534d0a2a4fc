from __future__ import annotations

import pytest
import torch

from components.landscape.blocks import stretches


@pytest.mark.parametrize(
    ("numel", "rows", "size"),
    [(12, 1, 5), (12, 1, 12), (12, 3, 100), (12, 3, 9), (12, 3, 3), (12, 12, 5), (0, 1, 5), (7, 7, 1)],
)
def test_every_element_once_in_its_row(numel: int, rows: int, size: int) -> None:
    of_row = torch.arange(rows, dtype=torch.float64)
    expected = of_row.repeat_interleave(max(1, numel // rows)) if numel else torch.empty(0, dtype=torch.float64)
    found = []
    for stretch in stretches(numel, rows, size):
        assert 0 < stretch.stop - stretch.start <= size
        assert stretch.start == sum(map(len, found))
        ones = torch.ones(stretch.stop - stretch.start, dtype=torch.float64)
        stretch.as_rows(ones).mul_(stretch.share(of_row))
        found.append(ones)
    whole = torch.cat(found) if found else torch.empty(0, dtype=torch.float64)
    assert torch.equal(whole, expected if rows > 1 else torch.zeros(numel, dtype=torch.float64))


def test_rows_are_kept_together_where_they_fit() -> None:
    found = [(s.start, s.stop, s.first, s.rows) for s in stretches(30, 10, 10)]
    assert found == [(0, 9, 0, 3), (9, 18, 3, 3), (18, 27, 6, 3), (27, 30, 9, 1)]
    found = [(s.start, s.stop, s.first, s.rows) for s in stretches(8, 2, 3)]
    assert found == [(0, 3, 0, 1), (3, 4, 0, 1), (4, 7, 1, 1), (7, 8, 1, 1)]
