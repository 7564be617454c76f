"""EVA on sequences: against the loop, causality, padding, one token at a time."""

import pytest
import torch
from helpers import relative_errors, saved_bytes
from ops.eva.references import eva_1d_loop, eva_loop

from evavit.ops import eva_attention_1d, eva_attention_1d_step, halo_size


def make_case(N, *, B=2, h=2, d=4, bias=True, noise=True, **options):
    """(leaves, options) in float64: qkv, summaries, a table of one bias for each offset."""

    def normal(*shape, std=1.0):
        return (std * torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    leaves = {'qkv': normal(3, B, h, N, d)}
    if options['cell_size']:
        for name in ('summary_q', 'summary_k'):
            leaves |= {f'{name}.{i}': normal(*shape, std=0.5) for i, shape in enumerate([(d, d), (d,), (d,), (d,)])}
    if bias and options['window_size']:
        leaves['table'] = normal(4 * options['window_size'], h)
    if noise and options['cell_size']:
        options['noise'] = torch.randn(B, h, -(-N // options['cell_size']), 1, d, dtype=torch.float64)
    return leaves, options


def tensors(leaves):
    return dict(zip('qkv', leaves['qkv'], strict=True)) | {
        name: [value for key, value in leaves.items() if key.startswith(name)] or None
        for name in ('summary_q', 'summary_k')
    }


def dense_bias(leaves, options):
    if 'table' not in leaves:
        return None
    w = options['window_size']
    halo = halo_size(w) if options.get('overlap') else 0
    key = torch.arange(-halo, w + (0 if options.get('causal') else halo))
    return leaves['table'][torch.arange(w)[:, None] - key + 2 * w].permute(2, 0, 1)


def run_op(leaves, options):
    return eva_attention_1d(**tensors(leaves), rel_pos_bias=dense_bias(leaves, options), **options)


def run_loop(leaves, options):
    options = dict(options)
    padding = options.pop('key_padding_mask', None)
    bias = (lambda n, m: leaves['table'][n - m + 2 * options['window_size']]) if 'table' in leaves else None
    return eva_1d_loop(**tensors(leaves), bias=bias, padding=padding, **options)


def check(leaves, options):
    found = relative_errors(run_op(leaves, options), leaves, run_loop(leaves, options), leaves)
    assert max(found.values()) <= 1e-10, found


CAUSAL = [
    dict(window_size=4, cell_size=2),
    dict(window_size=6, cell_size=3, overlap=True),
    dict(window_size=5, cell_size=5),
    dict(window_size=5, cell_size=0, overlap=True),
    dict(window_size=1, cell_size=1, overlap=True),
    dict(window_size=32, cell_size=4, overlap=True),
]
BOTH_WAYS = [
    *CAUSAL,
    dict(window_size=4, cell_size=3, overlap=True),
    dict(window_size=0, cell_size=3),
    dict(window_size=2, cell_size=7, proposal_scale=0.5),
]
ALL = [dict(options, causal=True) for options in CAUSAL] + BOTH_WAYS
IDS = ['-'.join(f'{key}={value}' for key, value in options.items()) for options in ALL]


@pytest.mark.parametrize('N', [13, 1])
@pytest.mark.parametrize('options', ALL, ids=IDS)
def test_matches_the_loop(options, N):
    check(*make_case(N, bias=N == 13, **options))


@pytest.mark.parametrize('options', ALL, ids=IDS)
def test_padding_anywhere_matches_the_loop(options):
    padding = torch.rand(3, 11) < 0.4
    padding[0, :4] = True  # whole chunks and cells, on the left
    padding[1, 5:] = True  # on the right
    padding[:, 4] = False
    check(*make_case(11, B=3, key_padding_mask=padding, **options))


def test_a_sequence_of_padding_alone_is_zero():
    for options in ALL:
        leaves, options = make_case(7, key_padding_mask=torch.tensor([[True] * 7, [False] * 7]), **options)
        with torch.no_grad():
            leaves['qkv'][:, 0] = float('nan')
        output = run_op(leaves, options)
        assert not output[0].any() and output[1].isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), list(leaves.values())))


@pytest.mark.parametrize('options', ALL, ids=IDS)
def test_a_padded_batch_equals_single_sequences(options):
    lengths = [13, 6, 1]
    padding = torch.arange(13) >= torch.tensor(lengths)[:, None]
    leaves, options = make_case(13, B=3, noise=False, **options)
    output = run_op(leaves, dict(options, key_padding_mask=padding))
    for b, length in enumerate(lengths):
        alone = run_op(dict(leaves, qkv=leaves['qkv'][:, b : b + 1, :, :length]), options)
        torch.testing.assert_close(output[b : b + 1, :, :length], alone, rtol=1e-12, atol=1e-12)
        assert not output[b, :, length:].any()


@pytest.mark.parametrize('options', CAUSAL, ids=IDS[: len(CAUSAL)])
def test_a_future_token_changes_no_earlier_output(options):
    leaves, options = make_case(17, **options, causal=True)
    output = run_op(leaves, options)
    for n in range(17):
        changed = leaves['qkv'].detach().clone()
        changed[:, :, :, n:] = 10 * torch.randn_like(changed[:, :, :, n:])
        other = run_op(dict(leaves, qkv=changed), options)
        assert torch.equal(other[:, :, :n], output[:, :, :n])
        assert not torch.equal(other[:, :, n], output[:, :, n])


@pytest.mark.parametrize('options', [options for options in CAUSAL if options['cell_size']])
def test_every_earlier_token_is_seen(options):
    """No hole between the cells and the chunk: the last output depends on the value of every token."""
    leaves, options = make_case(17, **options, causal=True)
    (grad,) = torch.autograd.grad(run_op(leaves, options)[:, :, -1].square().sum(), leaves['qkv'])
    assert (grad[2].abs().sum((0, 1, 3)) > 0).all()


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('options', CAUSAL, ids=IDS[: len(CAUSAL)])
def test_steps_reproduce_the_whole_sequence(options, dtype, bound):
    leaves, options = make_case(19, noise=False, **options)
    leaves = {name: value.detach().to(dtype) for name, value in leaves.items()}
    causal = dict(options, causal=True)
    expected, cache = run_op(leaves, causal), None
    arguments = tensors(leaves)
    q, k, v = (arguments.pop(x) for x in 'qkv')
    for n in range(19):
        output, cache = eva_attention_1d_step(
            q[:, :, n : n + 1],
            k[:, :, n : n + 1],
            v[:, :, n : n + 1],
            cache,
            **arguments,
            rel_pos_bias=dense_bias(leaves, causal),
            **options,
        )
        assert output.dtype == dtype
        assert (output - expected[:, :, n : n + 1]).norm() <= bound * expected[:, :, n : n + 1].norm()
    assert cache.length == 19 and cache.keys.shape[2] <= options['window_size'] + halo_size(options['window_size'])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('options', ALL, ids=IDS)
def test_cuda(options):
    padding = torch.arange(29) >= torch.tensor([29, 20])[:, None]
    leaves, options = make_case(29, key_padding_mask=padding, **options)
    expected = run_op(leaves, options).detach()
    copies = {name: value.detach().cuda().requires_grad_() for name, value in leaves.items()}
    options = {key: value.cuda() if torch.is_tensor(value) else value for key, value in options.items()}
    output = run_op(copies, options)
    torch.testing.assert_close(output.detach().cpu(), expected, rtol=1e-10, atol=1e-12)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), list(copies.values())))


def test_limit_one_chunk_is_causal_softmax_attention():
    leaves, options = make_case(13, window_size=16, cell_size=0, causal=True, bias=False)
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves['qkv'], is_causal=True)
    torch.testing.assert_close(run_op(leaves, options), expected, rtol=1e-12, atol=1e-12)


def test_a_row_of_the_grid_is_a_sequence():
    leaves, options = make_case(13, window_size=4, cell_size=2, bias=False)
    arguments = tensors(leaves)
    expected = eva_loop(
        arguments['q'],
        arguments['k'],
        arguments['v'],
        (1, 13),
        arguments['summary_q'],
        arguments['summary_k'],
        None,
        4,
        7,
        noise=options['noise'][:, :, :, 0],
    )
    torch.testing.assert_close(run_op(leaves, options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('causal', [False, True])
def test_memory_is_linear_for_a_given_number_of_cells(causal):
    def saved_per_token(N, cell_size):
        leaves, options = make_case(N, B=1, h=1, d=16, window_size=64, cell_size=cell_size, causal=causal)
        return saved_bytes(lambda: run_op(leaves, options)) / N

    assert saved_per_token(2048, 64) < 1.2 * saved_per_token(512, 16)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    leaves, options = make_case(29, d=16, window_size=6, cell_size=3, causal=True, overlap=True)
    expected = run_op(leaves, options)
    for copies, enabled, expected_dtype in (
        ({name: value.to(dtype) for name, value in leaves.items()}, False, dtype),
        ({name: value.float() for name, value in leaves.items()}, True, torch.float32),
    ):
        with torch.autocast('cpu', dtype, enabled=enabled):
            output = run_op(copies, options)
        assert output.dtype == expected_dtype
        assert (output.double() - expected).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(window_size=0), 'window_size 0 leaves a causal query'),
        (dict(window_size=6, cell_size=4), 'cell_size 4 does not divide window_size 6'),
        (dict(cell_size=-1), 'cell_size must be 0'),
        (dict(summary_q=None), 'cell_size 4 needs summary_q and summary_k'),
        (dict(rel_pos_bias=torch.zeros(2, 8, 16)), r'rel_pos_bias must be .*\(2, 8, 12\)'),
        (dict(key_padding_mask=torch.zeros(1, 15, dtype=torch.bool)), r'key_padding_mask must be bool .*\(1, 16\)'),
        (dict(key_padding_mask=torch.zeros(1, 16)), 'key_padding_mask must be bool'),
        (dict(noise=torch.zeros(1, 2, 3, 1, 8)), r'noise must be .*\(1, 2, 4, 1, 8\)'),
        (dict(k=torch.zeros(1, 2, 15, 8)), 'must have one shape'),
        (dict(dropout_p=-0.1), 'dropout_p must be'),
    ],
)
def test_bad_arguments_name_the_value(change, message):
    tokens = torch.randn(3, 1, 2, 16, 8)
    summary = [torch.eye(8), torch.zeros(8)]
    args = dict(
        q=tokens[0],
        k=tokens[1],
        v=tokens[2],
        summary_q=summary,
        summary_k=summary,
        window_size=8,
        cell_size=4,
        causal=True,
        overlap=True,
    )
    with pytest.raises(ValueError, match=message):
        eva_attention_1d(**(args | change))


def test_a_step_takes_one_token():
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match='a step takes one token, got 2'):
        eva_attention_1d_step(q, q, q, None, window_size=4, cell_size=0)


def test_a_cache_of_other_sequences():
    q = torch.randn(2, 1, 1, 4)
    cache = eva_attention_1d_step(q, q, q, None, window_size=4, cell_size=0)[1]
    with pytest.raises(ValueError, match=r'the cache is of .* = \[2, 1, 4\], the token of \[1, 1, 4\]'):
        eva_attention_1d_step(q[:1], q[:1], q[:1], cache, window_size=4, cell_size=0)


@pytest.mark.parametrize('name', ['causal', 'overlap'])
def test_text_is_no_truth_value(name):
    q = torch.randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match=f"^{name} must be True or False, got 'no'$"):
        eva_attention_1d(q, q, q, window_size=4, cell_size=0, **{name: 'no'})
