"""How kernels are launched: found by Triton once for a case, then with addresses alone. No kernel runs here."""

import threading
import time
import types

import pytest
import torch
from ops.kernels import graphs_of
from torch.utils._python_dispatch import TorchDispatchMode

launching = pytest.importorskip('evavit.ops.common.launch')
torch_private = pytest.importorskip('evavit.ops.common.torch_private')

FLOATS = torch.float32


class Kernel:
    """What `triton.jit` makes, and what it compiles to, as far as launches look at it. `log` has the launches."""

    arg_names = ('x', 'y', 'parts', 'one', 'size', 'scale', 'none', 'BLOCK')

    def __init__(self, log, **metadata):
        self.log = log
        self.function = 77
        sizes = dict(num_warps=4, shared=128, num_ctas=1, global_scratch_size=0, profile_scratch_size=0)
        self.metadata = types.SimpleNamespace(**(sizes | metadata))
        kinds = '*fp32', '*bf16', '*fp32', 'constexpr', 'i32', 'fp32', 'constexpr', 'constexpr'
        self.src = types.SimpleNamespace(signature=dict(zip(self.arg_names, kinds, strict=True)))

    def __getitem__(self, grid):
        def launch(*args, stream='Triton finds it', **options):
            self.log.append((grid, args, options, stream))
            return self

        return launch


@pytest.fixture
def log(monkeypatch):
    """Launches: of Triton with grid, arguments, options and stream, of the static launcher with all that it gets."""
    log = []
    monkeypatch.setattr(launching, 'static_launch', lambda *args: log.append(args))
    monkeypatch.setattr(launching, 'current_raw_stream', lambda device: 5)
    return log


def made(kernel):
    run = launching.Launches()
    x, y = run.tensor(FLOATS), run.tensor(torch.bfloat16)
    run.scratch(FLOATS, 3)
    parts = run.scratch(FLOATS, 40)
    run.launch(kernel, (2, 3, 1), x, y.at(8), parts, 1, 100, 0.5, None, BLOCK=16, num_warps=4)
    return run


def tensors():
    return torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)


def test_the_first_call_is_triton_s_and_later_ones_pass_addresses(log):
    run, (x, y) = made(Kernel(log)), tensors()
    run(x, y)
    grid, args, options, _ = log.pop()
    assert (grid, args[3:], options) == ((2, 3, 1), (1, 100, 0.5, None), dict(BLOCK=16, num_warps=4))
    assert args[0] is x and args[1].data_ptr() == y.data_ptr() + 16 and args[1].dtype == y.dtype
    assert args[2].dtype == FLOATS and args[2].data_ptr() % 16 == 0

    x, y = tensors()
    run(x, y)
    ((*head, letters, args, stream),) = log
    assert (head, letters, stream) == ([77, 2, 3, 1, 4, 128], 'OOOifOO', 5)
    assert (args[0], args[1], args[3:]) == (x.data_ptr(), y.data_ptr() + 16, (100, 0.5, None, None))


def test_addresses_of_another_alignment_are_another_kernel(log):
    run, (x, y) = made(Kernel(log)), tensors()
    run(x, y)
    run(x[1:], y)
    assert [each[-1] for each in log] == ['Triton finds it'] * 2
    run(x, y)
    run(x[1:], y)
    run(x[2:], y)
    assert [each[-1] for each in log[2:]] == [5, 5, 'Triton finds it']


def test_threads_that_bind_together_pass_their_own_arguments(log):
    run, (x, y), count = made(Kernel(log)), tensors(), 4
    barrier = threading.Barrier(count)

    def let_others_run(frame, event, arg):
        time.sleep(0)
        return let_others_run if frame.f_code.co_filename == launching.__file__ else None

    def work(i):
        barrier.wait()
        run(x[i:], y)

    threading.settrace(let_others_run)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.settrace(None)
    log.clear()
    for i in range(count):
        run(x[i:], y)
    assert [each[7][3:] for each in log] == [(100, 0.5, None, None)] * count


@pytest.mark.parametrize(
    'metadata',
    [dict(num_ctas=2), dict(launch_pdl=True), dict(launch_cooperative_grid=True), dict(global_scratch_size=8)],
)
def test_what_the_static_launcher_cannot_goes_through_triton_s(log, metadata):
    run, (x, y) = made(Kernel(log, **metadata)), tensors()
    run(x, y)
    run(x, y)
    grid, args, options, stream = log[1]
    assert (grid, args[0], args[3:], options, stream) == ((2, 3, 1), x.data_ptr(), (1, 100, 0.5, None, 16), {}, 5)


def test_without_a_static_launcher(log, monkeypatch):
    monkeypatch.setattr(launching, 'static_launch', None)
    run, (x, y) = made(Kernel(log)), tensors()
    run(x, y)
    run(x, y)
    assert log[1][1][:1] == (x.data_ptr(),) and log[1][-1] == 5


def test_a_profiler_of_triton_sees_each_launch(log, monkeypatch):
    run, (x, y) = made(Kernel(log)), tensors()
    run(x, y)
    monkeypatch.setattr(launching, '_is_hooked', lambda: True)
    run(x, y)
    assert [each[-1] for each in log] == ['Triton finds it'] * 2


def test_nothing_is_bound_in_the_interpreter(log):
    class Interpreted(Kernel):
        def __getitem__(self, grid):
            return lambda *args, **options: self.log.append('interpreted')

    run, (x, y) = made(Interpreted(log)), tensors()
    for _ in range(2):
        run(x, y)
    assert log == ['interpreted'] * 2


def test_scratch_memory_is_one_allocation_whose_parts_do_not_meet():
    memory = launching.Memory()
    places = [memory.place(0, FLOATS, 3), memory.place(0, torch.float16, 5, 13), memory.place(0, FLOATS, 1)]
    ends = [place.offset + size for place, size in zip(places, (12, 130, 4), strict=True)]
    assert all(place.offset % 128 == 0 for place in places)
    assert all(end <= after.offset for end, after in zip(ends, places[1:], strict=False))
    assert memory.size >= ends[-1]


@pytest.mark.skipif(not hasattr(torch._C, '_StaticCudaLauncher'), reason='this PyTorch has no static launcher')
def test_this_pytorch_s_static_launcher_is_known(monkeypatch):
    assert torch_private._static_launch() is not None

    class Other:
        @staticmethod
        def _launch_kernel(function, grid, types, args, stream):
            raise AssertionError

    monkeypatch.setattr(torch._C, '_StaticCudaLauncher', Other)
    assert torch_private._static_launch() is None


class Seen(TorchDispatchMode):
    """Counts the operators of evavit that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [str(func)] if 'evavit' in str(func) else []
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A tensor of another class."""


@pytest.fixture(scope='module')
def times():
    """An operator x -> factor · x that is registered as those with kernels."""

    def function(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x.detach() * factor

    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    return launching.register_op(
        'test_times',
        function,
        lambda x, factor: torch.empty_like(x),
        setup_context,
        lambda ctx, g: (g * ctx.factor, None),
    )


class TestEager:
    """Operators of plain tensors are computed without the dispatcher, and by it where someone looks."""

    def test_plain_tensors(self, times):
        x = torch.ones(3, requires_grad=True)
        with torch.profiler.profile() as profile:
            y = times(x, 3.0)
            y.sum().backward()
            with torch.no_grad():
                assert not times(x, 3.0).requires_grad
        assert y.tolist() == [3.0] * 3 and x.grad.tolist() == [3.0] * 3
        assert not any('evavit::' in event.key for event in profile.key_averages())
        with pytest.raises(RuntimeError, match='evavit::test_times has no second derivative'):
            torch.autograd.grad(times(x, 3.0).sum(), x, create_graph=True)

    def test_modes_see_the_operator(self, times):
        x = torch.ones(3, requires_grad=True)
        with Seen() as seen:
            times(x, 3.0).sum().backward()
        assert seen.names == ['evavit.test_times.default']
        assert x.grad.tolist() == [3.0] * 3

    def test_other_tensors_go_through_the_dispatcher(self, times):
        with torch._subclasses.FakeTensorMode() as mode:
            fake = mode.from_tensor(torch.ones(3))
        assert isinstance(times(fake, 3.0), torch._subclasses.FakeTensor)
        with torch.profiler.profile() as profile:
            times(torch.ones(3).as_subclass(Wrapped), 3.0)
        assert any(event.key == 'evavit::test_times' for event in profile.key_averages())

    def test_compiled_graphs_hold_the_operator(self, times):
        assert 'evavit.test_times' in graphs_of(lambda x: times(x, 3.0), torch.ones(3))[0]
