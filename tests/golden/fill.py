"""Deterministic weights and images, so that a golden case needs to store outputs only."""

import zlib
import numpy as np


def _rng(seed, name):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))


def fill_tensor(name, shape, seed):
    """float64 array for the state-dict entry `name` of a *standard* (not yet converted) model."""
    rng = _rng(seed, name)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if name.endswith("running_mean"):
        return 0.1 * rng.standard_normal(shape)
    if name.endswith("running_var"):
        return 0.5 + rng.random(shape)
    if name.endswith("bias"):
        return 0.1 * rng.standard_normal(shape)
    if len(shape) < 2:
        return 1.0 + 0.1 * rng.standard_normal(shape)
    fan_in = int(np.prod(shape[1:]))
    return rng.standard_normal(shape) * np.sqrt(2.0 / fan_in)


def images(n, size, seed):
    """(n, 3, size, size) float64 in [0, 1]: smooth random blobs plus noise."""
    rng = _rng(seed, "images")
    low = rng.random((n, 3, 8, 8))
    up = np.kron(low, np.ones((1, 1, -(-size // 8), -(-size // 8))))[:, :, :size, :size]
    return np.clip(0.8 * up + 0.2 * rng.random((n, 3, size, size)), 0.0, 1.0)


def probe(name, shape, seed):
    """fixed direction that a gradient is projected on"""
    return _rng(seed, "probe:" + name).standard_normal(shape)
