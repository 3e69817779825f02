"""Chips, topologies, time on the network, and the roofline; expectations are worked out by hand from the published figures."""

import dataclasses
import types

import numpy as np
import pytest

from gemma4_jax import chips
from gemma4_jax.errors import UserError
from gemma4_jax.plan import network, report, roofline
from gemma4_jax.plan.costs import Collective, Totals
from gemma4_jax.tables import table

GB = 1e9


def groups(shape, *axes):
    """Device numbers [groups, members] along axes of a mesh."""
    ids = np.arange(np.prod(shape)).reshape(shape)
    others = [i for i in range(len(shape)) if i not in axes]
    return ids.transpose([*others, *axes]).reshape(-1, int(np.prod([shape[i] for i in axes])))


def seconds(topology, shape, axis, kind, slices=1):
    members = groups(shape, axis)
    if kind == "collective-permute":
        members = np.concatenate([np.stack([row, np.roll(row, -1)], axis=1) for row in members])
    return network.call_seconds(kind, GB, members, network.places(chips.topology(topology), shape, slices))


def test_topologies():
    assert chips.topology("v6e:8x8").devices == 64
    assert chips.topology("tpu7x:4x4x4").devices == 128
    assert chips.topology("v5p:4x4x12").chips == 192
    assert chips.topology("v5e:1x1").description["chips_per_host_bounds"] == (1, 1, 1)
    assert chips.topology("h100:2x8").description["topology"] == "1x2x8"
    assert chips.topology("v5e:8x16").wraps == (False, True)
    assert chips.topology("v5p:2x4x4").wraps == (False, False, False)
    assert chips.topology("v5p:4x4x8").wraps == (True, True, True)
    for name in chips.topologies():
        assert chips.topology(name).name == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v6e:3x3", "v6e has no topology '3x3'; did you mean 'v6e:"),
        ("v9z:8x8", "Unknown topology 'v9z:8x8'.*v5e, v6e: 1x1 2x2"),
        ("v5p", "such as v6e:8x8"),
        ("h100:3x4", "h100 has no topology"),
        ("v5p:0x4x4", "v5p has no topology"),
    ],
)
def test_unknown_topologies_list_the_known(name, says):
    with pytest.raises(UserError, match=says):
        chips.topology(name)


def test_peak_of_a_device():
    assert chips.peak_flops("TPU7x") == 2307e12 / 2
    assert chips.peak_flops("TPU v5") == chips.peak_flops("TPU v5p") == 459e12
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert chips.peak_flops("cpu") is None


def test_all_links_of_a_box_work_at_once():
    # 64 chips in an open 8 x 8 grid: 63/64 GB over two links of 100 GB/s; a cube of rings has six.
    assert seconds("v6e:8x8", (1, 64), 1, "all-gather") == pytest.approx(63 / 64 * GB / 2e11)
    assert seconds("v5p:4x4x4", (1, 64), 1, "all-gather") == pytest.approx(63 / 64 * GB / 6e11)
    assert seconds("v5p:4x4x4", (16, 4), 1, "reduce-scatter") == pytest.approx(3 / 4 * GB / 2e11)
    assert seconds("v5p:4x4x4", (16, 4), 1, "all-reduce") == pytest.approx(2 * 3 / 4 * GB / 2e11)
    assert seconds("v6e:8x8", (64, 1), 1, "all-gather") == 0


def test_all_to_all_is_bounded_by_the_middle():
    # A ring of 16: 8 x 8 pairs cross either of two links both ways, each with 1/16 GB. A line has one.
    assert seconds("v5e:16x16", (16, 16), 1, "all-to-all") == pytest.approx(8 * 8 / 16 * GB / (2 * 5e10))
    assert seconds("v6e:4x4", (4, 4), 1, "all-to-all") == pytest.approx(2 * 2 / 4 * GB / 1e11)


def test_permute_takes_the_links_between():
    assert seconds("v6e:2x4", (2, 4), 1, "collective-permute") == pytest.approx(GB / 1e11)
    places = network.places(chips.topology("v6e:8x8"), (8, 8))
    along = groups((8, 8), 1)
    far = np.stack([along[:, 0], along[:, 3]], axis=1)  # three links, nobody else on them
    assert network.call_seconds("collective-permute", GB, far, places) == pytest.approx(GB / 1e11)
    all_by_two = np.concatenate([np.stack([along[:, i], along[:, i + 2]], axis=1) for i in range(6)])
    assert network.call_seconds("collective-permute", GB, all_by_two, places) == pytest.approx(2 * GB / 1e11)


def test_groups_that_interleave_share_links():
    shape = (16, 4)  # 4 along half a dimension of 8, so that groups of 16 have two columns, four apart
    places = network.places(chips.topology("v6e:8x8"), shape)
    lengths = sorted(np.ptp(places.chips[groups(shape, 0)[0]], axis=0))
    assert lengths == [4, 7]
    assert seconds("v6e:8x8", shape, 0, "all-gather") == pytest.approx(15 / 16 * GB / (1e11 + 1e11 / 4))


def test_two_devices_of_a_chip():
    alone = seconds("tpu7x:4x4x4", (64, 2), 1, "all-gather")
    assert alone == pytest.approx(GB / 2 / 6e11)  # inside the chip
    both = seconds("tpu7x:4x4x4", (1, 128), 1, "all-gather")
    assert both == pytest.approx(63 / 64 * GB / 6e11)  # a chip takes everything once
    halves = seconds("tpu7x:4x4x4", (64, 2), 0, "all-gather")
    assert halves == pytest.approx(2 * both)  # each of its devices takes something else


def test_slow_network_between_slices_and_hosts():
    slices = seconds("v6e:4x4", (2, 16), 0, "all-reduce", slices=2)
    assert slices == pytest.approx(2 * GB / 2 / 12.5e9)
    hosts = seconds("h100:2x8", (1, 16), 1, "all-gather")
    assert hosts == pytest.approx(GB / 2 / (8 * 50e9) + 7 / 8 * GB / 450e9)


def test_places_of_real_devices():
    device = types.SimpleNamespace
    topology = chips.topology("tpu7x:1x1x1")
    devices = [device(coords=[0, 0, 0], core_on_chip=core, slice_index=None) for core in (0, 1)]
    places = network.places_of(topology, devices)
    assert places.cores.tolist() == [0, 1]
    assert places.slices.tolist() == [0, 0]


@pytest.fixture
def totals():
    members = groups((16, 4), 1)
    gather = Collective("all-gather", ("tensor",), 4, GB, 10.0, "g", "jit(f)/g", "bf16[1]", members)
    return Totals(matmul_flops={"bf16": 9.18e12, "s8": 9.18e12}, hbm_bytes=16.38e9, collectives=[gather])


def test_roofline(totals):
    topology = chips.topology("v6e:8x8")
    result = roofline.roofline(totals, network.places(topology, (16, 4)), model_flops=64 * 4.59e12)
    assert result.compute == pytest.approx(10e-3 + 5e-3)  # 8-bit products at twice the rate
    assert result.memory == pytest.approx(10e-3)
    assert result.network == pytest.approx(10 * 3 / 4 * GB / 1e11)
    assert result.network_by_axes == {("tensor",): pytest.approx(75e-3)}
    assert result.binding == "network"
    assert result.mfu_bound == pytest.approx(5 / 75)
    assert result.mfu_serial == pytest.approx(5 / 100)


def test_float32_products_cost_passes(totals):
    totals.matmul_flops = {"f32 highest": 9.18e12, "f32": 9.18e12}
    assert roofline.compute_seconds(totals, chips.CHIPS["v6e"]) == pytest.approx(70e-3)
    assert roofline.compute_seconds(totals, chips.CHIPS["h100"]) == pytest.approx(2 * 2 * 9.18 / 989.4)


def test_tables(totals):
    topology = chips.topology("v6e:8x8")
    result = roofline.roofline(totals, network.places(topology, (16, 4)), model_flops=64 * 4.59e12)
    parts = {"parameters": 10 * chips.GiB, "activations": 24 * chips.GiB}
    text = report.compiled(parts, totals, result, topology)
    lines = [line.split() for line in text.splitlines()]
    assert ["total", "34.00", "108.8", "%"] in lines
    assert ["too", "much", "by", "2.75", "8.8", "%"] in lines
    assert ["all-gather", "tensor", "10", "6.98"] in lines
    assert "network   75.00  <- binding" in text
    assert "MFU at most 6.7 %" in text
    fits = report.memory({"parameters": 10 * chips.GiB}, topology.chip)
    assert ["head-room", "21.25", "68.0", "%"] in [line.split() for line in fits.splitlines()]


def test_every_figure_is_positive():
    for chip in chips.CHIPS.values():
        numbers = {k: v for k, v in dataclasses.asdict(chip).items() if isinstance(v, float)} | {"hbm": chip.hbm}
        assert all(value > 0 for key, value in numbers.items() if key != "core_bandwidth"), chip.name
        assert chip.usable_hbm <= chip.hbm
    assert table(("a",), []) == "a\n-"
