"""The state of an optimizer in a checkpoint, believed only after it has been checked, as the rest in `contents`."""

from typing import Any, Iterator, Tuple

import torch

from evavit.models._weights import strange
from evavit.training.sections import is_number, is_plain, is_whole


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
