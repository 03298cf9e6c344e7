"""Traces a model in the server of forks, so that no fork imports, and traces anew, what every trace needs: the modules
of torch.export and the patterns of kernels take 2 CPU seconds.

Where there is a GPU nothing is traced: it would start autograd's threads, which do not survive a fork.
"""

import models
import torch

from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source

if not torch.cuda.device_count():
    torch.ones((), requires_grad=True).backward()
    for name in ("gpt2", "llama"):
        Source(*models.build(name), torch.float32).full(models.SAMPLES, Mesh.of("2:cpu"))
