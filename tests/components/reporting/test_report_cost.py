"""What a run took, and where its numbers come from."""

from __future__ import annotations

from components.reporting.report_cost import cost_table
from components.reporting.report_lineage import lineage
from tests.components.reporting.example import summary


def test_costs_are_summed_by_stage_and_unknown_ones_stay_unknown() -> None:
    table = cost_table(summary())
    assert table is not None
    assert table.stages == ["load", "train_mask", "evaluate"]
    zh, hi, once = table.lines
    assert (zh.name, dict(zh.seconds), zh.total) == ("zh", {"train_mask": 24.6, "evaluate": 66.1}, 24.6 + 66.1)
    assert (zh.prompts, zh.tokens, zh.peak, zh.written) == (760, 12345, 1_500_000_000, 2_500_000)
    assert (hi.name, hi.total, hi.prompts, hi.peak, hi.written) == ("hi", 0.4, None, None, None)
    assert (once.name, once.total) == ("once for all", 212.5)
    assert (table.together.total, table.together.prompts) == (24.6 + 66.1 + 0.4 + 212.5, 760)
    assert (table.together.peak, table.together.written) == (1_500_000_000, 2_600_000)


def test_a_summary_without_any_has_no_table() -> None:
    assert cost_table({"schema": 1, "run": "a", "aligned": None, "finetunes": []}) is None


def test_lineage_names_every_record_once_parents_first() -> None:
    found = summary()
    made = lineage(found, found["finetunes"][0])
    assert [(one.step, one.parents) for one in made] == [
        ("load_aligned", ()),
        ("load", ("load_aligned",)),
        ("train_mask", ("load_aligned", "load")),
        ("fuse_soft", ("load", "train_mask")),
        ("evaluate_soft", ("fuse_soft",)),
    ]
    assert lineage(found, found["finetunes"][1]) == []


def test_a_borrowed_mask_is_said_to_be_the_others() -> None:
    found = summary()
    owner = found["finetunes"][0]
    lent = {**owner, "name": "copy", "records": {k: v for k, v in owner["records"].items() if k != "train_mask"}}
    found["finetunes"].append(lent)  # type: ignore[arg-type]
    assert "zh/train_mask" in [one.step for one in lineage(found, lent)]  # type: ignore[arg-type]
