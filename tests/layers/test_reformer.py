import math
from itertools import pairwise

import pytest
import torch
from helpers import assert_matches, heads_of, randomise

from evavit.layers import ReformerAttention


def reformer_loop(q, v, rotations, chunk_size):
    """LSH attention over the union of what a query meets in any round; rotations `(rounds, d, buckets / 2)`."""
    N = q.shape[2]
    images = []
    for image in range(q.shape[0]):
        heads = []
        for head in range(q.shape[1]):
            Q, V = q[image, head], v[image, head]
            sees = torch.zeros(N, N, dtype=torch.bool)
            for R in rotations:
                bucket = [int(torch.cat([x @ R, -(x @ R)]).argmax()) for x in Q.detach()]
                place = {n: i for i, n in enumerate(sorted(range(N), key=lambda n: (bucket[n], n)))}
                for n in range(N):
                    for m in range(N):
                        if bucket[m] == bucket[n] and place[n] // chunk_size - place[m] // chunk_size in (0, 1):
                            sees[n, m] = n != m
            for n in range(N):
                if not sees[n].any():
                    sees[n, n] = True
            keys = torch.stack([x / x.norm() for x in Q])
            heads.append(torch.softmax((Q @ keys.T).masked_fill(~sees, -math.inf), 1) @ V)
        images.append(torch.stack(heads))
    return torch.stack(images)


# Grids small enough for a loop over pairs: chunks that divide N, a short last chunk, one chunk, one token.
GRIDS = [(8, 8), (9, 7), (5, 13), (5, 3), (1, 1)]


def columns(layer, N):
    """Half the number of buckets: the even number next above N / chunk_size."""
    return -(-N // (2 * layer.chunk_size))


@pytest.mark.parametrize('feat_size', GRIDS)
@pytest.mark.parametrize(
    'kwargs',
    [dict(chunk_size=8), dict(chunk_size=5, num_hashes=2, qkv_bias=False), dict(num_hashes=1, chunk_size=4), {}],
)
@pytest.mark.parametrize('training', [False, True])
def test_output_and_gradients_match_the_loop(feat_size, kwargs, training):
    layer = randomise(ReformerAttention(24, 3, dtype=torch.float64, **kwargs)).train(training)
    N = feat_size[0] * feat_size[1]

    def loop(layer, x):
        rotations = layer.rotations[:, :, : columns(layer, N)]
        if training:  # the layer's first draw of the default generator
            rotations = torch.randn(rotations.shape, dtype=torch.float64)
        return reformer_loop(*heads_of(layer, x, 2), rotations, layer.chunk_size)

    assert_matches(layer, loop, feat_size, batch=1)


def shared_softmax(layer, x):
    """Softmax attention of tokens to all others, queries normalised as keys."""
    q, v = heads_of(layer, x, 2)
    logits = q @ (q / q.norm(dim=-1, keepdim=True)).transpose(2, 3)
    logits = logits.masked_fill(torch.eye(q.shape[2], dtype=torch.bool), float('-inf'))
    return layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_rounds_enough_for_every_pair_to_meet_are_softmax():
    layer = randomise(ReformerAttention(24, 3, num_hashes=200, chunk_size=15, dtype=torch.float64)).eval()
    x = torch.randn(1, 15, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, (3, 5)), shared_softmax(layer, x))


def test_the_error_falls_with_the_rounds():
    torch.manual_seed(1)
    x = torch.randn(1, 81, 24, dtype=torch.float64)
    errors = []
    for num_hashes in (1, 3, 9, 27):
        layer = ReformerAttention(24, 3, num_hashes=num_hashes, chunk_size=8, dtype=torch.float64).eval()
        torch.manual_seed(2)
        randomise(layer, 0.3)
        expected = shared_softmax(layer, x)
        errors.append(((layer(x, (9, 9)) - expected).norm() / expected.norm()).item())
    assert all(later < earlier for earlier, later in pairwise(errors)), errors


def test_hashing_follows_the_seed_in_training_and_nothing_in_evaluation():
    layer, x = randomise(ReformerAttention(48, 3, chunk_size=16)), torch.randn(2, 196, 48)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x, (14, 14))

    layer.train()
    assert torch.equal(run(1), run(1)) and not torch.allclose(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))
    again = ReformerAttention(48, 3, chunk_size=16).eval()
    again.load_state_dict(layer.state_dict())  # the rotations are no part of it
    assert torch.equal(again(x, (14, 14)), run(1)) and 'rotations' not in layer.state_dict()


def test_queries_stand_in_for_the_keys_of_a_packed_tensor():
    layer = ReformerAttention(48, 3, chunk_size=16).eval()
    qkv = torch.randn(3, 2, 3, 35, 16)
    other = qkv.clone()
    other[1] = 7.0
    assert torch.equal(layer.attend(qkv, (5, 7)), layer.attend(other, (5, 7)))
    assert layer.qkv.weight.shape == (96, 48)


def test_equal_queries_fall_into_one_bucket_and_give_no_nan():
    layer = ReformerAttention(48, 3, chunk_size=4).eval()
    qkv = torch.ones(3, 1, 3, 35, 16).requires_grad_()
    output = layer.attend(qkv, (5, 7))
    torch.testing.assert_close(output, torch.ones_like(output))
    output.sum().backward()
    assert qkv.grad.isfinite().all()
    zero = torch.zeros(3, 1, 3, 35, 16).requires_grad_()
    layer.attend(zero, (5, 7)).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize('kwargs', [dict(num_hashes=0), dict(chunk_size=0)])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f'{next(iter(kwargs))} must be a whole number of at least 1, got 0'):
        ReformerAttention(48, 3, **kwargs)
