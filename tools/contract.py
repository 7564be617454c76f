"""Run timm's own model tests on this package's models: `make contract`.

Fetches the source distribution of the installed timm with pip (kept in .contract/), runs its tests/test_models.py with
our models in timm's families (timm_backend.py), and fails on any failure and on any test below that did not run.
"""
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import timm

TOOLS = Path(__file__).resolve().parent
CACHE = TOOLS.parent / '.contract'

MODELS = ('eva_deit_tiny', 'eva_deit_small', 'eva_deit_tiny_784', 'eva_pvt_v2_b3')
# name of the test: batch size in its id, or None
TESTS = {
    'test_model_forward': 1,
    'test_model_backward': 2,
    'test_model_default_cfgs_non_std': 1,
    'test_model_forward_torchscript': 1,
    'test_model_forward_intermediates_features': 1,
    'test_model_forward_intermediates': 1,
    'test_prune_intermediate_layers_contract': None,
    'test_model_forward_fx': 1,
    'test_model_backward_fx': 2,
    'test_model_forward_fx_torchscript': 1,
}


def expected_tests():
    """Ids of the tests that have to pass."""
    return {f'{test}[{model}]' if batch is None else f'{test}[{batch}-{model}]'
            for test, batch in TESTS.items() for model in MODELS}


def fetch_timm(version: str) -> Path:
    """Folder of timm's unpacked source distribution."""
    source = CACHE / f'timm-{version}'
    if not (source / 'tests' / 'test_models.py').exists():
        CACHE.mkdir(exist_ok=True)
        subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
                        '--dest', str(CACHE), f'timm=={version}'], check=True)
        with tarfile.open(CACHE / f'timm-{version}.tar.gz') as archive:
            if hasattr(tarfile, 'data_filter'):
                archive.extractall(CACHE, filter='data')
            else:
                archive.extractall(CACHE)
    return source


def main() -> int:
    source = fetch_timm(timm.__version__)
    report = CACHE / 'report.xml'
    report.unlink(missing_ok=True)
    environment = dict(os.environ, TORCH_BACKEND='timm_backend', PYTHONPATH=str(TOOLS), TIMEOUT='600')
    environment.pop('GITHUB_ACTIONS', None)  # timm leaves tests out where it is set
    pytest = subprocess.run(
        [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-q', '-k', ' or '.join(MODELS),
         '-p', 'no:cacheprovider', '-W', 'ignore', f'--junitxml={report}'],
        cwd=source, env=environment)

    if not report.exists():
        print(f'contract: pytest ended with {pytest.returncode} and wrote no report')
        return 1
    cases = list(ElementTree.parse(report).iter('testcase'))
    passed = {case.get('name') for case in cases if len(case.findall('*')) == len(case.findall('system-out'))}
    missing = sorted(expected_tests() - passed)
    print(f'contract: timm {timm.__version__}, {len(passed)} of its tests passed on {len(MODELS)} models, '
          f'{len(expected_tests())} listed')
    for name in missing:
        print(f'contract: did not pass: {name}')
    return 1 if missing or pytest.returncode else 0


if __name__ == '__main__':
    sys.exit(main())
