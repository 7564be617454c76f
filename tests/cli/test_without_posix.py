"""What Windows lacks is not needed to import the package and to train on a CPU."""

import os
import subprocess
import sys

from runs import MODEL, PATIENCE, QUICK, ROOT, rows


def test_a_run_without_what_windows_lacks(images, tmp_path):
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--workers', '1', '--epochs', '1']
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'without_posix.py'), *map(str, [*MODEL, *QUICK, *place])],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        timeout=300 * PATIENCE,
    )
    assert done.returncode == 0 and 'imported' in done.stdout, done.stdout + done.stderr
    assert [row['epoch'] for row in rows(tmp_path / 'run')] == ['0']
