"""Recompute by minimum cut: the least that no product needs to run again from, and pieces that run once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import pytest
import torch
import transformers as hf
from models import build
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.compile.programs import programs
from autopart.compile.simulate import simulate_plan
from autopart.cost.liveness import MODES
from autopart.hardware.mesh import Mesh
from autopart.ir.graph import info
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.checkpoint_cut import is_product, is_view, mode_cut, pieces
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of
from autopart.planner.request import Request
from autopart.planner.search_space import SearchSpace
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import Groups
from autopart.runtime.recompute import recomputed, saved
from autopart.runtime.simulated import run_simulated

SELECTIVE, MINCUT = MODES.index("selective"), MODES.index("mincut")
LARGE = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=1024, n_head=16)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=2, num_key_value_heads=8)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(num_layers=2, decoder_start_token_id=0)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_hidden_layers=2)),
}


@cache
def large(name: str) -> Source:
    """A model at its published width, with a batch."""
    with torch.device("meta"):
        model = LARGE[name]()
        ids = torch.zeros(4, 256, dtype=torch.long)
    return Source(model, {"input_ids": ids, "labels": ids}, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("name", LARGE)
def test_it_saves_at_most_what_selective_does_and_runs_at_most_as_much_again(name: str, tp: int) -> None:
    """Of every block, under the planner's own splits for each of both modes."""
    layered = large(name).full(4, Mesh.parse("8:h100-80gb"))
    space = SearchSpace(layered, Mesh.parse(f"{tp}:h100-80gb"), Request(global_batch=4, tp=tp, micro_batch=4))
    (point,) = (p for p in space.points() if p.tp == tp)
    for mode in ("selective", "mincut"):
        solution = space.solve(point, 0.0, dict.fromkeys(space.model(point).blocks, mode))
        assert solution is not None
        costs = space.position_costs(point, solution.chosen)
        blocks = [is_block(label) for label in layered.labels]
        assert any(blocks)
        assert (costs.saved_bytes[MINCUT, blocks] <= costs.saved_bytes[SELECTIVE, blocks]).all()
        assert (costs.recompute_seconds[MINCUT, blocks] < costs.recompute_seconds[SELECTIVE, blocks]).all()


def blocks_of(layered: LayeredGraph) -> list[int]:
    return [i for i, segment in enumerate(layered.segments) if is_block(segment.label)]


class Gated(nn.Module):
    """Numbered layers whose products, sums and views leave several cuts; several pieces would read one of the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatedLayer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class GatedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.up(x) * torch.sigmoid(self.gate(x))
        folded = wide.unflatten(-1, (2, 8)).sum(-2)
        beside = folded + x
        return torch.tanh(self.down(folded)) + beside


def bytes_of(nodes: Sequence[fx.Node]) -> int:
    return sum(info(n).bytes for n in nodes)


@pytest.mark.parametrize("name", ["gated", "mlp"])
def test_no_other_cut_saves_less(name: str) -> None:
    """By enumeration of all sets of values: a set is a cut where no product runs again."""
    model, batch = (Gated(), {"x": torch.randn(4, 8)}) if name == "gated" else build("mlp")
    layered = Source(model, batch, torch.float32).full(4, Mesh.parse("1:cpu"))
    for segment in blocks_of(layered)[:1]:
        nodes = layered.segments[segment].nodes
        cut, values = mode_cut(layered, segment, "mincut"), [n for n in nodes if not is_view(n)]
        roots = {root for node in nodes for root in info(node).saves}

        def is_cut(saved: set[fx.Node], nodes: Sequence[fx.Node] = nodes, roots: set[str] = roots) -> bool:
            rerun: set[fx.Node] = set()
            for node in reversed(nodes):
                if node not in saved and (node.name in roots or any(user in rerun for user in node.users)):
                    rerun.add(node)
            return not any(map(is_product, rerun))

        assert is_cut(set(cut.saved)) and len(values) < 15
        several = itertools.chain.from_iterable(itertools.combinations(values, n) for n in range(len(values) + 1))
        assert bytes_of([*cut.saved]) == min(bytes_of(some) for some in several if is_cut(set(some)))


def test_what_runs_once_leads_to_one_end() -> None:
    layered = Source(Gated(), {"x": torch.randn(4, 8)}, torch.float32).full(4, Mesh.parse("1:cpu"))
    for segment in blocks_of(layered):
        nodes, cut = layered.segments[segment].nodes, mode_cut(layered, segment, "mincut")
        ends = pieces(nodes, cut.saved, cut.rerun)
        assert all(len(end) <= 1 for end in ends.values())
        assert not any(map(is_product, cut.rerun)) and not cut.saved & cut.rerun


class Products(TorchDispatchMode):
    """Counts the products that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += str(func.overloadpacket) in ("aten.mm", "aten.addmm", "aten.bmm")
        return func(*args, **(kwargs or {}))


def products_of_a_step(source: Source, plan: autopart.Plan) -> int:
    """How many products a step of a plan on one rank runs."""
    layered = source.full(plan.micro_batch, plan.mesh)
    (program,) = programs(layered, plan)

    def one(groups: Groups) -> int:
        compiled = Compiled(source.model, plan, groups, program, layered.traced.aliases, layered.traced.buffers)
        with Products() as products:
            compiled.step(source.batch)
        return products.count

    return run_simulated(1, 1, 1, one)[0]


@pytest.mark.parametrize("name", ["gated", "gpt2"])
def test_no_product_runs_again(name: str) -> None:
    torch.manual_seed(0)
    model, batch = (
        (Gated().double(), {"x": torch.randn(4, 8).double()}) if name == "gated" else build(name, torch.float64)
    )
    source = Source(model, batch, torch.float64)
    loss, gradients = one_process(model, batch)
    counts = {}
    for mode in ("none", "selective", "mincut"):
        plan = make_plan(source, Mesh.of("1:cpu"), request_of(model, batch, recompute=mode), to_run=True)
        counts[mode] = products_of_a_step(source, plan)
        found = simulate_plan(source, plan)
        assert torch.allclose(found.loss, loss, rtol=1e-12)
        assert worst_error(found.gradients, gradients)[0] < 1e-12
    assert counts["selective"] == counts["mincut"] == counts["none"] > 0


class Recurrent(nn.Module):
    """Numbered GRUs, whose cells change what products give in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x.square().mean()


@pytest.mark.parametrize("mode", MODES[1:])
def test_recurrent_cells_have_their_gradients(mode: str) -> None:
    torch.manual_seed(0)
    model, batch = Recurrent().double(), {"x": torch.randn(4, 5, 8).double()}
    loss, gradients = one_process(model, batch)
    found = simulate_plan(Source(model, batch, torch.float64), autopart.plan(model, "1:cpu", batch, recompute=mode))
    assert torch.allclose(found.loss, loss, rtol=1e-12)
    assert worst_error(found.gradients, gradients)[0] < 1e-12


class InPlace(nn.Module):
    """Changes what it has saved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = saved(lambda: x @ self.weight)
        return product.mul_(2).sin()


def test_a_saved_result_that_is_changed_in_place_is_no_silent_error() -> None:
    layer = InPlace()
    with pytest.raises(RuntimeError, match="changed in place"):
        recomputed(layer, torch.ones(2, 4, requires_grad=True)).sum().backward()
