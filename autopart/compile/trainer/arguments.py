"""The settings of transformers' Trainer that are refused, and how accelerate sees the ranks of a mesh."""

import os
from typing import Any

import transformers
from accelerate import DistributedType

from autopart.errors import PartitionError

REFUSED = {
    "fsdp": ("the plan says how parameters are split", "zero=3 of autopart.Trainer"),
    "deepspeed": ("the plan says how states are split", "zero=1, 2 or 3 of autopart.Trainer"),
    "parallelism_config": ("the plan has the degrees", "tp=, pp= and dp= of autopart.Trainer"),
    "torch_compile": ("the model runs as emitted modules", "compile=True of autopart.Trainer"),
    "bf16": ("it is autocast, whose casts a plan does not have", 'precision="bfloat16", master="float32"'),
    "fp16": ("it is autocast, whose casts a plan does not have", 'precision="float16", master="float32"'),
    "bf16_full_eval": ("evaluation has the weights of training", 'precision="bfloat16"'),
    "fp16_full_eval": ("evaluation has the weights of training", 'precision="float16"'),
    "activation_checkpointing": ("the plan says which blocks are recomputed", 'recompute="full" of autopart.Trainer'),
    "gradient_checkpointing": ("the plan says which blocks are recomputed", 'recompute="full" of autopart.Trainer'),
    "label_smoothing_factor": ("the loss is that of the model", "loss=, a function of the outputs and the batch"),
    "neftune_noise_alpha": ("a trace does not see hooks on the embedding", "the noise in forward"),
    "use_liger_kernel": ("a trace does not see its kernels", "use_liger_kernel=False"),
    "auto_find_batch_size": ("the planner knows which micro-batch fits", "a batch of any size, and micro_batch="),
    "torch_empty_cache_steps": ("a step is one call of an emitted program", "without it"),
    "save_on_each_node": ("all ranks write one checkpoint", "one folder that all hosts see"),
    "enable_jit_checkpoint": ("a signal reaches ranks in different steps", 'save_strategy="steps"'),
    "debug": ("hooks on modules see nothing of an emitted program", "autopart.Callback"),
}  # fmt: skip
"""Field of TrainingArguments that must be unset -> (why, what to give instead)."""

LAUNCH_VARIABLES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION")
"""Environment variables by which `accelerate launch` asks for what a plan decides."""

OVERRIDDEN = ("compute_loss", "training_step", "prediction_step")
"""Methods of transformers.Trainer that a subclass of autopart.Trainer cannot replace."""


def check_arguments(args: transformers.TrainingArguments) -> None:
    """Raise PartitionError for the first argument that would not have its usual meaning on a mesh."""
    for name, (why, instead) in REFUSED.items():
        if value := getattr(args, name, None):
            raise PartitionError(f"TrainingArguments({name}={value!r}) has no meaning on a mesh", why, instead)
    for name in LAUNCH_VARIABLES:
        if os.environ.get(name, "no").lower() not in ("no", "false", "0", ""):
            raise PartitionError(
                f"accelerate is configured with {name}={os.environ[name]}",
                "the plan says how states are split, and in which precision",
                "torchrun in place of accelerate launch, and settings of autopart.Trainer",
            )
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    ):
        raise PartitionError(
            "ranks that torchrun starts again would not find each other",
            "TrainingArguments meets in the store that torchrun keeps, with the addresses of the ranks that are gone",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ..., or no --max-restarts",
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise PartitionError(
                f"accelerator_config has {name}", "every rank reads the whole batch, and takes its part", "without it"
            )


def check_trainer(trainer: transformers.Trainer, base: type[transformers.Trainer]) -> None:
    """Raise PartitionError for a trainer with a loss other than the model's or `loss=`, or with adapters of PEFT.

    base  the class from which the trainer must have the methods OVERRIDDEN
    """
    model = trainer.model
    for name in OVERRIDDEN:
        if getattr(type(trainer), name) is not getattr(base, name):
            raise PartitionError(
                f"{type(trainer).__name__} has a {name} of its own",
                "the emitted program computes the loss and its gradients",
                "loss=, a function of the outputs and the batch",
            )
    if trainer.compute_loss_func is not None:
        raise PartitionError(
            "compute_loss_func is not called on a mesh",
            "the emitted program computes the loss",
            "loss=lambda outputs, batch: ..., the mean over the batch's samples",
        )
    if hasattr(model, "peft_config"):
        raise PartitionError(
            "the model has adapters of PEFT",
            "checkpoints would have all its weights, and transformers.Trainer writes the adapters alone",
            "autopart.compile(model, mesh, batch), then compiled.sync_to(model) and model.save_pretrained",
        )


def as_one_process(args: transformers.TrainingArguments) -> None:
    """Let accelerate treat each rank as a process that trains alone. Rank 0 still logs and writes alone.

    Accelerate then gives all ranks the same rows, and neither wraps the model nor sums over ranks.
    """
    state: Any = args.device and args.distributed_state
    state.num_processes, state.distributed_type = 1, DistributedType.NO
    args._n_gpu = min(args.n_gpu, 1)
