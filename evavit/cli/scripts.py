"""What starts the programs. The scripts of a clone (train.py) and the commands of an installed package (evavit-train)
call these functions, which return the exit code."""

from importlib import import_module

from evavit.errors import run_script


def train() -> int:
    return _run('train')


def validate() -> int:
    return _run('validate')


def benchmark() -> int:
    return _run('benchmark')


def export() -> int:
    return _run('export')


def _run(name: str) -> int:
    return run_script(import_module(f'evavit.cli.{name}').main)
