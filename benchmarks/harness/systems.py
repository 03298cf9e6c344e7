"""Every system of the harness, in the order of turns."""

from __future__ import annotations

from functools import partial

from autopart.compile.bench import own
from autopart.compile.bench.setting import System
from autopart.compile.bench.systems import systems as for_any_model
from benchmarks.harness.adapters import accelerate, deepspeed, dtensor, galvatron, lightning, pipelining, tp_plan
from benchmarks.harness.megatron import adapter as megatron


def systems(ranks: int) -> dict[str, System]:
    """Name -> system."""
    dp, tp = own.name_of(dp=ranks), own.name_of(tp=ranks)
    made = for_any_model(ranks)
    made["DTensor"] = System(dtensor.build, tp)
    for name in pipelining.KINDS:
        like = own.name_of(pp=ranks, schedule="gpipe" if name in ("GPipe", "LoopedBFS") else "1f1b")
        made[f"pipelining {name}"] = System(partial(pipelining.build, name=name), like)
    for pp, tensor in megatron.degrees(ranks):
        like = own.name_of(pp=pp, dp=ranks // (pp * tensor), tp=tensor)
        words = " ".join(f"{axis}={n}" for axis, n in (("pp", pp), ("tp", tensor)) if n > 1)
        made[f"by hand {words}"] = System(partial(megatron.build, pp=pp, tp=tensor), like)
        if tensor > 1:
            made[f"by hand {words} sp"] = System(partial(megatron.build, pp=pp, tp=tensor, sequence=True), like)
    made["transformers tp_plan"] = System(tp_plan.build, tp)
    made["accelerate"] = System(accelerate.build, dp)
    made["Lightning Fabric"] = System(lightning.build, dp)
    for level in (1, 2, 3):
        made[f"DeepSpeed ZeRO {level}"] = System(
            partial(deepspeed.build, level=level), own.name_of(dp=ranks, zero=level)
        )
    made["Galvatron"] = System(galvatron.build)
    return made
