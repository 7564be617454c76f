"""What starts the programs. The scripts of a clone (train.py) and the commands of an installed package (evavit-train)
call these functions, which return the exit code."""

import ast
import contextlib
import os
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

from evavit.arguments import asks_for_help
from evavit.errors import INTERRUPTED, UserError, one_line, print_anything, run_script
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
        with _quiet_interrupt():
            from evavit.training.distributed import check_backend

            main = import_module(f'evavit.cli.{name}').main
        check_backend()
        main(argv)

    return run_script(checked)


@contextlib.contextmanager
def _quiet_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once, while libraries load: NumPy makes an ImportError of a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # which signals do not reach
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _list_flags(name: Any) -> int:
    """--help, without the program itself and `run_script`, which load PyTorch and timm."""
    print_anything()
    source = Path(__file__).with_name(f'{name}.py').read_text(encoding='utf-8')
    try:
        parse_settings(name, description=ast.get_docstring(ast.parse(source)))
    except UserError as error:  # of a flag before --help
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 2
    return 0
