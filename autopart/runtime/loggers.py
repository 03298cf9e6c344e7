"""Callbacks that show and record training: progress bar, TensorBoard, Weights & Biases, ranges of torch's profiler."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.profiler import record_function

from autopart.errors import PartitionError
from autopart.plan.schedules.ops import Instruction, Op
from autopart.runtime.callbacks import RECOMPUTE, Callback, Event

if TYPE_CHECKING:
    from autopart.runtime.compiled import Compiled


class MetricsCallback(Callback):
    """Gives the metrics of every update to `record`, on rank 0.

    loss                of the update's last batch
    grad_norm           norm of the gradients before clipping, where it is known
    samples_per_second  batches x the plan's global batch / seconds since the update before; from the second update on
    tokens_per_second   samples_per_second x tokens of a sample, where these are known (`Signature.tokens`)
    """

    def __init__(self, compiled: Compiled) -> None:
        self.compiled, self.batches, self.updates = compiled, compiled.groups.rng.step, 0
        self.shows = compiled.rank == 0

    def trained(self, step: int, loss: float, seconds: float) -> None:
        if not self.shows:
            return
        metrics = {"loss": loss}
        if (norm := self.compiled.grad_norm) is not None:
            metrics["grad_norm"] = float(norm)
        if self.updates:
            plan = self.compiled.plan
            rate = (step + 1 - self.batches) * plan.global_batch / seconds
            metrics["samples_per_second"] = rate
            if plan.signature.tokens:
                metrics["tokens_per_second"] = rate * plan.signature.tokens
        self.batches, self.updates = step + 1, self.updates + 1
        self.record(step, metrics)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Called with the metrics of an update. `step` is the number of the update's last batch, from 0."""
        raise NotImplementedError


class Progress(MetricsCallback):
    """A progress bar on rank 0's stderr: batches, loss, gradient norm, and tokens/s or else samples/s.

    steps  batches of the whole training, after which the bar is closed; None: not known
    """

    def __init__(self, compiled: Compiled, steps: int | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        super().__init__(compiled)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        console = Console(stderr=True)
        self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not self.shows)
        self.task, self.steps = self.bar.add_task("", total=steps), steps

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Show the metrics."""
        if self.updates == 1:
            self.bar.start()
            atexit.register(self.close)  # closing the bar shows the cursor
        parts = [f"loss {metrics['loss']:.4f}"]
        if "grad_norm" in metrics:
            parts.append(f"grad norm {metrics['grad_norm']:.3g}")
        for unit in ("tokens", "samples"):
            if (name := f"{unit}_per_second") in metrics:
                parts.append(f"{metrics[name]:,.0f} {unit}/s")
                break
        self.bar.update(self.task, completed=step + 1, description="  ".join(parts))
        if self.steps is not None and step + 1 >= self.steps:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is, and show no more updates."""
        self.shows = False
        self.bar.stop()
        atexit.unregister(self.close)


class TensorBoard(MetricsCallback):
    """Writes the metrics of every update as scalars that TensorBoard reads.

    folder  of the event files, which rank 0 writes

    Raises PartitionError, on every rank, where the package tensorboard is not installed.
    """

    def __init__(self, compiled: Compiled, folder: str | Path) -> None:
        super().__init__(compiled)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _not_installed("autopart.TensorBoard", "tensorboard") from error
        self.writer = SummaryWriter(str(folder)) if self.shows else None

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics."""
        assert self.writer is not None
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the scalars that are not written yet, and close the file."""
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases(MetricsCallback):
    """Logs the metrics of every update to a run of Weights & Biases, whose config has the plan's head and step seconds.

    settings  keywords of `wandb.init`, such as `project`

    Raises PartitionError, on every rank, where the package wandb is not installed.
    """

    def __init__(self, compiled: Compiled, **settings: Any) -> None:
        super().__init__(compiled)
        try:
            import wandb
        except ImportError as error:
            raise _not_installed("autopart.WeightsAndBiases", "wandb") from error
        plan = compiled.plan
        config = {"plan": plan.head, "predicted_seconds": plan.step_seconds, **(settings.pop("config", None) or {})}
        self.run = wandb.init(config=config, **settings) if self.shows else None

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics."""
        assert self.run is not None
        self.run.log(metrics, step=step)

    def close(self) -> None:
        """End the run."""
        if self.run is not None:
            self.run.finish()


class ProfilerRanges(Callback):
    """A range of torch.profiler around every instruction, named such as "stage 0 FORWARD micro-batch 1"; inside of a
    backward one around every block that runs again, named "stage 0 RECOMPUTE micro-batch 1"."""

    def __init__(self) -> None:
        self.ranges: list[record_function] = []

    def before(self, event: Event) -> None:
        if event.op == RECOMPUTE:
            name = f"stage {event.stage} RECOMPUTE micro-batch {event.micro_batch}"
        else:
            while self.ranges:
                self._end()  # the range of an instruction that failed
            name = str(Instruction(Op(event.op), event.stage, event.micro_batch, event.peer))
        self.ranges.append(record_function(name))
        self.ranges[-1].__enter__()

    def after(self, event: Event, seconds: float) -> None:
        self._end()

    def _end(self) -> None:
        if self.ranges:
            self.ranges.pop().__exit__(*sys.exc_info())


def _not_installed(what: str, package: str) -> PartitionError:
    return PartitionError(f"{what} needs {package}", "it is not installed", 'pip install "autopart[watch]"')
