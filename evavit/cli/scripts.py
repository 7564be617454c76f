"""What starts the programs. The scripts of a clone (train.py) and the commands of an installed package (evavit-train)
call these functions, which return the exit code."""

from importlib import import_module
from typing import Optional, Sequence

from evavit.errors import UserError, run_script
from evavit.ops.backends import check_environment


def train() -> int:
    return _run('train')


def validate() -> int:
    return _run('validate')


def benchmark() -> int:
    return _run('benchmark')


def export() -> int:
    return _run('export')


def _run(name: str) -> int:
    main = import_module(f'evavit.cli.{name}').main

    def checked(argv: Optional[Sequence[str]] = None) -> None:
        try:
            check_environment()
        except ValueError as error:
            raise UserError(str(error)) from error
        main(argv)

    return run_script(checked)
