"""`transformers.Trainer` on a mesh. This package imports transformers and accelerate; `import autopart` does not."""

from autopart.compile.trainer.trainer import Trainer

__all__ = ["Trainer"]
