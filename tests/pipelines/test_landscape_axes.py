"""What `realign landscape`'s options say."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.errors import ConfigError
from components.landscape.settings import LandscapeSettings, Scan, TowardsAxis
from pipelines.evaluated_models import Named
from pipelines.landscape_axes import Options, asked_settings, scans_of, with_targets


def test_axes_are_scans() -> None:
    found = asked_settings(
        Options(("random:3", "random,towards=zh", "towards=runs/a model/", "towards=zh"), points=5), None
    )
    assert [(one.name, one.directions, one.points) for one in found.scans] == [
        ("random", 3, 5), ("random-towards-zh", 1, 5), ("towards-a-model", 1, 5), ("towards-zh", 1, 5),
    ]  # fmt: skip
    assert [[axis.kind for axis in one.axes] for one in found.scans] == [
        ["random"], ["random", "towards"], ["towards"], ["towards"],
    ]  # fmt: skip
    assert found.models == ("zh", "runs/a model/")
    assert [(axis.low, axis.high) for axis in found.scans[1].axes] == [(-0.5, 0.5), (-0.5, 1.5)]
    assert [one.name for one in asked_settings(Options(("random", "random,random", "random")), None).scans] == [
        "random", "random-random", "random-2",
    ]  # fmt: skip


def test_options_stand_in_place_of_what_the_file_says() -> None:
    of_file = LandscapeSettings(scans=(Scan(directions=2, points=9),), sets=("harmful",), limit=7)
    assert asked_settings(Options(), of_file) == of_file
    found = asked_settings(Options(bounds="-1:2", refine=1.5, prompts=3, sets="a, b"), of_file)
    [scan] = found.scans
    assert (scan.directions, scan.points, scan.refine) == (2, 9, 1.5)
    assert [(axis.low, axis.high) for axis in scan.axes] == [(-1, 2)]
    assert (found.sets, found.limit) == (("a", "b"), 3)
    assert asked_settings(Options(), None) == LandscapeSettings()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (Options(("randm",)), "--axes randm: randm is no axis; give random, random:3"),
        (Options(("random:0",)), "random:0 is no axis"),
        (Options(("towards=",)), "towards= is no axis"),
        (Options(("random,",)), "nothing is no axis"),
        (Options(("random,random,random",)), "at most 2 items"),
        (Options(("towards=a,towards=a",)), "both axes lead to a"),
        (Options(bounds="0.5"), "--range 0.5: give two numbers with a colon"),
        (Options(bounds="a:b"), "--range a:b: give two numbers"),
        (Options(bounds="1:-1"), "an axis goes from low to high, not from 1 to -1"),
        (Options(bounds="-1:nan"), "finite number"),
        (Options(refine=0.0), "refine: Input should be greater than 0"),
    ],
)
def test_each_mistake_has_its_remedy(options: Options, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asked_settings(options, None)
    assert told in str(caught.value)


def test_axes_lead_to_models_given_or_to_directories(tmp_path: Path) -> None:
    for name in ("aligned", "zh", "other"):
        (tmp_path / name).mkdir()
    given = [Named("aligned", True, str(tmp_path / "aligned")), Named("zh", True, str(tmp_path / "zh"))]
    settings = asked_settings(Options(("towards=zh", "towards=other", "towards=aligned/", "random")), None)
    scans, named = with_targets(settings, given, tmp_path)
    assert [axis.model for one in scans for axis in one.axes if isinstance(axis, TowardsAxis)] == [
        "zh",
        "other",
        "aligned",
    ]
    assert [(one.name, Path(one.place)) for one in named[2:]] == [("other", tmp_path / "other")]
    assert [one.name for one in scans_of(scans, "zh")] == ["towards-other", "towards-aligned", "random"]
    with pytest.raises(
        ConfigError, match=r"towards nowhere: neither one of the models given \(aligned, zh\) nor a directory"
    ):
        with_targets(asked_settings(Options(("towards=nowhere",)), None), given, tmp_path)
