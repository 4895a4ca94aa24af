"""When two tensors count as equal."""


def assert_close(got, expected, tolerance=1e-5):
    """To rounding: the largest difference in units of the largest value."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
