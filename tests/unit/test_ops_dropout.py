"""Dropout by seeds and places: how often, how independent, what stays."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from sam_jax.ops.dropout import branch_seeds, dropout, keep_mask

SEEDS = jax.random.bits(jax.random.key(0), (1, 40))


def choices(branch: int, rate: float = 0.1) -> np.ndarray:
    """Numbers that are kept of 40 objects of 20,000 numbers."""
    seeds = branch_seeds(SEEDS, branch).reshape(-1, 1, 1)
    return np.asarray(keep_mask(seeds, jnp.arange(80)[:, None], 250, rate)).reshape(40, -1)


def test_numbers_are_dropped_at_the_rate_and_independently() -> None:
    kept = choices(0)
    of_objects = kept.sum(axis=1)
    spread = stats_of_counts(of_objects, kept.shape[1], 0.9)
    assert 0.01 < spread < 0.99
    # Neighbours, those that share bits, rows, objects, and branches that share seeds.
    others = [np.roll(kept, by, axis=1) for by in (1, 125, 250)]
    for other in (*others, np.roll(kept, 1, axis=0), choices(1)):
        assert abs(np.corrcoef(kept.ravel(), other.ravel())[0, 1]) < 4 / kept.size**0.5


def stats_of_counts(counts: np.ndarray, size: int, rate: float) -> float:
    """Probability of a spread at least as far from the binomial distribution's, either way."""
    chi = float(np.sum((counts - size * rate) ** 2) / (size * rate * (1 - rate)))
    return float(scipy.stats.chi2.cdf(chi, len(counts)))


def test_what_is_kept_is_enlarged_so_that_the_mean_stays() -> None:
    x = jnp.ones((1, 40, 30, 50))
    seeds = branch_seeds(SEEDS, 2)
    out = np.asarray(dropout(x, seeds, 0.25))
    np.testing.assert_allclose(np.unique(out), [0, 4 / 3], rtol=1e-6)
    assert abs(out.mean() - 1) < 0.01
    gradient = jax.grad(lambda x: dropout(x, seeds, 0.25).sum())(x)
    np.testing.assert_array_equal(gradient, out)


def test_an_objects_choices_are_its_own_wherever_it_is() -> None:
    x = jnp.ones((1, 40, 64))
    together = dropout(x, branch_seeds(SEEDS, 5), 0.5)
    alone = dropout(x[:, 7:8], branch_seeds(SEEDS[:, 7:8], 5), 0.5)
    np.testing.assert_array_equal(together[:, 7:8], alone)


def test_rows_of_an_odd_length() -> None:
    x = jnp.ones((1, 40, 3, 7))
    out = dropout(x, branch_seeds(SEEDS, 5), 0.5)
    assert out.shape == x.shape
    assert 0.4 < np.mean(np.asarray(out) == 0) < 0.6


def test_without_seeds_nothing_is_dropped() -> None:
    x = jnp.ones((1, 40, 64))
    np.testing.assert_array_equal(dropout(x, None, 0.5), x)
