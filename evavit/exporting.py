"""The former name of `evavit.export`."""

from .export import *  # noqa: F403
