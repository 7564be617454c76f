"""What starts the programs. The scripts of a clone (train.py) and the commands of an installed package (evavit-train)
call these functions, which return the exit code."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, Sequence

from evavit.arguments import asks_for_help
from evavit.errors import SMALLER, UserError, loaded, one_line, print_anything, quiet_start, run_script, tell
from evavit.training.config import parse_settings


def train() -> int:
    return _run('train')


def validate() -> int:
    return _run('validate')


def inference() -> int:
    return _run('inference')


def benchmark() -> int:
    return _run('benchmark')


def export() -> int:
    return _run('export')


def _run(name: Any) -> int:
    if asks_for_help():
        return _list_flags(name)

    def checked(argv: Optional[Sequence[str]] = None) -> None:
        quiet_start(name)  # also where the process is called otherwise
        from evavit.training.distributed import check_backend

        main = import_module(f'evavit.cli.{name}').main
        loaded()
        check_backend()
        main(argv)

    return run_script(checked, no_memory=SMALLER)


def _list_flags(name: Any) -> int:
    """--help, without the program itself and `run_script`, which load PyTorch and timm."""
    print_anything()
    source = Path(__file__).with_name(f'{name}.py').read_text(encoding='utf-8')
    try:
        parse_settings(name, description=ast.get_docstring(ast.parse(source)))
    except UserError as error:  # of a flag before --help
        tell(f'error: {one_line(error)}')
        return 2
    return 0
