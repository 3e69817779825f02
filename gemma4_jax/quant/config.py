"""The settings of quantisation-aware training."""

import dataclasses
from typing import Literal

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.options import option
from gemma4_jax.quant.grids import GRIDS, grid_named
from gemma4_jax.quant.policies import NEVER, POLICIES, ROLES, ROUTER, Activations, KeysValues, PolicyName


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """What quantisation-aware training rounds, and what it learns from."""

    policy: PolicyName = option("q4_0", "what is to be shipped: a grid for each group of weights (quant/policies.py)")
    grid: str | None = option(None, f"one grid for all groups in place of the policy's: {', '.join(GRIDS)}")
    cover: tuple[str, ...] | None = option(
        None, f"groups of weights to round ({', '.join(r for r in ROLES if r not in NEVER)}); none: the policy's"
    )
    activations: Literal["policy", "none", "dynamic", "static"] = option(
        "policy", "int8 inputs of linear maps: a scale per token, or one per tensor found at the start, outputs too"
    )
    kv_cache: Literal["policy", "none", "int8"] = option("policy", "keys and values as an int8 cache holds them")
    calibration_batches: int = option(16, "training batches that the scales of static activations are found from")
    gradient: Literal["straight_through", "clipped"] = option(
        "straight_through", "clipped: none for weights beyond the last code"
    )
    learn_scales: bool = option(False, "train the scales of linear layers too (LSQ); tables keep their grid's rule")
    freeze_router: bool = option(True, "leave the choice of experts as the float model makes it (26B-A4B)")
    distill_weight: float = option(
        1.0, "share of the loss that is KL divergence from the teacher, the rest is cross-entropy"
    )
    teacher: str | None = option(None, "checkpoint of the teacher; none: the float model that training starts from")
    teacher_cache: str | None = option(
        None,
        "directory for the teacher's likeliest tokens: it answers once before step 1 and is let go, and other runs on the same "
        "rows go by its answers; none: it answers in every step",
    )
    teacher_top_k: int = option(64, "tokens kept of each answer with teacher_cache; all others count as one")
    reverse_kl: bool = option(False, "KL(student || teacher) in place of KL(teacher || student)")

    def __post_init__(self):
        if self.grid is not None:
            grid_named(self.grid)
        self._check_cover()
        if self.calibration_batches < 1:
            raise UserError(f"quant.calibration_batches is at least 1, got {self.calibration_batches}.")
        if not 0.0 <= self.distill_weight <= 1.0:
            raise UserError(f"quant.distill_weight is a share of the loss from 0 to 1, got {self.distill_weight}.")
        needing = [key for key in ("teacher", "teacher_cache", "reverse_kl") if getattr(self, key)]
        if self.distill_weight == 0.0 and needing:
            raise UserError(
                f"quant.{needing[0]} is set, but quant.distill_weight=0 means that no teacher is used; change one of them."
            )
        if self.teacher_top_k < 1:
            raise UserError(f"quant.teacher_top_k is at least 1, got {self.teacher_top_k}.")

    def _check_cover(self):
        for role in self.cover or ():
            if role not in ROLES:
                raise UserError(f"quant.cover has {role!r}, which is no group of weights; {did_you_mean(role, ROLES)}")
            if role in NEVER:
                raise UserError(f"quant.cover has {role!r}, which is {ROUTER}; take it out.")
            if self.grid is None and role not in self._known:
                raise UserError(
                    f"quant.cover has {role!r}, for which quant.policy={self.policy} has no grid; set quant.grid too."
                )
        if self.cover == ():
            raise UserError("quant.cover is empty, so nothing would be quantised; none means what the policy covers.")

    @property
    def grids(self) -> dict[str, str]:
        """Group -> name of its grid: all that `apply` goes by."""
        covered = POLICIES[self.policy].grids
        return {role: self.grid or self._known[role] for role in self.cover or covered}

    @property
    def _known(self) -> dict[str, str]:
        """Group -> grid the policy has for it, whether it covers it by itself or only where it is named."""
        return {**POLICIES[self.policy].asked, **POLICIES[self.policy].grids}

    @property
    def rounds(self) -> tuple[Activations, KeysValues]:
        """What happens to activations and to keys and values."""
        default = POLICIES[self.policy]
        return (
            default.activations if self.activations == "policy" else self.activations,
            default.kv_cache if self.kv_cache == "policy" else self.kv_cache,
        )

    @property
    def stays(self) -> dict[str, str]:
        """Group -> why it stays float."""
        named = {role: "not in quant.cover" for role in ROLES if role not in self.grids}
        return named | dict(POLICIES[self.policy].stays)
