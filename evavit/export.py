"""Models in forms that run elsewhere: ONNX files, AOTInductor packages, exported programs, smaller weights.

`export.py` is the command for this; docs/deploy.md says what each form is good for.
"""

import contextlib
import copy
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch
from timm.utils.onnx import onnx_export
from torch import nn

from evavit.arguments import check_type, shown
from evavit.files import open_regular, replacing_in
from evavit.layers.attention import GridAttention

__all__ = [
    'PRECISIONS',
    'TENSORRT_OPERATORS',
    'fixed_image_size',
    'load_exported',
    'lower_precision',
    'onnx_operators',
    'relative_error',
    'tensorrt_objections',
    'to_onnx',
    'to_package',
    'to_program',
]

PRECISIONS = ('float32', 'bfloat16', 'float16', 'int8')
MAX_BATCH = 1024  # upper end of the dynamic batch of programs and packages

# The operators of models like these that TensorRT's parser reads, and what it asks of each, from the table of
# onnx-tensorrt for TensorRT 10.15. Copied by hand: only TensorRT itself could say it, and writing a file does not need
# it. Resize is not among them: the parser reads no cubic one.
_CONSTANT_AXES = 'axes must be constant'
TENSORRT_OPERATORS: Dict[str, str] = {
    **dict.fromkeys(
        (
            'Add',
            'And',
            'Cast',
            'Ceil',
            'Clip',
            'Concat',
            'Constant',
            'ConstantOfShape',
            'Conv',
            'Div',
            'Equal',
            'Erf',
            'Exp',
            'Expand',
            'Flatten',
            'Floor',
            'Gather',
            'GatherElements',
            'GatherND',
            'Gelu',
            'Gemm',
            'GlobalAveragePool',
            'Greater',
            'GreaterOrEqual',
            'Identity',
            'Less',
            'LessOrEqual',
            'Log',
            'MatMul',
            'Max',
            'Min',
            'Mod',
            'Mul',
            'Neg',
            'Not',
            'Or',
            'Pad',
            'Pow',
            'Range',
            'Reciprocal',
            'Relu',
            'Reshape',
            'ScatterElements',
            'Shape',
            'Sigmoid',
            'Slice',
            'Softmax',
            'Split',
            'Sqrt',
            'Sub',
            'Tanh',
            'Tile',
            'Transpose',
            'Trilu',
            'Where',
        ),
        '',
    ),
    **dict.fromkeys(
        ('ReduceMax', 'ReduceMean', 'ReduceMin', 'ReduceProd', 'ReduceSum', 'Squeeze', 'Unsqueeze'), _CONSTANT_AXES
    ),
    'LayerNormalization': 'the first output alone',
    'ScatterND': 'no reduction',
}
TENSORRT_TYPES = ('FLOAT', 'FLOAT16', 'BFLOAT16', 'INT32', 'INT64', 'BOOL')


def lower_precision(model: nn.Module, precision: str) -> nn.Module:
    """A copy of a model whose weights are smaller.

    Args:
        model: In float32.
        precision: One of `PRECISIONS`. 'bfloat16' and 'float16': weights and arithmetic, the images too. 'int8': the
            weights of the Linear layers, one scale for each output channel; arithmetic stays in float32.

    Raises:
        ValueError: unknown precision.
        ModuleNotFoundError: 'int8' without torchao.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision {precision} is not one of {", ".join(PRECISIONS)}')
    check_type(model, nn.Module, 'model must be a torch.nn.Module, such as timm.create_model makes')
    model = copy.deepcopy(model)
    if precision == 'int8':
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(version=2))
        return model
    return model.to(getattr(torch, precision))


def fixed_image_size(model: nn.Module) -> bool:
    """Whether an exported graph of this model holds for one image size: all that cut their tokens into windows."""
    return any(isinstance(module, GridAttention) for module in model.modules())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; each of its modules is in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check(model: nn.Module, input_size: Sequence[int], path: Optional[Path] = None) -> None:
    check_type(model, nn.Module, 'model must be a torch.nn.Module, such as timm.create_model makes')
    sizes = list(input_size) if isinstance(input_size, (list, tuple)) else []
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f'input_size must be channels, height and width, such as (3, 224, 224), got {shown(input_size)}'
        )
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f'{path}: there is no folder {Path(path).parent}; make it first')


def _example(model: nn.Module, input_size: Sequence[int]) -> torch.Tensor:
    weight = next(model.parameters())
    # A batch of 1 would be taken for a constant.
    return torch.zeros(2, *input_size, device=weight.device, dtype=weight.dtype)


def to_onnx(
    model: nn.Module,
    path: Path,
    input_size: Sequence[int],
    opset: Optional[int] = None,
    keep_initializers: bool = False,
    dynamic_size: bool = False,
    metadata: Optional[Dict[str, str]] = None,
    verbose: bool = False,
) -> None:
    """Write a model, as in evaluation, as ONNX: images `input0`, logits `output0`, any batch.

    Args:
        model: In float32 or float16. Its mode stays as it is.
        path: File to write.
        input_size: Channels, height and width of the images.
        opset: Version of ONNX's operators; the exporter's own if None.
        keep_initializers: Weights are inputs of the graph as well.
        dynamic_size: Images of any height and width, for models that allow it.
        metadata: Entries of the file's metadata.
        verbose: Pass on what the exporter says.

    Raises:
        ValueError: `dynamic_size` with a model that has `fixed_image_size`; an input_size that is none.
        TypeError: a model that is no module.
        FileNotFoundError: the file's folder is not there.
    """
    _check(model, input_size, path)
    import onnx

    if dynamic_size and fixed_image_size(model):
        raise ValueError('an exported graph of this model holds for one image size: windows and cells are cut for it')
    # The exporter takes the logarithm of 0 for cells that a query has inside its window: they are to count nothing.
    with replacing_in(Path(path).parent) as folder, np.errstate(divide='ignore'), _evaluating(model):
        partial = folder / Path(path).name
        onnx_export(
            model,
            str(partial),
            _example(model, input_size),
            opset=opset,
            keep_initializers=keep_initializers,
            dynamic_size=dynamic_size,
            use_dynamo=True,
            verbose=verbose,
            check=False,
        )
        if metadata:
            file = onnx.load(str(partial), load_external_data=False)
            onnx.helper.set_model_props(file, metadata)
            onnx.save(file, str(partial))
        onnx.checker.check_model(str(partial), full_check=True)


def rename_exported(path: Path, name: str) -> None:
    """Give another name to a file that `to_onnx` or `to_package` wrote, and to the file of its large weights."""
    data = path.with_name(f'{path.name}.data')
    if data.exists():
        import onnx

        file = onnx.load(str(path), load_external_data=False)
        for tensor in file.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == 'location':
                    entry.value = f'{name}.data'
        onnx.save(file, str(path))
        data.rename(path.with_name(f'{name}.data'))
    path.rename(path.with_name(name))


def _read_onnx(path: Path) -> Any:
    """An ONNX file without weights of other files. ValueError, one line, where it is none; OSError of the system's."""
    import onnx

    with open_regular(path) as opened:
        content = opened.read()
    try:
        file = onnx.load_model_from_string(content)
    except Exception:  # protobuf's own
        file = None
    if file is None or not file.ir_version or not file.graph.node:
        raise ValueError(f'{path}: no ONNX file; give one that to_onnx or another exporter wrote')
    return file


def onnx_operators(path: Path) -> Counter:
    """How often each operator stands in an ONNX file; those of other domains than ONNX's as 'domain::name'.

    Raises:
        ValueError: one line on a file that is no ONNX.
        OSError: it is missing, or cannot be read.
    """
    file = _read_onnx(path)
    nodes = [*file.graph.node, *(node for function in file.functions for node in function.node)]
    return Counter(
        f'{node.domain}::{node.op_type}' if node.domain not in ('', 'ai.onnx') else node.op_type for node in nodes
    )


def tensorrt_objections(path: Path) -> List[str]:
    """What TensorRT's parser may not read in an ONNX file, by its published table: nothing if the list is empty.

    Operators that are not in `TENSORRT_OPERATORS` or break what it asks of them, and types of numbers. Raises as
    `onnx_operators` does.
    """
    import onnx

    file = onnx.shape_inference.infer_shapes(_read_onnx(path))
    constants = {tensor.name for tensor in file.graph.initializer}
    constants |= {node.output[0] for node in file.graph.node if node.op_type == 'Constant'}
    found = set(onnx_operators(path)) - set(TENSORRT_OPERATORS)
    for node in file.graph.node:
        rule = TENSORRT_OPERATORS.get(node.op_type, '')
        if rule == _CONSTANT_AXES:
            broken = not constants.issuperset(node.input[1:2])
        else:
            broken = bool(rule) and (
                len(node.output) > 1
                or any(attribute.name == 'reduction' and attribute.s != b'none' for attribute in node.attribute)
            )
        if broken:
            found.add(f'{node.op_type} ({rule})')
    values = (*file.graph.input, *file.graph.value_info, *file.graph.output)
    types = {onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in values}
    types |= {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in file.graph.initializer}
    return sorted(found | (types - set(TENSORRT_TYPES)))


def to_program(model: nn.Module, input_size: Sequence[int]) -> torch.export.ExportedProgram:
    """A model, as in evaluation, as a program of PyTorch's operators for one image size, with a batch of 1 to 1,024.

    The model's own mode stays. Raises ValueError and TypeError as `to_onnx` does.
    """
    _check(model, input_size)
    batch = torch.export.Dim('batch', min=1, max=MAX_BATCH)
    with torch.no_grad(), _evaluating(model):
        return torch.export.export(model, (_example(model, input_size),), dynamic_shapes=({0: batch},))


def to_package(model: nn.Module, path: Path, input_size: Sequence[int]) -> None:
    """Compile a model ahead of time for its device: a `.pt2` file with machine code and weights.

    Loading it needs PyTorch, but neither this package, nor timm, nor a compiler. Raises as `to_onnx` does.
    """
    _check(model, input_size, path)
    program = to_program(model, input_size)
    with replacing_in(Path(path).parent) as folder:
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / Path(path).name))


def load_exported(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function in an ONNX file (by onnxruntime, on the CPU) or a package of `to_package`: images to logits.

    onnxruntime takes as many threads as PyTorch has.

    Raises:
        ValueError: one line on a file that is neither.
        OSError: it is missing, or cannot be read.
    """
    if Path(path).suffix == '.onnx':
        import onnxruntime

        _read_onnx(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return lambda images: torch.from_numpy(session.run(None, {'input0': images.numpy()})[0])
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f'{path}: no package; give a file of to_package, or one of ONNX that ends in .onnx')
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: package(images.contiguous())  # it reads memory as it was exported, and checks no strides


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value where that is not zero; NaN where one of them is.

    Raises ValueError, one line, where the shapes differ or are empty.
    """
    if got.shape != expected.shape or not got.numel():
        raise ValueError(f'got {list(got.shape)}, expected {list(expected.shape)}: must be of one shape, and not empty')
    expected = expected.double()
    difference, scale = (got.double() - expected).abs().max().item(), expected.abs().max().item()
    return difference / scale if scale else difference
