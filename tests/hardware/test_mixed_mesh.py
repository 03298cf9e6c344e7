"""Meshes of several kinds of hosts: their text, what they have together, and what each stage has."""

import math

import pytest

from autopart import Mesh, PartitionError
from autopart.cost.compute import peaks
from autopart.cost.training_state import Training
from autopart.cost.update_seconds import update_seconds
from autopart.hardware import DEVICES, LINKS
from autopart.hardware.mixed import of_stage, parts_of, peak_flops, view_of, views_of
from autopart.hardware.rows import DTYPES, Slowest

GOOD = {  # text: hosts, ranks, the link between hosts, the text str() gives back
    "2x8:a100-80gb+2x8:h100-80gb": (4, 32, "ib-hdr", "2x8:a100-80gb+2x8:h100-80gb"),
    "8:h100-80gb + 8:A100-80GB": (2, 16, "ib-hdr", "8:h100-80gb+8:a100-80gb"),
    "8:h100-80gb@ethernet+8:a100-80gb": (2, 16, "ethernet", "8:h100-80gb@ethernet+8:a100-80gb"),
    "8:b200+8:h100-80gb+16x8:b200": (18, 144, "ib-ndr", "8:b200+8:h100-80gb+16x8:b200"),
    "8:h100-80gb+3x8:h100-80gb": (4, 32, "ib-ndr", "4x8:h100-80gb"),
}

BAD = {  # text: what the error says
    "8:a100-80gb+4:h100-80gb": r"(?s)hosts of 8 and of 4 devices.*try: 4:a100-80gb\+4:h100-80gb",
    "8:a100-80gb+8:cpu": "cuda and cpu devices",
    "8:a100-80gb+": "the form is",
    "+8:a100-80gb": "the form is",
    "8:a100-80gb+8:h100": "unknown device",
}


@pytest.mark.parametrize("text", GOOD)
def test_good_text(text: str) -> None:
    hosts, size, inter, shown = GOOD[text]
    mesh = Mesh.of(text)
    assert (mesh.hosts, mesh.size, str(mesh)) == (hosts, size, shown)
    assert mesh.inter == LINKS[inter]
    assert Mesh.from_json(mesh.to_json()) == mesh == Mesh.parse(shown)
    assert peak_flops(mesh, "bfloat16") == sum(part.size * part.device.flops["bfloat16"] for part in parts_of(mesh))


@pytest.mark.parametrize("text", BAD)
def test_bad_text(text: str) -> None:
    with pytest.raises(PartitionError, match=BAD[text]):
        Mesh.of(text)


STAGES = {  # stages: the devices of each stage of 2 x 8 A100 + 1 x 8 H100 + 1 x 8 A100
    1: ["a100-80gb+h100-80gb"],
    2: ["a100-80gb", "a100-80gb+h100-80gb"],
    4: ["a100-80gb", "a100-80gb", "h100-80gb", "a100-80gb"],
    8: [*["a100-80gb"] * 4, *["h100-80gb"] * 2, *["a100-80gb"] * 2],
}


@pytest.mark.parametrize("stages", STAGES)
def test_stages_have_the_devices_of_their_ranks(stages: int) -> None:
    mesh = Mesh.parse("2x8:a100-80gb+8:h100-80gb+8:a100-80gb")
    views = [of_stage(mesh, stage, stages) for stage in range(stages)]
    assert [view.device.name for view in views] == STAGES[stages]
    for view in views:
        assert (view.size, view.hosts) == (mesh.size, mesh.hosts)
        assert view.intra.name == ("nvlink4" if view.device.name == "h100-80gb" else "nvlink3")
    assert len(set(views_of(mesh))) == len(views_of(mesh)) == 3
    one = Mesh.parse("4x8:a100-80gb")
    assert views_of(one) == (one,) and view_of(one, stages - 1, stages) == 0


def test_what_kinds_have_together() -> None:
    a100, h100 = DEVICES["a100-40gb"], DEVICES["h100-80gb"]
    device = Mesh.parse("8:a100-40gb+8:h100-80gb").device
    assert isinstance(device, Slowest) and device.kinds == (a100, h100)
    assert device.memory_bytes == a100.memory_bytes
    assert "float8" in h100.flops and "float8" not in device.flops
    assert math.isnan(peaks(device)[DTYPES.index("float8")]) and peaks(device)[-1] == math.inf
    training = Training("adamw", 1, Mesh.parse("8:h100-80gb").group(1, 8), 4)
    seconds = [update_seconds(1e9, True, True, training, each) for each in (a100, h100, device)]
    assert seconds[2] == max(seconds[:2]) > min(seconds[:2])
