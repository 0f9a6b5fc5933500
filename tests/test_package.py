"""The package imports quickly, builds nothing, and has the promised layout."""

import fastgan.kernels

import fastgan


def test_version_is_a_string():
    assert fastgan.__version__.count(".") == 2
