"""One optimizer step as one jitted function."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import variables, with_arrays
from gemma4_jax.model.tally import of_stacks, tallied
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.sharding import constrain, rest
from gemma4_jax.train.loss import Batch, loss_sum
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.tower_flops import media_flops

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, Transformer | None], tuple[TrainState, Metrics]]


def make_train_step(
    template: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    grad_accum: int = 1,
    remat: str = "none",
    distill_weight: float = 0.0,
    reverse_kl: bool = False,
    balance_weight: float = 0.0,
    skip_above: float | None = None,
) -> TrainStep:
    """(state, batch, teacher or None) -> (state, metrics); the state given in is donated.

    `template` gives the model's structure, quantisation grids included; its arrays may be abstract. The batch is cut
    into `grad_accum` micro-batches whose gradient sums add up in float32 (its media come cut, `data.media.MediaLayout`); the loss
    is the mean over all trained tokens of the whole batch. Metrics, float32 scalars: loss, ce, kl, accuracy, tokens (trained),
    slots (real tokens), grad_norm (before clipping), skipped (1: parameters and optimizer state are those of before, because loss
    or gradients are not finite or the norm is beyond `skip_above`); of a mixture of experts balance, max_load and unused
    (`model.moe`) too; of a batch with pictures or sounds tower_flops (`train.tower_flops`), the teacher's included.
    """
    if balance_weight and not template.cfg.num_experts:
        raise UserError(f"train.balance_weight={balance_weight} balances experts, but the model has none; set it to 0.")

    loss = functools.partial(loss_sum, reverse_kl=reverse_kl, remat=remat, balance_weight=balance_weight)
    dims = {name: variable.dims for name, variable in variables(template).items()}

    def resting(grads):
        """Gradients cut as their parameters rest."""
        return {name: rest(gradient, dims[name]) for name, gradient in grads.items()}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, teacher: Transformer | None):
        weight = distill_weight if teacher is not None or "taught" in batch else 0.0

        def one(micro, totals=None):
            """Sums and gradients; with `totals`, of the parameters in stacks of layers, those plus the gradients."""
            totals = {} if totals is None else totals
            zeros = {name: rest(jnp.zeros_like(total), dims[name]) for name, total in totals.items()}

            def of_parameters(others, zeros):
                model = with_arrays(template, {**state.params, **others, **state.frozen, **state.base})
                model = tallied(model, zeros, totals) if totals else model
                return loss(model, micro, teacher=teacher, distill_weight=weight)

            others = {name: value for name, value in state.params.items() if name not in totals}
            differentiated = jax.value_and_grad(of_parameters, argnums=(0, 1), has_aux=True)
            (total, sums), (of_others, of_layers) = differentiated(others, zeros)
            grads = {name: of_layers[name] if name in totals else of_others[name] for name in state.params}
            sums = {**sums, "loss_sum": total, "tokens": jnp.sum(micro["loss_weights"])}
            if (media := micro.get("media")) is not None:
                sums["tower_flops"] = media_flops(template.cfg, media, state.params)
                if teacher is not None:
                    sums["tower_flops"] += media_flops(teacher.cfg, media)
            return {**sums, "slots": jnp.sum(micro["positions"] >= 0, dtype=jnp.float32)}, resting(grads)

        sums, grads = one(batch) if grad_accum == 1 else _accumulate(one, resting, batch, grad_accum)
        return _updated(optimizer, state, sums, grads, skip_above)

    return step


def _updated(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    sums: dict[str, jax.Array],
    grads: dict[str, jax.Array],
    skip_above: float | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after the step, or of before it where the numbers are not sound, and the metrics."""
    # A batch without a trained token has gradient 0 / 1, not 0 / 0.
    scale = 1.0 / jnp.maximum(sums["tokens"], 1e-9)
    grads = jax.tree.map(lambda g, p: (g * scale.astype(g.dtype)).astype(p.dtype), grads, state.params)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to the power of the int32 step
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(dict[str, jax.Array], optax.apply_updates(state.params, updates))
    norm = optax.tree.norm(grads)
    # One number decides on every device of every process alike. Selecting fuses with the update: no memory, no pass.
    sound = jnp.isfinite(norm) & jnp.isfinite(sums["loss_sum"])
    if skip_above is not None:
        sound &= norm <= skip_above
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    metrics = {name: sums[key] * scale for name, key in _MEANS.items() if key in sums}
    metrics |= {"tokens": sums["tokens"], "slots": sums["slots"], "grad_norm": norm}
    metrics["skipped"] = 1.0 - sound.astype(jnp.float32)
    if "tower_flops" in sums:
        metrics["tower_flops"] = sums["tower_flops"]
    return TrainState(state.step + 1, params, state.frozen, opt_state, state.base), metrics


_MEANS = {"accuracy": "correct_sum"} | {
    name: f"{name}_sum" for name in ("loss", "ce", "kl", "balance", "max_load", "unused")
}


def _accumulate(one: Callable[..., Any], resting: Callable, batch: Batch, count: int) -> Any:
    """Sums of `one` over `count` equal parts of the batch, one at a time, in float32.

    Of the layers' gradients there is one copy throughout: `one` adds to it layer by layer (`model.tally`).
    """
    rows = batch["tokens"].shape[0]
    if rows % count:
        raise UserError(f"train.grad_accum={count} does not divide data.batch_size={rows}; choose one that does.")

    def part(x):
        """Row i goes to part i % count, so that on a mesh every part spreads over all devices."""
        return jnp.moveaxis(x.reshape(rows // count, count, *x.shape[1:]), 1, 0)

    parts: Any = {
        name: x.with_dims(lambda rows, dims: constrain(part(rows), None, *dims))
        if hasattr(x, "with_dims")
        else constrain(part(x), None, "batch", "length")
        for name, x in batch.items()
        if name != "media"
    }
    if (media := batch.get("media")) is not None:
        parts["media"] = media.with_dims(lambda x, dims: constrain(x, *dims))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    sums, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    zeros = sums, resting(grads)

    def add(total, part):
        sums, grads = total
        stacked = {name: grads[name] for name in of_stacks(grads)}
        new_sums, new_grads = one(part, stacked)
        others = {name: t + new_grads[name].astype(jnp.float32) for name, t in grads.items() if name not in stacked}
        total = {name: others[name] if name in others else new_grads[name] for name in grads}
        return (jax.tree.map(jnp.add, sums, new_sums), resting(total)), None

    return jax.lax.scan(add, zeros, parts)[0]
