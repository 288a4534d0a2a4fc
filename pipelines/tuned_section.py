"""`fusion.tuned`: settings of a finetune or merge that a sweep (or somebody) has found, used in place of the two forms' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from components.fusion.merge_settings import MergeSettings, merge_problems
from components.fusion.settings import NEEDS_UNALIGNED, FusionSettings
from components.masks.settings import MaskSettings

if TYPE_CHECKING:
    from pipelines.config import RunConfig

_TAKES_MASK = ("masked", "random_mask")


class TunedSettings(FusionSettings):
    """How one finetune, or one merge, is fused as the form `tuned`."""

    merge: MergeSettings | None = None
    """mode merge: how its finetunes become one first; by default as the merge itself says."""

    @property
    def fusion(self) -> FusionSettings:
        """Without the merge."""
        return FusionSettings.model_validate(self.model_dump(exclude={"merge"}))


def form_settings(mask: MaskSettings, form: Literal["soft", "binary"]) -> FusionSettings:
    """A mask is used as it was trained: same rescaling, same scale."""
    rescale: Literal["none", "mean"] = "none" if mask.rescale == "none" else "mean"
    return FusionSettings(method="masked", form=form, rescale=rescale, scale=mask.scale)


def inputs_of(method: str) -> tuple[str, ...]:
    """The steps of a run that a fusion method needs results of, beside the models that are fused."""
    mask = ("train_mask",) if method in _TAKES_MASK else ()
    return (*mask, *(("load_unaligned",) if method in NEEDS_UNALIGNED else ()))


def tuned_problems(config: RunConfig) -> list[str]:
    """What in `fusion.tuned` does not fit the run."""
    section, targets = config.fusion, config.targets
    what = "merges" if config.mode == "merge" else "finetunes"
    unknown = [name for name in section.tuned if name not in targets]
    problems = [f"fusion.tuned names {what} that are not there: {', '.join(unknown)} (there: {', '.join(targets)})"]
    problems = problems if unknown else []
    missing = [name for name in targets if name not in section.tuned]
    if section.select == "tuned" and missing:
        problems.append(f"fusion.select: tuned needs fusion.tuned of {', '.join(missing)}; give it, or select auto")
    for name, tuned in section.tuned.items():
        if name in targets:
            problems += [f"fusion.tuned.{name}: {problem}" for problem in _misfits(config, name, tuned)]
    return problems


def _misfits(config: RunConfig, name: str, tuned: TunedSettings) -> list[str]:
    problems = []
    if tuned.method in NEEDS_UNALIGNED and config.unaligned is None:
        problems.append(f"{tuned.method} needs `unaligned`, the model that the aligned one was made from")
    if config.mask.track == "factors" and tuned.method not in _TAKES_MASK:
        problems.append(f"{tuned.method} is no method for mask.track: factors, whose weights are products; take masked")
    if tuned.merge is not None:
        if config.merge_named(name) is None:
            problems.append("merge is for mode: merge; remove it")
        else:
            problems += [f"merge: {one}" for one in merge_problems(tuned.merge, [f.name for f in config.members(name)])]
    return problems
