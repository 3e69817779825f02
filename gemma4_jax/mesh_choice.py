"""Which mesh a job gets when the config leaves it open: from the model, the batch, the sequence and the devices."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from gemma4_jax.config import KINDS, ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.sharding import AXES, MeshConfig, check_batch, check_product, heads_divide, make_mesh

LONGEST = 32_768
"""Tokens of one sequence on one device, above which `context` cuts it: a layer's activations of 31B are then 2 GiB."""


def training_mesh(
    cfg: ModelConfig, config: MeshConfig, devices: Sequence[Any], rows: int, length: int
) -> jax.sharding.Mesh | None:
    """The mesh for training on (or prefilling) `rows` sequences of `length` tokens at a time; None on one device."""
    mesh = make_mesh(training_axes(cfg, config, len(devices), rows, length), devices, config.slices)
    check_batch(mesh, rows, length)
    return mesh if mesh.size > 1 else None


def decoding_mesh(
    cfg: ModelConfig, config: MeshConfig, devices: Sequence[Any], tokens: int = 0
) -> jax.sharding.Mesh | None:
    """The mesh for decoding with caches of so many tokens, of all rows together (0: short ones); None on one device."""
    mesh = make_mesh(decoding_axes(cfg, config, len(devices), tokens), devices, config.slices)
    return mesh if mesh.size > 1 else None


def training_axes(cfg: ModelConfig, config: MeshConfig, devices: int, rows: int, length: int) -> dict[str, int]:
    """Axis -> size for training on (or prefilling) `rows` sequences of `length` tokens at a time.

    What the config leaves open, in this order: `tensor` 1; `context` as small as the rows and LONGEST allow; `expert` (of a
    mixture) what moves the fewest bytes; `data` one per slice; `fsdp` the rest.
    """
    sizes = config.sizes()
    sizes["tensor"] = sizes["tensor"] or 1
    sizes["data"] = sizes["data"] or config.slices
    open_ = _open_devices(sizes, devices)
    if sizes["context"] is None:
        sizes["context"] = _context(open_, sizes, rows, length)
        open_ //= sizes["context"]
    if sizes["expert"] is None:
        tokens = rows * length * sizes["tensor"] // devices
        fixed = sizes["fsdp"] is not None
        sizes["expert"] = math.gcd(open_, cfg.num_experts or 1) if fixed else _experts(cfg, open_, tokens)
        open_ //= sizes["expert"]
    if sizes["fsdp"] is None:
        sizes["fsdp"] = open_
    return _checked(cfg, sizes, devices)


def decoding_axes(cfg: ModelConfig, config: MeshConfig, devices: int, tokens: int = 0) -> dict[str, int]:
    """Axis -> size for decoding: nothing is gathered per token, so weights are cut where they are used.

    What the config leaves open: `tensor` as many devices as the heads allow, fewer where caches of `tokens` tokens outweigh
    the weights; then `expert`; `context` (slots of the cache) the rest.
    """
    sizes = config.sizes()
    sizes["data"] = sizes["data"] or config.slices
    sizes["fsdp"] = sizes["fsdp"] or 1
    open_ = _open_devices(sizes, devices)
    if sizes["tensor"] is None:
        fitting = [t for t in reversed(_divisors(open_)) if _heads_divide(cfg, t)]
        sizes["tensor"] = min(fitting, key=lambda t: _read_by_a_step(cfg, t, open_ // t, tokens))
        open_ //= sizes["tensor"]
    if sizes["expert"] is None:
        sizes["expert"] = math.gcd(open_, cfg.num_experts or 1)
        open_ //= sizes["expert"]
    if sizes["context"] is None:
        sizes["context"] = open_
    return _checked(cfg, sizes, devices)


def _heads_divide(cfg: ModelConfig, tensor: int) -> bool:
    return all(heads_divide(tensor, cfg.num_attention_heads, cfg.kv_heads(kind)) for kind in KINDS)


def _checked(cfg: ModelConfig, sizes: dict[str, int | None], devices: int) -> dict[str, int]:
    full = {name: sizes[name] or 1 for name in AXES}
    check_product(full, devices)
    if not _heads_divide(cfg, full["tensor"]):
        heads = " and ".join(f"{cfg.kv_heads(kind)} of {kind} layers" for kind in KINDS)
        raise UserError(
            f"mesh.tensor={full['tensor']} cannot share out {cfg.num_attention_heads} query heads and the key/value heads, "
            f"{heads}; wanted one of {[t for t in range(1, full['tensor']) if _heads_divide(cfg, t)]}."
        )
    if full["expert"] > 1 and (not cfg.num_experts or cfg.num_experts % full["expert"]):
        have = f"{cfg.num_experts} experts" if cfg.num_experts else "a model without experts"
        raise UserError(f"mesh.expert={full['expert']} does not divide {have}; choose a divisor, or 1.")
    holders = full["fsdp"] * full["expert"] * full["context"] * full["tensor"]
    if cfg.vocab_size % holders:
        raise UserError(
            f"The vocabulary of {cfg.vocab_size} rows cannot be shared out over mesh fsdp x expert x context x tensor = "
            f"{holders} devices; move a factor of it to mesh.data."
        )
    return full


def _open_devices(sizes: dict[str, int | None], devices: int) -> int:
    fixed = math.prod(size for size in sizes.values() if size)
    if devices % fixed:
        given = " x ".join(f"{name} {size}" for name, size in sizes.items() if (size or 1) > 1)
        raise UserError(f"config.mesh fixes {given} = {fixed}, which does not divide the {devices} devices.")
    return devices // fixed


def _context(devices: int, sizes: dict[str, int | None], rows: int, length: int) -> int:
    """The fewest devices per sequence that let every device have one, and none more than LONGEST tokens if that can be."""
    fixed = math.prod(sizes[name] or 1 for name in ("data", "fsdp", "expert"))
    fitting = [c for c in _divisors(devices) if rows % (fixed * (devices // c)) == 0 and length % c == 0]
    if fitting:
        return next((context for context in fitting if length // context <= LONGEST), fitting[-1])
    if devices == 1:
        return 1  # the batch does not fit what the config fixes: `check_batch` says how
    raise UserError(
        f"{rows} sequences of {length} tokens cannot be shared out evenly over {devices * fixed} devices; choose a batch that "
        "is a multiple of a divisor of the devices, or a sequence length that is a multiple of the rest."
    )


def _experts(cfg: ModelConfig, devices: int, tokens: int) -> int:
    """Devices that share out the experts so that a training step moves the fewest bytes per layer and device.

    With e of them, a device gathers 1/e of the expert weights three times (forward, recomputation, gradient), and the tokens of
    e - 1 others five times (gathered forward, again, backward; sums scattered twice); all bfloat16.
    """
    if not cfg.num_experts:
        return 1
    weights = 3 * cfg.num_experts * cfg.hidden_size * cfg.moe_intermediate_size
    choices = [e for e in _divisors(devices) if cfg.num_experts % e == 0]
    return min(choices, key=lambda e: 3 * weights / e + 5 * (e - 1) * tokens * cfg.hidden_size)


def _read_by_a_step(cfg: ModelConfig, tensor: int, rest: int, tokens: int) -> float:
    """Numbers of weights and of full layers' caches that a device reads to decode a token, roughly.

    Where `tensor` does not divide the key/value heads, each of its devices holds all of them.
    """
    heads = 2 * cfg.num_attention_heads * cfg.head_dim + 3 * cfg.intermediate_size
    wide = 3 * cfg.num_experts * cfg.moe_intermediate_size if cfg.num_experts else 0
    weights = cfg.num_hidden_layers * cfg.hidden_size * (heads / tensor + wide / (tensor * rest))
    kv_heads = cfg.kv_heads("full")
    owners = sum(stack.blocks for stack in cfg.stacks if stack.owns_kv)  # a full layer each
    cache = 2 * tokens * owners * kv_heads * cfg.head_size("full") / (1 if kv_heads % tensor else tensor)
    return weights + cache / (1 if cfg.num_experts else rest)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
