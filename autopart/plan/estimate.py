"""What a configuration would cost: rates, MFU, peak bytes and headroom of each stage, seconds by cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopart.hardware.mixed import peak_flops
from autopart.plan.breakdown import model_flops_utilisation, step_breakdown
from autopart.plan.data import Plan
from autopart.plan.layout import paragraph, text_width
from autopart.plan.text import memory_text
from autopart.plan.units import bytes_text, seconds_text


@dataclass(frozen=True)
class Estimate:
    """What a configuration would cost.

    step_seconds        of one step of the whole batch
    samples_per_second  of the whole mesh
    tokens_per_second   of the whole mesh; None where samples have no known sequence (`Signature.tokens`)
    mfu                 model FLOPs utilisation (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B):
                        3 forward_flops / (step_seconds x devices x peak_flops). A product's backward is two products of
                        its size; recompute does not count; attention counts in full, causal or not
    peak_flops          FLOP/s of one device for products of `peak_dtype`, the mean where devices differ
    peak_dtype          dtype of the parameters
    memory_bytes        peak bytes of a rank of each stage
    memory              of each stage, kind -> bytes (see `PlanStage.memory`)
    headroom_bytes      of each stage: usable bytes of its device less its peak; negative where the stage does not fit
    fits                whether no stage takes more than its device can give
    breakdown           cause -> seconds of the slowest stage (`autopart.plan.breakdown.step_breakdown`)
    plan                the plan that was priced
    """

    step_seconds: float
    samples_per_second: float
    tokens_per_second: float | None
    mfu: float
    peak_flops: float
    peak_dtype: str
    memory_bytes: tuple[int, ...]
    memory: tuple[Mapping[str, float], ...]
    headroom_bytes: tuple[int, ...]
    fits: bool
    breakdown: Mapping[str, float]
    plan: Plan = field(repr=False)

    @staticmethod
    def of(plan: Plan) -> Estimate:
        """The estimate of a plan."""
        seconds, tokens = plan.step_seconds, plan.signature.tokens
        peak = peak_flops(plan.mesh, plan.precision) / plan.mesh.size
        return Estimate(
            seconds,
            plan.global_batch / seconds,
            plan.global_batch * tokens / seconds if tokens else None,
            model_flops_utilisation(plan),
            peak,
            plan.precision,
            plan.memory_bytes,
            tuple(s.memory for s in plan.stages),
            tuple(round(most) - nbytes for most, nbytes in zip(plan.usable_bytes, plan.memory_bytes, strict=True)),
            plan.fits,
            step_breakdown(plan),
            plan,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the plan, as plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}

    def __str__(self) -> str:
        plan, tokens = self.plan, self.tokens_per_second
        rates = [f"{self.samples_per_second:,.1f} samples/s", *([f"{tokens:,.0f} tokens/s"] if tokens else [])]
        peak = f"{plan.mesh.size} x {self.peak_flops / 1e12:,.4g} TFLOP/s ({self.peak_dtype})"
        lines = [
            plan.head,
            f"step     {seconds_text(self.step_seconds)}, {', '.join(rates)}",
            f"MFU      {self.mfu:.1%} of {peak}: 3 x {plan.forward_flops:.4g} FLOPs of the forward's products",
            f"of this  {', '.join(f'{name} {seconds_text(value)}' for name, value in self.breakdown.items() if value)}",
        ]
        for index, (nbytes, room) in enumerate(zip(self.memory_bytes, self.headroom_bytes, strict=True)):
            verdict = f"fits, {bytes_text(room)} left" if room >= 0 else f"does not fit, {bytes_text(-room)} lacking"
            name, memory = f"stage {index}{plan.device_text(index)}", memory_text(self.memory[index])
            lines.append(f"{name:<8} {bytes_text(nbytes)} a rank ({memory}): {verdict}")
        return "\n".join(part for line in lines for part in paragraph(line, text_width(), hanging=9))
