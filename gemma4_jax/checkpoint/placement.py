"""In which dtype, and on which devices, the parameters that are read go."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.errors import UserError

Shardings = Callable[[str, nnx.Variable], jax.sharding.Sharding]
"""Where a parameter goes, from its dotted name and its variable (shape, `.dims`)."""

Which = int | Literal["latest", "best"]
"""Which step of a training run."""

DTYPES = ("float32", "bfloat16", "float16")


def default_device(_name: str, _variable: nnx.Variable) -> jax.sharding.Sharding:
    """Everything on this process's first device."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def dtype_name(dtype: jax.typing.DTypeLike | None) -> str | None:
    """The name of a dtype that parameters can have; None stays None."""
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise UserError(f"Parameters cannot be {name}; wanted one of {', '.join(DTYPES)}.")
    return name
