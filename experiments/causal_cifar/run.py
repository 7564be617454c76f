#!/usr/bin/env python3
"""Causal EVA as a model of images: python experiments/causal_cifar/run.py --data-dir CIFAR10

    python experiments/causal_cifar/run.py --data-dir CIFAR10 --list
    python experiments/causal_cifar/run.py --data-dir CIFAR10 --seconds 500 --results-file FILE.csv
    python experiments/causal_cifar/run.py --report --results-file FILE.csv

A picture of CIFAR-10 is 3,072 bytes, and a Transformer predicts each from those before it. Causal EVA and causal
softmax attention, of the same size by causal_cifar.yaml, train for the same number of seconds (--budget; 3,600). A row
of --results-file tells the tokens seen, the tokens a second, and the bits a dimension of the 10,000 test pictures, read
once at the end. curve.csv in the run's folder has the bits of training over seconds and tokens. CIFAR10 is CIFAR-10 in
one of the forms that experiments/cifar.py reads.

The clock stands still while a run compiles, saves and is judged. The rate follows the seconds, so both end their
schedule. After a stop (SIGTERM, or --seconds are over) the same command goes on from the last checkpoint, no older than
a minute and log_updates updates. A name such as eva-3600s-s0 says: attention, budget, seed.
"""

import csv
import io
import math
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import yaml

from evavit.errors import Preempted, UserError, first_line, run_script
from evavit.files import replacing, stamp
from evavit.training.build import check_finite
from evavit.training.config import read_mapping
from evavit.training.contents import is_number, is_plain, is_whole, read_archive
from evavit.training.distributed import seed_at, start_process
from evavit.training.signals import SignalHandler

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / 'causal_cifar.yaml'
sys.path.append(str(HERE.parent))

from causal_cifar.model import TOKENS, ByteModel  # noqa: E402
from cifar import read_cifar10  # noqa: E402
from driver import (  # noqa: E402
    ABOUT,
    about,
    beside,
    chosen,
    drive,
    finished,
    keep,
    make_output,
    parser_of,
    rows_to_report,
    save_plot,
    stopping_after,
    write_number,
)

ATTENTIONS, SEEDS = ('eva', 'softmax'), 3
SIZES = ('dim', 'depth', 'num_heads', 'window_size', 'cell_size', 'drop')  # settings of the model
CURVE = ('update', 'seconds', 'tokens', 'bits')
COLUMNS = (
    'run',
    'attention',
    'budget',
    'seed',
    'parameters',
    'updates',
    'tokens',
    'epochs',
    'tokens_per_second',
    'train_bits',
    'test_bits',
    'images',
    'memory_gib',
    'seconds',
    *ABOUT,
)
clock = time.perf_counter  # of training


class Job(NamedTuple):
    attention: str
    budget: float
    seed: int

    @property
    def name(self):
        return f'{self.attention}-{self.budget:g}s-s{self.seed}'


@cache
def pictures(folder, split, device):
    """Bytes `(N, 3072)` of a split, uint8 on the device."""
    return torch.from_numpy(read_cifar10(folder, split)[0]).flatten(1).to(device)


def bits(model, batch):
    """Bits a dimension of pictures, the mean over a batch, with the gradient."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        logits = model(batch.long())
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.flatten().long()) / math.log(2)


def rate(share, settings):
    """The learning rate where a share of the budget is over: a tenth of lr at both ends."""
    if share < settings['warmup']:
        return settings['lr'] * (0.1 + 0.9 * share / settings['warmup'])
    done = (share - settings['warmup']) / (1 - settings['warmup'])
    return settings['lr'] * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


class Training:
    """A run under way: the model, its optimizer and how far they are."""

    def __init__(self, job, settings, device):
        torch.manual_seed(job.seed)
        self.job, self.settings, self.device = job, settings, device
        self.model = ByteModel(job.attention, **{name: settings[name] for name in SIZES}).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [dict(params=matrices, weight_decay=settings['weight_decay']), dict(params=others, weight_decay=0.0)],
            betas=settings['betas'],
            fused=device.type == 'cuda',
        )
        self.update, self.seconds, self.curve = 0, 0.0, []
        if device.type == 'cuda':
            for block in self.model.blocks:  # one by one: they are alike, so that a single one is compiled
                block.compile(dynamic=False)

    @property
    def tokens(self):
        return self.update * self.settings['batch_size'] * TOKENS

    def save(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), settings=self.settings)
        state |= dict(update=self.update, seconds=self.seconds, curve=self.curve)
        with replacing(path, durable=True) as partial:
            torch.save(state, partial)
            stamp(partial)

    def load(self, path):
        state = read_archive(path)
        try:
            if state['settings'] != self.settings:
                changed = [name for name in self.settings if state['settings'].get(name) != self.settings[name]]
                raise UserError(f'{path}: was trained with another {", ".join(changed)}; name another --output')
            check_finite(state['model'], path)
            self.model.load_state_dict(state['model'])
            self.optimizer.load_state_dict(state['optimizer'])
            self.update, self.seconds, self.curve = state['update'], state['seconds'], state['curve']
            if not (is_whole(self.update) and is_number(self.seconds) and is_plain(self.curve)):
                raise ValueError('its position is none')
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f'{path}: not a checkpoint of this program ({first_line(error)[:200]})') from error

    def train(self, data, path):
        """Train until the budget is over. Raises Preempted where a signal asks to stop, after saving."""
        self.model.train()
        with SignalHandler('1m') as signals:
            bits(self.model, data[: self.settings['batch_size']]).backward()  # compiles
            self.optimizer.zero_grad()
            while self.seconds < self.settings['budget']:
                self._round(data)
                save, stop = signals.poll(self.update, last=False)
                if save or stop:
                    self.save(path)
                if stop:
                    raise Preempted(f'asked to stop after {self.seconds:.0f} of {self.settings["budget"]:g} s')
        self.save(path)

    def _round(self, data):
        """`log_updates` updates, and a row of the curve."""
        settings, losses = self.settings, []
        torch.manual_seed(seed_at(self.job.seed, self.update))  # a run that goes on draws what it would have drawn
        self._wait()
        began = clock()
        for group in self.optimizer.param_groups:
            group['lr'] = rate(self.seconds / settings['budget'], settings)
        for _ in range(settings['log_updates']):
            batch = data[torch.randint(len(data), (settings['batch_size'],)).to(self.device)]
            loss = bits(self.model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings['clip_grad'])
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        self._wait()
        self.seconds += clock() - began
        self.update += settings['log_updates']
        found = torch.stack(losses).mean().item()
        if not math.isfinite(found):
            raise UserError(f'{self.job.name}: the loss is {found} at update {self.update}; lower lr in the YAML file')
        self.curve.append([self.update, round(self.seconds, 3), self.tokens, round(found, 5)])
        print(f'{self.seconds:8.0f} s  update {self.update}  {found:.4f} bits a dimension', flush=True)

    def _wait(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def judge(training, data):
    """Bits a dimension of all pictures."""
    model = training.model.eval()
    total = sum(bits(model, batch).double() * len(batch) for batch in data.split(training.settings['batch_size']))
    return total.item() / len(data)


def read_settings(path):
    """A YAML file with the keys of causal_cifar.yaml; UserError where it has others, or lacks one."""
    found, own = read_mapping(path), read_mapping(SETTINGS)
    if differs := ', '.join(sorted(map(str, own.keys() ^ found.keys()))):
        raise UserError(f'{path}: takes the keys of {SETTINGS.name}, no more and no less; see to {differs}')
    for name, value in found.items():
        values = value if name == 'betas' and isinstance(value, list) and len(value) == 2 else [value]
        right = is_whole if isinstance(own[name], int) and name != 'budget' else is_number
        if not all(map(right, values)) or len(values) != (2 if name == 'betas' else 1):
            raise UserError(f'{path}: {name}: {str(value)[:100]} is no value as in {SETTINGS.name}')
    return found


def run(job, args, seconds_left):
    """Train, judge, and return the row."""
    began, folder, device = time.monotonic(), args.output / job.name, start_process(args.device).device
    training = Training(job, args.settings, device)
    path, data = folder / 'last.pth.tar', pictures(args.data_dir, 'train', device)
    if path.exists():
        training.load(path)
    if not finished(folder, lambda _: training.update):
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        with stopping_after(seconds_left):
            training.train(data, path)
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == 'cuda' else 0
        write_number(folder / 'memory_gib', memory, digits=2)
        write_number(folder / 'train_seconds', training.seconds)
    test = pictures(args.data_dir, 'test', device)
    with replacing(folder / 'args.yaml') as partial:
        partial.write_text(yaml.safe_dump(training.settings, sort_keys=False))
    curve = io.StringIO(newline='')
    csv.writer(curve, lineterminator='\n').writerows([CURVE, *training.curve])
    with replacing(folder / 'curve.csv') as partial:
        partial.write_text(curve.getvalue())
    keep(curve.getvalue().encode(), beside(args, 'curves'), f'{job.name}.csv')
    last = [bits for *_, bits in training.curve[-max(1, len(training.curve) // 20) :]]  # of the last twentieth
    return dict(
        run=job.name,
        attention=job.attention,
        budget=f'{job.budget:g}',
        seed=job.seed,
        parameters=sum(p.numel() for p in training.model.parameters()),
        updates=training.update,
        tokens=training.tokens,
        epochs=round(training.tokens / TOKENS / len(data), 2),
        tokens_per_second=round(training.tokens / training.seconds),
        train_bits=round(sum(last) / len(last), 4),
        test_bits=round(judge(training, test), 4),
        images=len(test),
        memory_gib=(folder / 'memory_gib').read_text(),
        seconds=round(time.monotonic() - began, 1),
        **about(job, folder / 'args.yaml', args, device),
    )


def table(rows):
    """Markdown: a row a run."""
    yield '| attention | seconds | seed | parameters | tokens seen | tokens a second | bits a dimension, test | GiB |'
    yield '|---|---|---|---|---|---|---|---|'
    for row in sorted(rows, key=lambda row: (float(row['budget']), row['attention'], row['seed'])):
        yield (
            f'| {row["attention"]} | {row["budget"]} | {row["seed"]} | {int(row["parameters"]) / 1e6:.2f} M '
            f'| {int(row["tokens"]) / 1e6:,.1f} M | {int(row["tokens_per_second"]):,} | {float(row["test_bits"]):.3f} '
            f'| {row["memory_gib"]} |'
        )


def plot(rows, results):
    """Bits of training over seconds, and over tokens."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout='constrained')
    colours = dict(zip(ATTENTIONS, ('C0', 'C1'), strict=True))
    for row in rows:
        with open(results.parent / 'curves' / f'{row["run"]}.csv', newline='') as file:
            curve = [{name: float(value) for name, value in point.items()} for point in csv.DictReader(file)]
        for panel, name in zip(panels, ('seconds', 'tokens'), strict=True):
            bits = [point['bits'] for point in curve]
            panel.plot([point[name] for point in curve], bits, color=colours[row['attention']], label=row['run'])
            panel.set_xlabel(f'{name} of training')
    panels[0].set_ylabel('bits a dimension, training')
    panels[1].legend()
    save_plot(figure, results)


def main(argv=None):
    parser = parser_of(__doc__, 'output/causal_cifar', 'CIFAR-10 in a form that experiments/cifar.py reads')
    parser.add_argument('--budget', type=float, help='seconds of training a run (those of the YAML file)')
    parser.add_argument('-c', '--config', type=Path, default=SETTINGS, help='the settings')
    parser.add_argument('--device', help='cpu, cuda or cuda:N (cuda where there is one)')
    parser.add_argument('--report', action='store_true', help='print the table and draw the plot beside --results-file')
    args = parser.parse_args(argv)
    args.results_file = args.results_file or args.output / 'runs.csv'
    if args.report and not args.list:
        rows = rows_to_report(args, COLUMNS)
        print('\n'.join(table(rows)))
        plot(rows, args.results_file)
        return
    args.settings = read_settings(args.config)
    if args.budget is not None:
        args.settings['budget'] = args.budget
    if not args.settings['budget'] > 0:
        raise UserError(f'--budget {args.settings["budget"]:g}: must be above 0')
    budget = args.settings['budget']
    jobs = chosen((Job(attention, budget, seed) for seed in range(SEEDS) for attention in ATTENTIONS), args)
    if not args.list:
        if args.data_dir is None:
            raise UserError('give --data-dir CIFAR10, CIFAR-10 in a form that experiments/cifar.py reads')
        make_output(args)
        beside(args, 'curves')
    drive(
        args,
        jobs,
        COLUMNS,
        run=lambda job, rows, left: run(job, args, left),
        says=lambda row: f'{row["test_bits"]} bits a dimension, {row["tokens_per_second"]} tokens a second',
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
