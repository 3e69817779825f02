"""AdamW with a schedule and clipping, and which parameters it moves."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optax
from flax import nnx

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.model.lora import adapters
from gemma4_jax.model.parameters import is_trainable, variables
from gemma4_jax.options import option
from gemma4_jax.train.parts import PARTS, check_parts


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and what it leaves alone."""

    learning_rate: float = option(1e-5, "peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "how it falls after the warm-up")
    warmup_steps: int = option(0, "steps of linear warm-up")
    end_factor: float = option(0.1, "last learning rate as a share of the peak")
    b1: float = option(0.9, "decay of the first moment")
    first_moment: Literal["float32", "bfloat16"] = option(
        "float32", "what the first moment is stored in; bfloat16 saves 2 bytes a parameter"
    )
    b2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.0, "decoupled decay of weight matrices; norms, scales and embeddings never decay")
    clip_norm: float | None = option(1.0, "largest global gradient norm; none: no clipping")
    train: tuple[str, ...] = option(
        ("decoder",), f"parts of the model that move: {', '.join(PARTS)}; towers stay as they are unless named"
    )
    freeze: tuple[str, ...] = option((), "patterns of parameter names that stay as they are, such as 'embed*'")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"optim.learning_rate must be above 0, got {self.learning_rate}.")
        for name in ("warmup_steps", "end_factor", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name} must not be negative, got {getattr(self, name)}.")
        check_parts(self.train, "optim.train")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"optim.clip_norm is none or above 0, got {self.clip_norm}.")


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then down to end_factor at `steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps and warmup:
        raise UserError(f"optim.warmup_steps={warmup} leaves none of train.steps={steps} after it; lower one.")
    end = peak * config.end_factor
    rest = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup, alpha=config.end_factor),
        "linear": lambda: optax.linear_schedule(peak, end, steps - warmup),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    # The first step already moves: it has 1/warmup of the peak, not 0.
    start = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([start, rest], [warmup]) if warmup else rest


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping and AdamW over a dict of parameters by name."""
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mu_dtype=config.first_moment,
            mask=_decay_mask,
        )
    )
    return optax.chain(*parts)


def _decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
    return {name: decays(name) for name in params}


def decays(name: str) -> bool:
    """True for the weights of linear maps, and for adapters.

    Norms and scales are not pulled to 0; nor are embeddings, whose rows get a gradient only when their token occurs but
    would decay at every step.
    """
    return name.endswith((".w", ".adapter.a", ".adapter.b")) and name not in ("embed.w", "per_layer.table.w")


def trainable_names(model: nnx.Module, freeze: Sequence[str]) -> set[str]:
    """Names of the parameters the optimizer moves: all but buffers and what a pattern in `freeze` matches.

    Of a model with adapters only these.
    """
    names = {name for name, variable in variables(model).items() if is_trainable(variable)}
    names = set(adapters(model)) or names
    left = set(names)
    for pattern in freeze:
        matched = set(fnmatch.filter(names, pattern))
        if not matched:
            groups = {".".join(name.split(".")[:3]) + "*" for name in names}
            raise UserError(f"optim.freeze pattern {pattern!r} matches no parameter; {did_you_mean(pattern, groups)}")
        left -= matched
    if not left:
        raise UserError(f"optim.freeze={tuple(freeze)} leaves nothing to train.")
    return left
