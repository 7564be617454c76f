"""Whole models: images a second of an EVA model and of timm's softmax model of its size, in training and inference."""

import ast
import copy
import functools
from typing import Any, Dict, Iterable, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import resolve_model_input_args
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evavit.arguments import nearest, too_large
from evavit.errors import UserError, first_line, tell
from evavit.layers import ATTENTIONS, EvaAttention, pop_attention_kwargs
from evavit.models import softmax_twin
from evavit.ops.eva import EVA
from evavit.training.compilation import AS_IS, Compilation

from .clocks import Call
from .contenders import (
    ERROR_BOUNDS,
    Contender,
    Setting,
    WrongResult,
    check_backend,
    force,
    measure,
    within,
    worst_error,
)
from .results import Row

__all__ = ['bench_model', 'build', 'describe', 'input_size', 'model_contenders', 'parse_model']


def parse_model(text: str) -> Tuple[str, Dict[str, Any]]:
    """'name:key=value:key=value' to a name and its arguments; UserError for a name that timm does not know."""
    name, *pairs = text.split(':')
    if not timm.is_model(name):
        raise UserError(f'unknown model {name}{nearest(name, timm.list_models())}')
    kwargs = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals:
            raise UserError(f'{text}: {pair!r} is not key=value')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            kwargs[key] = value
    if excess := too_large(kwargs):
        raise UserError(f'{text}: {excess}; lower it')
    return name, kwargs


def describe(name: str, kwargs: Dict[str, Any]) -> str:
    """What `parse_model` reads."""
    return ':'.join([name, *(f'{key}={value}' for key, value in kwargs.items())])


def build(name: str, kwargs: Dict[str, Any], img_size: Optional[int], device: str = 'cpu') -> Any:
    """A model for images of a side, its own if None, with random weights, which are the same at every call.

    Raises:
        UserError: not with these arguments or for images of this side.
    """
    torch.manual_seed(0)
    try:
        with torch.device(device):  # a GPU draws the weights of a large model faster
            return timm.create_model(**resolve_model_input_args(name, args=dict(img_size=img_size), **kwargs))
    except Exception as error:  # each model has its own errors for arguments that do not fit
        images = f', images of {img_size}' if img_size else ''
        texts = [key for key, value in kwargs.items() if isinstance(value, str)] if isinstance(error, TypeError) else []
        hint = f' ({", ".join(texts)} is text; give a number, or what else the model takes)' if texts else ''
        raise UserError(f'{describe(name, kwargs)}{images}: {first_line(error)[:300]}{hint}') from error


@functools.lru_cache
def input_size(text: str, img_size: Optional[int] = None) -> Tuple[int, ...]:
    """Channels, height and width of the images that `bench_model` gives a model, once one has passed through it.

    Raises:
        UserError: no such model, or not with these arguments or for images of this size.
    """
    model = build(*parse_model(text), img_size).eval()
    channels, *sides = resolve_model_data_config(model)['input_size']
    size = (channels, *((img_size, img_size) if img_size else sides))
    try:
        with torch.no_grad():
            model(torch.zeros(1, *size))
    except Exception as error:  # likewise
        raise UserError(f'{text}, images of {size[1]} × {size[2]}: {first_line(error)[:300]}') from error
    return size


def _eva_layers(module: nn.Module) -> List[EvaAttention]:
    return [layer for layer in module.modules() if isinstance(layer, EvaAttention)]


def _set_fused(model: nn.Module, fused: bool) -> None:
    """Let the EVA layers and the MLPs take kernels or not: graphs of torch.compile are kept by these attributes."""
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        switch = 'fused_attn' if isinstance(layer, EvaAttention) else 'fused_mlp'
        if hasattr(layer, switch):
            setattr(layer, switch, fused)


def _eva_backend(module: nn.Module) -> str:
    """The backend of a module's EVA layers: 'plain' if one of them takes that, else the fastest that one takes."""
    taken = {layer.backend for layer in _eva_layers(module)}
    return 'plain' if 'plain' in taken else next(backend for backend in EVA.backends if backend in taken)


def model_contenders(
    text: str, setting: Setting, img_size: Optional[int]
) -> List[Tuple[str, Dict[str, Any], str, str]]:
    """(name, arguments, attention, backend) of a model and of the softmax model beside it."""
    name, kwargs = parse_model(text)
    model = build(name, kwargs, img_size)
    if not _eva_layers(model):
        softmax = [backend for backend in setting.backends if backend not in EVA.backends]
        return [(name, kwargs, '', backend) for backend in (softmax if setting.backends else [''])]
    backends = setting.backends
    if not backends:
        with setting.autocast():
            backends = (_eva_backend(model.to(setting.device)), 'sdpa')
    contenders = [(name, kwargs, 'eva', backend) for backend in backends if backend in EVA.backends]
    softmax = [backend for backend in backends if backend not in EVA.backends]
    twin = _twin(name, kwargs, img_size) if softmax else None
    if twin is not None:
        contenders += [(*twin, 'softmax', backend) for backend in softmax]
    return contenders


def _twin(name: str, kwargs: Dict[str, Any], img_size: Optional[int]) -> Optional[Tuple[str, Dict[str, Any]]]:
    """timm's softmax model of the size that a model has with these arguments, which are its own too but for those of
    the attention. None where there is none; one line says why."""
    twin = softmax_twin(name)
    if twin is None:
        return None
    shared = {key: value for key, value in kwargs.items() if value is not None}  # timm drops None, the model's default
    attention = shared.pop('attn_layer', next(key for key in ATTENTIONS if name.startswith(f'{key}_')))
    pop_attention_kwargs(attention, shared)
    twin = twin[0], {**twin[1], **shared}
    try:
        build(*twin, img_size, 'meta')
    except UserError as error:
        tell(f"timm's softmax model beside {describe(name, kwargs)} is left out: {error}")
        return None
    return twin


def bench_model(
    setting: Setting,
    kind: str,
    text: str,
    batch: int,
    img_size: Optional[int] = None,
    compilation: Compilation = AS_IS,
) -> List[Row]:
    """Images a second of a model and, beside an EVA model, of timm's softmax model of its size.

    Args:
        setting: Device, dtype, contenders.
        kind: 'infer', or 'train': forward, cross-entropy, backward, AdamW on one fixed batch of noise.
        text: The model, with arguments as `parse_model` reads them.
        batch: Images.
        img_size: Side of the images; the model's own if None.
        compilation: How all models are compiled, if they are.

    Raises:
        UserError: no such model, or not with these arguments or of this size.
    """
    device, size = setting.device, input_size(text, img_size)
    torch.compiler.reset()

    def contender(name: str, kwargs: Dict[str, Any], attention: str, backend: str) -> Contender:
        model = build(name, kwargs, img_size)
        model.to(device).train(kind == 'train')
        _set_fused(model, backend != 'plain')
        row = dict(
            bench=kind,
            case=text,
            model=describe(name, kwargs),
            attention=attention,
            backend=backend,
            batch_size=batch,
            img_size=size[1],
            torchcompile=compilation.label,
        )
        context = force(backend)
        images = torch.randn(batch, *size, device=device)
        expected: List[torch.Tensor] = []

        def check() -> float:
            with setting.autocast():
                check_backend(backend, lambda: _eva_backend(model))
            judged = copy.deepcopy(model).eval()
            reference = copy.deepcopy(judged).double()
            _set_fused(reference, False)
            with torch.no_grad():
                with sdpa_kernel(SDPBackend.MATH):  # the contender's own may not take float64
                    expected.append(reference(images[:1].double()))
                with setting.autocast():
                    return worst_error([judged(images[:1])], expected)

        def prepare() -> Dict[str, Call]:
            run = compilation.compile(model)

            @torch.no_grad()
            def infer() -> torch.Tensor:
                with setting.autocast():
                    return run(images)

            if kind == 'infer':
                error, limit = worst_error([infer()[:1]], expected), ERROR_BOUNDS['model'][setting.dtype]
                if not error <= limit:
                    raise WrongResult(f'{error:.1e} from float64 in a batch, more than {limit:.0e}')
                return {'ms': within(context, infer)}
            target = torch.randint(model.num_classes, (batch,), device=device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=setting.cuda)

            def train() -> torch.Tensor:
                with setting.autocast():
                    loss = F.cross_entropy(run(images), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            if not train().isfinite():
                raise WrongResult('a loss that is not finite')
            return {'ms': within(context, train)}

        return Contender(row, check, prepare, context)

    rows = measure(
        setting,
        [contender(*which) for which in model_contenders(text, setting, img_size)],
        lambda row: ERROR_BOUNDS['model'][setting.dtype],
    )
    for row in rows:
        if row['status'] == 'ok':
            row['img_per_s'] = round(1e3 * batch / row['ms'], 1)
        if compilation.graphs:  # what a graph allocates it keeps from one call to the next
            row.pop('peak_memory_mib', None)
    return rows
