"""Gated feed-forward experts on the tokens of one device or of a mesh: dropless, in bounded memory.

One `shard_map` island over the whole mesh, with a derivative of its own. Where experts are cut over the axis `expert`
of size X, tokens and experts meet in one of two ways, whichever sends fewer bytes (`Cut.route`):

    gather    X <= top_k: every device gathers the tokens of the other X - 1, applies its own experts, and the sums
              are reduced and scattered. X - 1 rows per token each way, by collectives that use all links of a torus evenly.
    exchange  X > top_k: every (token, choice) row goes to its expert's device and comes back, by all-to-all.
              top_k (X - 1) / X rows per token each way, and a quarter more with the room for uneven routing.

One layer of 26B-A4B forward and backward, bf16, 8,192 tokens per chip, compiled for v6e 4x4 (jax 0.10.2, libtpu 0.0.42); the GB
are what a chip sends and receives for its tokens, in five collectives, the rest of them being under 4 MB (before blocks were
bounded as `expert_routes.largest_block` has it, which takes about half a GiB off gather):

    expert 8 x fsdp 2: gather 1.6 GB, 3.34 GiB of temporaries; exchange 2.0 GB, 1.85 GiB
    expert 16:         gather 3.5 GB, 4.60 GiB;                exchange 2.2 GB, 1.44 GiB

Nothing is dropped and nothing grows with the load: a device works through the rows of its experts in blocks of a fixed
size, with room for a quarter more than an even share. With all experts on every device, the M * top_k rows are one static
block, whose inner activations are kept for the derivative; the blocks of the other two ways are computed again.
"""

import dataclasses
import functools

import jax
from jax.sharding import PartitionSpec

from gemma4_jax import sharding
from gemma4_jax.kernels import expert_routes as routes
from gemma4_jax.kernels.expert_routes import Gate, Matrices, Tokens
from gemma4_jax.sharding import axes_in

IN_DIMS = ("experts", "embed", "gate_up", "expert_ffw")
OUT_DIMS = ("experts", "expert_ffw", "embed")


def experts(
    x_BTD: jax.Array,
    weights_BTk: jax.Array,
    index_BTk: jax.Array,
    w_in_EDCF: jax.Array,
    w_out_EFD: jax.Array,
    gate: Gate,
) -> jax.Array:
    """sum over a token's k experts of weight * (gate(x . w_in) . w_out): [B, T, D] in the dtype of x.

    Args:
      x_BTD: tokens; on a mesh cut as `sharding.ACTIVATIONS` says, like the next two.
      weights_BTk: float32.
      index_BTk: int32; the k experts of a token differ.
      w_in_EDCF: gate and up side by side, in the dtype of x; on a mesh cut as `sharding.use_spec` says, like the next.
      w_out_EFD: in the dtype of x.
      gate: what lies between the two products.

    Gradients reach everything but the index. Those of the matrices come cut as `sharding.stored_spec` says.
    """
    mesh = sharding.current_mesh()
    cut = Cut.of(mesh, x_BTD, index_BTk, w_in_EDCF, w_out_EFD) if mesh is not None else None
    return _experts(gate, cut, x_BTD, weights_BTk, index_BTk, w_in_EDCF, w_out_EFD)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the arrays of one call lie on a mesh."""

    mesh: jax.sharding.AbstractMesh
    tokens: PartitionSpec
    used: tuple[PartitionSpec, PartitionSpec]
    stored: tuple[PartitionSpec, PartitionSpec]
    top_k: int

    @classmethod
    def of(cls, mesh, x_BTD, index_BTk, w_in_EDCF, w_out_EFD) -> "Cut":
        tokens = sharding.activation_spec(mesh, ("batch", "length", None), x_BTD.shape)
        used, stored = (
            (spec(mesh, IN_DIMS, w_in_EDCF.shape), spec(mesh, OUT_DIMS, w_out_EFD.shape))
            for spec in (sharding.use_spec, sharding.stored_spec)
        )
        return cls(mesh, tokens, used, stored, index_BTk.shape[-1])

    @property
    def token_axes(self) -> tuple[str, ...]:
        return axes_in(self.tokens[0]) + axes_in(self.tokens[1])

    @property
    def ranks(self) -> int:
        """Devices that share out the experts."""
        return sharding.size_of(self.mesh, axes_in(self.used[0][0]))

    @property
    def sums_over_tensor(self) -> bool:
        return bool(axes_in(self.used[0][3]))

    @property
    def route(self) -> str:
        """whole: every expert is here. gather, exchange: see above. replicated: as gather, but the tokens are here."""
        if self.ranks == 1:
            return "whole"
        if "expert" not in self.token_axes:
            return "replicated"
        return "gather" if self.ranks <= self.top_k else "exchange"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(gate: Gate, cut: Cut | None, x, weights, index, w_in, w_out):
    def forward(x, weights, index, w_in, w_out):
        return _forward(gate, cut, x, weights, index, w_in, w_out)[0]

    tokens = Tokens(*(a.reshape(-1, a.shape[-1]) for a in (x, weights, index)))
    matrices = Matrices(w_in.reshape(*w_in.shape[:2], -1), w_out, gate)
    small = routes.small_forward(tokens, matrices) if cut is None else None
    if small is None:
        return forward(x, weights, index, w_in, w_out)

    def on_cpu(x, weights, index, w_in, w_out):
        tokens = Tokens(*(a.reshape(-1, a.shape[-1]) for a in (x, weights, index)))
        return small(tokens, Matrices(w_in.reshape(*w_in.shape[:2], -1), w_out, gate)).reshape(x.shape)

    return jax.lax.platform_dependent(x, weights, index, w_in, w_out, cpu=on_cpu, default=forward)


def _forward(gate: Gate, cut: Cut | None, x, weights, index, w_in, w_out):
    local = functools.partial(_local_forward, gate, cut)
    if cut is not None:
        kept = PartitionSpec(cut.token_axes or None, "tensor" if cut.sums_over_tensor else None)
        specs = (cut.tokens, cut.tokens, cut.tokens, *cut.used)
        local = jax.shard_map(local, mesh=cut.mesh, in_specs=specs, out_specs=(cut.tokens, kept), check_vma=False)
    out, inner = local(x, weights, index, w_in, w_out)
    return out, (x, weights, index, w_in, w_out, inner)


def _backward(gate: Gate, cut: Cut | None, residuals, d_out):
    local = functools.partial(_local_backward, gate, cut)
    if cut is not None:
        kept = PartitionSpec(cut.token_axes or None, "tensor" if cut.sums_over_tensor else None)
        specs = (cut.tokens, cut.tokens, cut.tokens, *cut.used, kept, cut.tokens)
        outs = (cut.tokens, cut.tokens, *cut.stored)
        local = jax.shard_map(local, mesh=cut.mesh, in_specs=specs, out_specs=outs, check_vma=False)
    d_x, d_weights, d_in, d_w_out = local(*residuals, d_out)  # pyright: ignore[reportCallIssue]
    return d_x, d_weights, None, d_in, d_w_out


_experts.defvjp(_forward, _backward)


def _local_forward(gate: Gate, cut: Cut | None, x, weights, index, w_in, w_out):
    tokens = Tokens(*(a.reshape(-1, a.shape[-1]) for a in (x, weights, index)))
    matrices = Matrices(w_in.reshape(*w_in.shape[:2], -1), w_out, gate)
    if cut is None or cut.route == "whole":
        out, inner = routes.whole_forward(tokens, matrices)
    elif cut.route == "exchange":
        out, inner = routes.exchange_forward(tokens, matrices, cut.ranks), None
    else:
        out, inner = routes.gather_forward(tokens, matrices, cut.ranks, cut.route == "replicated"), None
    if cut is not None and cut.sums_over_tensor:
        out = jax.lax.psum(out, "tensor")
    return out.reshape(x.shape), inner


def _local_backward(gate: Gate, cut: Cut | None, x, weights, index, w_in, w_out, inner, d_out):
    tokens = Tokens(*(a.reshape(-1, a.shape[-1]) for a in (x, weights, index)))
    matrices = Matrices(w_in.reshape(*w_in.shape[:2], -1), w_out, gate)
    d_out = d_out.reshape(tokens.x.shape)
    if cut is None or cut.route == "whole":
        gradients = routes.whole_backward(tokens, matrices, inner, d_out)
    elif cut.route == "exchange":
        gradients = routes.exchange_backward(tokens, matrices, cut.ranks, d_out)
    else:
        gradients = routes.gather_backward(tokens, matrices, cut.ranks, cut.route == "replicated", d_out)
    d_x, d_weights, d_in, d_w_out = gradients
    if cut is not None and cut.sums_over_tensor:
        d_x, d_weights = jax.lax.psum((d_x, d_weights), "tensor")
    d_x, d_weights, d_in = d_x.reshape(x.shape), d_weights.reshape(weights.shape), d_in.reshape(w_in.shape)
    if cut is not None:
        d_in, d_w_out = (
            _to_stored(cut, d, used, stored)
            for d, used, stored in zip((d_in, d_w_out), cut.used, cut.stored, strict=True)
        )
    return d_x, d_weights, d_in, d_w_out


def _to_stored(cut: Cut, d: jax.Array, used: PartitionSpec, stored: PartitionSpec) -> jax.Array:
    """This device's part of a matrix's gradient, summed over the devices that saw other tokens."""
    rest = [axis for axis in cut.token_axes if all(axis not in axes_in(entry) for entry in used)]
    for dim, (before, after) in enumerate(zip(used, stored, strict=True)):
        for axis in axes_in(after)[len(axes_in(before)) :]:
            if axis in rest:
                rest.remove(axis)
                d = jax.lax.psum_scatter(d, axis, scatter_dimension=dim, tiled=True)
            else:
                size = d.shape[dim] // cut.mesh.shape[axis]
                d = jax.lax.dynamic_slice_in_dim(d, jax.lax.axis_index(axis) * size, size, dim)
    return jax.lax.psum(d, rest) if rest else d
