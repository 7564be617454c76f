"""Run one of timm's own scripts with the models of this package: python -m evavit.timm SCRIPT ...

SCRIPT is the path of a script in a clone of timm's repository, pytorch-image-models: pip installs none of them. Its
flags come behind it. timm's train.py needs no such help: it has `--device-modules evavit`.
"""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Optional, Sequence

from evavit.errors import printable

_LAUNCHER = ['-m', 'evavit.timm']


class _Popen(subprocess.Popen):
    """The processes of bulk_runner.py, which are `python -u SCRIPT ...`, run SCRIPT in this way too."""

    def __init__(self, args: Any, *others: Any, **kwargs: Any) -> None:
        words = list(args) if isinstance(args, (list, tuple)) else []
        if words[:2] == [sys.executable, '-u'] and len(words) > 2 and str(words[2]).endswith('.py'):
            args = [*words[:2], *_LAUNCHER, *words[2:]]
        super().__init__(args, *others, **kwargs)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a script as `__main__`, whose errors are its own; the models are registered, as `evavit` has been imported.

    Returns:
        The exit code: 2 after one line where no script is named.
    """
    words: List[str] = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ('-h', '--help'):
        print(__doc__.strip())
        return 0
    if not words or not Path(words[0]).is_file():
        what = f'{printable(words[0][:500])}: no such script' if words else 'no script is named'
        print(
            f"error: {what}; give the path of one in a clone of timm's repository (pip installs none): python -m "
            f'evavit.timm pytorch-image-models/validate.py --model eva_deit_tiny',
            file=sys.stderr,
        )
        return 2
    subprocess.Popen = _Popen  # type: ignore[misc]  # in this process, which is the script from here on
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
