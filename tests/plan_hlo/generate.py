"""Writes the TPU programs of this directory: `python tests/plan_hlo/generate.py` (libtpu needed, two minutes).

Each is compiled for an absent TPU and stripped of what the reader of `gemma4_jax.plan` does not use. What they cost is in
`tests/test_plan_costs.py`, counted by hand from the functions below.
"""

import gzip
import os
import pathlib
import re
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import NamedSharding, PartitionSpec

from gemma4_jax import sharding

HERE = pathlib.Path(__file__).parent


def mesh_of(topology: str, **sizes: int) -> jax.sharding.Mesh:
    """A mesh of absent chips."""
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    count = 1
    for size in sizes.values():
        count *= size
    return sharding.make_mesh(sizes, devices[:count])


def array(mesh: jax.sharding.Mesh, shape: tuple[int, ...], *spec, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An argument that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def write(name: str, mesh: jax.sharding.Mesh, f, *arguments, options: dict[str, Any] | None = None) -> None:
    """Compile and keep the text."""
    with jax.set_mesh(mesh):
        text = jax.jit(f).lower(*arguments).compile(compiler_options=options).as_text() or ""
    text = re.sub(r"\A.*?(?=^(%|ENTRY))", "", text, count=1, flags=re.MULTILINE | re.DOTALL)
    estimate = r'"cost_estimate":\{[^}]*\}'
    kept = []
    for line in text.splitlines():
        found = re.search(estimate, line)
        line = re.sub(r", backend_config=.*", ", backend_config={" + found[0] + "}" if found else "", line)
        line = re.sub(r" stack_frame_id=\d+", "", line)
        if "pallas_call" not in line or (" custom-call(" not in line and not line.startswith("}")):
            line = re.sub(r", metadata=\{[^}]*\}", "", line)
        line = re.sub(
            r", (sharding|operand_layout_constraints|output_to_operand_aliasing)=\{.*?\}(?=, [a-z_]+=|$)", "", line
        )
        kept.append(line)
    packed = gzip.compress("\n".join(kept).encode(), mtime=0)
    (HERE / f"{name}.hlo.gz").write_bytes(packed)
    print(name, len(packed), "bytes")


UP, DOWN = ("embed", "ffw"), ("ffw", "embed")


def layers(w1, w2, x):
    """L residual feed-forward layers, rematerialised, and the gradient of both weights."""

    def loss(w1, w2):
        def layer(h, w):
            up, down = w
            y = jnp.tanh(h @ sharding.gather(up, UP)) @ sharding.gather(down, DOWN)
            return h + jax.lax.with_sharding_constraint(y, PartitionSpec("fsdp", None)), None

        h, _ = jax.lax.scan(jax.checkpoint(layer), x, (w1, w2))
        return jnp.sum(h.astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1))(w1, w2)


def scan(name: str, topology: str, sizes: dict[str, int], tokens: int, width: int, hidden: int, options=None) -> None:
    """`layers` on a mesh of fsdp and tensor."""
    mesh = mesh_of(topology, **sizes)
    w1, w2 = (
        array(mesh, (5, *shape), None, *sharding.stored_spec(mesh, dims, shape))
        for dims, shape in ((UP, (width, hidden)), (DOWN, (hidden, width)))
    )
    write(name, mesh, layers, w1, w2, array(mesh, (tokens, width), "fsdp", None), options=options)


def splash(q, k, v):
    """Causal, then sliding attention, and their gradients."""
    heads, length = q.shape[1:3]

    def attention(mask):
        kernel = splash_attention_kernel.make_splash_mqa_single_device(
            mask=splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=splash_attention_kernel.BlockSizes(
                block_q=256,
                block_kv=256,
                block_kv_compute=256,
                block_q_dkv=256,
                block_kv_dkv=256,
                block_kv_dkv_compute=256,
                block_q_dq=256,
                block_kv_dq=256,
            ),
        )
        return jax.vmap(kernel)

    def loss(q, k, v):
        out: Any = attention(splash_attention_mask.CausalMask((length, length)))(q, k, v)
        out = attention(splash_attention_mask.LocalMask((length, length), (255, 0), 0))(out, k, v)
        return jnp.sum(out, dtype=jnp.float32)

    return jax.grad(loss, (0, 1, 2))(q, k, v)


def main() -> None:
    """All of them."""
    scan("scan_v6e", "v6e:2x2", {"fsdp": 2, "tensor": 2}, 2048, 512, 2048)
    fused = {
        f"xla_tpu_enable_async_collective_fusion{suffix}": "true"
        for suffix in ("", "_fuse_all_gather", "_multiple_steps")
    } | {"xla_enable_async_all_gather": "true", "xla_tpu_overlap_compute_collective_tc": "true"}
    scan("async_v6e", "v6e:2x4", {"fsdp": 4, "tensor": 2}, 16384, 4096, 16384, fused)
    one = mesh_of("v6e:2x2", data=1)
    q, kv = array(one, (2, 4, 1024, 256)), array(one, (2, 1024, 256))
    write("splash_v6e", one, splash, q, kv, kv)
    write(
        "gmm_v6e",
        one,
        lambda x, w, sizes: gmm(x, w, sizes, preferred_element_type=jnp.bfloat16, tiling=(512, 512, 512)),
        array(one, (2048, 512)),
        array(one, (4, 512, 1024)),
        array(one, (4,), dtype=jnp.int32),
    )
    write(
        "batched_v6e",
        one,
        lambda q, k, x, w: (jnp.einsum("bnth,bsh->bnts", q, k), jnp.einsum("ktf,kfd->ktd", x, w)),
        array(one, (2, 4, 384, 128)),
        array(one, (2, 512, 128)),
        array(one, (6, 256, 384)),
        array(one, (6, 384, 512)),
    )


if __name__ == "__main__":
    main()
