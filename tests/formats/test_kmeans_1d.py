import numpy as np
import pytest

from mlx_afm.formats.kmeans_1d import cluster_groups


def least_cost(values, count):
    """The least sum of squared distances to `count` centroids, by trying every split: float64, slow."""
    values = np.sort(np.asarray(values, np.float64))
    spread = [[np.sum((values[a:b] - values[a:b].mean()) ** 2) for b in range(a + 1, len(values) + 1)]
              for a in range(len(values))]  # fmt: skip
    best = [0.0, *(np.inf for _ in values)]
    for _ in range(count):
        best = [0.0] + [
            min([best[i], *(best[j] + spread[j][i - j - 1] for j in range(i))]) for i in range(1, len(values) + 1)
        ]
    return best[-1]


def cost(values, centroids, clusters):
    return float(np.sum((values.astype(np.float64) - centroids[clusters]) ** 2))


CASES = {
    "normal": lambda rng: rng.standard_normal(40),
    "heavy": lambda rng: rng.standard_cauchy(40),
    "uniform": lambda rng: rng.uniform(-1, 1, 40),
    "repeated": lambda rng: rng.integers(0, 20, 40) / 8,
    "far": lambda rng: 1000 + rng.standard_normal(40),
    "tiny": lambda rng: 1e-6 * rng.standard_normal(40),
    "grid": lambda rng: np.arange(40.0),
    "clumps": lambda rng: rng.integers(0, 3, 40) + 1e-3 * rng.standard_normal(40),
}


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("case", CASES)
def test_the_cost_is_the_least_there_is(case, count):
    rng = np.random.default_rng(3)
    groups = np.stack([CASES[case](rng) for _ in range(5)]).astype(np.float32)
    centroids, clusters = cluster_groups(groups, count)
    assert (centroids.shape, clusters.shape) == ((5, count), (5, 40))
    for group, group_centroids, group_clusters in zip(groups, centroids, clusters):
        found, least = cost(group, group_centroids, group_clusters), least_cost(group, count)
        assert found == pytest.approx(least, rel=1e-9, abs=1e-12 * float(np.sum(group.astype(np.float64) ** 2)))
        assert set(group_clusters) == set(range(min(count, len(np.unique(group)))))


@pytest.mark.parametrize("count", [2, 16])
def test_centroids_are_means_ascend_and_are_the_nearest(count):
    groups = np.random.default_rng(1).standard_normal((3, 400)).astype(np.float32)
    centroids, clusters = cluster_groups(groups, count)
    assert (np.diff(centroids, axis=1) > 0).all()
    for group, middles, chosen in zip(groups.astype(np.float64), centroids, clusters):
        np.testing.assert_allclose(middles, [group[chosen == c].mean() for c in range(count)], rtol=1e-12, atol=1e-14)
        assert (np.abs(group[:, None] - middles).argmin(axis=1) == chosen).all()


def test_groups_are_independent_of_each_other_and_of_batching():
    groups = np.random.default_rng(2).standard_normal((40, 700)).astype(np.float32)
    groups[3] = 0
    groups[4, 50:] = groups[4, 0]
    together = cluster_groups(groups, 16)
    for index in range(0, 40, 3):
        alone = cluster_groups(groups[index : index + 1], 16)
        np.testing.assert_array_equal(alone[0][0], together[0][index])
        np.testing.assert_array_equal(alone[1][0], together[1][index])


def test_few_distinct_values_are_the_centroids_and_zeros_follow():
    groups = np.array([[2.0, -1.0, 2.0, 0.5], [7.0, 7.0, 7.0, 7.0]], np.float32)
    centroids, clusters = cluster_groups(groups, 5)
    np.testing.assert_array_equal(centroids, [[-1, 0.5, 2, 0, 0], [7, 0, 0, 0, 0]])
    np.testing.assert_array_equal(clusters, [[2, 0, 2, 1], [0, 0, 0, 0]])


def test_as_many_centroids_as_values_cost_nothing():
    values = np.random.default_rng(5).standard_normal((2, 16)).astype(np.float32)
    centroids, clusters = cluster_groups(values, 16)
    np.testing.assert_allclose(np.take_along_axis(centroids, clusters.astype(int), 1), values, atol=1e-12)


def test_no_groups_at_all():
    centroids, clusters = cluster_groups(np.zeros((0, 8)), 4)
    assert (centroids.shape, clusters.shape) == ((0, 4), (0, 8))


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_and_clusters_are_coremltools_exact_modes(dtype):
    pytest.importorskip("coremltools", reason="the parity extra is not installed")
    from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight as theirs

    rng = np.random.default_rng(0)
    groups = np.stack([rng.standard_normal(4096), rng.uniform(-1, 1, 4096), rng.laplace(size=4096)]).astype(dtype)
    centroids, clusters = cluster_groups(groups, 16)
    for group, middles, chosen in zip(groups, centroids, clusters):
        table, wanted = theirs(4, group, force_kmeans1d=True)
        np.testing.assert_array_equal(chosen, wanted)
        np.testing.assert_array_equal(middles.astype(np.float16), table.astype(np.float16))
        np.testing.assert_allclose(middles, table, rtol=1e-12, atol=1e-13)
