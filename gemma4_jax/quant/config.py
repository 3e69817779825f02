"""The settings of quantisation-aware training."""

import dataclasses

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.options import option
from gemma4_jax.quant.grids import GRIDS, grid_named
from gemma4_jax.quant.policies import NEVER, POLICIES, ROLES, ROUTER, PolicyName


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """What quantisation-aware training rounds, and what it learns from."""

    policy: PolicyName = option("q4_0", "what is to be shipped: a grid for each group of weights (quant/policies.py)")
    grid: str | None = option(None, f"one grid for all groups in place of the policy's: {', '.join(GRIDS)}")
    cover: tuple[str, ...] | None = option(
        None, f"groups of weights to round ({', '.join(r for r in ROLES if r not in NEVER)}); none: the policy's"
    )
    distill_weight: float = option(
        1.0, "share of the loss that is KL divergence from the teacher, the rest is cross-entropy"
    )
    teacher: str | None = option(None, "checkpoint of the teacher; none: the float model that training starts from")
    reverse_kl: bool = option(False, "KL(student || teacher) in place of KL(teacher || student)")

    def __post_init__(self):
        if self.grid is not None:
            grid_named(self.grid)
        self._check_cover()
        if not 0.0 <= self.distill_weight <= 1.0:
            raise UserError(f"quant.distill_weight is a share of the loss from 0 to 1, got {self.distill_weight}.")
        if self.distill_weight == 0.0 and (self.teacher is not None or self.reverse_kl):
            key = "quant.teacher" if self.teacher is not None else "quant.reverse_kl"
            raise UserError(
                f"{key} is set, but quant.distill_weight=0 means that no teacher is used; change one of them."
            )

    def _check_cover(self):
        for role in self.cover or ():
            if role not in ROLES:
                raise UserError(f"quant.cover has {role!r}, which is no group of weights; {did_you_mean(role, ROLES)}")
            if role in NEVER:
                raise UserError(f"quant.cover has {role!r}, which is {ROUTER}; take it out.")
            if self.grid is None and role not in POLICIES[self.policy].grids:
                raise UserError(
                    f"quant.cover has {role!r}, for which quant.policy={self.policy} has no grid; set quant.grid too."
                )
        if self.cover == ():
            raise UserError("quant.cover is empty, so nothing would be quantised; none means what the policy covers.")

    @property
    def grids(self) -> dict[str, str]:
        """Group -> name of its grid: all that `apply` goes by."""
        covered = POLICIES[self.policy].grids
        return {role: self.grid or covered[role] for role in self.cover or covered}

    @property
    def stays(self) -> dict[str, str]:
        """Group -> why it stays float."""
        named = {role: "not in quant.cover" for role in ROLES if role not in self.grids}
        return named | dict(POLICIES[self.policy].stays)
