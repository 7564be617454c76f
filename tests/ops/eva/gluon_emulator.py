"""Runs kernels in Gluon in PyTorch, program by program: their arithmetic, indices, masks and buffers, on any machine.

Shared memory holds NaN until it is written; a buffer that is copied to holds NaN until the copy is waited for; no
address outside of a tensor's memory may be touched where a mask lets it. Layouts, barriers and fences are ignored.
"""

import itertools
import types

import torch


class Pointer:
    def __init__(self, memory, offset=0):
        self.memory, self.offset, self.dtype = memory, offset, types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)

    def places(self, mask):
        """Where to read or write, and which of it counts."""
        offset = torch.as_tensor(self.offset)
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
        inside = offset[mask]
        assert inside.numel() == 0 or (inside.min() >= 0 and inside.max() < len(self.memory)), 'outside of a tensor'
        return torch.where(mask, offset, 0), mask


class Shared:
    def __init__(self, tile):
        self.tile = tile

    def index(self, i):
        return Shared(self.tile[int(i)])

    def permute(self, order):
        return Shared(self.tile.permute(*order))

    def load(self, layout):
        return self.tile.clone()


def load(pointer, mask=None, other=0.0):
    offset, mask = pointer.places(mask)
    return torch.where(mask, pointer.memory[offset], torch.tensor(other, dtype=pointer.memory.dtype))


def store(pointer, value, mask=None):
    offset, mask = pointer.places(mask)
    pointer.memory[offset[mask]] = value.expand(offset.shape)[mask].to(pointer.memory.dtype)


class Copies:
    """`async_copy`: a copy arrives when its group is waited for."""

    def __init__(self):
        self.groups = [[]]

    def copy(self, shared, pointer, mask):
        self.groups[-1].append((shared.tile, load(pointer, mask)))
        shared.tile.fill_(float('nan'))

    def commit_group(self):
        self.groups.append([])

    def wait_group(self, pending):
        while len(self.groups) > pending + 1:
            for tile, values in self.groups.pop(0):
                tile.copy_(values)


def allocate(dtype, shape, layout, value=None):
    return Shared(torch.full(shape, float('nan'), dtype=dtype) if value is None else value.to(dtype).clone())


def product(a, b, acc, use_acc=True, is_async=False):
    a, b = (x.tile if isinstance(x, Shared) else x for x in (a, b))
    return a.float() @ b.float() + acc if use_acc else a.float() @ b.float()


def nothing(*args, **kwargs):
    return None


class Emulator:
    """The functions of a module of kernels, to be called as `launch(name, grid, arguments, options)`."""

    def __init__(self, module):
        program = self.program = [0, 0, 0]
        self.copies = Copies()
        tensor = torch.as_tensor
        gl = types.SimpleNamespace(
            constexpr=None,
            int64=torch.int64,
            float32=torch.float32,
            load=load,
            store=store,
            NVMMADistributedLayout=nothing,
            BlockedLayout=nothing,
            DotOperandLayout=nothing,
            SliceLayout=nothing,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=nothing),
            allocate_shared_memory=allocate,
            program_id=lambda axis: torch.tensor(program[axis]),
            arange=lambda a, b, layout: torch.arange(a, b),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            minimum=lambda a, b: torch.minimum(tensor(a), tensor(b)),
            maximum=torch.maximum,
            exp2=torch.exp2,
            where=lambda mask, a, b: torch.where(mask, tensor(a), tensor(b)),
            log2=torch.log2,
            max=torch.amax,
            sum=torch.sum,
            reshape=torch.reshape,
            permute=torch.permute,
            convert_layout=lambda x, *_, **__: x,
        )
        space = dict(
            vars(module),
            gl=gl,
            LOG2E=module.LOG2E.value,
            warpgroup_mma=product,
            fence_async_shared=nothing,
            warpgroup_mma_wait=lambda pending, deps: deps[0] if len(deps) == 1 else deps,
            async_copy=types.SimpleNamespace(
                commit_group=lambda: self.copies.commit_group(),
                wait_group=lambda pending: self.copies.wait_group(pending),
            ),
            _copy=lambda *args, **kwargs: self.copies.copy(*args, **kwargs),
        )
        self.kernels = {
            name: types.FunctionType(x.fn.__code__, space, name)
            for name, x in vars(module).items()
            if isinstance(getattr(x, 'fn', None), types.FunctionType)
        }
        space.update(self.kernels)

    def launch(self, kernel, grid, args, options):
        def pointer(x):
            if not torch.is_tensor(x):
                return x
            return Pointer(x.as_strided((x.untyped_storage().nbytes() // x.itemsize - x.storage_offset(),), (1,)))

        for self.program[:] in itertools.product(*map(range, grid)):
            self.copies = Copies()
            kernel(*map(pointer, args), **options)
            assert not any(self.copies.groups), 'a copy is under way at the end'
