"""Training runs that others published, as configurations of this project, and plans with them forced.

A row of `benchmarks/data` becomes a mesh of the device it names with that device's usual links, which are those of
every row so far (HDR for A100, 400 Gb/s for H100 and H200; the V100 are of one DGX-2), and degrees, ZeRO level,
recompute and micro-batch as they were. What this project cannot express is named in each row, and the nearest taken: a
context-parallel degree is made part of the tensor-parallel one.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from autopart import Mesh, PartitionError, Plan
from autopart.cli import models as models
from autopart.frontend.batch import DTYPES
from autopart.kernels.table import KERNELS, STEP
from autopart.passes.fuse_dropout import RESIDUAL
from autopart.passes.randomness import FUSED
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan
from autopart.planner.request import Request, read_constraints

DATA = Path(__file__).resolve().parents[1] / "data"
DEVICES = (
    ("DGX-2", "v100-32gb-dgx2"),
    ("A100 (DGX-A100)", "a100-40gb"),
    ("A100", "a100-80gb"),
    ("H100-96GB", "h100-96gb"),
    ("H200", "h200"),
)
"""What hardware is called in the rows -> a device of the tables. The DGX-A100 of January 2021, whose memory is not
named, is taken for that of 40 GB a device: its batch, twice that of the V100's 32 GB, is about as much as fits."""

Row = Mapping[str, str]

OURS = tuple(name for name in (*KERNELS, FUSED, RESIDUAL, STEP) if name != "rms_norm")
"""Kernels that the systems of published runs do not have."""


@dataclass(frozen=True)
class Published:
    """One published configuration in this project's terms.

    model        a named size, or what the row calls it, which `config` then describes as transformers does
    words        of the vocabulary
    precision    of parameters and states: the row's of computing, bfloat16 for 8 bits
    forced       degrees, ZeRO level and recompute
    micro_batch  theirs, over all ranks
    pieces       of a stage, interleaved; 1 where stages are whole
    even         whether every stage has as many blocks
    cuts         the first block of every stage but the first, where that is known
    master       dtype of what adds up, where a sharded run is known to have added up in it
    unfused      whether attention was of several kernels, with dropout
    eager        whether RMSNorm was of several kernels
    replicated   whether what is between tensor-parallel products was of the whole sequence on every rank
    width        of what blocks pass on
    again        elements a token of a block's products that selective recompute did not keep
    freed        elements a token that a block's forward makes at most and frees
    logits       float32 tensors of a micro-batch's logits that a rank had room for; None where it is not known
    widest       bytes an element of the widest of the logits' tensors
    gathered     bytes an element of blocks' parameters as FSDP gathers them
    after        whether gradients were summed over dp after the backward, not beside it
    overlapped   whether backward hid tensor parallelism's collectives and added weight gradients up in their products
    measured     seconds of a step as published; None where it is not
    memory       GiB of the fullest device as published; None where it is not
    out          whether it was published as out of memory
    left_out     what they did that cannot be expressed here, or is different here
    apart        that of it which makes the row another computation
    skipped      why there is no such plan
    """

    name: str
    model: str
    config: Mapping[str, Any] = field(repr=False)
    sequence: int
    words: int
    mesh: str
    precision: str
    global_batch: int
    forced: Mapping[str, Any]
    micro_batch: int
    pieces: int
    even: bool
    cuts: tuple[int, ...]
    master: str | None
    unfused: bool
    eager: bool
    replicated: bool
    width: int
    again: int
    freed: int
    logits: float | None
    widest: int
    gathered: int
    after: bool
    overlapped: bool
    measured: float | None
    memory: float | None
    out: bool
    left_out: tuple[str, ...]
    apart: tuple[str, ...]
    skipped: str = ""

    @property
    def besides(self) -> tuple[str, ...]:
        """What is left out where the model is not traced as it was run."""
        fused = ("attention of several kernels, here of one",) if self.unfused else ()
        norms = ("no sequence parallelism, here where it pays",) if self.replicated else ()
        kept = ("selective runs every second product too again, here all but products",) if self.again else ()
        summed = ("gradients summed after the backward, here beside it",) if self.after else ()
        return (*self.left_out, *fused, *norms, *kept, *summed)


def read(file: str) -> Iterator[Published]:
    """The rows of a table of `benchmarks/data`."""
    with (DATA / file).open() as lines:
        for number, row in enumerate(csv.DictReader(lines), 1):
            yield published(row, f"{row['source_id']}:{number}")


def published(row: Row, name: str) -> Published:
    """One row in this project's terms."""
    count, per_host = int(row["num_gpus"]), int(row["gpus_per_node"])
    hosts, each = max(1, count // per_host), min(count, per_host)
    device = next(device for key, device in DEVICES if key in row["hardware"])
    tp, pp, dp, cp = (whole(row[k], 1) for k in ("tp", "pp", "dp", "cp"))
    model, config = model_of(row)
    return Published(
        name=name,
        model=model,
        config=config,
        sequence=int(row["seq_len"]),
        words=whole(row["vocab"], 0),
        mesh=f"{hosts}x{each}:{device}",
        precision="float16" if row["dtype"] == "fp16" else "bfloat16",
        global_batch=whole(row["global_batch"], 0),
        forced={"pp": pp, "dp": dp, "tp": tp * cp, "zero": whole(row["zero"], 0), "recompute": recompute_of(row)},
        micro_batch=whole(row["micro_batch"], 1) * dp,
        pieces=whole(row["vpp"], 1),
        even=pp > 1 and int(row["layers"]) % pp == 0,
        cuts=cuts_of(row) if row["arch"] == "llama" else (),
        master="float32" if row["arch"] == "llama" else None,
        unfused=row["arch"] == "gpt",
        eager=row["arch"] == "llama" and not compiled(row),
        replicated=row["arch"] == "gpt" and row["sp"] != "1" and tp > 1,
        width=whole(row["hidden"], 0),
        again=second_products(row) if row["arch"] == "llama" and recompute_of(row) == "selective" else 0,
        freed=freed_of(row) if row["arch"] == "llama" else 0,
        logits=logits_of(row) if row["arch"] == "llama" else None,
        widest=2 if fused_loss(row) else 4,
        gathered=1 if gathered_in_8_bits(row) else 2,
        after=row["arch"] == "gpt",
        overlapped=overlapped(row),
        measured=measured_seconds(row),
        memory=float(row["metric_mem_gb"]) if row["metric_mem_gb"] else None,
        out="out of memory" in row["notes"].lower(),
        left_out=tuple(left_out(row)),
        apart=tuple(apart(row)),
        skipped=next(reasons(row), ""),
    )


def several_kernels(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention as Megatron-LM ran it before there were fused ones: two batched products with the scores in memory
    between them, a kernel that scales, masks and takes the softmax, which moves what a softmax alone does (Narayanan et
    al., arXiv 2104.04473, section 4.2), and dropout. The mask is left out: no time depends on it."""
    scores = torch.softmax(torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3)), -1)
    scores = F.dropout(scores, settings.get("dropout", 0.0), module.training)
    return torch.matmul(scores, value).transpose(1, 2).contiguous(), None


class SeveralKernels(nn.Module):
    """RMSNorm as torchtitan runs it outside of torch.compile: casts, a square, a mean, and products, each a kernel.
    The square is a product here, which `autopart.passes.fuse` does not take for its own kernel's."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> (..., width)."""
        wide = x.float()
        normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def eagerly(model: nn.Module) -> None:
    """Put SeveralKernels in place of every RMSNorm of a Llama."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SeveralKernels(module))


def whole(text: str, default: int) -> int:
    """A number out of a cell: 51200 of "51200?", 1 of "1 (pp microbatch; local batch 32)"."""
    return int("".join(c for c in text.partition("(")[0] if c.isdigit()) or default)


def model_of(row: Row) -> tuple[str, Mapping[str, Any]]:
    """A model's name in the table of sizes: GPT-1.7B is gpt-1.7b, Llama-3.1-8B is llama-3-8b. A GPT that is not there
    is a config of GPT-2's architecture, as those there are, with the row's sizes."""
    name = row["model"].lower().replace("llama-3.1", "llama-3")
    if name in models.SIZES:
        return name, {}
    assert row["arch"] == "gpt", name
    sizes = {
        "n_layer": "layers",
        "n_embd": "hidden",
        "n_head": "heads",
        "n_positions": "seq_len",
        "vocab_size": "vocab",
    }
    return name, {"model_type": "gpt2", **{ours: whole(row[theirs], 0) for ours, theirs in sizes.items()}}


def compiled(row: Row) -> bool:
    """Whether blocks ran under torch.compile: the page of the H200 says so in its command."""
    return "compile" in row["notes"] or row["source_id"] == "torchtitan_h200"


def overlapped(row: Row) -> bool:
    """`Published.overlapped`: Megatron-LM of 2022, whose linear layers all-reduce or gather beside the product that
    gives the weight's gradient, by which recompute takes 39 % there and not a third (Korthikanti et al., arXiv
    2205.05198, table 4), and add to the float32 sum in that product (NVIDIA/apex, fused_weight_gradient_mlp_cuda)."""
    return row["source_id"].startswith("seqsel")


def cuts_of(row: Row) -> tuple[int, ...]:
    """`Published.cuts` of torchtitan: as many blocks in every stage, and those left over one each from the second stage
    on (`generate_split_points`, pipelining_utils.py at 9dec370)."""
    each, left = divmod(int(row["layers"]), stages := whole(row["pp"], 1))
    return tuple(n * each + min(n - 1, left) for n in range(1, stages))


def second_products(row: Row) -> int:
    """Elements a token of the outputs of every second product of a Llama's block: k, o and up (torchtitan's policy of
    selective checkpointing at 9dec370, parallelize_llama.py). The last one's, down, is kept by a policy but read by no
    backward: torch.compile, which cuts the graph of both passes, leaves it out (torch/_functorch/partitioners.py)."""
    width = int(row["hidden"])
    second = width // int(row["heads"]) * int(row["kv_heads"]) + width + int(row["ffn"])
    return second + width if compiled(row) else second


def freed_of(row: Row) -> int:
    """`Published.freed` of a Llama's block, by whichever of its moments takes most, a rank's own tokens counted.

    The feed-forward makes silu(gate), up and their product; one kernel makes it where compiled, and reads gate, which
    may be kept. Tensor parallelism gathers the whole input. Its collectives along the sequence, which is not the first
    dim, copy: what is gathered, after which one copy is left, and what is scattered, the whole output
    (torch/distributed/_functional_collectives.py); asynchronous ones copy what the product before a scatter reads
    (torch/distributed/_symmetric_memory). Besides, the stream and the normalised input are there.
    """
    width, inner, tp = (whole(row[k], 1) for k in ("hidden", "ffn", "tp"))
    moments = [(2 if compiled(row) and recompute_of(row) == "selective" else 3) * inner]
    if tp > 1:
        moments += [width * tp + 2 * inner, width * tp + inner + (inner if asynchronous(row) else width * tp)]
    return max(moments) + 2 * width


def asynchronous(row: Row) -> bool:
    """Whether tensor parallelism ran beside its products."""
    return "async" in row["notes"].lower()


def logits_of(row: Row) -> float:
    """`Published.logits` of torchtitan. Its loss of December 2024 is eager (pytorch/pytorch #143774): the logarithms of
    the softmax, the gradient of those and of the logits; split over tensor parallelism, one more
    (torch/distributed/tensor/parallel/loss.py). The bfloat16 logits were freed by then, but none of these fits into
    their room, half of theirs, which stays reserved. Compiled, as in the runs on H200 of 2025, it keeps the bfloat16
    logits and their gradient alone."""
    if fused_loss(row):
        return 1.0
    return 4.5 if whole(row["tp"], 1) > 1 else 3.5


def fused_loss(row: Row) -> bool:
    """Whether the loss was compiled, as --training.compile does in 2025: it makes no float32 tensor of the logits."""
    return row["source_id"] == "torchtitan_h200"


def gathered_in_8_bits(row: Row) -> bool:
    """Whether FSDP gathered the blocks' parameters in 8 bits: the command of the runs on H200 has
    --float8.enable_fsdp_float8_all_gather; those of December 2024 are not published."""
    return row["source_id"] == "torchtitan_h200"


def recompute_of(row: Row) -> str:
    """What all blocks do; "selective(per-op)" is what is called selective here."""
    return row["recompute"].partition("(")[0] or "none"


def reasons(row: Row) -> Iterator[str]:
    """Why a row has no plan."""
    if not row["global_batch"]:
        yield "the batch is not published"
    tp, pp, dp, cp = (whole(row[k], 1) for k in ("tp", "pp", "dp", "cp"))
    if pp * dp * tp * cp != int(row["num_gpus"]):
        yield f"pp {pp} x dp {dp} x tp {tp} x cp {cp} is not {row['num_gpus']} devices"


def apart(row: Row) -> Iterator[str]:
    """What a row did that makes it another computation than the plan that stands for it."""
    if whole(row["cp"], 1) > 1:
        yield f"cp {row['cp']} made part of tp"
    if row["dtype"].startswith("float8"):
        yield f"{row['dtype']}, here bf16"
    if asynchronous(row):
        yield "async TP"


def left_out(row: Row) -> Iterator[str]:
    """What a row did that is not in the plan that stands for it. Megatron-LM's selective recompute is of attention
    (Korthikanti et al., arXiv 2205.05198, section 5)."""
    if whole(row["vpp"], 1) > 1:
        yield f"{row['vpp']} interleaved pieces a stage"
    elif "interleaved" in row["schedule"]:
        yield "interleaved schedule"
    yield from apart(row)
    if row["dtype"] in ("fp16", "bf16") and row["arch"] == "gpt":
        yield f"fp32 states, here {row['dtype']}"
    if recompute_of(row) == "selective" and row["arch"] == "gpt":
        yield "selective runs attention alone again, here all but products"
    if row["sp"] != "1" and whole(row["tp"], 1) > 1 and row["arch"] != "gpt":
        yield "no sequence parallelism, here where it pays"
    if "compile" in row["notes"]:
        yield "torch.compile"
    if row["hardware"].startswith("A100 "):
        yield "40 or 80 GB not named, here 40"


def measured_seconds(row: Row) -> float | None:
    """Seconds of a step: as they are, from tokens/s, or from TFLOP/s by the formula they were counted with (Narayanan
    et al., arXiv 2104.04473, equation 3). None where nothing of it is published."""
    if row["metric_iter_s"]:
        return float(row["metric_iter_s"])
    batch, length, count = whole(row["global_batch"], 0), int(row["seq_len"]), int(row["num_gpus"])
    if row["metric_tokens_s_gpu"]:
        return batch * length / (float(row["metric_tokens_s_gpu"]) * count)
    if not row["metric_tflops_per_gpu"]:
        return None
    layers, width, words = int(row["layers"]), int(row["hidden"]), int(row["vocab"])
    flops = 96 * batch * length * layers * width**2 * (1 + length / 6 / width + words / 16 / layers / width)
    return flops / (float(row["metric_tflops_per_gpu"]) * 1e12 * count)


@dataclass
class Bench:
    """Plans, each made once: rows that differ only in what is left out here share them. `as_run` says whether the model
    is traced with the attention and the dropout that its authors ran, and its gradients summed when theirs were; else
    with what is fastest today."""

    time_limit: float | None = None
    as_run: bool = False
    sources: dict[tuple[str, int, int, str, bool], Source] = field(default_factory=dict)
    plans: dict[str, tuple[Plan, float] | Exception] = field(default_factory=dict)

    def source(self, row: Published) -> Source:
        """The traced model of a row; a batch of one is traced for itself."""
        eager = self.as_run and row.eager
        key = row.model, row.sequence, min(2, row.global_batch), row.precision, eager
        if key not in self.sources:
            with TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(row.config))
                spec = folder if row.config else row.model
                unfused = self.as_run and row.unfused
                model, batch = models.load(spec, key[2], row.sequence, meta=True, dropout=unfused)
                if unfused:
                    for block in model.transformer.h:
                        block.mlp.act = nn.GELU(approximate="tanh")
                    AttentionInterface.register("several_kernels", several_kernels)
                    model.set_attn_implementation("several_kernels")
                if eager:
                    eagerly(model)
            self.sources[key] = Source(model, batch, DTYPES[row.precision], OURS)
        return self.sources[key]

    def mesh(self, row: Published) -> Mesh:
        """The mesh of a row; as it was run, Megatron-LM's DDP of 2021 and 2022 all-reduces gradients after the last
        backward (`allreduce_gradients` of its megatron/model/distributed.py, called by megatron/training.py)."""
        mesh = Mesh.parse(row.mesh)
        return replace(mesh, device=replace(mesh.device, overlap=0.0)) if self.as_run and row.after else mesh

    def plan(self, row: Published, constraints: Sequence[str] = (), **settings: Any) -> tuple[Plan, float]:
        """The plan of a row under some settings, and the CPU seconds of its search. Raises PartitionError, and
        AssertionError where the planner contradicts itself."""
        ran = self.as_run and [row.eager, row.after]
        what = [row.model, row.sequence, row.mesh, row.precision, row.global_batch, ran, list(constraints), settings]
        key = json.dumps(what, sort_keys=True)
        if key not in self.plans:
            try:
                self.plans[key] = self._search(row, constraints, settings)
            except (PartitionError, AssertionError) as error:
                self.plans[key] = error
        found = self.plans[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _search(self, row: Published, constraints: Sequence[str], settings: Mapping[str, Any]) -> tuple[Plan, float]:
        request = Request(
            row.global_batch,
            precision=row.precision,
            time_limit=self.time_limit,
            constraints=read_constraints(constraints),
            **settings,
        )
        source, mesh = self.source(row), self.mesh(row)
        source.sampled(min(2, row.global_batch), mesh)
        started = time.process_time()
        try:
            plan = make_plan(source, mesh, request)
        except AssertionError as error:
            taken = time.process_time() - started
            raise AssertionError(f"{error} (under {dict(settings) or 'no settings'}, after {taken:.1f} s)") from error
        return plan, time.process_time() - started
