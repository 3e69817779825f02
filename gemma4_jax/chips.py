"""Published figures of every accelerator we plan for, and the topologies they are rented in.

Figures are per chip as published; the `device_*` properties are per JAX device, which is half a chip where a chip shows
as two (tpu7x). Sources:

- TPU pages of the Cloud documentation (docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}): FLOP/s, HBM, "bidirectional
  ICI bandwidth per chip" (both directions of all links together: v5e 400, v5p 1200, v6e 800, tpu7x 1200 GB/s) and DCN.
- How To Scale Your Model, part 2 (github.com/jax-ml/scaling-book, tpus.md): bytes/s of one link in one direction (v4p
  4.5e10, v5e 5e10, v5p and v6e 1e11, which agree with the pages above), host links, and which slices wrap around.
- VMEM: jax/_src/pallas/mosaic/tpu_info.py (jax 0.10.2).
- Usable HBM: what the compiler allows. Compiling a program that needs 600 GiB for one device of each topology with libtpu
  0.0.42.1 says "exceeds available HBM (31.25G)"; the rest is the runtime's. (v4: 15.25G for each half of a chip.)
- NVIDIA data sheets H100 SXM (dense, without sparsity) and A100 SXM 80 GB.
"""

import dataclasses
import math
import re

from gemma4_jax.errors import UserError, did_you_mean

GiB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Bytes, bytes per second and FLOP/s of a whole chip."""

    name: str  # as topologies are named: v6e in v6e:8x8
    device_kinds: tuple[str, ...]  # as jax.Device.device_kind says, alone or as a prefix
    flops: float  # dense bfloat16
    int8_flops: float  # the rate of 8-bit matmuls (float8 on tpu7x and H100); bfloat16's where there is none faster
    hbm: float
    usable_hbm: float  # what a program may take
    hbm_bandwidth: float
    vmem: float  # per device; 0 where there is none
    torus_dims: int  # dimensions of the network of links between chips; 0: a switch
    link_bandwidth: float  # one link, one direction; to a switch: one direction of all links together
    dcn_bandwidth: float  # one direction of the slow network, per chip
    host_bandwidth: float  # one direction between a chip and its host's memory
    devices_per_chip: int = 1  # JAX devices
    core_bandwidth: float = 0.0  # one direction between the two devices of a chip
    compiles: bool = True  # False: libtpu lists a v4 as two devices of half a chip, which no v4 at work shows
    full_ring: int = 0  # a torus dimension closes into a ring when it is this long; 0: when all are multiples of 4

    @property
    def platform(self) -> str:
        """tpu or cuda, as `get_topology_desc` spells it."""
        return "tpu" if self.torus_dims else "cuda"

    @property
    def device_flops(self) -> float:
        """Dense bfloat16 FLOP/s of one device."""
        return self.flops / self.devices_per_chip

    @property
    def device_int8_flops(self) -> float:
        """8-bit FLOP/s of one device."""
        return self.int8_flops / self.devices_per_chip

    @property
    def device_usable_hbm(self) -> float:
        """Bytes a program may take on one device."""
        return self.usable_hbm / self.devices_per_chip

    @property
    def device_host_bandwidth(self) -> float:
        """Bytes per second between one device and its host's memory, one direction."""
        return self.host_bandwidth / self.devices_per_chip

    @property
    def device_hbm_bandwidth(self) -> float:
        """HBM bytes per second of one device."""
        return self.hbm_bandwidth / self.devices_per_chip


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            device_kinds=("TPU v4",),
            flops=275e12,  # v4 page: 275 bf16 or int8
            int8_flops=275e12,
            hbm=32 * GiB,
            usable_hbm=30.5 * GiB,
            hbm_bandwidth=1200e9,
            vmem=32 << 20,
            torus_dims=3,
            link_bandwidth=4.5e10,  # scaling book; no v4 page gives it
            dcn_bandwidth=6.25e9,  # scaling book: 2.5e10 a host of 4 chips
            host_bandwidth=1.6e10,  # scaling book
            compiles=False,
        ),
        Chip(
            name="v5e",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            flops=197e12,
            int8_flops=393e12,  # v5e page
            hbm=16 * GiB,
            usable_hbm=15.75 * GiB,
            hbm_bandwidth=819e9,
            vmem=128 << 20,
            torus_dims=2,
            link_bandwidth=5e10,  # 400 GB/s / 4 links / 2 directions
            dcn_bandwidth=3.125e9,  # 6.4 Tbit/s a pod of 256
            host_bandwidth=1.5e10,  # scaling book
            full_ring=16,
        ),
        Chip(
            name="v5p",
            device_kinds=("TPU v5", "TPU v5p"),
            flops=459e12,
            int8_flops=918e12,  # scaling book; the page gives 459 for float8
            hbm=96 * GiB,
            usable_hbm=95.74 * GiB,
            hbm_bandwidth=2765e9,
            vmem=128 << 20,
            torus_dims=3,
            link_bandwidth=1e11,  # 1200 GB/s / 6 links / 2 directions
            dcn_bandwidth=6.25e9,  # 50 Gbit/s
            host_bandwidth=1.5e10,  # scaling book
        ),
        Chip(
            name="v6e",
            device_kinds=("TPU v6 lite", "TPU v6e"),
            flops=918e12,
            int8_flops=1836e12,  # v6e page
            hbm=32 * GiB,
            usable_hbm=31.25 * GiB,
            hbm_bandwidth=1638e9,  # tpu7x page's comparison; the v6e page rounds to 1600
            vmem=128 << 20,
            torus_dims=2,
            link_bandwidth=1e11,  # 800 GB/s / 4 links / 2 directions
            dcn_bandwidth=12.5e9,  # 100 Gbit/s
            host_bandwidth=3.2e10,  # scaling book
            full_ring=16,
        ),
        Chip(
            name="tpu7x",
            device_kinds=("TPU7x",),
            flops=2307e12,
            int8_flops=4614e12,  # float8; 8-bit integers are not published
            hbm=192 * GiB,
            usable_hbm=2 * 94.75 * GiB,
            hbm_bandwidth=7380e9,
            vmem=64 << 20,
            torus_dims=3,
            link_bandwidth=1e11,  # 1200 GB/s / 6 links / 2 directions
            dcn_bandwidth=12.5e9,  # 100 Gbit/s
            host_bandwidth=3.2e10,  # not published; as v6e
            devices_per_chip=2,
            core_bandwidth=6e11,  # "six times faster" than one link; from memory, no stored copy of the page to check it by
        ),
        Chip(
            name="h100",
            device_kinds=("NVIDIA H100",),
            flops=989.4e12,
            int8_flops=1978.9e12,
            hbm=84929347584,
            usable_hbm=0.92 * 84929347584,  # with XLA_PYTHON_CLIENT_MEM_FRACTION=.92; JAX takes .75 unless told
            hbm_bandwidth=3350e9,
            vmem=0,
            torus_dims=0,
            link_bandwidth=450e9,  # NVLink 4: 900 GB/s, both directions together
            dcn_bandwidth=50e9,  # one 400 Gbit/s NIC a GPU, as DGX H100 has
            host_bandwidth=6.4e10,  # PCIe 5 x16
        ),
        Chip(
            name="a100",
            device_kinds=("NVIDIA A100",),
            flops=312e12,
            int8_flops=624e12,
            hbm=80 * 10**9,
            usable_hbm=0.92 * 80 * 10**9,
            hbm_bandwidth=2039e9,
            vmem=0,
            torus_dims=0,
            link_bandwidth=300e9,  # NVLink 3: 600 GB/s, both directions together
            dcn_bandwidth=25e9,
            host_bandwidth=3.2e10,  # PCIe 4 x16
        ),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a `jax.Device.device_kind`; None where the table has none (a CPU)."""
    exact = [chip for chip in CHIPS.values() if device_kind in chip.device_kinds]
    prefix = [chip for chip in CHIPS.values() if chip.platform == "cuda" and device_kind.startswith(chip.device_kinds)]
    return (exact or prefix or [None])[0]


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None where the kind is not in the table (a CPU)."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.device_flops


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are rented together: a box of the torus, or GPUs of hosts (hosts x GPUs a host)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each torus dimension, whether its ends are linked.

        v5e and v6e close a dimension of 16 only; the others close all dimensions of slices made of 4x4x4 cubes and none
        of smaller slices (v5p page: "All 4x4x4 and larger slices (one cube) have full 3D tori"; scaling book, part 2).
        """
        if not self.chip.torus_dims:
            return tuple(False for _ in self.shape)
        if self.chip.full_ring:
            return tuple(size == self.chip.full_ring for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)

    @property
    def description(self) -> dict[str, object]:
        """Keyword arguments of `jax.experimental.topologies.get_topology_desc`; a GPU needs a `target_config` as well."""
        if self.chip.platform == "cuda":
            hosts, gpus = (1, *self.shape)[-2:]
            return {"topology_name": self.chip.name.upper(), "platform": "cuda", "topology": f"1x{hosts}x{gpus}"}
        args: dict[str, object] = {"topology_name": self.name, "platform": "tpu"}
        if self.chips == 1:  # libtpu assumes hosts of 2x2 chips
            args["chips_per_host_bounds"] = (1, 1, 1)
        return args


_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BOXES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_GPUS = ("1", "2", "4", "8", "2x8", "4x8", "8x8")


_SHAPES = {0: _GPUS, 2: _PLANES, 3: _BOXES}


def topologies() -> list[str]:
    """The names `topology` knows. Other boxes of 4x4x4 cubes and other numbers of GPU hosts work too."""
    return [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in _SHAPES[chip.torus_dims]]


def topology(name: str) -> Topology:
    """The topology called `name`: v5e:4x4, v5p:4x4x4, tpu7x:2x2x1, h100:8, h100:2x8 (hosts x GPUs)."""
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().lower())
    chip = CHIPS.get(found[1]) if found else None
    if found is None or chip is None:
        shapes = [(", ".join(c.name for c in CHIPS.values() if c.torus_dims == d), s) for d, s in _SHAPES.items()]
        listed = "; ".join(f"{names}: {' '.join(each)}" for names, each in reversed(shapes))
        raise UserError(f"Unknown topology {name!r}; it is a chip and a shape, such as v6e:8x8 (known: {listed}).")
    shape = tuple(int(size) for size in found[2].split("x"))
    spelled = f"{chip.name}:{found[2]}"
    cubes = chip.torus_dims == 3 == len(shape) and all(size and size % 4 == 0 for size in shape)
    hosts = not chip.torus_dims and (len(shape) == 1 or (len(shape) == 2 and shape[1] == 8)) and min(shape) > 0
    if spelled not in topologies() and not cubes and not hosts:
        known = [f"{chip.name}:{each}" for each in _SHAPES[chip.torus_dims]]
        raise UserError(f"{chip.name} has no topology {found[2]!r}; {did_you_mean(spelled, known)}.")
    return Topology(spelled, chip, shape)
