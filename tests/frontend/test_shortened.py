"""A trace of a model's first blocks says of the whole model what a trace of all its blocks says."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from models import WIDTH, WORDS, Batch, batch_for, build
from torch import Tensor, nn

import autopart
from autopart.errors import PartitionError
from autopart.frontend.layer_sampling import sampled_layers
from autopart.hardware.mesh import Mesh
from autopart.ir.layered_graph import LayeredGraph, used_parameters
from autopart.passes import source as source_module
from autopart.passes.source import Source

MESH = Mesh.of("4:cpu")
LAYERS = 5
TEXT = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 32, "use_cache": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def gemma() -> nn.Module:
    """Sliding windows in all layers but every third."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    settings = {**TEXT, "num_hidden_layers": 9, "head_dim": 8, "layer_types": kinds, "sliding_window": 4}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**settings))


def deepseek() -> nn.Module:
    """Two dense layers before those with experts."""
    sizes = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
             "topk_group": 1, "first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
             "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4}  # fmt: skip
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**{**TEXT, **sizes}))


def bart() -> nn.Module:
    """More layers in the encoder than in the decoder."""
    return hf.BartForConditionalGeneration(
        hf.BartConfig(d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS - 1, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=WORDS, dropout=0.1,
                      max_position_embeddings=32, use_cache=False)
    )  # fmt: skip


def mt5() -> nn.Module:
    return hf.MT5ForConditionalGeneration(
        hf.MT5Config(num_layers=LAYERS, d_model=WIDTH, num_heads=4, d_kv=8, vocab_size=WORDS, d_ff=64, use_cache=False,
                     decoder_start_token_id=0)
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (mixtral, gemma, deepseek, bart, mt5)
}  # fmt: skip


ALL = "AUTOPART_EXAMPLES" in os.environ
FEW = ["llama", "t5", "mixtral", "gemma", "deepseek", "bart"]
"""Families of every structure; the others are like Llama or T5 here."""
SEVERAL_BATCHES = {"llama": (16,), "t5": (4,), "mixtral": (4,)}
"""Other sizes of a micro-batch than two samples."""


def family(name: str) -> tuple[nn.Module, Batch]:
    """A model of that name with more layers than are traced, and a batch."""
    if name not in FAMILIES:
        return build(name, layers=LAYERS)
    torch.manual_seed(0)
    return FAMILIES[name]().train(), batch_for(name, torch.float32)


class Block(nn.Module):
    """A layer beside a sum."""

    def __init__(self, number: int, inner: int = 16) -> None:
        super().__init__()
        self.number, self.scale = number, 1.0
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(x)))


class Dropping(Block):
    """Draws twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x + F.dropout(super().forward(x), 0.1), 0.2)


class Stack(nn.Module):
    """Blocks in a row under a mean squared error."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.run(x)[:, :8], target)


class AllStates(Stack):
    """The mean of what all blocks give."""

    def run(self, x: Tensor) -> Tensor:
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return torch.stack(states).mean(0)


class LastStates(Stack):
    """What the last two blocks give."""

    def run(self, x: Tensor) -> Tensor:
        before = x
        for block in self.blocks:
            x, before = block(x), x
        return x + before


class Everywhere(Stack):
    """Every block reads the first one's output too."""

    def run(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        x = first
        for block in self.blocks[1:]:
            x = block(x + first)
        return x


class Skipping(Stack):
    """Runs two blocks of three."""

    def run(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i % 3 != 1:
                x = block(x)
        return x


class Told(Stack):
    """A list tells by place what comes behind each block; the last one is unlike the others."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.kinds = ["tanh", "relu"] * (len(blocks) // 2) + ["sigmoid"]
        for block, kind in zip(blocks, self.kinds, strict=True):
            block.kind = kind  # type: ignore[assignment]

    def run(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = getattr(torch, self.kinds[i])(block(x))
        return x


class Counted(Stack):
    """Runs as many blocks as there were at first."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.count = len(blocks)

    def run(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = self.blocks[i](x)
        return x


class Heads(Stack):
    """Has a list of heads besides, as many as its number says."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.count = 4
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(self.count))

    def run(self, x: Tensor) -> Tensor:
        x = super().run(x)
        return torch.stack([self.heads[i](x) for i in range(self.count)]).mean(0)


class Backward(Stack):
    """From the last block to the first."""

    def run(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class Twice(Stack):
    """All blocks, and all of them again."""

    def run(self, x: Tensor) -> Tensor:
        return super().run(super().run(x))


class Halfway(Stack):
    """Adds the first values again behind the block in the middle."""

    def run(self, x: Tensor) -> Tensor:
        first = x
        for number, block in enumerate(self.blocks):
            x = block(x) + first if number == len(self.blocks) // 2 else block(x)
        return x


class Idle(Stack):
    """Has blocks that it does not run."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.others = nn.ModuleList(Block(i) for i in range(9))


class Gated(Block):
    """Does something else in one block of five, which nothing but its number tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.number % 5 == 1 else 1.0)


class Parts(Stack):
    """Every block reads a part of its own of one tensor."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.parts = nn.Linear(WIDTH, 9 * WIDTH)

    def run(self, x: Tensor) -> Tensor:
        parts = self.parts(x).unflatten(-1, (9, WIDTH))
        for i, block in enumerate(self.blocks):
            x = block(x + parts[:, i])
        return x


class Masked(Block):
    """Has a buffer of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.register_buffer("mask", torch.arange(WIDTH) % 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.where(self.mask * 2 > 0, x, 0.5 * x))


class Normed(Block):
    """Counts the batches that it has seen."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class ByDepth(Block):
    """Scales by its depth, as a number that grows by two from block to block tells it and as a factor of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.depth, self.factor = 2 * number + 1, 0.8 - 0.6 * math.exp(-0.3 * number)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x) + x * math.sqrt(self.depth / (self.depth + 1))


class Drawn(Block):
    """Makes a constant of its own, whose values are drawn by the block's number."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.tensor(random.Random(self.number).sample(range(WIDTH), WIDTH))
        return super().forward(x) + x[:, order]


def alternating() -> nn.Module:
    blocks: list[nn.Module] = [Block(i) for i in range(12)]
    for block in blocks[::2]:
        block.scale = 0.5  # type: ignore[assignment]
    return Stack(blocks)


def shared() -> nn.Module:
    """One matrix in all blocks, which is the first one's."""
    blocks: list[nn.Module] = [Block(i) for i in range(7)]
    for block in blocks:
        block.up.weight = blocks[0].up.weight  # type: ignore[union-attr]
    return Stack(blocks)


def frozen() -> nn.Module:
    """The last three of nine blocks train."""
    model = Stack([Block(i) for i in range(9)])
    for block in model.blocks[:6]:
        block.requires_grad_(False)
    return model


def blocks(kind: Callable[[int], nn.Module] = Block, count: int = 9) -> list[nn.Module]:
    return [kind(i) for i in range(count)]


SHORT: dict[str, Callable[[], nn.Module]] = {
    "a stack": lambda: Stack(blocks()),
    "attributes in turns": alternating,
    "a shared matrix": shared,
    "the last two": lambda: LastStates(blocks()),
    "the first everywhere": lambda: Everywhere(blocks()),
    "others that do not run": lambda: Idle(blocks()),
    "a part each": lambda: Parts(blocks()),
    "a buffer each": lambda: Stack(blocks(Masked)),
    "a factor by depth": lambda: Stack(blocks(ByDepth)),
    "two of three": lambda: Skipping([Block(i, 24 if i % 3 == 1 else 16) for i in range(18)]),
    "frozen blocks": frozen,
    "another at the end": lambda: Stack([*blocks(), Block(9, 24)]),
    "kinds by place": lambda: Told(blocks(count=13)),
    "an odd number that draw": lambda: Stack([Dropping(i, 24 if i % 2 else 16) for i in range(15)]),
    "a constant each": lambda: Stack(blocks(Drawn)),
}
WHOLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "every block its width": (lambda: Stack([Block(i, 16 + i) for i in range(9)]), ""),
    "all states": (lambda: AllStates(blocks()), r"reads .* of blocks\.\d"),
    "a number": (lambda: Stack(blocks(Gated)), r"blocks\.3 reads aten.add.Tensor of elsewhere"),
    "a count": (lambda: Counted(blocks()), r"index \d is out of range"),
    "a batch norm each": (lambda: Stack(blocks(Normed)), r"the forward pass changes blocks\.0\.norm\.running_mean"),
    "halfway": (lambda: Halfway(blocks()), "the forward pass asks how many blocks there are"),
    "twice": (lambda: Twice(blocks()), r"blocks\.0 does part of the work of other blocks"),
    "backwards": (lambda: Backward(blocks()), "one after the other"),
}


class Asking(Block):
    """Multiplies by a number that depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sum().item()


class Branching(Block):
    """Does what depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Drawing(Block):
    """Draws from Python's random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (random.random() < 0.5)


class Turning(Block):
    """Has a backward of its own that is no derivative."""

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return -gradients[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.Turned.apply(super().forward(x))  # type: ignore[no-any-return]


class Mixing(Block):
    """Multiplies two dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x).double() @ self.down.weight.T


REFUSED = {
    Asking: "a number depends on data",
    Branching: "cannot trace the model",
    Drawing: "draws from Python's",
    Turning: "calls an autograd.Function",
    Mixing: "a product of",
}


def numbers() -> Batch:
    return batch_for("mlp", torch.float32)


def kinds(layered: LayeredGraph) -> list[int]:
    """The class of every position, counted as they come."""
    seen: dict[int, int] = {}
    return [seen.setdefault(layered.segments[run].segment_class, len(seen)) for run in layered.sequence]


def counts(layered: LayeredGraph) -> dict[str, int]:
    return {key: layered.count[node] for node, key in layered.keys.items()}


def names(layered: LayeredGraph) -> list[list[str]]:
    """The parameters that each position reads."""
    return [
        [layered.parameter_at(position, p) for p in used_parameters(layered.segments[run])]
        for position, run in enumerate(layered.sequence)
    ]


def sources(layered: LayeredGraph) -> list[object]:
    return [layered.sources(position) for position in range(len(layered.sequence))]


def both(model: nn.Module, batch: dict[str, Any]) -> tuple[LayeredGraph, LayeredGraph]:
    """The folded graph of a short and of a whole trace, found to say the same."""
    source = Source(model, batch, torch.float32)
    short, full = source.sampled(2, MESH), source.full(2, MESH)
    assert short.labels == full.labels
    assert kinds(short) == kinds(full)
    assert names(short) == names(full)
    assert counts(short) == counts(full)
    assert sources(short) == sources(full)
    assert short.parameters() == full.parameters() == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert short.operators == full.operators
    assert short.hash == full.hash
    return short, full


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "mt5", *FEW] if ALL else FEW)
def test_a_family_is_planned_from_its_first_layers_whatever_the_batch(name: str) -> None:
    model, batch = family(name)
    short, full = both(model, batch)
    assert len(short.segments) < len(full.segments) == len(full.sequence)
    assert not short.traced_in_full
    for samples in (4, 16) if ALL else SEVERAL_BATCHES.get(name, ()):
        larger = Source(model, batch, torch.float32).sampled(samples, MESH)
        assert larger.hash == full.hash
        assert counts(larger) == counts(full)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_blocks_that_do_the_same_stand_for_each_other(name: str) -> None:
    short, full = both(SHORT[name](), numbers())
    assert len(short.segments) < len(full.segments)
    assert not short.traced_in_full


@pytest.mark.parametrize("name", WHOLE)
def test_other_blocks_do_not_and_the_reason_is_told(name: str) -> None:
    make, why = WHOLE[name]
    short, full = both(make(), numbers())
    assert len(short.segments) == len(full.segments)
    assert bool(short.traced_in_full) == bool(why)
    assert re.search(why, short.traced_in_full), short.traced_in_full


@pytest.mark.parametrize("name", ["all states", "twice"])
def test_another_micro_batch_begins_with_the_blocks_that_stood_for_all(name: str) -> None:
    make, why = WHOLE[name]
    source, traces = Source(make(), numbers(), torch.float32), []
    own = source._traced
    with mock.patch.object(source, "_traced", lambda *args, **how: traces.append(args) or own(*args, **how)):
        first = source.sampled(2, MESH)
        before = len(traces)
        second = source.sampled(4, MESH)
    assert before > 1
    assert len(traces) == before + 1
    assert second.traced_in_full == first.traced_in_full
    assert re.search(why, second.traced_in_full)
    assert second.hash == first.hash


def test_lists_that_no_more_blocks_would_help_are_traced_in_full_at_once() -> None:
    class Taking(Twice):
        """Two lists of blocks in turns, all of them twice."""

        def __init__(self) -> None:
            super().__init__(blocks())
            self.others = nn.ModuleList(blocks())

        def run(self, x: Tensor) -> Tensor:
            for _ in range(2):
                for block in (*self.blocks, *self.others):
                    x = block(x)
            return x

    source, traces = Source(Taking(), numbers(), torch.float32), []
    own = source._traced
    with mock.patch.object(source, "_traced", lambda *args, **how: traces.append(args) or own(*args, **how)):
        told = source.sampled(2, MESH).traced_in_full
    assert len(traces) == 2
    assert re.findall(r"(\w+): blocks.0 does part of the work of other blocks", told) == ["blocks", "others"]


@pytest.mark.parametrize("kind", REFUSED)
def test_an_operator_that_is_refused_is_not_traced_in_more_blocks(kind: Callable[[int], nn.Module]) -> None:
    source, traces = Source(Stack(blocks(kind)), numbers(), torch.float32), []
    own = source._traced
    with (
        mock.patch.object(source, "_traced", lambda *args, **how: traces.append(args) or own(*args, **how)),
        pytest.raises(PartitionError, match=REFUSED[kind]),
    ):
        source.sampled(2, MESH)
    assert len(traces) == 1


@pytest.mark.slow
def test_a_list_that_is_needed_whole_keeps_no_other_from_being_shortened() -> None:
    short, full = both(Heads(blocks()), numbers())
    assert len(short.segments) < len(full.segments)
    assert short.traced_in_full.startswith("heads: torch.export cannot trace")


@pytest.mark.slow
def test_a_whole_trace_shows_what_a_short_one_could_not_see() -> None:
    source = Source(Stack([Gated(i + 1) for i in range(9)]), numbers(), torch.float32)
    short, full = source.sampled(2, MESH), source.full(2, MESH)
    assert len(short.segments) < len(full.segments)
    assert short.hash != full.hash


class Reading(Block):
    """Every sixth block reads a table that the model makes for these alone."""

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        return super().forward(x if table is None else x * table)


class Tabled(Stack):
    def __init__(self) -> None:
        super().__init__([Reading(i, 24 if i % 6 == 2 else 16) for i in range(48)])
        self.register_buffer("rates", torch.rand(WIDTH))

    def run(self, x: Tensor) -> Tensor:
        table = (self.rates * 2).sin().exp()
        for i, block in enumerate(self.blocks):
            x = block(x, table if i % 6 == 2 else None)
        return x


def test_a_stage_of_part_of_a_period_makes_what_its_own_blocks_read() -> None:
    plan = autopart.plan(Tabled(), "1x12:h100-80gb", numbers(), pp=12, micro_batch=1)  # else an AssertionError
    assert not any("traced" in note for note in plan.notes)


def test_the_model_itself_keeps_all_its_blocks() -> None:
    model = Stack(blocks())
    parameters = dict(model.named_parameters())
    Source(model, numbers(), torch.float32).sampled(2, MESH)
    assert len(model.blocks) == 9
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.slow
def test_a_hash_tells_models_apart() -> None:
    made = [Stack(blocks()), Stack(blocks(count=10)), Stack([Block(i, 24) for i in range(9)]), alternating()]
    found = {Source(model, numbers(), torch.float32).sampled(2, MESH).hash for model in made}
    assert len(found) == len(made)


@pytest.mark.parametrize(
    ("kinds_of_blocks", "kept"),
    [
        *[("aaaaaaaa", 2), ("baaaaaaa", 3), ("abababab", 4), ("ababababa", 5), ("aabaabaabaa", 8), ("bbaaaaaa", 4)],
        *[("aaaaaab", 3), ("babababaab", 6), ("aaaaaabaaaaa", 6), ("caaabaaabaaab", 8)],
    ],
)
def test_as_few_blocks_are_kept_as_show_every_kind_twice(kinds_of_blocks: str, kept: int) -> None:
    model = Stack([Block(i, 16 if kind == "a" else 24) for i, kind in enumerate(kinds_of_blocks)])
    (short,) = sampled_layers(model)
    assert short.kept == kept


def mixed(kinds_of_blocks: str) -> nn.Module:
    return Stack([Block(i, {"a": 16, "b": 24, "c": 32}[kind]) for i, kind in enumerate(kinds_of_blocks)])


@pytest.mark.parametrize("seed", range(12 if ALL else 3))
def test_blocks_of_mixed_kinds_stand_for_each_other(seed: int) -> None:
    rng = random.Random(seed)
    period = "".join(rng.choices("aaab", k=rng.randint(3, 8))) + "b"
    kinds_of_blocks = rng.choice(["", "c"]) + period * rng.randint(3, 5) + period[: rng.randint(0, len(period))]
    short, full = both(model := mixed(kinds_of_blocks), numbers())
    assert len(short.segments) <= sampled_layers(model)[0].kept + 2, kinds_of_blocks
    assert len(short.segments) < len(full.segments)
    assert not short.traced_in_full


class Twofold(Block):
    """Hands on a second value, which the next block adds."""

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        inner = torch.tanh(self.up(x if before is None else x + before))
        return x + self.down(inner), self.down(inner * inner)


class Handing(Stack):
    def run(self, x: Tensor) -> Tensor:
        more = None
        for block in self.blocks:
            x, more = block(x, more)
        return x


def test_blocks_of_mixed_kinds_that_hand_on_two_values_are_traced_by_periods() -> None:
    kinds = "aabaabaabaabaab"
    model = Handing([Twofold(i, 16 if kind == "a" else 24) for i, kind in enumerate(kinds)])
    short, full = both(model, numbers())
    assert sampled_layers(model)[0].kept < len(short.segments) < len(full.segments)


class Headed(Block):
    """Attention in front of the layer, both behind norms."""

    def __init__(self, number: int, inner: int = 16) -> None:
        super().__init__(number, inner)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(self.second(x))))


class Worded(nn.Module):
    """Blocks between an embedding and a head of the same matrix, of which two ranks cannot have half of the words."""

    def __init__(self, kinds_of_blocks: str) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(101, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 101)
        self.blocks = nn.ModuleList(Headed(i, 96 if kind == "a" else 64) for i, kind in enumerate(kinds_of_blocks))
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), input_ids.flatten())


@pytest.mark.parametrize("kinds_of_blocks", ["aab" * 4, "aaaaab" * 3])
def test_the_first_block_of_mixed_kinds_stands_for_itself(kinds_of_blocks: str) -> None:
    """Over tp it reshards what the embedding gives, which no other block reads."""
    model, batch = Worded(kinds_of_blocks), {"input_ids": torch.randint(0, 101, (12, 17))}
    plan = autopart.plan(model, "4:cpu", batch, tp=2, pp=2)  # else an AssertionError
    with mock.patch.object(source_module, "sampled_layers", lambda model: ()):
        whole = autopart.plan(model, "4:cpu", batch, tp=2, pp=2)
    assert plan.step_seconds == pytest.approx(whole.step_seconds, rel=1e-12)


@pytest.mark.parametrize("stages", [2, 4, 12])
def test_stages_of_mixed_kinds_are_planned_as_from_a_trace_of_every_block(stages: int) -> None:
    model = mixed("caab" + "aaab" * 5)
    settings = {"pp": stages, "micro_batch": 1, "zero": 0}
    plan = autopart.plan(model, "1x12:h100-80gb", numbers(), **settings)
    with mock.patch.object(source_module, "sampled_layers", lambda model: ()):
        whole = autopart.plan(model, "1x12:h100-80gb", numbers(), **settings)
    assert plan.step_seconds == pytest.approx(whole.step_seconds, rel=1e-12)
    assert [stage.memory for stage in plan.stages] == [stage.memory for stage in whole.stages]


@pytest.mark.slow
def test_equal_constants_are_one() -> None:
    """Every block makes tensors of Python's numbers: those of equal values do not keep blocks from being equal."""

    class Counting(nn.Module):
        def __init__(self, numbers: list[int]) -> None:
            super().__init__()
            self.line, self.numbers = nn.Linear(WIDTH, WIDTH), numbers

        def forward(self, x: Tensor) -> Tensor:
            return x + self.line(x) * torch.tensor(self.numbers, dtype=torch.float32)

    def layered(*kinds: list[int]) -> LayeredGraph:
        return Source(Stack([Counting(kind) for kind in kinds]), numbers(), torch.float32).sampled(2, MESH)

    ones, twos = [1] * WIDTH, [2] * WIDTH
    same, other = layered(*[ones] * 6), layered(*[ones, twos] * 3)
    assert same.traced_in_full == "" and len(same.traced.buffers) == 1 and len(same.segments) < 6
    assert len(other.traced.buffers) == 2
    assert len({same.hash, other.hash, layered(*[twos] * 6).hash}) == 3
