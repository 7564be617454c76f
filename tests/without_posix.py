"""A program for tests: what Windows lacks is taken away, then every module is imported and a tiny run is trained.

    python without_posix.py FLAGS_OF_TRAIN

Loading processes are spawned, as Windows does it. Only the modules of the kernels (triton, gluon, kernels, ops.common)
need Triton, which is gone as well.
"""

import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys

for name in ('fcntl', 'resource', 'triton'):
    sys.modules[name] = None
for name in ('SIGUSR1', 'pthread_sigmask', 'sigwaitinfo'):
    delattr(signal, name)
del os.sched_getaffinity


def main():
    import evavit
    from evavit.cli.scripts import train

    for module in pkgutil.walk_packages(evavit.__path__, 'evavit.'):
        if not {'triton', 'gluon', 'kernels', 'common'} & set(module.name.split('.')):
            importlib.import_module(module.name)
    print('imported')
    return train()


if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    sys.exit(main())
