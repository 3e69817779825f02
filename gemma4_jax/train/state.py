"""What training carries from step to step, as flat dicts by parameter name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma4_jax.model.lora import base_names, has_adapters
from gemma4_jax.model.parameters import arrays, with_arrays
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.train.optimizer import trainable_names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Steps done (int32), the parameters that move, those that stay, and the optimizer's state.

    `base` are those that stay and that checkpoints leave out: what adapters are trained beside.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    opt_state: Any
    base: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(
        cls,
        model: Transformer,
        optimizer: optax.GradientTransformation,
        freeze: Sequence[str],
        *,
        copy: bool = True,
    ) -> "TrainState":
        """The state before step 0; only parameters that move get optimizer state.

        Every step takes the state's memory, so the model can be used afterwards only if its arrays are copied. Of a model with
        adapters these alone move.
        """
        # One program each: an operation per parameter and shape would compile dozens of them.
        values = jax.jit(lambda x: jax.tree.map(jnp.copy, x))(arrays(model)) if copy else arrays(model)
        params, frozen, base = _parted(model, values, freeze)
        moments = jax.tree.map(lambda x: x.sharding, _abstract_moments(optimizer, params))
        state = cls(jnp.int32(0), params, frozen, jax.jit(optimizer.init, out_shardings=moments)(params), base)
        # Committed to where it is: a step's results are, and an input that is not would compile the second step again.
        places = dataclasses.replace(jax.tree.map(lambda x: x.sharding, state), step=_beside(params))
        return jax.device_put(state, places)

    @classmethod
    def abstract(
        cls, model: Transformer, optimizer: optax.GradientTransformation, freeze: Sequence[str]
    ) -> "TrainState":
        """The same of a model whose arrays are shapes with shardings: shapes with shardings."""
        params, frozen, base = _parted(model, arrays(model), freeze)
        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=_beside(params))
        return cls(step, params, frozen, _abstract_moments(optimizer, params), base)

    def model(self, template: Transformer) -> Transformer:
        """The model with this state's arrays."""
        return with_arrays(template, {**self.params, **self.frozen, **self.base})

    def flat(self) -> dict[str, Any]:
        """Every array but `base` by a dotted name (`params.*`, `frozen.*`, `opt.*`, `step`): the layout of checkpoints."""
        out: dict[str, Any] = {"step": self.step}
        out |= {f"params.{name}": value for name, value in self.params.items()}
        out |= {f"frozen.{name}": value for name, value in self.frozen.items()}
        return out | {f"opt.{name}": value for name, value in _named_leaves(self.opt_state)}

    def with_flat(self, values: Mapping[str, Any]) -> "TrainState":
        """A state of this structure with its arrays taken from `values`."""
        leaves = [values[f"opt.{name}"] for name, _ in _named_leaves(self.opt_state)]
        return TrainState(
            values["step"],
            {name: values[f"params.{name}"] for name in self.params},
            {name: values[f"frozen.{name}"] for name in self.frozen},
            jax.tree.unflatten(jax.tree.structure(self.opt_state), leaves),
            self.base,
        )


def _parted(model: Transformer, values: Mapping[str, Any], freeze: Sequence[str]) -> tuple[dict, dict, dict]:
    """The parameters that move, those that stay, and those that stay and are the base of adapters."""
    moving = trainable_names(model, freeze)
    base = base_names(model) if has_adapters(model) else frozenset()
    parts: tuple[dict, dict, dict] = {}, {}, {}
    for name, value in values.items():
        parts[0 if name in moving else 2 if name in base else 1][name] = value
    return parts


def _abstract_moments(optimizer: optax.GradientTransformation, params: Mapping[str, Any]) -> Any:
    """Shapes of the optimizer's state: a moment lies with its parameter, a scalar on every device."""
    state, alone = jax.eval_shape(optimizer.init, params), _beside(params)
    leaves = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=params[name].sharding if x.ndim and name in params else alone)
        for name, x in _by_parameter(state)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _beside(params: Mapping[str, Any]) -> jax.sharding.Sharding:
    """Whole on every device that holds parameters."""
    some = next(iter(params.values())).sharding
    if isinstance(some, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(some.mesh, jax.sharding.PartitionSpec())
    return some


def _by_parameter(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of an optimizer state with the name of the parameter they belong to: the last key on their path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path[-1:], simple=True) if path else "", leaf) for path, leaf in leaves]


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]
