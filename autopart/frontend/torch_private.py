"""Every private name of torch that autopart uses, in one place. Tried on torch 2.11 and 2.13."""

import torch._decomp.decompositions as decompositions
import torch.utils._traceback as stack_traces
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module as lazy_graph_modules
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim.optimizer import _global_optimizer_post_hooks as post_hooks_of_all_optimizers
from torch.optim.optimizer import _global_optimizer_pre_hooks as pre_hooks_of_all_optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_unflatten

__all__ = [
    "BatchNorm",
    "FakeTensor",
    "FakeTensorMode",
    "StorageWeakRef",
    "TorchDispatchMode",
    "decompositions",
    "get_proxy_mode",
    "lazy_graph_modules",
    "post_hooks_of_all_optimizers",
    "pre_hooks_of_all_optimizers",
    "stack_traces",
    "tree_leaves",
    "tree_unflatten",
]
