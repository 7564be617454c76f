"""Settings gone bad, drawn from the table of options and a list of contradictions, for tests."""

import random
from itertools import pairwise

import yaml

from evavit.training.config import OPTIONS, options_of

WRONG = {  # texts that a flag could carry, values that YAML could
    int: (['ten', '2.5', '1e3', '0x10', '--', '4,5', '', 'None'], ['ten', 2.5, [4], {'a': 1}, True, float('nan')]),
    float: (['fast', '1,5', 'nan', 'inf', '-inf', '', '1e', '0.1.2'], ['fast', [0.1], {'a': 1}, True, float('inf')]),
    bool: ([], ['perhaps', 1, 0, 'true', [True], {'on': 1}, 0.5]),
    str: ([], [['a'], {'a': 1}, True]),
    dict: (['depth', '=3', 'depth:3'], ['depth', 3, ['depth=3'], {3: 4}, True]),
}

# Each is wrong in itself, whatever the data: flags beside those of the base.
CONTRADICTIONS = (
    '--mixup 0.2 --num-classes 1',
    '--cutmix 1 --num-classes 1',
    '--mixup 0.2 -b 5',
    '--cutmix 1.0 -b 3',
    '--global-batch-size 1024',
    '--global-batch-size 7',
    '--global-batch-size 8 --grad-accum-steps 3',
    '--warmup-epochs 2',
    '--warmup-epochs 50',
    '--pretrained --initial-checkpoint x.pth',
    '--initial-checkpoint x.pth --pretrained-path y.pth',
    '--initial-checkpoint nowhere.pth',
    '--pretrained-path nowhere.pth',
    '--resume nowhere.pth.tar',
    '--resume auto',
    '--no-resume-opt',
    '--torchcompile-mode max-autotune',
    '--torchcompile inductr',
    '--torchcompile reduce-overhead --torchcompile-mode default',
    '--bce-target-thresh 0.2',
    '--smoothing 1',
    '--clip-grad 0',
    '--sched step --decay-epochs 0',
    '--sched step',
    '--sched multistep',
    '--sched multistep --decay-milestones 5 9',
    '--sched multistep --decay-milestones 1 1',
    '--ratio 0 1',
    '--ratio 2 1',
    '--scale 0.9 0.1',
    '--scale 0 0',
    '--scale 0.5 20',
    '--opt adamv',
    '--opt adahessian',
    '--opt-betas 0.9',
    '--opt-betas 0.9 0.99 0.999',
    '--opt-betas 0.9 1.0',
    '--opt sgd --opt-betas 0.9 0.999',
    '--mean 0.5 0.5',
    '--mean 0.5 0.5 0.5 0.5',
    '--std 0 0 0',
    '--std 0.2 0.2',
    '--mean 127 127 127',
    '--std 58 58 58',
    '--in-chans 1 --mean 0.5 0.5 0.5',
    '--in-chans 1 --input-size 3 16 16',
    '--img-size 16 --input-size 3 32 32',
    '--input-size 4 16 16',
    '--img-size 15',
    '--img-size 32',
    '--img-size 3',
    '--crop-pct 20',
    '--dataset folder',
    '--dataset torch/imagenett',
    '--dataset hfd/cats',
    '--dataset tar/x',
    '--dataset torch/',
    '--dataset wds/x --aug-repeats 3',
    '--data-dir /nowhere/at/all',
    "--data-dir ''",
    '--class-map classes.pkl',
    '--class-map nowhere.txt',
    '--output /dev/null',
    '--output /dev/null/runs',
    '--device gpu',
    '--device cuda:x',
    '--device mps',
    '--aa random',
    '--aa rand-m9-foo3',
    '--model eva_deit_tinny',
    "--model ''",
    '--model timm/resnet18',
    '--model resnet1',
    '--no-aug --aa rand-m9-mstd0.5-inc1',
    '--no-aug --reprob 0.25',
    '--lr 1e-3 --min-lr 1e-2',
    '--model-ema-warmup',
    '--mixup-off-epoch 1',
    '--layer-decay 0',
    '--weight-decay inf',
    '--model-kwargs window_sise=2',
    '--model-kwargs window_size=two',
    '--model-kwargs window_size=0 partition_grid=0',
    '--model-kwargs window_size=-1',
    '--model-kwargs depth=-1',
    '--model-kwargs depth=2.5',
    '--model-kwargs num_heads=0',
    '--model-kwargs num_heads=5',
    '--model-kwargs embed_dim=0',
    '--model-kwargs embed_dim=15',
    '--model-kwargs patch_size=0',
    '--model-kwargs patch_size=32',
    '--model-kwargs num_classes=5',
    '--model-kwargs device=meta',
    '--model-kwargs drop_path_rate=0.1',
    '--model-kwargs in_chans=4',
    '--model-kwargs partition_grid=-2',
    '--model-kwargs global_pool=maximum',
    '--model-kwargs mlp_ratio=wide',
    '--model-kwargs noise_std=loud',
    '--model-kwargs act_layer=nonsense',
    '--model-kwargs norm_layer=nonsense',
    '--model vit_tiny_patch16_224 --model-kwargs windows=7',
    '--model resnet18 --drop-path 2',
    '--model resnet18 --model-kwargs layers=3',
    '--model vgg11 --grad-checkpointing',
    "--train-split ''",
    '--experiment ..',
    '--amp --amp-dtype int8',
    '--amp=maybe',
    '--workers -1',
    '--epochs',
    '--lr 1e-3 1e-4',
    '--opt-betas',
    '--model-kwargs',
    'extra',
    '-b 4 -z',
    '-c',
    '-c nowhere.yaml',
    '-c /dev',
    *(f'{flag} {"x" * 300}' for flag in ('--data-dir', '--output', '--experiment', '--resume', '--class-map')),
    '--validation-batch-size 0',
    '-vb x',
    '--seed -1',
    '--seed 99999999999',
    '--max-bad-images 5',
    '--epochs ２４',
    '--epochs 2_4',
    '--epochs 0x10',
    '--epochs 10000000000000',
    '--lr 1_0',
    '--lr １.5',
    '--seed 1:30',
    '--model-kwargs depth=2_4',
    '--model-kwargs mlp_ratio=(1_0,)',
    '--model-kwargs depth=1000000000',
    '--model-kwargs depth={[]:1}',
    f'--model-kwargs depth={"(" * 500}',
    f'--model-kwargs depth={"9" * 5000}',
    f'--checkpoint-interval {"9" * 400}',
    f'--checkpoint-interval {"9" * 400}m',
    '--checkpoint-interval ５',
    '--recount 1000000',
    '--aug-repeats 1000000',
    '--workers 3000',
    '--aa rand-m9-n1000000',
    '--aa rand-m9-n２',
    '--aa rand-m9-n1_0',
    '--aa rand-m9-mstd.-inc1',
    '--aa augmix-a0',
    '--aa augmix-w0',
    '--color-jitter 1e308',
    '--aa augmix-m5-w1000000',
    '--aa augmix-m5-d1000000',
    f'--aa rand-m{"9" * 400}',
    '--experiment /somewhere/else',
    '--experiment .',
    '--experiment a/../../b',
    '--model hf-hub:someone/model',
    '--model HF_Hub:someone/model',
    '--pretrained',
    '--warmup-epochs 1 --warmup-lr 1e-2',
    '--decay-rate 1e300',
    '-c /dev/zero',
    f'--opt {"x" * 5000}',
)

# Each names the one before ten times: written out, the last would have 10 ** 9 values.
TEN = [(b, ', '.join(['*' + a] * 10)) for a, b in pairwise('abcdefghij')]
BOMB = '[' + ', '.join(['&a [1]', *(f'&{b} [{ten}]' for b, ten in TEN)]) + ']'

BROKEN_FILES = (
    'lr: [0.1',
    'lr: 0.1\nlr: 0.2',
    '- lr\n- epochs',
    'just words',
    '42',
    'lr: 0.1\n\tepochs: 3',
    'lr 0.1',
    'lr: : 3',
    '{lr: 0.1',
    'model_kwargs:\n  depth: 1\n  depth: 2',
    'lr: !!python/object:os.system x',
    '? [a, b]\n: 3',
    '*anchor',
    'lr: &a [*a]',
    '!!binary |\n  aGVsbG8=',
    '%YAML 9.9\n---\nlr: 0.1',
    '---\nlr: 0.1\n---\nlr: 0.2',
    '3: 4',
    'null: 1',
    'true: yes',
    'lr: 2001-01-01',
    '"lr: 0.1',
    'lr: |\n  fast',
    'lr: !!float x',
    'epochs: !!timestamp x',
    'experiment: 2026-13-45',
    'epochs: ' + 5000 * '9',
    2000 * '[',
    'experiment: "a\\0b"',
    'class_map: "\\ud800.txt"',
    'epochs: 1:30',
    'epochs: 2_4',
    'epochs: ２４',
    'epochs: 0x10',
    'epochs: 0b11',
    'epochs: !!int 1:30',
    'epochs: !!int 0x10',
    'lr: 1_0.5',
    'lr: 190:20:30.15',
    'lr: !!float 1_0.5',
    'lr: 0x' + 5000 * 'f',
    f'lr: {BOMB}',
    f'mean: {BOMB}',
    f'model: {BOMB}',
    f'amp: {BOMB}',
    f'model_kwargs: {BOMB}',
    f'model_kwargs: {{depth: {BOMB}}}',
    f'{{{BOMB}: 1}}',
    'a: &a {lr: 1}\n' + '\n'.join(f'{b}: &{b} {{<<: [{ten}]}}' for b, ten in TEN),
    'model_kwargs: &a {depth: *a}',
    'experiment: "a\\nb"',
    'experiment: "a\\e[2J"',
    f'experiment: {5000 * "x"}',
    f'{5000 * "x"}: 1',
    f'checkpoint_interval: {400 * "9"}',
    f'lr: {[[[[["x" * 900] * 50] * 50]]]}',
)


def mutations(count, seed=0):
    """`count` bad settings as (name, YAML text or None, flags): all of the two lists, the rest drawn."""
    rng = random.Random(seed)
    cases = [(f'flags {flags}', None, _words(flags)) for flags in CONTRADICTIONS]
    cases += [(f'file {text!r}', text, []) for text in BROKEN_FILES]
    drawn = set()
    while len(cases) < count:
        option = rng.choice([option for option in OPTIONS if 'train' in option.scripts])
        case = rng.choice((_type, _type, _range, _choice, _typo, _count))(option, rng)
        if case and str(case) not in drawn:
            drawn.add(str(case))
            text, flags = case
            cases.append((f'{option.name}: {text or flags}', text, flags))
    return cases[:count]


def _words(flags):
    return [word.strip("'") for word in flags.split(' ')]


def _either(option, values, rng):
    """As a key of YAML or as a flag."""
    if rng.random() < 0.5:
        return yaml.safe_dump({option.name: values}), []
    values = values if isinstance(values, list) else [values]
    return None, [option.flag, *map(str, values)]


def _listed(option, value):
    return value if option.count is None else [value] * (2 if option.count == '+' else option.count)


def _type(option, rng):
    texts, values = WRONG[option.type]
    if texts and rng.random() < 0.5 and option.bare is None:
        values = _listed(option, rng.choice(texts))
        return None, [option.flag, *map(str, values if option.count else [values])]
    value = rng.choice(values)
    if option.type is str and option.count is None and not isinstance(value, (list, dict, bool)):
        return None
    return yaml.safe_dump({option.name: value if option.type is dict else _listed(option, value)}), []


def _range(option, rng):
    bounds = [(sign, bound) for sign, bound in ((-1, option.low), (1, option.high)) if bound is not None]
    if not bounds:
        return None
    sign, bound = rng.choice(bounds)
    # Beside 1e30 a step of 1 is none.
    step = rng.choice((1, 1000)) if option.type is int else rng.choice((1e-3, 0.5, 1e6)) * max(1, abs(bound))
    return _either(option, _listed(option, bound + sign * step), rng)


def _choice(option, rng):
    if not option.choices or option.type is not str:
        return None
    return _either(option, _misspelt(rng.choice(option.choices), rng, option.choices), rng)


def _typo(option, rng):
    name = _misspelt(option.name, rng, options_of('train'))
    value = option.default if option.default is not None else 1
    if rng.random() < 0.5:
        return yaml.safe_dump({name: value}), []
    return None, ['--' + name.replace('_', '-'), '1']


def _count(option, rng):
    if option.count is None:
        return (yaml.safe_dump({option.name: [option.low or 1] * 2}), []) if option.type in (int, float) else None
    return _either(option, [0.5] * rng.choice((5, 7)), rng) if option.count != '+' else (f'{option.name}: []', [])


def _misspelt(word, rng, known):
    while True:
        place = rng.randrange(len(word))
        kind = rng.randrange(4)
        letter = rng.choice('abcdefghijklmnopqrstuvwxyz')
        new = (
            word[:place] + word[place + 1 :],
            word[:place] + letter + word[place:],
            word[:place] + letter + word[place + 1 :],
            word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :],
        )[kind]
        if new and new not in known and new.strip('_-') == new:
            return new
