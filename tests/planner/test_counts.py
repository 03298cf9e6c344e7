"""How many positions pay for a variable: counted one by one."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from models import build

from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.ilp_model import Model, is_partial
from autopart.planner.make_plan import request_of
from autopart.planner.search_space import SearchSpace


def counted(model: Model, i: int, j: int) -> list[int]:
    table, sizes, found = model.table, model.sizes, list[int]()

    def paying(places: Iterable[Iterable[int]]) -> int:
        return sum(any(i <= position < j for position in place) for place in places)

    for n, node in enumerate(table.nodes):
        if node.kind == "parameter":
            count = paying(table.state.get(n, ()))
        elif node.segment_class in table.segment_classes:
            count = table.segment_classes[i:j].count(node.segment_class)
        else:
            count = paying(table.shared.get(n, ()))
        found += [count] * len(node.options)
    for index, have, _ in sizes.reshards:
        used, places = table.value_uses[index], []
        for producer, dependents in zip(used.producers, used.dependents, strict=True):
            made = is_partial(have) and producer >= 0
            places.append([producer] if made else [position for each in dependents for position in each])
        found.append(paying(places))
    return [*found, *(paying(table.saved_tensors[index].places) for index, _ in sizes.saved_index)]


@pytest.mark.parametrize("name", ["mlp", "gpt2", "t5"])
def test_every_variable_is_paid_for_where_its_segments_stand(name: str) -> None:
    module, batch = build(name)
    mesh = Mesh.of("4:cpu")
    request = request_of(module, batch).check(mesh)
    space = SearchSpace(Source(module, batch, torch.float32).sampled(2, mesh), mesh, request)
    model = space.model(next(point for point in space.points() if point.tp == 2))
    last = len(model.table.labels)
    for i, j in ((0, last), (0, 1), (1, last // 2), (last // 2, last)):
        assert model.counts_in(i, j).tolist() == counted(model, i, j)
