"""The cost model's constants against published measurements of kernels and collectives.

Without arguments: the errors of the constants as frozen in `autopart/hardware`. With
`--fit`: fits them anew, cross-validates, and prints both side by side. Every fit minimises the mean relative error of
seconds; an error is predicted / measured - 1. The tables of `benchmarks/data` name the sources.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.collectives import COLLECTIVES, all_reduce_seconds, p2p_seconds
from autopart.cost.kernel_efficiency import attention_seconds, memory_seconds, product_bytes, product_seconds
from autopart.hardware import DEVICES, LINKS
from autopart.hardware.mesh import Group
from autopart.hardware.rows import Link, Silicon

DATA = Path(__file__).resolve().parents[1] / "data"
Floats = NDArray[np.float64]
MIB = float(2**20)
FAILED = 1e8
"""Milliseconds that stand for a collective that did not fit into memory."""

PCIE_BANDWIDTH = 1935e9
"""Bytes/s of the A100 80GB PCIe: NVIDIA A100 datasheet."""


def silicon_of(name: str) -> Silicon:
    """The constants of a device, which has them."""
    found = DEVICES[name].silicon
    assert found is not None
    return found


def rows(name: str) -> list[dict[str, str]]:
    """A table of `benchmarks/data`."""
    with open(DATA / name) as file:
        return list(csv.DictReader(file))


def minimum(f: Callable[[Floats], float], start: Sequence[float], turns: int = 400) -> Floats:
    """Where `f` of positive numbers is least, near `start`: the simplex method of Nelder and Mead (1965) on the
    logarithms, begun twice."""
    point = np.log(np.asarray(start, dtype=float))
    for spread in (0.25, 0.1):
        simplex = np.vstack([point, point + spread * np.eye(len(point))])
        values = np.array([f(np.exp(p)) for p in simplex])
        for _ in range(turns):
            order = np.argsort(values)
            simplex, values = simplex[order], values[order]
            middle = simplex[:-1].mean(0)
            tried = {step: middle + step * (middle - simplex[-1]) for step in (1.0, 2.0, -0.5, 0.5)}
            found = f(np.exp(tried[1.0]))
            step = 1.0
            if found < values[0]:
                step = 2.0
            elif found >= values[-2]:
                step = 0.5 if found < values[-1] else -0.5
            if step != 1.0:
                other = f(np.exp(tried[step]))
                step, found = (step, other) if other < found else (1.0, found)
            if found < values[-1]:
                simplex[-1], values[-1] = tried[step], found
            else:
                simplex[1:] = (simplex[1:] + simplex[0]) / 2
                values[1:] = [f(np.exp(p)) for p in simplex[1:]]
        point = simplex[np.argmin(values)]
    return np.exp(point)


def mape(errors: Floats) -> float:
    """Mean of absolute relative errors."""
    return float(np.abs(errors).mean()) if len(errors) else math.nan


# Products and attention: A100 80GB PCIe and B200


@dataclass(frozen=True)
class Products:
    """Measured products: sizes, bytes moved, seconds; `grouped` are those of experts, of one batch."""

    batch: Floats
    m: Floats
    n: Floats
    k: Floats
    nbytes: Floats
    seconds: Floats
    grouped: NDArray[np.bool_]

    def errors(self, silicon: Silicon, peak: float, bandwidth: float) -> Floats:
        """Relative errors of every row."""
        found = product_seconds(self.batch, self.m, self.n, self.k, self.nbytes, peak, bandwidth, silicon)
        return np.asarray(found / self.seconds - 1)


def _fields(text: str) -> dict[str, str]:
    return dict(part.strip().split("=") for part in text.split(","))


def products(hardware: str) -> Products:
    """The rows of `simumax_gemm_sdp_efficiency.csv`: seconds = FLOPs / (efficiency peak). A gradient that accumulates
    in float32 reads and writes 4 bytes an element of the result."""
    found = []
    for row in rows("simumax_gemm_sdp_efficiency.csv"):
        grouped = row["op"] == "group_matmul"
        if not row["hardware"].startswith(hardware) or not (grouped or row["op"] == "matmul"):
            continue
        f = _fields(row["shape"])
        if grouped:
            b, m, n, k = (float(f[name]) for name in ("ng", "M", "N", "K"))
            m, n, k = {"fwd": (m, n, k), "bwd_grad_act": (m, k, n), "bwd_grad_w": (n, k, m)}[f["stage"]]
            wide = f["stage"] == "bwd_grad_w"
        else:
            b, m, n, k = (float(f[name]) for name in "bmnk")
            wide = f["out_dtype"] == "fp32"
        result = (8 if f["accumulate"] == "True" else 4) if wide else 2
        nbytes = b * (2 * (m * k + k * n) + result * m * n)
        seconds = 2 * b * m * n * k / (float(row["efficiency"]) * float(row["peak_tflops"]) * 1e12)
        found.append((b, m, n, k, nbytes, seconds, grouped))
    b, m, n, k, nbytes, seconds, grouped = np.array(found, dtype=float).T
    return Products(b, m, n, k, nbytes, seconds, grouped.astype(bool))


def attention_errors(hardware: str, silicon: Silicon, peak: float, bandwidth: float, backward: bool) -> Floats:
    """Relative errors of causal attention. The source counts all pairs, as if nothing were masked."""
    errors = []
    for row in rows("simumax_gemm_sdp_efficiency.csv"):
        if not row["hardware"].startswith(hardware) or row["op"] != ("sdp_bwd" if backward else "sdp_fwd"):
            continue
        f = _fields(row["shape"])
        names = ("batch", "seq_len", "head_num", "kv_head_num", "qk_head_dim", "v_head_dim")
        b, s, h, kv, d, e = (float(f[name]) for name in names)
        flops = 2 * b * h * s * s * (d + e) * (2.5 if backward else 1)
        seconds = flops / (float(row["efficiency"]) * float(row["peak_tflops"]) * 1e12)
        nbytes = 2 * b * s * (h + kv) * (d + e) * (2 if backward else 1)
        found = attention_seconds(b, h, s, s, d, e, True, nbytes, peak, bandwidth, silicon, backward)
        errors.append(float(found / seconds - 1))
    return np.array(errors)


# Products and attention: H100


@dataclass(frozen=True)
class Kernel:
    """A row of `hopper_kernels.csv`: products, linear layers forward and backward, or fused attention in bfloat16."""

    source: str
    device: str
    op: str
    sizes: dict[str, float]
    seconds: float

    def predicted(self, silicon: Silicon) -> float:
        """Seconds by a device's constants."""
        device, f = DEVICES[self.device], self.sizes
        peak, band = device.flops["bfloat16"], device.bandwidth
        if self.op.startswith("attention"):
            b, h, s, d, back = f["b"], f["h"], f["s"], f["d"], self.op.endswith("backward")
            nbytes = 2 * 4 * b * s * h * d * (1 + back)
            return float(attention_seconds(b, h, s, s, d, d, f["causal"] > 0, nbytes, peak, band, silicon, back))
        m, k, n = f["m"], f["k"], f["n"]
        orders = ((m, n, k), (m, k, n), (k, n, m))[: 1 if self.op == "product" else 3]
        return sum(
            float(product_seconds(1, *order, product_bytes(1, *order, 2), peak, band, silicon)) for order in orders
        )


def hopper(device: str, op: str) -> list[Kernel]:
    """The rows of a device and an operator. FLOP/s count half of causal attention, and 2.5 times as many backward
    (Shah et al., arXiv 2407.08608, section 4.1)."""
    found = []
    for row in rows("hopper_kernels.csv"):
        if (row["device"], row["op"]) != (device, op):
            continue
        f = {name: float(size) for name, size in _fields(row["shape"]).items()}
        if row["seconds"]:
            seconds = float(row["seconds"])
        elif op == "product":
            seconds = 2 * f["m"] * f["k"] * f["n"] / float(row["tflops"]) / 1e12
        else:
            flops = 4 * f["b"] * f["h"] * f["s"] ** 2 * f["d"] * (2.5 if op.endswith("backward") else 1)
            seconds = flops / (1 + f["causal"]) / float(row["tflops"]) / 1e12
        found.append(Kernel(row["source_id"], device, op, f, seconds))
    return found


def kernel_errors(found: Sequence[Kernel], silicon: Silicon) -> Floats:
    """Relative errors of some rows."""
    return np.array([row.predicted(silicon) / row.seconds - 1 for row in found])


# Operators: V100 (Megatron-LM v2.4 in float16)


@dataclass(frozen=True)
class Kernels:
    """What an operator runs in one direction.

    products     (batch, m, n, k)
    moved        bytes of every kernel that streams
    reduced      bytes of every all-reduce, after each of which the host waits
    """

    products: tuple[tuple[float, ...], ...] = ()
    moved: tuple[float, ...] = ()
    reduced: tuple[float, ...] = ()


def kernels(
    name: str, batch: int, ways: int, algo: int, hidden: int, heads: int, vocab: int
) -> tuple[Kernels, Kernels]:
    """Forward and backward kernels of an operator of a GPT of 2048 tokens, as Megatron-LM v2.4 runs it and the source's
    `runtime/megatron/model/flex_ops.py` calls it; `ways` of tensor parallelism.

    Counted are bytes: a normalisation reads its input twice; causal softmax skips the upper triangle of what it reads;
    dropout writes a mask of one byte an element; bias, dropout and residual are three kernels forward, and a cast of
    the mask and a product backward; the head casts its logits to float32 and passes over them six times; an embedding's
    gradient is zeroed, then added into a main gradient. Row-parallel products reduce forward, column-parallel backward.
    """
    s, p = 2048, ways
    t = batch * s
    here, size = batch * (heads // p), hidden // heads
    n = t * hidden * 2.0
    scores = here * s * s * 2.0
    wide = t * 4 * hidden / p * 2.0
    logits = t * vocab / p
    both = (n,) if p > 1 else ()

    def linear(k: float, out: float) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
        return ((1, t, out, k),), ((1, t, k, out), (1, out, k, t))

    if name == "encoder-embedding":
        turned = (2 * n,) if batch > 1 else ()
        weight, places = vocab * hidden * 2.0 / p, s * hidden * 2.0
        masked = (2 * n,) if p > 1 else ()
        forward = Kernels((), (n, n, 3 * n, 2.5 * n, *turned, *masked), both)
        return forward, Kernels((), (2.5 * n, *turned, weight, n, 3 * weight, places, n, 3 * places))
    if "layernorm" in name:
        final = name == "final-layernorm"
        turned = (2 * n,) if final and batch > 1 else ()
        return Kernels((), (3 * n, *turned)), Kernels((), (2 * n, 5 * n) + (() if final else (3 * n,)))
    if name == "enc-attention-qkv" and algo == 0:
        ahead, back = linear(hidden, 3 * hidden / p)
        return Kernels(ahead, (6 * n / p,) + (2 * n / p,) * 3), Kernels(back, (6 * n / p, 3 * n / p), both)
    if name == "enc-attention-qkv":
        ahead, back = linear(hidden / p, 3 * hidden)
        return Kernels(ahead, (6 * n,) + (2 * n,) * 3, tuple(3 * x for x in both)), Kernels(back, (6 * n, 3 * n))
    if name == "enc-attention-score":
        product = (here, s, size, s)
        return Kernels(((here, s, s, size),)), Kernels((product, product), (2 * n / p, 2 * n / p))
    if name == "enc-attention-softmax":
        if here % 4:  # the fused kernel takes four matrices at a time; else cast, scale, mask, softmax and cast
            return Kernels((), tuple(x * scores for x in (3, 4, 4, 4, 3))), Kernels(
                (), tuple(x * scores for x in (3, 6, 8, 4, 3))
            )
        return Kernels((), (1.5 * scores,)), Kernels((), (2 * scores,))
    if name == "enc-attention-dropout":
        return Kernels((), (2.5 * scores,)), Kernels((), (2.5 * scores,))
    if name == "enc-attention-context":
        ahead = ((here, s, size, s),)
        return Kernels(ahead, (2 * n / p,)), Kernels(((here, s, s, size), *ahead), (2 * n / p,))
    if name == "enc-attention-dense":
        ahead, back = linear(hidden / p, hidden)
        return Kernels(ahead, (), both), Kernels(back)
    if name == "enc-MLP-GEMM-1":
        ahead, back = linear(hidden, 4 * hidden / p)
        return Kernels(ahead), Kernels(back, (), both)
    if name == "enc-MLP-gelu":
        return Kernels((), (2 * wide,)), Kernels((), (3 * wide, wide))
    if name == "enc-MLP-GEMM-2":
        ahead, back = linear(4 * hidden / p, hidden)
        return Kernels(ahead, (), both), Kernels(back)
    if name in ("enc-post-attention-dropout", "enc-post-MLP-dropout"):
        return Kernels((), (2 * n, 2.5 * n, 3 * n)), Kernels((), (1.5 * n, 3 * n))
    assert name == "gpt-post-process", name
    ahead, back = linear(hidden, vocab / p)
    passes = tuple(x * logits for x in (6, 4, 8, 8, 4, 8))
    small = (4.0 * t,) * 3 if p > 1 else ()
    return Kernels(ahead, passes, small), Kernels(back, (8 * logits, 6 * logits), both)


@dataclass(frozen=True)
class Host:
    """Seconds of the host in a measurement: of one call forward and backward, and of every kernel it launches. The
    calls run ahead of the device, except where they wait for a collective."""

    forward: float
    backward: float
    launch: float


PROFILER = Host(14e-6, 21e-6, 28e-6)
"""Of the operator profiles: fitted with the V100's constants, a property of the measurement."""


class Profile:
    """The rows of `aceso_v100_gpt_op_profile.csv`, forward then backward."""

    def __init__(self) -> None:
        table = rows("aceso_v100_gpt_op_profile.csv")
        run, seconds, names, models, ways = [], [], [], [], []
        for column, direction in enumerate(("forward", "backward")):
            for row in table:
                sizes = [int(row[c]) for c in ("micro_batch", "tp", "tp_algo", "hidden", "heads", "vocab")]
                run.append(kernels(row["op_name"], *sizes)[column])
                seconds.append(float(row[f"{direction}_compute"]) * 1e-6)
                names.append(row["op_name"])
                models.append(row["model"])
                ways.append(int(row["tp"]))
        self.measured = np.array(seconds)
        self.name, self.model, self.ways = np.array(names), np.array(models), np.array(ways)
        self.backward = np.arange(len(run)) >= len(table)
        self.owner = np.repeat(np.arange(len(run)), [len(k.products) for k in run])
        self.product = np.array([p for k in run for p in k.products]).T
        self.moved = np.array([sum(k.moved) for k in run])
        self.streams = np.array([len(k.moved) for k in run])
        self.count = np.array([len(k.products) + len(k.moved) + len(k.reduced) for k in run])
        self.waits = np.array([len(k.reduced) > 0 for k in run])
        intra = LINKS["nvlink2"]
        self.reduced = np.array(
            [
                sum(float(all_reduce_seconds(x, Group(p, p, intra, intra))) for x in k.reduced)
                for k, p in zip(run, self.ways.tolist(), strict=True)
            ]
        )
        # What the profiler itself adds, not the kernels: `final-layernorm` transposes its own input anew each time it
        # is repeated, so that its backward passes through all of them; the embedding is asked for token 0 alone, so
        # that its gradient adds every row into one; backward of the 350M model's gelu takes 0.93 ms at any size.
        odd = (self.name == "final-layernorm") | (self.name == "encoder-embedding")
        odd |= (self.name == "enc-MLP-gelu") & (self.model == "gpt-350M")
        self.sound = ~(odd & self.backward)

    def errors(self, silicon: Silicon, host: Host) -> Floats:
        """Relative errors of every row."""
        device = DEVICES["v100-32gb"]
        b, m, n, k = self.product
        each = product_seconds(
            b, m, n, k, product_bytes(b, m, n, k, 2), device.flops["float16"], device.bandwidth, silicon
        )
        found = np.bincount(self.owner, each, len(self.measured)) + self.reduced
        found += memory_seconds(self.moved, device.bandwidth, silicon, self.streams)
        waited = np.where(self.backward, host.backward, host.forward) + self.count * host.launch
        return np.where(self.waits, found + waited, np.maximum(found, waited)) / self.measured - 1


# Collectives


class Collectives:
    """The rows of `aceso_v100_collectives.csv` that ran.

    nbytes   as the functions of `autopart.cost.collectives` count them: the whole. The source counts a rank's part of
             an all-gather
    copied   bytes read and written by copies between lists of tensors and one buffer, one kernel a rank
    aligned  sizes that are whole KiB; the source's profiles hold some odd numbers of elements, which copy and exchange
             without vector instructions (UNALIGNED) and take up to 1.6 times as long
    """

    def __init__(self) -> None:
        sizes = _measured_sizes()
        found = []
        for row in rows("aceso_v100_collectives.csv"):
            milliseconds = float(row["time_ms_min"])
            if milliseconds < FAILED and row["collective"] in COLLECTIVES:
                nbytes = sizes.get(int(float(row["data_mb"])), float(row["data_mb"]) * MIB)
                found.append((row["collective"], int(row["gpus"]), nbytes, milliseconds * 1e-3))
        self.name = np.array([f[0] for f in found])
        self.ranks = np.array([f[1] for f in found])
        sent = np.array([f[2] for f in found])
        self.seconds = np.array([f[3] for f in found])
        self.nbytes = np.where(self.name == "all_gather", sent * self.ranks, sent)
        listed = np.isin(self.name, ("all_gather", "reduce_scatter"))
        self.copied = np.where(listed, 2 * self.nbytes, 0.0)
        self.launched = np.where(self.name == "all_reduce", 0, self.ranks)
        self.aligned = (sent % 1024 == 0) | (self.name == "all_reduce")

    def errors(self, link: Link, wait: float, unaligned: float | None = None) -> Floats:
        """Relative errors of every row; `wait` is the seconds that starting one and waiting for it takes the host,
        `unaligned` UNALIGNED or what stands for it."""
        device, silicon = DEVICES["v100-32gb"], silicon_of("v100-32gb")
        found = memory_seconds(self.copied, device.bandwidth, silicon, self.launched)
        for name, collective in COLLECTIVES.items():
            for p in (2, 4, 8):
                mine = (self.name == name) & (self.ranks == p)
                found[mine] += collective(self.nbytes[mine], Group(p, p, link, link))
        found = found / np.where(self.aligned, 1.0, UNALIGNED if unaligned is None else unaligned) + wait
        return np.asarray(found / self.seconds - 1)


def _measured_sizes() -> dict[int, float]:
    """Bytes measured for every number of whole MiB: the source takes the first tensor of so many in its own operator
    profiles, in the order it reads them."""
    table = rows("aceso_v100_gpt_op_profile.csv")
    order = {row["model"]: row["hidden"] for row in table}
    found: dict[int, float] = {}
    for model in sorted(order, key=lambda m: int(order[m])):
        mine = [row for row in table if row["model"] == model]
        mine.sort(key=lambda row: (int(row["micro_batch"]), int(row["tp"]), int(row["tp_algo"])))
        for row in mine:
            for column in ("activations", "output_size"):
                elements = int(float(row[column]) * MIB / 2)
                if elements:
                    found.setdefault(int(2 * elements / MIB), 2.0 * elements)
    return found


UNALIGNED = 0.71
"""Share of its rate that a collective of an odd number of elements reaches: fitted on the 375 rows of such. Of the
measurement alone: tensors of real models are whole vectors."""

WAIT = 65e-6
"""Seconds of the host in the collectives' profiles."""


@dataclass(frozen=True)
class Fabric:
    """Collectives of `galvatron_profiles.csv` within one host: (name, ranks, bytes, seconds)."""

    found: list[tuple[str, int, float, float]]

    @staticmethod
    def read() -> Fabric:
        names = {"allreduce": "all_reduce", "all2all": "all_to_all"}
        found = []
        for row in rows("galvatron_profiles.csv"):
            match = re.fullmatch(r"(\w+)_size_(\d+)_(\d+)MB_time", row["key"])
            if row["kind"] == "collective_time" and match:
                name, ranks, size = match.groups()
                found.append((names[name], int(ranks), int(size) * MIB, float(row["value"]) * 1e-3))
        return Fabric(found)

    def errors(self, link: Link, wait: float) -> Floats:
        """Relative errors of every row."""
        errors = [
            float(COLLECTIVES[name](size, Group(p, p, link, link)) + wait) / seconds - 1
            for name, p, size, seconds in self.found
        ]
        return np.array(errors)


# What no constant was fitted on: whole layers, and rings between hosts


def llama_layer(samples: int, silicon: Silicon) -> float:
    """Seconds of one Llama-7B layer forward on an A100-SXM in bfloat16, 2048 tokens a sample, fused attention."""
    device = DEVICES["a100-80gb"]
    peak, band = device.flops["bfloat16"], device.bandwidth
    t = samples * 2048
    n, wide = t * 4096 * 2.0, t * 11008 * 2.0
    shapes = ((3 * 4096, 4096), (4096, 4096), (2 * 11008, 4096), (4096, 11008))
    found = sum(
        float(product_seconds(1, t, o, k, product_bytes(1, t, o, k, 2), peak, band, silicon)) for o, k in shapes
    )
    found += float(attention_seconds(samples, 32, 2048, 2048, 128, 128, True, 4 * n, peak, band, silicon))
    # Two normalisations, splitting q, k and v, rotating q and k, two residuals, the gate and its product.
    moved = (3 * n, 3 * n, 6 * n, 2 * n, 2 * n, 3 * n, 3 * n, 3 * wide)
    return found + float(memory_seconds(sum(moved), band, silicon, len(moved)))


def layer_errors(silicon: Silicon) -> Floats:
    """Relative errors of `galvatron_profiles.csv`'s layers of 1 to 12 samples."""
    errors = []
    for row in rows("galvatron_profiles.csv"):
        match = re.fullmatch(r"layertype_0_bsz(\d+)_seq2048", row["key"])
        if row["kind"] == "fwd_time" and match:
            samples = int(match[1])
            errors.append(llama_layer(samples, silicon) / (samples * float(row["value"]) * 1e-3) - 1)
    return np.array(errors)


LAYER = (
    *(
        "enc-1st-layernorm",
        "enc-attention-qkv",
        "enc-attention-score",
        "enc-attention-softmax",
        "enc-attention-dropout",
    ),
    *("enc-attention-context", "enc-attention-dense", "enc-post-attention-dropout", "enc-2nd-layernorm"),
    *("enc-MLP-GEMM-1", "enc-MLP-gelu", "enc-MLP-GEMM-2", "enc-post-MLP-dropout"),
)


def megatron_layer(silicon: Silicon) -> tuple[float, float]:
    """Seconds forward and backward of one layer of the 22B GPT on 8 A100-SXM, 4 samples, nothing recomputed."""
    device, link = DEVICES["a100-80gb"], LINKS["nvlink3"]
    found = []
    for column in (0, 1):
        total = 0.0
        for name in LAYER:
            run = kernels(name, 4, 8, 0, 6144, 64, 51200)[column]
            for b, m, n, k in run.products:
                nbytes = product_bytes(b, m, n, k, 2)
                total += float(product_seconds(b, m, n, k, nbytes, device.flops["float16"], device.bandwidth, silicon))
            total += float(memory_seconds(sum(run.moved), device.bandwidth, silicon, len(run.moved)))
            total += sum(float(all_reduce_seconds(x, Group(8, 8, link, link))) for x in run.reduced)
        found.append(total)
    return found[0], found[1]


def published_layer() -> tuple[float, float]:
    """What `seqsel_2205.05198_layer_time_a100.csv` measured of that layer."""
    (row,) = (r for r in rows("seqsel_2205.05198_layer_time_a100.csv") if r["config"] == "baseline no recompute")
    return float(row["fwd_ms"]) * 1e-3, float(row["bwd_ms"]) * 1e-3


def rails() -> list[tuple[str, float]]:
    """Bytes/s that a host's NICs carry in rings over two hosts of eight, by group: the published bus bandwidth times
    the groups that share them. Equal numbers are what `Group.nics` assumes."""
    found = []
    for row in rows("galvatron_profiles.csv"):
        match = re.fullmatch(r"allreduce_size_(\d+)_consec_([01])", row["key"])
        if row["kind"] == "allreduce_busbw" and row["context"].startswith("2 nodes") and match:
            size, near = int(match[1]), match[2] == "1"
            if size == 16 or not near:
                found.append((f"{16 // size} groups of {size}", float(row["value"]) * 1e9 * (16 // size)))
    return found


# Fits


def fit_operators(profile: Profile, which: NDArray[np.bool_], turns: int) -> tuple[Silicon, Host]:
    """The V100's constants, those that stream, and the profiler's on the rows of `which`; no power limit shows."""

    def made(x: Floats) -> tuple[Silicon, Host]:
        own = replace(silicon_of("v100-32gb"), issue=x[0], sustained=x[0], memory=x[1], kernel_seconds=x[2])
        return own, Host(*x[3:])

    start = (0.8, 0.8, 3e-6, 15e-6, 25e-6, 25e-6)
    return made(minimum(lambda x: mape(profile.errors(*made(x))[which]), start, turns))


def fit_products(
    measured: Products, which: NDArray[np.bool_], base: Silicon, peak: float, bandwidth: float, own: bool, turns: int
) -> Silicon:
    """A device's two shares of the peak, and where `own` its ramp and feed too."""

    def made(x: Floats) -> Silicon:
        found = replace(base, issue=x[0], sustained=x[1])
        return replace(found, ramp=x[2], feed=x[3]) if own else found

    start = (0.8, base.sustained, base.ramp, base.feed)[: 4 if own else 2]
    return made(minimum(lambda x: mape(measured.errors(made(x), peak, bandwidth)[which]), start, turns))


def fit_attention(hardware: str, base: Silicon, peak: float, bandwidth: float) -> Silicon:
    """A device's two shares of fused attention."""
    found = []
    for backward in (False, True):

        def errors(x: Floats, backward: bool = backward) -> float:
            silicon = replace(base, attention=(x[0], x[0]))
            return mape(attention_errors(hardware, silicon, peak, bandwidth, backward))

        found.append(float(minimum(errors, (0.7,), 25)[0]))
    return replace(base, attention=(found[0], found[1]))


def fit_collectives(measured: Collectives, which: NDArray[np.bool_], turns: int) -> tuple[Link, float]:
    """The V100 node's shares and the profiler's wait."""

    def made(x: Floats) -> tuple[Link, float]:
        return replace(LINKS["nvlink2"], share=x[0], exchange=x[1]), x[2]

    return made(minimum(lambda x: mape(measured.errors(*made(x))[which]), (0.8, 0.3, 50e-6), turns))


def fit_unaligned(measured: Collectives, which: NDArray[np.bool_], turns: int) -> float:
    """UNALIGNED on some rows, with all else as frozen."""

    def error(x: Floats) -> float:
        return mape(measured.errors(LINKS["nvlink2"], WAIT, float(x[0]))[which])

    return float(minimum(error, (0.8,), turns)[0])


def fit_kernels(found: Sequence[Kernel], made: Callable[[float], Silicon], start: float) -> Silicon:
    """A device's constants of which one is fitted on some rows of `hopper_kernels.csv`."""
    return made(float(minimum(lambda x: mape(kernel_errors(found, made(float(x[0])))), (start,), 25)[0]))


def fit_fabric(measured: Fabric, which: NDArray[np.bool_], turns: int) -> tuple[Link, float]:
    """The A100 node's shares and its profiler's wait."""

    def made(x: Floats) -> tuple[Link, float]:
        return replace(LINKS["nvlink3"], share=x[0], exchange=x[1]), x[2]

    return made(minimum(lambda x: mape(measured.errors(*made(x))[which]), (0.75, 0.6, 50e-6), turns))


FABRIC_WAIT = 56e-6
"""Seconds of the host in `galvatron_profiles.csv`'s collectives."""

DATASETS = (
    ("A100", "a100-80gb-pcie", DEVICES["a100-80gb"].flops["bfloat16"], PCIE_BANDWIDTH),
    ("B200", "b200", DEVICES["b200"].flops["bfloat16"], DEVICES["b200"].bandwidth),
)
"""Hardware in the table of products, device here, peak FLOP/s, bytes/s."""


def line(label: str, errors: Floats) -> str:
    """One row of a table: number, mean and median of the absolute relative errors, their mean with sign."""
    if not len(errors):
        return f"  {label:32s}    no rows"
    middle, bias = float(np.median(np.abs(errors))), float(errors.mean())
    return f"  {label:32s} {len(errors):5d} rows  mean {mape(errors):6.1%}  median {middle:6.1%}  bias {bias:+6.1%}"


def report(profile: Profile, collectives: Collectives, fabric: Fabric) -> None:
    """Errors of the constants as frozen."""
    print("Operators, V100, float16 (aceso_v100_gpt_op_profile.csv)")
    e = profile.errors(silicon_of("v100-32gb"), PROFILER)
    print(line("all", e))
    print(line("all but what the profiler adds", e[profile.sound]))
    for direction, mine in (("forward", ~profile.backward), ("backward", profile.backward)):
        print(line(direction, e[mine & profile.sound]))
        for name in dict.fromkeys(profile.name.tolist()):
            both = mine & (profile.name == name)
            left = "" if profile.sound[both].all() else " *"
            print(line(f"  {name}{left}", e[both]))
    print("  * what the profiler adds: in no fit")

    for hardware, name, peak, band in DATASETS:
        print(f"Products and attention, {name}, bfloat16 (simumax_gemm_sdp_efficiency.csv)")
        measured, silicon = products(hardware), silicon_of(name)
        e = measured.errors(silicon, peak, band)
        print(line("products", e[~measured.grouped]))
        print(line("products of experts, in no fit", e[measured.grouped]))
        for label, backward in (("attention forward", False), ("attention backward", True)):
            print(line(label, attention_errors(hardware, silicon, peak, band, backward)))

    print("Products and attention, H100, bfloat16 (hopper_kernels.csv)")
    for name, op in (
        *(("h100-96gb", "product"), ("h100-96gb", "linear"), ("h100-80gb", "product")),
        *(("h100-80gb", "attention forward"), ("h100-80gb", "attention backward")),
    ):
        print(line(f"{op} {name}", kernel_errors(hopper(name, op), silicon_of(name))))

    print("Layers, in no fit (that the A100-SXM shows no power limit was chosen on the first)")
    print(line("Llama-7B forward, A100", layer_errors(silicon_of("a100-80gb"))))
    for label, found, published in zip(
        ("22B forward", "22B backward"), megatron_layer(silicon_of("a100-80gb")), published_layer(), strict=True
    ):
        print(f"  {label}, 8 A100: {found * 1e3:.1f} ms, measured {published * 1e3:.1f} ms (seqsel_2205.05198)")

    print("Collectives, 2 to 8 V100 (aceso_v100_collectives.csv)")
    e = collectives.errors(LINKS["nvlink2"], WAIT)
    print(line("all", e))
    print(line("sizes of whole KiB", e[collectives.aligned]))
    print(line("odd numbers of elements", e[~collectives.aligned]))
    for name in COLLECTIVES:
        for p in (2, 4, 8):
            mine = (collectives.name == name) & (collectives.ranks == p) & collectives.aligned
            if mine.any():
                print(line(f"  {name} of {p}", e[mine]))
    e = fabric.errors(LINKS["nvlink3"], FABRIC_WAIT)
    print("Collectives, 2 to 8 A100 (galvatron_profiles.csv)")
    for name in ("all_reduce", "all_to_all"):
        print(line(f"  {name}", e[[f[0] == name for f in fabric.found]]))
    print(line("all", e))
    print("Sends between two V100 of a host (aceso_v100_collectives.csv), in no fit")
    print(line("1 MiB to 1 GiB", _sends()))
    print("A host's NICs in rings over two hosts (galvatron_profiles.csv), GB/s, in no fit")
    print("  " + ", ".join(f"{label}: {rate / 1e9:.0f}" for label, rate in rails()))


def _sends() -> Floats:
    link = LINKS["nvlink2"]
    errors = []
    for row in rows("aceso_v100_collectives.csv"):
        if row["collective"] == "p2p_intra_node":
            found = float(p2p_seconds(float(row["data_mb"]) * MIB, link)) + WAIT / 2
            errors.append(found / (float(row["time_ms_min"]) * 1e-3) - 1)
    return np.array(errors)


def shown(silicon: Silicon) -> str:
    """What fits change of a device."""
    names = ("issue", "sustained", "ramp", "feed", "memory", "kernel_seconds")
    return ", ".join(f"{name} {getattr(silicon, name):.3g}" for name in names)


def shown_link(link: Link, wait: float) -> str:
    """What fits change of a link."""
    return f"share {link.share:.3f}, exchange {link.exchange:.3f}, host {wait * 1e6:.0f} us"


@dataclass(frozen=True)
class Fitted:
    """Constants fitted on some rows, and judged there and on those rows of the source that were left out.

    own, others   mean of the absolute relative errors; nan where nothing was left out
    """

    constants: str
    on: str
    own: float
    others: float
    found: str

    def __str__(self) -> str:
        others = "" if math.isnan(self.others) else f", the others {self.others:.1%}"
        return f"{self.constants}, fitted on {self.on}: {self.own:.1%}{others}; {self.found}"


def judged(constants: str, on: str, errors: Floats, own: NDArray[np.bool_], every: Any, found: str) -> Fitted:
    """What a fit on the rows of `own` says of `every` row that could have been taken."""
    return Fitted(constants, on, mape(errors[own]), mape(errors[every & ~own]), found)


def refits(profile: Profile, collectives: Collectives, fabric: Fabric, turns: int) -> Iterator[Fitted]:
    """Everything that is fitted: on all rows, and on parts of them, judged on the others."""
    small = np.isin(profile.model, ("gpt-1_3B", "gpt-13B"))
    for label, own in (("all", small | ~small), ("1.3B and 13B", small), ("350M, 2.6B and 6.7B", ~small)):
        silicon, host = fit_operators(profile, own & profile.sound, turns)
        text = f"{shown(silicon)}; host {host.forward:.1e}, {host.backward:.1e}, {host.launch:.1e} s"
        e = profile.errors(silicon, host)
        yield judged("operators of a V100", label, e, own & profile.sound, profile.sound, text)
    for hardware, name, peak, band in DATASETS:
        measured = products(hardware)
        plain = ~measured.grouped
        even = (np.cumsum(plain) // 3) % 2 == 0
        for label, own in (("all", plain), ("every other layer", plain & even), ("the rest", plain & ~even)):
            silicon = fit_products(measured, own, silicon_of(name), peak, band, hardware == "A100", turns)
            e = measured.errors(silicon, peak, band)
            text = f"experts {mape(e[~plain]):.1%}; {shown(silicon)}"
            yield judged(f"products of {name}", label, e, own, plain, text)
        found = fit_attention(hardware, silicon_of(name), peak, band).attention
        e = np.concatenate([attention_errors(hardware, silicon_of(name), peak, band, back) for back in (False, True)])
        text = f"attention {found[0]:.3f} forward, {found[1]:.3f} backward"
        yield judged(f"attention of {name}", "all", e, np.full(len(e), True), True, text)
    yield from refit_hopper()
    ok = collectives.aligned
    mib = np.round(collectives.nbytes / MIB).astype(int)
    for label, own in (
        ("all", ok),
        ("2 and 8 ranks", ok & (collectives.ranks != 4)),
        ("2 and 4 ranks", ok & (collectives.ranks != 8)),
        ("4 and 8 ranks", ok & (collectives.ranks != 2)),
        ("multiples of 2 MiB", ok & (mib % 2 == 0)),
        ("up to 100 MB", ok & (collectives.nbytes < 1e8)),
    ):
        link, wait = fit_collectives(collectives, own, turns)
        e = collectives.errors(link, wait)
        yield judged("collectives of V100", label, e, own, ok, shown_link(link, wait))
    for label, own in (("all", ~ok), ("multiples of 2 MiB", ~ok & (mib % 2 == 0)), ("the rest", ~ok & (mib % 2 == 1))):
        share = fit_unaligned(collectives, own, 25)
        e = collectives.errors(LINKS["nvlink2"], WAIT, share)
        yield judged("collectives of odd sizes", label, e, own, ~ok, f"unaligned {share:.2f}")
    ranks = np.array([f[1] for f in fabric.found])
    for label, own in (("all", ranks > 0), ("2 and 8 ranks", ranks != 4), ("2 and 4 ranks", ranks != 8)):
        link, wait = fit_fabric(fabric, own, turns)
        e = fabric.errors(link, wait)
        yield judged("collectives of A100", label, e, own, ranks > 0, shown_link(link, wait))


def refit_hopper() -> Iterator[Fitted]:
    """What is fitted on `hopper_kernels.csv`."""
    one, two = silicon_of("h100-80gb"), silicon_of("h100-96gb")
    forward, backward = (hopper("h100-80gb", f"attention {way}") for way in ("forward", "backward"))
    for constants, found, made, halves in (
        (
            "products of h100-96gb",
            hopper("h100-96gb", "product") + hopper("h100-96gb", "linear"),
            lambda x: replace(two, sustained=x),
            ("products alone", lambda k: k.op == "product", "layers, forward and backward"),
        ),
        (
            "products of h100-80gb",
            hopper("h100-80gb", "product"),
            lambda x: replace(one, sustained=x),
            ("k of 8192", lambda k: k.sizes["k"] == 8192, "the rest"),
        ),
        (
            "attention of h100-80gb forward",
            forward,
            lambda x: replace(one, attention=(x, x)),
            ("causal", lambda k: k.sizes["causal"] > 0, "the rest"),
        ),
        (
            "attention of h100-80gb backward",
            backward,
            lambda x: replace(one, attention=(x, x)),
            ("heads of 128", lambda k: k.sizes["d"] == 128, "heads of 64"),
        ),
    ):
        first, picks, second = halves
        mine = np.array([picks(kernel) for kernel in found])
        for label, own in (("all", mine | ~mine), (first, mine), (second, ~mine)):
            silicon = fit_kernels([k for k, taken in zip(found, own, strict=True) if taken], made, 0.5)
            e = kernel_errors(found, silicon)
            value = silicon.sustained if constants.startswith("products") else silicon.attention[0]
            yield judged(constants, label, e, own, True, f"share {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants anew and cross-validate")
    parser.add_argument("--turns", type=int, default=250, help="of each of a simplex's two rounds")
    arguments: Any = parser.parse_args()
    profile, collectives, fabric = Profile(), Collectives(), Fabric.read()
    if arguments.fit:
        for found in refits(profile, collectives, fabric, arguments.turns):
            print(found)
    report(profile, collectives, fabric)


if __name__ == "__main__":
    main()
