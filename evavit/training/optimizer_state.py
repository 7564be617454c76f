"""The state of an optimizer in a checkpoint: believed only after it has been checked, as the rest in `contents`, and
fit to the optimizer of the run that goes on."""

import contextlib
import copy
from typing import Any, Dict, Iterator, Tuple

import torch

from evavit.models._weights import strange
from evavit.training.sections import is_number, is_plain, is_whole

# What the flags decide in an optimizer; "fused" follows the device, see `build.build_optimizer`.
FROM_FLAGS = ('lr', 'initial_lr', 'lr_scale', 'weight_decay', 'betas', 'eps', 'momentum', 'fused')


def judged_optimizer(optimizer: Any) -> Iterator[Tuple[str, Any, bool]]:
    """(name, value, whether an optimizer can have it) of an `Optimizer.state_dict` and the values in it; None is none.

    Whoever goes on after a value that is not right may meet what is no state at all.
    """
    yield 'optimizer', optimizer, optimizer is None or _is_optimizer(optimizer)
    if optimizer is None:
        return
    if 'rng_state' in optimizer:  # of timm's Kron
        yield 'optimizer.rng_state', optimizer['rng_state'], _is_generator(optimizer['rng_state'])
    for kind, entries in (
        ('param_groups', enumerate(optimizer['param_groups'])),
        ('state', optimizer['state'].items()),
    ):
        for number, entry in entries:
            for name, value in entry.items():
                for part in _parts(value):
                    yield f'optimizer.{kind}[{number}].{name}', part, _is_computed(name, part)


def _is_kept(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, torch.dtype))


def _is_optimizer(state: Any) -> bool:
    """The form of `Optimizer.state_dict`: parameters are numbered through the groups, and have a state by number."""
    if not isinstance(state, dict) or not isinstance(state.get('state'), dict):
        return False
    groups = state.get('param_groups')
    if not isinstance(groups, (list, tuple)) or not groups or not is_plain(groups, _is_kept):
        return False
    if not all(isinstance(group, dict) and isinstance(group.get('params'), (list, tuple)) for group in groups):
        return False
    numbers = [number for group in groups for number in group['params']]
    return (
        numbers == list(range(len(numbers)))
        and all(is_whole(number, 0, len(numbers) - 1) for number in state['state'])
        and all(isinstance(entry, dict) and is_plain(entry, _is_kept) for entry in state['state'].values())
    )


def _is_generator(state: Any) -> bool:
    """What `random.Random.getstate` gives: version, 624 words and the place among them, and what `gauss` has left."""
    if not isinstance(state, tuple) or len(state) != 3 or state[0] != 3 or not isinstance(state[1], tuple):
        return False
    (*words, place), left = state[1] or (None,), state[2]
    return (
        len(words) == 624
        and all(is_whole(word, 0, 2**32 - 1) for word in words)
        and any(words)  # of zeros all draws would be zero
        and is_whole(place, 0, 624)
        and (left is None or (type(left) is float and is_number(left)))
    )


def _parts(value: Any) -> Iterator[Any]:
    """The values in lists and dictionaries, however deep."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, (dict, list, tuple)):
            rest += item.values() if isinstance(item, dict) else item
        else:
            yield item


def _is_computed(name: str, value: Any) -> bool:
    """Whether an optimizer can have computed this: finite, and no count of steps or mean of squares below zero."""
    positive = name == 'step' or name == 'square_avg' or 'avg_sq' in name
    if type(value) in (int, float):
        return is_number(value) and (value >= 0 or not positive)
    if not isinstance(value, torch.Tensor):
        return True
    if strange(value) or any(size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True)):
        return False  # elements that share their memory cannot be updated in place
    return bool(value.isfinite().all() and (not positive or value.is_complex() or (value >= 0).all()))


def fit_state(state: Dict[str, Any], optimizer: torch.optim.Optimizer, updates: int, skipped: int) -> None:
    """ValueError where a judged state is not one of this optimizer after so many updates, of which the last `skipped`
    were skipped. What the flags decide in it becomes the optimizer's."""
    groups = optimizer.param_groups
    if len(groups) != len(state['param_groups']):
        raise ValueError(
            f'it has {len(state["param_groups"])} groups of parameters, this run {len(groups)} '
            f'(--layer-decay, --weight-decay 0)'
        )
    if lacking := optimizer.state_dict().keys() - state.keys():  # such as the generator's state of timm's Kron
        raise ValueError(f'its optimizer lacks {", ".join(sorted(lacking))}')
    after = _after_a_step(optimizer)
    for group, saved, tried in zip(groups, state['param_groups'], after.get('param_groups', groups), strict=True):
        for name, value in group.items():
            if name in FROM_FLAGS or isinstance(value, (bool, torch.dtype)) or name not in saved:
                saved[name] = value
        for name, value in tried.items():
            first = skipped and saved.get(name) is None  # Lamb and Adan write it in their first step
            if not first and (is_number(value) or isinstance(value, torch.Tensor)):
                _check_form(name, saved.get(name), value)
        for name in saved.keys() - group.keys() - tried.keys():
            if not (saved[name] is None or isinstance(saved[name], bool) or is_number(saved[name])):
                raise ValueError(f'its {name} is {_form(saved[name])}, not a number')
            if after or name == 'lr_scale':  # nothing of this run's: a scheduler would multiply by it
                del saved[name]
    expected = after.get('state', {})
    for number, entry in state['state'].items():
        for name, value in expected.get(number, {}).items():
            _check_form(f'{name} of parameter {number}', entry.get(name), value)
    # A skipped update may be the first of its optimizer, which with --no-resume-opt begins within a run.
    if updates and not skipped and any(expected.values()) and not state['state']:
        raise ValueError(f'it lacks the state of the optimizer after {updates} updates')


def _after_a_step(optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """The state dict of a fresh optimizer after a step, empty where a copy of it cannot make one: on parameters without
    content, or of zeros."""
    for device in ('meta', 'cpu'):
        memo: Dict[int, Any] = {}
        for parameter in (parameter for group in optimizer.param_groups for parameter in group['params']):
            twin = torch.nn.Parameter(torch.zeros_like(parameter, device=device))
            twin.grad = torch.ones_like(twin)
            memo[id(parameter)] = twin
        with contextlib.suppress(Exception):  # such as those that ask for a value, which only the CPU has
            trial = copy.deepcopy(optimizer, memo)
            for group in trial.param_groups:
                group.update((name, False) for name in ('fused', 'foreach') if name in group)
            trial.step()
            return trial.state_dict()
    return {}


def _check_form(name: str, value: Any, expected: Any) -> None:
    if _form(value) != _form(expected):
        raise ValueError(f'its {name} is {_form(value)}, not {_form(expected)}')


def _form(value: Any) -> str:
    """Shape and type of a value in an optimizer's state, for comparison."""
    if isinstance(value, torch.Tensor):
        return f'{"×".join(map(str, value.shape)) or "a number"} of {str(value.dtype)[6:]}'
    if isinstance(value, (list, tuple)):
        return f'[{", ".join(map(_form, value))}]'
    return 'a number' if is_number(value) else 'missing' if value is None else type(value).__name__
