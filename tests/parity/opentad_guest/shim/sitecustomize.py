"""Let OpenTAD's unmodified files run on a machine without a GPU; Python imports this at start, by PYTHONPATH.

NCCL is gloo, a device number is the CPU, and packages that the tiny config never calls (torchvision, two CUDA
extensions) are empty. Nothing of OpenTAD, mmengine or tensorkeep is touched.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types

EMPTY = ("torchvision", "Align1D", "boundary_max_pooling_cuda")


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})  # a class, so that it can be a base


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in EMPTY else None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def _without_gpu():
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    init, to, ddp, load = dist.init_process_group, torch.nn.Module.to, DistributedDataParallel.__init__, torch.load

    def init_process_group(backend=None, **options):
        return init("gloo", **options)

    def module_to(self, *args, **options):
        return (
            to(self, "cpu", *args[1:], **options) if args and isinstance(args[0], int) else to(self, *args, **options)
        )

    def parallel(self, module, device_ids=None, output_device=None, **options):
        ddp(self, module, **options)

    def load_here(file, map_location=None, **options):
        return load(file, map_location="cpu", **options)

    dist.init_process_group = init_process_group
    torch.nn.Module.to = module_to
    DistributedDataParallel.__init__ = parallel
    torch.load = load_here
    torch.cuda.set_device = lambda device: None
    torch.cuda.device_count = lambda: 1


sys.meta_path.append(_Finder())
if os.environ.get("OPENTAD_WITHOUT_GPU"):
    _without_gpu()
