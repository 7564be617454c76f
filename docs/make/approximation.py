#!/usr/bin/env python3
"""How near each attention comes to a trained softmax, for docs/evidence.md: python docs/make/approximation.py

Draws docs/images/approximation.svg from results/approximation_h200.csv, with the plot of the program that wrote it,
experiments/tiny_imagenet/approximation.py. `tables.py` writes the table. Needs matplotlib.
"""

import argparse
import importlib.util
import sys

import pages

from evavit.layers import ATTENTIONS

FILE = 'approximation_h200.csv'
PLOT = pages.ROOT / 'docs' / 'images' / 'approximation.svg'
SIZES = (4, 16, 64)  # tokens of a window, landmarks or chunks, and cells
NAMES = {
    'eva': '`eva`, as published',
    'eva_converted': '`eva`, as `convert_vit` starts',
    'mean': 'the mean of all values',
}


def errors(size: int) -> dict:
    """The relative error of each attention where a token sees `size` others or summaries; EVA as many of both."""
    found = {row['run']: float(row['error']) for row in pages.read_results(FILE)}
    names = [name for name in dict.fromkeys((*NAMES, *ATTENTIONS)) if name != 'softmax']
    suffixes = {'mean': '', 'eva': f'-E{size}-C{size}', 'eva_converted': f'-E{size}-C{size}'}
    return {name: found[name + suffixes.get(name, f'-E{size}')] for name in names}


def table() -> str:
    """Relative error of every attention: a row each, the nearest at 16 first."""
    of_size = [errors(size) for size in SIZES]
    names = sorted(of_size[0], key=of_size[1].__getitem__)
    lines = [[NAMES.get(name, f'`{name}`'), *(f'{found[name]:.2f}' for found in of_size)] for name in names]
    origins = pages.origins(pages.read_results(FILE))
    return f'{pages.table(["attention", *map(str, SIZES)], lines)}\n\n{origins}'


def draw() -> None:
    """The error by layer, and EVA's over its windows and cells."""
    import matplotlib

    matplotlib.rcParams['svg.hashsalt'] = 'approximation'  # the same file from the same numbers
    path = pages.ROOT / 'experiments' / 'tiny_imagenet' / 'approximation.py'
    spec = importlib.util.spec_from_file_location('experiment', path)
    assert spec is not None and spec.loader is not None
    experiment = importlib.util.module_from_spec(spec)
    sys.modules['experiment'] = experiment
    spec.loader.exec_module(experiment)
    experiment.plot(pages.read_results(FILE), PLOT)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    draw()
    print(table())


if __name__ == '__main__':
    main()
