"""What all processes of a run must have alike, compared before the first update: settings, data and code.

Processes that differ here wait for each other for ever, as with another number of batches, or train on in silence, as
with another seed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import timm
import torch

from evavit.arguments import shown
from evavit.errors import SharedError
from evavit.training.config import Config
from evavit.training.distributed import Process
from evavit.version import __version__

OWN = (  # what each machine may have its own way; only the first process writes to `output`
    *('data_dir', 'dataset_download', 'class_map', 'pretrained_path', 'initial_checkpoint', 'checkpoint'),
    *(
        'kd_pretrained_path',
        'output',
        'experiment',
        'resume',
        'results_file',
        'device',
        'workers',
        'pin_mem',
        'stall_timeout',
    ),
)


def code_version() -> str:
    """The versions of what a run computes with. A clone's code changes within a version: its text counts as well."""
    text, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(package.rglob('*.py')):
        text.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return f'evavit {__version__} ({text.hexdigest()[:12]}), torch {torch.__version__}, timm {timm.__version__}'


def check_agreement(process: Process, config: Config, **numbers: Any) -> None:
    """SharedError in all processes where a setting, one of the `numbers` or the code is not the same in each of them.

    Args:
        process: This process.
        config: The settings of its script.
        numbers: More that must be alike, by its name with underscores, such as `training_images`.
    """
    if not process.distributed:
        return
    facts = {name: value for name, value in config.flat().items() if name not in OWN}
    facts |= {name.replace('_', ' '): value for name, value in numbers.items()}
    facts['code'] = code_version()
    text = json.dumps(facts, sort_keys=True, default=str)
    digests = process.gather(hashlib.sha256(text.encode()).digest())
    if len(set(digests)) > 1:
        raise SharedError(_difference(process.gather(json.loads(text))))


def _difference(facts: Sequence[Dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for one in facts for name in one))
    differing = [name for name in names if any(one.get(name) != facts[0].get(name) for one in facts)]
    told = [f'{name} is {_by_value([one.get(name) for one in facts])}' for name in differing[:3]]
    more = f'; {len(differing) - 3} more differ' if len(differing) > 3 else ''
    return f'the processes disagree: {"; ".join(told)}{more}; start all with the same settings, data and code'


def _by_value(values: Sequence[Any]) -> str:
    """'0.1 on ranks 0, 2 and 0.2 on rank 1'"""
    ranks: Dict[str, List[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(shown(value), []).append(rank)
    parts = [
        f'{value} on rank{"s" if len(who) > 1 else ""} {", ".join(map(str, who[:4]))}{" …" if len(who) > 4 else ""}'
        for value, who in list(ranks.items())[:4]
    ]
    return ' and '.join(parts) + (' …' if len(ranks) > 4 else '')
