"""Run timm's own model tests on this package's models: `make contract`, `make contract-all`.

Fetches the source distribution of the installed timm with pip (kept in .contract/), runs its tests/test_models.py with
our models in timm's families (timm_backend.py), and fails on any failure and on any test below that did not run.

Every model with EVA is tested in full, those wider than DeiT-Small on the tests that are cheap and those wider than
DeiT-Base not at all. Every other attention is tested in the first size, `deit_tiny`, on the tests that are cheap. With
--all each model is tested in full, which takes hours of processor time.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import timm

from evavit.layers import ATTENTIONS
from evavit.models import model_names, variants

TOOLS = Path(__file__).resolve().parent
CACHE = TOOLS.parent / '.contract'

# name of the test: batch size in its id, or None
TESTS = {
    'test_model_forward': 1,
    'test_model_backward': 2,
    'test_model_forward_torchscript': 1,
    'test_model_forward_intermediates_features': 1,
    'test_model_forward_intermediates': 1,
    'test_prune_intermediate_layers_contract': None,
    'test_model_forward_fx': 1,
    'test_model_backward_fx': 2,
    'test_model_forward_fx_torchscript': 1,
}
# timm has two tests of configuration and classifier: one for models whose features are a map, one for all others and
# for those named `eva_*`, as a family of its own is.
CFGS, CFGS_NON_STD = (
    {'test_model_default_cfgs': 1, 'test_model_forward_features': 1},
    {'test_model_default_cfgs_non_std': 1},
)
CHEAP = (
    'test_model_forward',
    'test_model_backward',
    'test_model_forward_intermediates_features',
    'test_model_forward_intermediates',
    'test_model_forward_torchscript',
)


def tests_of(model, only=None):
    """Ids of the tests that a model has to pass."""
    is_map = timm.get_pretrained_cfg_value(model, 'pool_size') is not None
    tests = TESTS | (CFGS if is_map and not model.startswith('eva_') else CFGS_NON_STD)
    return {
        f'{test}[{model}]' if batch is None else f'{test}[{batch}-{model}]'
        for test, batch in tests.items()
        if only is None or test in only
    }


def fetch_timm(version: str) -> Path:
    """Folder of timm's unpacked source distribution."""
    source = CACHE / f'timm-{version}'
    if not (source / 'tests' / 'test_models.py').exists():
        CACHE.mkdir(exist_ok=True)
        subprocess.run(
            [
                sys.executable,
                '-m',
                'pip',
                'download',
                '--quiet',
                '--no-deps',
                '--no-binary',
                'timm',
                '--dest',
                str(CACHE),
                f'timm=={version}',
            ],
            check=True,
        )
        with tarfile.open(CACHE / f'timm-{version}.tar.gz') as archive:
            if hasattr(tarfile, 'data_filter'):
                archive.extractall(CACHE, filter='data')
            else:  # Python 3.11.3 and before; it is timm's own release
                archive.extractall(CACHE)
    return source


def chosen(patterns=None, cheap=False):
    """Name of each model to test → the tests, None for all.

    Args:
        patterns: Wildcards of names, ['*'] for every model; None for what the module's docstring says.
        cheap: Of the models that patterns choose, the cheap tests only.
    """
    if patterns is not None:
        only = CHEAP if cheap else None
        return {name: only for name in model_names() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    first = next(iter(variants()))
    widths = {f'eva_{name}': size.model_args.get('embed_dim', 0) for name, size in variants().items()}
    wanted = {name: None if width < 768 else CHEAP for name, width in widths.items() if width < 1024}
    return {**wanted, **{f'{attention}_{first}': CHEAP for attention in ATTENTIONS if attention != 'eva'}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--all', action='store_true', help='every model, in full')
    parser.add_argument('--models', nargs='+', metavar='NAME', help='these models instead, wildcards allowed')
    parser.add_argument('--cheap', action='store_true', help='of --all or --models, the cheap tests only')
    parser.add_argument('--jobs', '-n', default='0', help='processes (pytest-xdist)')
    args = parser.parse_args()
    wanted = chosen(['*'] if args.all else args.models, args.cheap)
    if not wanted:
        print(f'contract: no model is called {" or ".join(args.models)}')
        return 2

    source = fetch_timm(timm.__version__)
    report = CACHE / 'report.xml'
    report.unlink(missing_ok=True)
    environment = dict(
        os.environ,
        TIMEOUT='600',
        CONTRACT=json.dumps(wanted),
        PYTHONPATH=os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get('PYTHONPATH')])]),
    )
    environment.pop('GITHUB_ACTIONS', None)  # timm leaves tests out where it is set
    pytest = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            'tests/test_models.py',
            '-q',
            '-n',
            args.jobs,
            '-p',
            'timm_backend',
            '-p',
            'no:cacheprovider',
            '-W',
            'ignore',
            f'--junitxml={report}',
        ],
        cwd=source,
        env=environment,
    )

    if not report.exists():
        print(f'contract: pytest ended with {pytest.returncode} and wrote no report')
        return 1
    cases = list(ElementTree.parse(report).iter('testcase'))
    passed = {case.get('name') for case in cases if len(case.findall('*')) == len(case.findall('system-out'))}
    expected = set().union(*(tests_of(*item) for item in wanted.items()))
    missing = sorted(expected - passed)
    in_full = [name for name, tests in wanted.items() if tests is None]
    print(
        f'contract: timm {timm.__version__}, {len(passed)} of its tests passed, {len(expected)} listed: '
        f'{len(in_full)} models in full ({", ".join(in_full) or "none"}), {len(wanted) - len(in_full)} on '
        f'{len(CHEAP)} tests ({", ".join(name for name in wanted if name not in in_full) or "none"})'
    )
    for name in missing:
        print(f'contract: did not pass: {name}')
    return 1 if missing or pytest.returncode else 0


if __name__ == '__main__':
    sys.exit(main())
