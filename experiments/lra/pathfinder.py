"""Pathfinder pictures: are two discs the ends of one dashed curve, or of two?

After Linsley et al., 2018 (https://arxiv.org/abs/1805.08315), whose files Long Range Arena uses. This generator is our
own, so accuracies are not those of LRA's files.

A picture has two long curves of dashes and a few short ones. It begins with a long curve and a disc on each end. Where
the discs are to be apart, the middle of the curve is taken out, and either half grows on to the full length without
coming near the other. Where they are to be joined, another long curve is added. A beginning is taken for which both can
be done, and the answer is drawn last: where the discs are, and the dashes next to them, say nothing. The dashes of a
curve are nearer to each other than those of two curves ever are, so that following them answers every picture.
"""

import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 32  # pixels
DASHES, SHORT, DISTRACTORS = 10, 3, 3  # dashes of a long curve, of a short one; number of short ones
KEPT = 3  # dashes at a disc that are the same for both answers
DASH, GAP = 1.8, 1.1  # pixels; so the centres of neighbours in a curve are STEP apart
STEP = DASH + GAP
BEND = 0.35  # radians, standard deviation of the turn from dash to dash
CLEAR = 3.6  # pixels at least between the centres of dashes that are not neighbours: more than STEP
MARGIN = 2.5  # pixels at least between a centre and the border
DISC = 1.3  # radius in pixels
FINE = 8  # places a pixel side, for smooth lines
TRIES = 12  # turns that a dash tries, and times that a long curve is begun
MANY = 200  # times that a short one is: nearly always it fits, so that their number does not tell the answer


class Pathfinder(NamedTuple):
    """A picture and what it shows.

    Attributes:
        pixels: `(32, 32)`, uint8.
        joined: Whether the discs are the ends of one curve.
        discs: Centres `(2, 2)`, (x, y) in pixels.
        curves: Centres of the dashes of each curve, `(dashes, 2)`; the long ones first.
    """

    pixels: np.ndarray
    joined: bool
    discs: np.ndarray
    curves: list


def pathfinder(seed, number):
    """Picture `number` of the set with this seed, whatever other pictures are made."""
    rng = random.Random(f'{seed} {number}')
    answers = None
    while answers is None:
        curve = _grow([], DASHES, [], rng)
        answers = curve and _answers(curve, rng)
    joined = rng.random() < 0.5
    curves = answers[joined]
    for _ in range(DISTRACTORS):
        grown = _try(MANY, [], SHORT, [dash for one in curves for dash in one], rng)
        curves = [*curves, grown] if grown else curves
    discs = [curve[0][:2], curve[-1][:2]]
    centres = [np.array([dash[:2] for dash in one]) for one in curves]
    return Pathfinder(_draw(curves, discs), joined, np.array(discs), centres)


def _answers(curve, rng):
    """The long curves of a picture in which the ends of this one are apart, and joined; None where one is not found."""
    first, last = curve[:KEPT], [(x, y, angle + math.pi) for x, y, angle in curve[: -KEPT - 1 : -1]]
    one = _try(TRIES, first, DASHES, last, rng)
    two = one and _try(TRIES, last, DASHES, one, rng)
    other = two and _try(TRIES, [], DASHES, curve, rng)
    return ([one, two], [curve, other]) if other else None


def _try(times, *args):
    """What `_grow` makes of these at one of so many times, or None."""
    return next(filter(None, (_grow(*args) for _ in range(times))), None)


def _grow(curve, length, taken, rng):
    """A curve, a list of dashes (x, y, angle), grown to `length`; None where no more fits.

    Args:
        curve: How it begins; none of it for a random place.
        length: Dashes.
        taken: Dashes of other curves, of which it stays clear.
    """
    low, high = MARGIN, SIDE - MARGIN
    curve = list(curve) or [(rng.uniform(low, high), rng.uniform(low, high), rng.uniform(0, 2 * math.pi))]
    if not _is_clear(curve[0], taken):
        return None
    while len(curve) < length:
        x, y, before = curve[-1]
        for _ in range(TRIES):
            angle = before + rng.gauss(0, BEND)
            middle = (before + angle) / 2  # half of the way along each of the two dashes
            dash = (x + STEP * math.cos(middle), y + STEP * math.sin(middle), angle)
            inside = low <= min(dash[:2]) and max(dash[:2]) <= high
            if inside and _is_clear(dash, taken) and _is_clear(dash, curve[:-1]):
                curve.append(dash)
                break
        else:
            return None
    return curve


def _is_clear(dash, others):
    x, y, _ = dash
    return all((x - other[0]) ** 2 + (y - other[1]) ** 2 >= CLEAR**2 for other in others)


def _draw(curves, discs):
    image = Image.new('L', (SIDE * FINE, SIDE * FINE))
    draw = ImageDraw.Draw(image)
    for x, y, angle in (dash for curve in curves for dash in curve):
        dx, dy = DASH / 2 * math.cos(angle), DASH / 2 * math.sin(angle)
        draw.line([FINE * place for place in (x - dx, y - dy, x + dx, y + dy)], fill=255, width=FINE)
    for x, y in discs:
        draw.ellipse([FINE * place for place in (x - DISC, y - DISC, x + DISC, y + DISC)], fill=255)
    return np.asarray(image.reduce(FINE))
