"""Seconds of kernels and collectives: their limits, their steps, and how far they are from measurements."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from autopart.cost.collectives import (
    COLLECTIVES,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    measured_seconds,
    p2p_seconds,
    ring_bandwidth,
)
from autopart.cost.compute import NO_SIZES, Seconds, work_in, work_seconds
from autopart.cost.kernel_efficiency import attention_seconds, memory_seconds, product_bytes, product_seconds
from autopart.cost.training_state import Training
from autopart.cost.update_seconds import update_seconds
from autopart.hardware import DEVICES, LINKS
from autopart.hardware.mesh import Group
from autopart.hardware.rows import Link
from benchmarks.accuracy import fit
from benchmarks.accuracy.fit import silicon_of

GPUS = [name for name in DEVICES if name != "cpu"]


def product(name: str, batch: float, m: float, n: float, k: float) -> float:
    device = DEVICES[name]
    nbytes, peak = product_bytes(batch, m, n, k, 2), device.flops["float16"]
    return float(product_seconds(batch, m, n, k, nbytes, peak, device.bandwidth, silicon_of(name)))


def share(name: str, m: int, n: int, k: int) -> float:
    """Of the peak."""
    return 2 * m * n * k / product(name, 1, m, n, k) / DEVICES[name].flops["float16"]


def one_host(ranks: int, link: str = "nvlink3") -> Group:
    return Group(ranks, ranks, LINKS[link], LINKS["ib-hdr"])


def two_level(hosts: int, per_host: int, nics: float = 1.0) -> Group:
    return Group(hosts * per_host, per_host, LINKS["nvlink3"], LINKS["ib-hdr"], nics)


def test_every_device_has_constants() -> None:
    assert all((device.silicon is not None) == (device.name in GPUS) for device in DEVICES.values())


@pytest.mark.parametrize("name", GPUS)
def test_a_huge_square_product_reaches_the_sustained_share(name: str) -> None:
    silicon = silicon_of(name)
    assert share(name, 2**16, 2**16, 2**16) == pytest.approx(min(silicon.issue, silicon.sustained), rel=0.03)


@pytest.mark.parametrize("name", GPUS)
def test_no_product_beats_the_peak_or_the_memory(name: str) -> None:
    device = DEVICES[name]
    draws = np.random.default_rng(0)
    b, m, n, k = 2.0 ** draws.integers(0, [[5], [15], [15], [15]], (4, 500)) + draws.integers(0, 7, (4, 500))
    nbytes = product_bytes(b, m, n, k, 2)
    seconds = product_seconds(b, m, n, k, nbytes, device.flops["float16"], device.bandwidth, silicon_of(name))
    assert (seconds >= 2 * b * m * n * k / device.flops["float16"]).all()
    assert (seconds >= nbytes / device.bandwidth).all()
    assert seconds.shape == (500,) and np.isfinite(seconds).all()


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("grown", range(4))
def test_a_product_takes_no_less_when_a_size_grows(name: str, grown: int) -> None:
    for shape in ([1, 96, 96, 96], [8, 2048, 2048, 64], [1, 4096, 1, 4096], [2, 300, 5000, 700]):
        times = []
        for factor in (1, 1.5, 2, 3, 5, 8, 13):
            sizes = list(shape)
            sizes[grown] = math.ceil(sizes[grown] * factor)
            times.append(product(name, *sizes))
        assert times == sorted(times)


def test_a_tile_more_than_the_waves_hold_costs_a_wave() -> None:
    """108 multiprocessors take 108 tiles at once: 27 x 4 of 128 x 256 fill them, one row more starts another wave."""
    full, over = product("a100-80gb", 1, 128 * 27, 256 * 4, 4096), product("a100-80gb", 1, 128 * 27 + 1, 1024, 4096)
    assert over > 1.1 * full
    same = product("a100-80gb", 1, 128 * 27 - 3, 1024, 4096)
    assert same == pytest.approx(full, rel=1e-3)


def test_a_short_k_reaches_less() -> None:
    shares = [share("a100-80gb", 8192, 8192, k) for k in (32, 64, 128, 512, 4096)]
    assert shares == sorted(shares) and shares[0] < 0.3 < 0.7 < shares[-1]


def test_a_skinny_product_is_bound_by_memory() -> None:
    device = DEVICES["a100-80gb"]
    moved = product_bytes(1, 1, 16384, 16384, 2) / (device.bandwidth * silicon_of("a100-80gb").memory)
    assert moved < product("a100-80gb", 1, 1, 16384, 16384) < 1.5 * moved


def test_sizes_may_be_arrays() -> None:
    k = np.array([128.0, 256.0])
    device = DEVICES["h200"]
    both = product_seconds(1, 512, 512, k, 0.0, device.flops["bfloat16"], device.bandwidth, silicon_of("h200"))
    alone = product_seconds(1, 512, 512, 256, 0.0, device.flops["bfloat16"], device.bandwidth, silicon_of("h200"))
    assert both[1] == alone


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("backward", [False, True])
def test_attention(name: str, backward: bool) -> None:
    device = DEVICES[name]

    def seconds(heads: int, length: int, causal: bool) -> float:
        sizes = (1, heads, length, length, 128, 128, causal, 0.0)
        peak = device.flops["float16"]
        return float(attention_seconds(*sizes, peak, device.bandwidth, silicon_of(name), backward))

    full = (10 if backward else 4) * 64 * 32768**2 * 128 / device.flops["float16"]
    reached = full / seconds(64, 32768, False)
    assert reached == pytest.approx(silicon_of(name).issue * silicon_of(name).attention[backward], rel=0.03)
    assert seconds(64, 32768, True) == pytest.approx(seconds(64, 32768, False) / 2, rel=0.05)
    times = [seconds(heads, 4096, True) for heads in (1, 2, 4, 16, 64, 256)]
    assert times == sorted(times)
    assert times[-1] < 5 * times[-2]


def test_small_streams_do_not_reach_the_bandwidth() -> None:
    device, silicon = DEVICES["a100-80gb"], silicon_of("a100-80gb")
    reached = [n / memory_seconds(n, device.bandwidth, silicon) / device.bandwidth for n in (1e4, 1e6, 1e8, 1e10)]
    assert reached == sorted(reached)
    assert reached[0] < 0.01 and reached[-1] == pytest.approx(silicon.memory, rel=0.01)
    assert memory_seconds(0.0, device.bandwidth, silicon, 3) == 3 * silicon.kernel_seconds


def seconds_of(
    name: str, flops: float, nbytes: float, sizes: tuple[float, ...] = NO_SIZES, grads: tuple[bool, bool] = (True, True)
) -> Seconds:
    peak = DEVICES[name].flops["bfloat16"] if flops else math.inf
    row = [flops, nbytes, peak, sum(grads) if flops else 1, 1, 0, *sizes, *grads]
    found = work_seconds(work_in(np.array([row], dtype=float)), DEVICES[name])
    return Seconds(float(found.forward[0]), float(found.backward[0]))


def test_a_product_has_a_backward_for_each_factor_with_a_gradient() -> None:
    m, n, k = 4096, 1000, 64
    nbytes = product_bytes(1, m, n, k, 2)
    times = [
        seconds_of("h100-80gb", 2 * m * n * k, nbytes, (1, m, n, k, 0, 0), grads)
        for grads in ((False, False), (True, False), (False, True), (True, True))
    ]
    device = DEVICES["h100-80gb"]
    forward, first, second = (
        float(product_seconds(1, *shape, nbytes, device.flops["bfloat16"], device.bandwidth, silicon_of("h100-80gb")))
        for shape in ((m, n, k), (m, k, n), (k, n, m))
    )
    assert min(forward, first, second) > device.launch_seconds and len({forward, first, second}) == 3
    assert {t.forward for t in times} == {forward}
    assert [t.backward for t in times] == pytest.approx([0.0, first, second, first + second])


def test_a_launch_is_hidden_behind_a_longer_kernel_and_bounds_a_shorter_one() -> None:
    device, silicon = DEVICES["a100-80gb"], silicon_of("a100-80gb")
    assert seconds_of("a100-80gb", 0.0, 10.0).forward == device.launch_seconds
    assert seconds_of("a100-80gb", 2.0 * 64**3, 10.0, (1, 64, 64, 64, 0, 0)).forward >= device.launch_seconds
    long = seconds_of("a100-80gb", 0.0, 1e9)
    assert long.forward == long.backward == memory_seconds(1e9, device.bandwidth, silicon)


def test_several_products_take_their_flops() -> None:
    device, silicon = DEVICES["a100-80gb"], silicon_of("a100-80gb")
    found = seconds_of("a100-80gb", 1e12, 10.0)
    assert found.forward == 1e12 / device.flops["bfloat16"] / silicon.sustained
    assert found.backward == 2 * found.forward


def test_a_device_without_constants_has_a_roofline() -> None:
    device = DEVICES["cpu"]
    found = seconds_of("cpu", 1e9, 1e3, (1, 1000, 1000, 500, 0, 0))
    assert found.forward == pytest.approx(1e9 / (0.7 * device.flops["bfloat16"]) + device.launch_seconds)
    assert found.backward == 2 * found.forward
    assert seconds_of("cpu", 0.0, 1e9).forward == pytest.approx(1e9 / (0.8 * device.bandwidth) + device.launch_seconds)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_of_one_costs_nothing(name: str) -> None:
    assert COLLECTIVES[name](1e9, one_host(1)) == 0.0


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("link", LINKS)
def test_a_collective_takes_no_less_when_bytes_grow(name: str, link: str) -> None:
    sizes = np.logspace(2, 10, 50)
    for group in (one_host(4, link), Group(16, 8, LINKS["nvlink3"], LINKS[link])):
        seconds = COLLECTIVES[name](sizes, group)
        assert (np.diff(seconds) > 0).all()
        assert float(COLLECTIVES[name](float(sizes[7]), group)) == seconds[7]


@pytest.mark.parametrize("link", LINKS)
def test_a_send_takes_no_less_when_bytes_grow(link: str) -> None:
    seconds = p2p_seconds(np.logspace(0, 10, 50), LINKS[link])
    assert (np.diff(seconds) > 0).all() and seconds[0] > 0


def test_an_all_reduce_is_twice_an_all_gather_of_large_tensors() -> None:
    for group in (one_host(8), two_level(2, 8), two_level(4, 1)):
        assert all_reduce_seconds(1e10, group) == pytest.approx(2 * all_gather_seconds(1e10, group), rel=0.01)


def test_large_rings_reach_the_links_share() -> None:
    bus = 2 * 7 / 8 * 1e11 / all_reduce_seconds(1e11, one_host(8))
    assert bus == pytest.approx(LINKS["nvlink3"].bandwidth * LINKS["nvlink3"].share, rel=0.01)


def test_more_nics_make_rings_between_hosts_faster_up_to_the_links_inside() -> None:
    rates = [ring_bandwidth(two_level(2, 8, nics)) for nics in (1 / 8, 1 / 4, 1 / 2, 1, 8)]
    assert rates[1] == 2 * rates[0]
    assert rates == sorted(rates)
    assert rates[-1] == ring_bandwidth(one_host(8))


def test_ranks_of_a_host_share_its_nics() -> None:
    """Eight groups of a rank a host take as long as one group of all would with an eighth of the bytes each."""
    alone, apart = ring_bandwidth(two_level(2, 8)), ring_bandwidth(two_level(2, 1))
    assert alone == pytest.approx(min(8 * apart, ring_bandwidth(one_host(8))))


def test_trees_beat_rings_on_many_hosts_for_small_tensors() -> None:
    few, many = all_reduce_seconds(1e3, two_level(2, 8)), all_reduce_seconds(1e3, two_level(64, 8))
    assert many < 10 * few
    assert all_gather_seconds(1e3, two_level(64, 8)) > 2 * many


def test_unswitched_meshes_have_fewer_links_in_small_groups() -> None:
    rates = [ring_bandwidth(one_host(p, "nvlink2")) for p in (2, 4, 8)]
    assert rates[1] == pytest.approx(2 * rates[0]) and rates[2] == pytest.approx(3 * rates[0])
    switched = {ring_bandwidth(one_host(p)) for p in (2, 4, 8)}
    assert len(switched) == 1
    assert all_to_all_seconds(1e9, one_host(8, "nvlink2")) > all_to_all_seconds(1e9, one_host(8))


def test_switched_v100_have_all_links_in_every_group() -> None:
    rates = {ring_bandwidth(one_host(p, "nvlink2-switched")) for p in (2, 4, 8, 16)}
    assert rates == {ring_bandwidth(one_host(8, "nvlink2"))}


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 20),
        ({"optimizer": "sgd"}, 3),
        ({"micro_batches": 5}, 20 + 4 * 3),
        ({"zero": 1}, 20 / 4),
        ({"widening": 2.0}, 3 + 2 * 20 + 3),
        ({"widening": 2.0, "micro_batches": 3}, 3 + 2 * 5 + 2 * 20 + 3),
        ({"widening": 2.0, "zero": 3}, 3 + 2 * 20 / 4),
    ],
)
def test_an_update_moves_its_tensors(changes: dict[str, Any], passes: float) -> None:
    """In tensors of the parameter's bytes: the sums of gradients, the passes of the step, the copy written back."""
    device = DEVICES["a100-80gb"]
    training = replace(Training("adamw", 0, one_host(4), 1), **changes)
    found = update_seconds(1e9, True, True, training, device)
    assert found == pytest.approx(passes * 1e9 / device.bandwidth / silicon_of("a100-80gb").memory)
    assert update_seconds(1e9, False, True, training, device) == 0


def test_links_without_nccl_follow_the_alpha_beta_model() -> None:
    link = LINKS["ethernet"]
    group = Group(4, 1, LINKS["nvlink4"], link)
    assert all_gather_seconds(1e6, group) == pytest.approx(3 * (link.latency_seconds + 1e6 / 4 / link.bandwidth))
    assert p2p_seconds(1e6, link) == pytest.approx(link.latency_seconds + 1e6 / link.bandwidth)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_over_gloo_a_pair_of_collectives_takes_longer_than_an_all_reduce(ranks: int) -> None:
    link = LINKS["shared-memory"]
    group = Group(ranks, ranks, link, link)
    for nbytes in (1e3, 1e6, 1e9):
        whole = all_reduce_seconds(nbytes, group)
        assert 0.5 * whole < all_gather_seconds(nbytes, group) < whole


def test_a_link_without_a_kind_is_taken_at_its_word() -> None:
    link = Link("mine", 300e9, 3e-6, "own")
    assert all_reduce_seconds(8e9, Group(8, 8, link, link)) == pytest.approx(14 * 3e-6 + 2 * 7e9 / link.bandwidth)


def test_measured_points_are_interpolated() -> None:
    points = [(1e3, 1e-5), (1e6, 1e-4), (1e9, 1e-2)]
    assert [float(measured_seconds(n, points)) for n, _ in points] == pytest.approx([s for _, s in points])
    assert measured_seconds(1.0, points) == pytest.approx(1e-5)
    assert measured_seconds(2e9, points) == pytest.approx(2e-2)
    times = measured_seconds(np.logspace(0, 11, 60), points)
    assert all(a <= b for a, b in pairwise(times.tolist()))


# How far the frozen constants are from measurements: `python -m benchmarks.accuracy.fit`.


def test_operators_of_a_v100() -> None:
    profile = fit.Profile()
    errors = profile.errors(silicon_of("v100-32gb"), fit.PROFILER)
    assert len(errors) == 5120 and profile.sound.sum() == 4768
    assert fit.mape(errors) < 0.13
    for direction in (profile.backward, ~profile.backward):
        assert fit.mape(errors[profile.sound & direction]) < 0.105
    for name in set(profile.name):
        own = profile.sound & (profile.name == name)
        assert fit.mape(errors[own]) < 0.175, name


@pytest.mark.parametrize(
    ("which", "products", "experts", "attention"),
    [(0, 0.036, 0.04, 0.07), (1, 0.105, 0.23, 0.125)],
    ids=["a100", "b200"],
)
def test_products_and_attention(which: int, products: float, experts: float, attention: float) -> None:
    hardware, name, peak, band = fit.DATASETS[which]
    measured = fit.products(hardware)
    errors = measured.errors(silicon_of(name), peak, band)
    assert fit.mape(errors[~measured.grouped]) < products
    assert fit.mape(errors[measured.grouped]) < experts
    for backward in (False, True):
        assert fit.mape(fit.attention_errors(hardware, silicon_of(name), peak, band, backward)) < attention


@pytest.mark.parametrize(
    ("device", "op", "count", "limit"),
    [
        ("h100-96gb", "product", 8, 0.03),
        ("h100-96gb", "linear", 7, 0.11),
        ("h100-80gb", "product", 5, 0.04),
        ("h100-80gb", "attention forward", 12, 0.075),
        ("h100-80gb", "attention backward", 12, 0.105),
    ],
)
def test_kernels_of_an_h100(device: str, op: str, count: int, limit: float) -> None:
    found = fit.hopper(device, op)
    assert len(found) == count
    assert fit.mape(fit.kernel_errors(found, silicon_of(device))) < limit


def test_fits_are_judged_on_what_they_left_out() -> None:
    """Constants fitted on all rows are those of the tables, and no half foretells the other twice as badly as itself
    and by more than a sixth."""
    found = list(fit.refit_hopper())
    assert {f.on for f in found if math.isnan(f.others)} == {"all"}
    for f in found:
        assert f.own < 0.11 and (math.isnan(f.others) or f.others < 0.17), f
    shares = {f.constants: float(f.found.split()[1]) for f in found if f.on == "all"}
    two, one = silicon_of("h100-96gb"), silicon_of("h100-80gb")
    assert list(shares.values()) == pytest.approx([two.sustained, one.sustained, *one.attention], abs=2e-3)


def test_layers() -> None:
    assert fit.mape(fit.layer_errors(silicon_of("a100-80gb"))) < 0.03
    forward, backward = fit.megatron_layer(silicon_of("a100-80gb"))
    published = fit.published_layer()
    assert published == (pytest.approx(7.7e-3), pytest.approx(11.9e-3))
    assert forward == pytest.approx(published[0], rel=0.15) and backward == pytest.approx(published[1], rel=0.2)


def test_collectives_of_a_node() -> None:
    measured = fit.Collectives()
    errors = measured.errors(LINKS["nvlink2"], fit.WAIT)
    assert measured.aligned.sum() == 1443 and len(errors) == 1818
    assert fit.mape(errors[measured.aligned]) < 0.08 and fit.mape(errors) < 0.1
    fabric = fit.Fabric.read()
    assert len(fabric.found) == 66
    assert fit.mape(fabric.errors(LINKS["nvlink3"], fit.FABRIC_WAIT)) < 0.085
