"""`python -m evavit.compare`: errors of the attentions against softmax, see `evavit/bench/compare.py`."""

import sys

from evavit.bench.compare import main
from evavit.errors import run_script

if __name__ == '__main__':
    sys.exit(run_script(main))
