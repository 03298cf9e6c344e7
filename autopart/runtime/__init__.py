"""What emitted code calls, and what runs it. Knows nothing of planning.

collectives, functions, experts, random, recompute,
gathered                                                        what emitted code calls
compiled, rank_state, parameters, emitted, torch_compile,
variants                                                        one rank's program: its methods, shares, module
executor, update, zero, flat_slices, optimizers, gradient_norm,
loss_scale                                                      a step: instructions, gradient sums, ZeRO, the optimizer
groups, process_group, agreement, guards                        the ranks, and the checks that they do the same
loader, padding, whole, shards, outputs                         batches in, outputs out
checkpoint/                                                     training that goes on under another plan
pretrained, weight_folder, weight_files, share_reader, whole_tensors,
transformers_names                                              weights from files and into files
watchdog, heartbeat, activity, launch                           ranks that die or hang; ranks started here
callbacks, loggers, predicted                                   what a user sees of a training
simulated, standalone, calibrate/                               ranks as threads; emitted folders; measuring a machine

Open `compiled.py` first, then `executor.py`.
"""

import autopart.ir.ctc  # noqa: F401  the operator that emitted code may call
from autopart.runtime.collectives import (
    all_gather,
    all_gather_again,
    all_reduce,
    all_to_all,
    copy_to,
    gather_from,
    reduce_from,
    reduce_scatter_to,
    scatter_to,
    share_gradient,
    slice_of,
)
from autopart.runtime.experts import grouped_linear, own_experts, shared_experts
from autopart.runtime.functions import (
    mean_cross_entropy,
    mean_linear_loss,
    vocab_cross_entropy,
    vocab_embedding,
    vocab_linear_loss,
)
from autopart.runtime.gathered import gathered
from autopart.runtime.groups import Groups, make_groups
from autopart.runtime.outputs import returned
from autopart.runtime.parameters import buffer, weight, weight_slice
from autopart.runtime.process_group import Group
from autopart.runtime.random import dropout, dropout_attention, residual_dropout, stochastic_depth, stream, uniform
from autopart.runtime.recompute import recomputed, run_once, saved

__all__ = [
    "Group",
    "Groups",
    "all_gather",
    "all_gather_again",
    "all_reduce",
    "all_to_all",
    "buffer",
    "copy_to",
    "dropout",
    "dropout_attention",
    "gather_from",
    "gathered",
    "grouped_linear",
    "make_groups",
    "mean_cross_entropy",
    "mean_linear_loss",
    "own_experts",
    "recomputed",
    "reduce_from",
    "reduce_scatter_to",
    "residual_dropout",
    "returned",
    "run_once",
    "saved",
    "scatter_to",
    "share_gradient",
    "shared_experts",
    "slice_of",
    "stochastic_depth",
    "stream",
    "uniform",
    "vocab_cross_entropy",
    "vocab_embedding",
    "vocab_linear_loss",
    "weight",
    "weight_slice",
]
