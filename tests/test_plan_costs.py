"""The reader of compiled programs: FLOPs, bytes, loops and collectives against counts by hand.

CPU programs are compiled here; TPU programs are those of tests/plan_hlo, made by the functions in its generate.py.
"""

import gzip
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemma4_jax import sharding
from gemma4_jax.plan import checks, costs, hlo, kernels

TPU = pathlib.Path(__file__).parent / "plan_hlo"


def read(name):
    return hlo.parse(gzip.decompress((TPU / f"{name}.hlo.gz").read_bytes()).decode())


def wires(total):
    return {key: pytest.approx(value) for key, value in total.wire_bytes.items()}


@pytest.fixture(scope="module")
def cpu():
    """Five steps of gather, matmul, exchange, shift and scatter over fsdp 2 and tensor 4, as text, after three of nothing."""
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})

    def local(x, w):
        def step(h, w):
            w = jax.lax.all_gather(w, "fsdp", tiled=True)
            h = jnp.tanh(h @ w)
            h = jax.lax.all_to_all(h, "tensor", 0, 1, tiled=True)
            h = jax.lax.ppermute(jnp.sin(h), "tensor", [(i, (i + 1) % 4) for i in range(4)])
            h = jax.lax.all_to_all(jnp.cos(h), "tensor", 1, 0, tiled=True)
            h = jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), h)
            return jax.lax.all_gather(jax.lax.psum_scatter(h, "tensor", tiled=True), "tensor", tiled=True), None

        h, _ = jax.lax.scan(step, x, w)
        return jax.lax.psum(h, ("fsdp", "tensor"))

    def f(x, w):
        specs = PartitionSpec(("fsdp", "tensor")), PartitionSpec(None, "fsdp")
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(x, w)

    x = jax.ShapeDtypeStruct((256, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("fsdp", "tensor"))))
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    return mesh, jax.jit(f).lower(x, w).compile().as_text()


def test_cpu_program_flops_and_collectives(cpu):
    mesh, text = cpu
    total = costs.totals(hlo.parse(text), mesh.shape)
    assert total.flops == 5 * (1 + 3) * 2 * 32 * 64 * 64  # 32 rows a device, nested loops multiplied out
    assert total.unknown_loops == []
    assert sorted(total.loops.values()) == [3, 5]
    x, w = 32 * 64 * 4, 64 * 64 * 4  # bytes a device
    assert wires(total) == {
        ("all-gather", ("fsdp",)): 5 * w / 2,
        ("all-to-all", ("tensor",)): 5 * 2 * x * 3 / 4,
        ("collective-permute", ("tensor",)): 5 * x,
        ("reduce-scatter", ("tensor",)): 5 * x * 3 / 4,
        ("all-gather", ("tensor",)): 5 * x * 3 / 4,
        ("all-reduce", ("fsdp", "tensor")): 2 * x * 7 / 8,
    }


def test_loops_are_counted_from_their_condition_where_the_compiler_left_no_note(cpu):
    mesh, text = cpu
    assert "known_trip_count" in text
    total = costs.totals(hlo.parse(text.replace("known_trip_count", "forgotten")), mesh.shape)
    assert sorted(total.loops.values()) == [3, 5]
    assert total.flops == 5 * (1 + 3) * 2 * 32 * 64 * 64


def test_loop_that_ends_by_data_is_named_and_runs_as_often_as_the_caller_says():
    def f(x):
        with jax.named_scope("outer"), jax.named_scope("search"):
            return jax.lax.while_loop(lambda x: x[0, 0] < 9.0, lambda x: x @ x, x)

    module = hlo.parse(jax.jit(f).lower(jnp.ones((16, 16))).compile().as_text())
    once = costs.totals(module, {"data": 1})
    assert once.loops == {}
    assert [name.split("/")[1:3] for name in once.unknown_loops] == [["outer", "search"]]
    assert once.flops == 2 * 16**3
    told = costs.totals(module, {"data": 1}, trips={"outer": 3, "search": 7})
    assert told.flops == 7 * 2 * 16**3
    assert told.unknown_loops == []


def test_dearest_branch_counts():
    def f(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

    text = jax.jit(f).lower(0, jnp.ones((16, 16))).compile().as_text()
    assert costs.totals(hlo.parse(text), {"data": 1}).flops == 2 * 2 * 16**3


def test_bytes_of_slices_are_those_of_the_slice():
    def f(stack, i):
        return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False) * 2.0

    text = jax.jit(f).lower(jnp.ones((1000, 64, 64)), 3).compile().as_text()
    moved = costs.totals(hlo.parse(text), {"data": 1}).hbm_bytes
    assert 2 * 64 * 64 * 4 <= moved < 3 * 64 * 64 * 4

    def g(stack, x, i):
        return jax.lax.dynamic_update_index_in_dim(stack, x * 2.0, i, 0)

    arguments = jnp.ones((1000, 64, 64)), jnp.ones((64, 64)), 3
    text = jax.jit(g, donate_argnums=0).lower(*arguments).compile().as_text()
    moved = costs.totals(hlo.parse(text), {"data": 1}).hbm_bytes
    assert 2 * 64 * 64 * 4 <= moved < 3 * 64 * 64 * 4


def test_tpu_scan_of_sharded_layers():
    total = costs.totals(read("scan_v6e"), {"fsdp": 2, "tensor": 2})
    tokens, width, hidden = 2048 // 2, 512, 2048 // 2  # of one device
    one = 2 * tokens * width * hidden
    assert dict(total.matmul_flops) == {"bf16": 5 * (2 + 1 + 4) * one}  # forward, the first again, backward
    assert sorted(total.loops.values()) == [5, 5]
    wire = total.wire_bytes
    assert wire["all-gather", ("fsdp",)] == 5 * 2 * 2 * width * hidden * 2 / 2  # two weights, forward and backward
    assert set(wire) <= {(kind, (axis,)) for kind in costs.COLLECTIVES for axis in ("fsdp", "tensor")}
    summed = wire["all-reduce", ("tensor",)]
    assert (
        summed == 5 * 2 * 2 * tokens * width * 2 / 2
    )  # y forwards, its twin backwards; twice the bytes, half the ring


def test_tpu_asynchronous_collectives_count_once():
    total = costs.totals(read("async_v6e"), {"fsdp": 4, "tensor": 2})
    tokens, width, hidden = 16384 // 4, 4096, 16384 // 2
    assert total.flops == pytest.approx(5 * 7 * 2 * tokens * width * hidden)
    assert total.wire_bytes["all-gather", ("fsdp",)] == 5 * 2 * 2 * width * hidden * 2 * 3 / 4
    # The gradients go back to where the weights rest: all-reduces inside fusions, to the letter, or rings of permutes.
    assert total.wire_bytes["reduce-scatter", ("fsdp",)] > 0
    assert ("all-reduce", ("fsdp",)) not in total.wire_bytes


def test_tpu_splash_attention_by_blocks_visited():
    total = costs.totals(read("splash_v6e"), {"data": 1})
    heads, blocks = 2 * 4, 4
    causal, sliding = blocks * (blocks + 1) // 2, 2 * blocks
    block = 2 * 256 * 256 * 256
    calls = {name: (kernel.calls, kernel.flops) for name, kernel in total.kernels.items()}
    assert calls == {
        "splash_mqa_fwd_residuals": (2, 2 * heads * (causal + sliding) * block),
        "splash_mqa_dq_no_residuals": (2, 3 * heads * (causal + sliding) * block),
        "splash_mqa_dkv_no_residuals": (2, 4 * heads * (causal + sliding) * block),
    }


def test_tpu_grouped_matmul_and_a_callers_own_price():
    module = read("gmm_v6e")
    total = costs.totals(module, {"data": 1})
    assert total.kernels["gmm"].flops == total.flops == 2 * 2048 * 512 * 1024
    assert total.unknown_loops == []

    def mine(computation, call):
        return kernels.KernelCost(1.0, 2.0) if kernels.kernel_name(call) == "gmm" else None

    again = costs.totals(module, {"data": 1}, price_kernel=mine)
    assert again.flops == 1.0
    assert total.hbm_bytes - again.hbm_bytes == total.kernels["gmm"].bytes - 2.0


def test_tpu_batched_dots_written_as_convolutions():
    total = costs.totals(read("batched_v6e"), {"data": 1})
    assert total.flops == 2 * 2 * 4 * 384 * 128 * 512 + 2 * 6 * 256 * 384 * 512


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'c'}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_device_groups(spelling, expected):
    line = f"  %x.1 = f32[4]{{0}} all-reduce(%y), channel_id=1, replica_groups={spelling}, to_apply=%add"
    (made,) = hlo.parse(f"ENTRY %main (y: f32[4]) -> f32[4] {{\n{line}\n}}").entry.instructions
    assert hlo.groups(made, 4).tolist() == expected


def test_axes_of_groups():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert hlo.axes_of(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), sizes) == ("tensor",)
    assert hlo.axes_of(np.array([[0, 2, 4, 6], [1, 3, 5, 7]]), sizes) == ("data", "fsdp")


def test_bytes_of_tiled_shapes():
    def size(text):
        shape, _ = hlo.parse_shape(text)
        return [(each.bytes, each.space) for each in hlo.leaves(shape)]

    assert size("bf16[6,84]{1,0:T(8,128)(2,1)}") == [(8 * 128 * 2, hlo.HBM)]
    assert size("bf16[84,6]{0,1:T(8,128)(2,1)S(1)}") == [(8 * 128 * 2, hlo.VMEM)]
    assert size("f32[10]{0:T(128)}") == [(512, 0)]
    assert size("s4[3]{0}") == [(2, 0)]
    assert size("(pred[], (u8[2,3]{1,0}, token[]))") == [(1, 0), (6, 0), (0, 0)]


def test_checks_find_scores_logits_and_gathered_tables():
    mesh = sharding.make_mesh({"fsdp": 8})

    def f(q, k, table):
        probabilities = jax.nn.softmax(jnp.einsum("nth,nsh->nts", q, k))
        gathered = jax.lax.with_sharding_constraint(table, NamedSharding(mesh, PartitionSpec()))
        return probabilities, jax.nn.logsumexp(q[0] @ gathered.T, axis=-1)

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    arguments = array((2, 96, 16)), array((2, 96, 16)), array((2048, 16), "fsdp")
    module = hlo.parse(jax.jit(f).lower(*arguments).compile().as_text())
    assert {each.shape.dims for each in checks.scores(module, 96, 96)} == {(2, 96, 96)}
    assert checks.scores(module, 48, 100) == []
    assert [each.shape.dims for each in checks.logits(module, 96, 2048)] == [(96, 2048)]
    assert checks.logits(module, 97, 2048) == []
    assert len(checks.gathered(module, 2048, [16])) == 1
    assert checks.gathered(module, 256, [16]) == checks.gathered(module, 2048, [24]) == []
    largest = checks.buffers(module)
    assert largest[0].shape.dims == (96, 2048)
    assert largest[0].bytes == 96 * 2048 * 4


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_f {}")
