#!/usr/bin/env python3
"""How good are frozen features? Nearest neighbours among them, without any training.

    python examples/knn.py --weights output/RUN/last.safetensors --model eva_deit_tiny --data-dir DIR

DIR holds train/CLASS/IMAGE and validation/CLASS/IMAGE. A picture's feature is what the classifier would read. Those of
the validation split are judged by the -k nearest of the training split in cosine distance, the nearer ones counting
more. --weights takes what --pretrained-path of train.py takes; without it the features are those of random weights, for
comparison. Other flags are those of validate.py (--model-kwargs, --img-size, --in-chans, --mean, -b, --amp, --device,
--val-fraction and --seed for a folder without splits). Needs scikit-learn.
"""

import logging
import sys

import torch

from evavit.arguments import Parser
from evavit.errors import SMALLER, UserError, run_script
from evavit.training import build, checks, contents, data, dry_run, loop
from evavit.training.config import parse_settings
from evavit.training.data.folders import SPLIT_NAMES
from evavit.training.data.images import UNREADABLE
from evavit.training.distributed import start_process

try:
    from sklearn.metrics import balanced_accuracy_score, f1_score
    from sklearn.neighbors import KNeighborsClassifier
except ModuleNotFoundError:
    raise SystemExit('error: scikit-learn is not installed: pip install scikit-learn') from None

log = logging.getLogger('evavit')

UNUSED = {'checkpoint', 'use_ema', 'results_file', 'report_dir', 'metrics_avg', 'latency'}  # of validate.py's flags


@torch.no_grad()
def features(model, dataset, settings, config, process):
    """Features `(n, C)` and labels `(n)` of a split's readable images, on the CPU."""
    found, labels = [], []
    load = dict(batch_size=settings.batch.batch_size, machine=settings.machine, device=process.device)
    for images, target in data.eval_loader(dataset, config, **load):
        readable = target != UNREADABLE
        with loop.autocast(settings.machine, process.device):
            found.append(model(images)[readable].float().cpu())  # the model has no classifier
        labels.append(target[readable].cpu())
    dataset.bad.review(process)  # names them; too many, by --max-bad-images, are an error
    features = torch.cat(found)
    if not features.isfinite().all():
        raise UserError('the features of the model are not finite; check its weights, or leave --amp out')
    return features, torch.cat(labels)


def judge(settings, k):
    """Top-1, balanced accuracy and macro F1 in percent, and the number of pictures looked up and judged."""
    process = start_process(settings.machine.device, alone='knn.py')
    settings.model.pretrained_path = contents.enter_run_folder(settings.model.pretrained_path)
    torch.manual_seed(0)  # the weights, where no file gives them
    read = dict(in_chans=checks.image_channels(settings.model), batch_size=settings.batch.batch_size)
    read['seed'] = settings.run.seed
    train_set, names = data.open_dataset(settings.data, 'train', **read)
    eval_set, _ = data.open_dataset(settings.data, settings.data.split, class_names=names, **read)
    build.name_converted(settings.model, softmax_too=True)
    model = build.build_model(settings.model, 0, new_head=False).to(process.device).eval()
    path = settings.model.pretrained_path
    if path and (line := dry_run.other_model(path, contents.origin(path), settings.model)):
        log.warning(f'warning: {line}')
    config = data.resolve_input(settings.model, model)
    known, labels = features(model, train_set, settings, config, process)
    asked, truth = features(model, eval_set, settings, config, process)
    if k > len(known):
        raise UserError(f'-k {k}: the training split has {len(known)} images')
    if not len(asked):
        raise UserError(f'--split {settings.data.split}: none of its images can be read; give another')
    guess = KNeighborsClassifier(k, metric='cosine', weights='distance').fit(known, labels).predict(asked)
    scores = (
        float((guess == truth.numpy()).mean()),
        balanced_accuracy_score(truth, guess),
        f1_score(truth, guess, average='macro', zero_division=0),
    )
    return [100 * score for score in scores], len(known), len(asked)


def main(argv=None):
    about = dict(description=__doc__.splitlines()[0], epilog='Its other flags are those of validate.py.')
    parser = Parser(**about)
    parser.add_argument('-k', type=int, default=20, help='neighbours (20)')
    parser.add_argument(
        '--weights', metavar='FILE', help="file of weights, or a run's folder; the classifier is not used"
    )
    args, flags = parser.parse_known_args(argv)
    settings, given = parse_settings('validate', flags, __doc__)
    if unused := sorted(given & UNUSED):
        raise UserError(f'--{unused[0].replace("_", "-")}: knn.py does not take it; weights are given with --weights')
    if args.k < 1:
        raise UserError(f'-k {args.k}: must be at least 1')
    if settings.data.split in SPLIT_NAMES[0]:
        raise UserError(f'--split {settings.data.split}: each picture would be its own nearest; judge another split')
    if not settings.model.model:
        raise UserError('no model: give --model NAME')
    settings.model.pretrained_path = args.weights
    (top1, balanced, macro), known, asked = judge(settings, args.k)
    print(
        f'{args.k} nearest of {known} images, {asked} judged: top-1 {top1:.2f}  balanced accuracy {balanced:.2f}  '
        f'macro F1 {macro:.2f}'
    )


if __name__ == '__main__':
    sys.exit(run_script(main, no_memory=SMALLER))
