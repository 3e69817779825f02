"""How fast a step can be: the time of its arithmetic, of its memory traffic and of its network traffic, and the longest.

The bound supposes that the three overlap perfectly and that each runs at its published peak; the sum of the three supposes
that nothing overlaps. A real step lies between or beyond.
"""

import dataclasses
from collections.abc import Mapping

from gemma4_jax.chips import Chip
from gemma4_jax.plan.costs import Totals
from gemma4_jax.plan.network import Places, by_axes

PASSES = {"highest": 6, "high": 3}
"""bfloat16 products that make one float32 product on a TPU, by jax.default_matmul_precision."""

EIGHT_BITS = ("s8", "u8", "s4", "u4", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz", "f8e4m3", "f8e3m4")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one device, and what it would be worth."""

    compute: float
    memory: float
    host: float  # copies to and from the host's memory
    network: float
    network_by_axes: Mapping[tuple[str, ...], float]
    model_flops: float  # of one device's share of the step
    executed_flops: float
    peak_flops: float  # of one device, bfloat16

    @property
    def times(self) -> dict[str, float]:
        """The resources and their seconds."""
        return {"compute": self.compute, "memory": self.memory, "network": self.network, "host": self.host}

    @property
    def binding(self) -> str:
        """What takes longest."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def step_seconds(self) -> float:
        """With perfect overlap."""
        return max(self.times.values())

    @property
    def serial_seconds(self) -> float:
        """Without any overlap."""
        return sum(self.times.values())

    @property
    def mfu_bound(self) -> float:
        """Share of the peak that model FLOPs can reach, with perfect overlap."""
        return self.model_flops / (self.peak_flops * self.step_seconds) if self.step_seconds else 0.0

    @property
    def mfu_serial(self) -> float:
        """The same without any overlap."""
        return self.model_flops / (self.peak_flops * self.serial_seconds) if self.serial_seconds else 0.0


def roofline(totals: Totals, places: Places, model_flops: float) -> Roofline:
    """The roofline of a compiled program.

    Args:
      totals: what a device does in a step, from `costs.totals`.
      places: where the mesh's devices stand, from `network.places_of`.
      model_flops: useful FLOPs of the whole step on all devices: nothing recomputed, causal halves not counted.
    """
    chip = places.topology.chip
    network = by_axes(totals.collectives, places)
    return Roofline(
        compute=compute_seconds(totals, chip),
        memory=totals.hbm_bytes / chip.device_hbm_bandwidth,
        host=totals.host_bytes / chip.device_host_bandwidth,
        network=sum(network.values()),
        network_by_axes=network,
        model_flops=model_flops / len(places.slices),
        executed_flops=totals.flops,
        peak_flops=chip.device_flops,
    )


def compute_seconds(totals: Totals, chip: Chip) -> float:
    """Each matmul at the rate of its dtype; kernels at that of bfloat16."""
    time = totals.kernel_flops / chip.device_flops
    for rate, flops in totals.matmul_flops.items():
        dtype, _, precision = rate.partition(" ")
        peak = chip.device_int8_flops if dtype in EIGHT_BITS else chip.device_flops
        passes = 1
        if dtype == "f32":  # a TPU rounds to bfloat16 unless told otherwise, a GPU to TF32 at half the rate
            passes = PASSES.get(precision, 1) if chip.platform == "tpu" else 2
        time += passes * flops / peak
    return time
