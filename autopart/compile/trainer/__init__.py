"""`transformers.Trainer` on a mesh. It imports transformers and accelerate, which `import autopart` does not."""

from autopart.compile.trainer.trainer import Trainer

__all__ = ["Trainer"]
