"""Every private name of torch that autopart uses, in one place. Tried on torch 2.13."""

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_unflatten

__all__ = ["FakeTensor", "FakeTensorMode", "StorageWeakRef", "tree_unflatten"]
