"""Bytes that two hosts send each other in a step, counted at their network cards, against those that plans foretell.

Two network namespaces of this machine are the hosts, a pair of virtual Ethernet cards is the network between them, and
torchrun starts the ranks of each (`--nnodes 2`), over gloo. Cards count the bytes and the packets that they send. Every
packet is of IPv4 and TCP with timestamps, and has HEADER bytes in front of its payload:

    payload = bytes - HEADER x packets

Acknowledgements are packets without payload. A card counts a large send that it would cut into packets later as one,
with one header, in both numbers. What else is sent between the counts, besides the step, is the loss and the watchdog's
heartbeats, of a few hundred bytes.

    python -m benchmarks.runtime.two_nodes        # as root: namespaces are made, and removed in the end
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import autopart

HEADER = 14 + 20 + 20 + 12
"""Bytes of a packet's Ethernet, IPv4 and TCP headers, and of TCP's option of timestamps."""

WORDS, WIDTH, HEADS, BLOCKS, TOKENS, SAMPLES = 1024, 192, 4, 4, 64, 8
STEPS, RANKS = 3, 2
"""Steps that are counted, and ranks of a host."""

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"dp=4, ZeRO {zero}": {"dp": 4, "zero": zero, "micro_batch": 4} for zero in range(4)},
    "dp=4, ZeRO 2, master": {"dp": 4, "zero": 2, "micro_batch": 4, "precision": "float32", "master": "float64"},
    "dp=2, tp=2": {"dp": 2, "tp": 2, "micro_batch": 4, "constraints": ["split *.up.weight dim 0 over tp"]},
    "tp=4": {"tp": 4, "micro_batch": 4, "constraints": ["split *.up.weight dim 0 over tp"]},
    "tp=4, recompute full": {
        "tp": 4, "micro_batch": 4, "recompute": "full", "constraints": ["split *.up.weight dim 0 over tp"],
    },
    "pp=2, dp=2": {"pp": 2, "dp": 2, "micro_batch": 2, "zero": 1},
    "pp=4": {"pp": 4, "micro_batch": 2},
    "dp=4, ZeRO 2, offload": {"dp": 4, "zero": 2, "micro_batch": 4, "offload": "optimizer"},
}  # fmt: skip
"""By name: what is asked of the planner."""


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: (samples, tokens, width)."""
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Words(nn.Module):
    """A language model whose head is its embedding, so that the first and the last stage share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of the next token. ids: (samples, tokens)."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# ---- two hosts -----------------------------------------------------------------------------------------------


def can_make_hosts() -> bool:
    """Whether this process may make network namespaces."""
    name = f"autopart-try-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
    return made and subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False).returncode == 0


@contextmanager
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces with a network between them: (namespace, card, address) of each. They are removed in the end."""
    number = os.getpid()
    found = [(f"autopart-{number}-{i}", f"ap{number % 10**9}{'ab'[i]}", f"10.213.0.{i + 1}") for i in range(2)]
    with ExitStack() as stack:
        for space, _, _ in found:
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "delete", space)
        (one, card, _), (other, peer, _) = found
        _ip("link", "add", card, "netns", one, "type", "veth", "peer", "name", peer, "netns", other)
        for space, name, address in found:
            _ip("-n", space, "address", "add", f"{address}/24", "dev", name)
            for device in ("lo", name):
                _ip("-n", space, "link", "set", device, "up")
        yield found


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def counted(names: Sequence[str]) -> list[dict[str, Any]]:
    """Start the ranks on two hosts; the rows of these settings."""
    with hosts() as spaces, tempfile.TemporaryDirectory() as folder:
        running = []
        for number, (space, card, _) in enumerate(spaces):
            torchrun = (
                *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(RANKS)),
                *("--node-rank", str(number), "--master-addr", spaces[0][2], "--master-port", "29511"),
            )
            command = [sys.executable, *torchrun, "-m", __spec__.name, "--folder", folder, "--card", card, *names]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": card, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            running.append(subprocess.Popen(["ip", "netns", "exec", space, *command], env=environment))
        try:
            status = [process.wait() for process in running]
        finally:
            for process in running:
                process.kill()
        if any(status):
            raise SystemExit(f"torchrun on the hosts ended with {status}")
        each = [json.loads((Path(folder) / f"{node}.json").read_text()) for node in range(2)]
    return [_row(*pair) for pair in zip(*each, strict=True)]


def _row(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What both hosts sent, of one setting."""
    sent, packets = (one[key] + other[key] for key in ("bytes", "packets"))
    payload = (sent - HEADER * packets) / STEPS
    return {
        **{key: one[key] for key in ("name", "plan", "foretold")},
        "payload": payload,
        "headers": HEADER * packets / STEPS,
        "error": payload / one["foretold"] - 1,
    }


# ---- a rank -----------------------------------------------------------------------------------------------------


def train(names: Sequence[str], folder: Path, card: str) -> None:
    """One rank: train under every setting; the first rank of a host writes what its card sent."""
    torch.set_num_threads(1)
    rows, node = [], int(os.environ["GROUP_RANK"])
    for name in names:
        batch = {"ids": torch.randint(0, WORDS, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))}
        compiled = autopart.compile(Words(), f"2x{RANKS}:cpu", batch, **SETTINGS[name])
        compiled.optimizer(torch.optim.AdamW, lr=1e-3)
        compiled.check_batches = False
        compiled.step(batch)
        before = _sent(card)
        for _ in range(STEPS):
            compiled.step(batch)
        after = _sent(card)
        plan = compiled.plan
        told = f"{plan.degrees}, ZeRO {plan.zero}, {plan.micro_batches} micro-batches"
        row = {"name": name, "plan": told, "foretold": plan.bytes_between_hosts}
        rows.append({**row, "bytes": after[0] - before[0], "packets": after[1] - before[1]})
    if os.environ["LOCAL_RANK"] == "0":
        (folder / f"{node}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _sent(card: str) -> tuple[int, int]:
    """Bytes and packets that a card has sent once all ranks have come here."""
    dist.barrier()
    statistics = Path("/sys/class/net") / card / "statistics"
    found = tuple(int((statistics / name).read_text()) for name in ("tx_bytes", "tx_packets"))
    dist.barrier()
    return found[0], found[1]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'asked':24s} {'foretold':>12s} {'counted':>12s} {'error':>8s} {'headers':>10s}"]
    for row in rows:
        numbers = f"{row['foretold']:12,.0f} {row['payload']:12,.0f} {row['error']:+8.2%} {row['headers']:10,.0f}"
        lines.append(f"{row['name']:24s} {numbers}")
    return "\n".join(lines)


def main() -> None:
    """Count all settings, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {'; '.join(SETTINGS)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--card", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.names or list(SETTINGS)
    if options.folder:
        train(names, options.folder, options.card)
        return
    if not can_make_hosts():
        parser.error("network namespaces need `ip` and the right to make them: run it as root")
    rows = counted(names)
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
