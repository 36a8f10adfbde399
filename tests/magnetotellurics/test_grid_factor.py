import numpy as np
import pytest
import torch

from plait.errors import EarthError
from plait.magnetotellurics.dissection import dissect
from plait.magnetotellurics.earth import flat_mesh, terrain_mesh
from plait.magnetotellurics.forward_2d import make_problem, respond
from plait.magnetotellurics.grid_factor import GridFactor, GridMatrix
from plait.magnetotellurics.linear_solver import BandFactor, sparse

from .sections import padded, padding


def five_point(shape, *, num_frequencies=2, seed=0):
    """Flux between neighbours, with conductances over four decades, and i times a mass."""
    generator = np.random.default_rng(seed)
    rows, columns = shape
    values = np.zeros((num_frequencies, 3, rows, columns), dtype=complex)
    values[:, 1, :, :-1] = -(10 ** generator.uniform(-2, 2, (num_frequencies, rows, columns - 1)))
    values[:, 2, :-1] = -(10 ** generator.uniform(-2, 2, (num_frequencies, rows - 1, columns)))
    values[:, 0] = 1j * 10 ** generator.uniform(-3, 0, (num_frequencies, rows, columns))
    for kind, (down, right) in ((1, (0, 1)), (2, (1, 0))):
        flux = values[:, kind]
        values[:, 0] -= flux
        values[:, 0, down:, right:] -= flux[:, : rows - down, : columns - right]
    return GridMatrix(values=values)


def dense_of(matrix):
    """The whole matrix of the first frequency, a column at a time."""
    _, _, rows, columns = matrix.values.shape
    unit = np.eye(rows * columns, dtype=complex).reshape(1, -1, rows, columns)
    first = GridMatrix(values=matrix.values[:1])
    return first.times(unit)[0].reshape(rows * columns, -1).T


@pytest.mark.parametrize("shape", [(2, 2), (3, 40), (17, 1), (9, 9), (13, 31), (40, 6)])
def test_solutions_are_those_of_lapack(shape):
    matrix = five_point(shape)
    sides = np.random.default_rng(1).standard_normal((2, 3, *shape)) + 0j
    found = GridFactor(matrix, dissect(*shape)).solve(sides)
    whole = dense_of(matrix)
    np.testing.assert_array_equal(whole, whole.T)
    expected = np.linalg.solve(whole, sides[0].reshape(3, -1).T).T
    np.testing.assert_allclose(found[0].reshape(3, -1), expected, rtol=1e-9, atol=1e-11)


def test_every_node_is_eliminated_once():
    plan = dissect(37, 52)
    nodes = np.concatenate([batch.own.ravel() for batch in plan.batches.values()])
    np.testing.assert_array_equal(np.sort(nodes), np.arange(37 * 52))


def test_residuals_of_a_large_grid_are_round_off_and_right_hand_sides_stay():
    matrix = five_point((70, 90), num_frequencies=1)
    sides = np.random.default_rng(2).standard_normal((1, 1, 70, 90)) + 0j
    kept = sides.copy()
    residual = matrix.times(GridFactor(matrix, dissect(70, 90)).solve(sides)) - sides
    assert np.abs(residual).max() < 1e-9
    np.testing.assert_array_equal(sides, kept)


def test_frequencies_of_a_batch_do_not_touch_each_other():
    plan = dissect(11, 14)
    both = five_point((11, 14), num_frequencies=2)
    sides = np.random.default_rng(3).standard_normal((2, 2, 11, 14)) + 0j
    together = GridFactor(both, plan).solve(sides)
    for f in range(2):
        alone = GridFactor(GridMatrix(values=both.values[f : f + 1]), plan).solve(sides[f : f + 1])
        np.testing.assert_allclose(together[f], alone[0], rtol=1e-12)


def hill():
    y = padded(np.linspace(-3000.0, 3000.0, 25), 3e4, 1.5)
    z = np.concatenate([np.arange(-300.0, 0.0, 60.0), [0.0], padding(60.0, 3e4, 1.4)])
    middle = (y[1:] + y[:-1]) / 2
    surface = -280.0 * np.exp(-((middle / 1200.0) ** 2))
    return terrain_mesh(y_m=y, z_m=z, surface_z_m=surface, air_height_m=3e4)


def test_a_hill_of_cells_reaches_its_height_and_answers_symmetrically():
    mesh = hill()
    top = mesh.z_m[mesh.terrain_row]
    assert (top.min(), top.max()) == (-300.0, 0.0)
    problem = make_problem(
        mesh, position_m=np.array([-1125.0, 0.5, 1125.0]), frequency_hz=np.array([100.0])
    )
    found = respond(problem, np.full(mesh.ground_shape, 100.0))
    for z in (found.te_impedance_ohm, found.tm_impedance_ohm):
        assert z[0, 0] == pytest.approx(z[0, 2], rel=1e-6)
        assert abs(z[0, 0] / z[0, 1] - 1) > 0.01  # the hill is felt


def test_a_surface_above_the_rows_is_refused():
    with pytest.raises(EarthError, match="rises to"):
        terrain_mesh(
            y_m=np.arange(9.0),
            z_m=np.arange(9.0),
            surface_z_m=np.full(8, -5.0),
            air_height_m=10.0,
        )


def small_problem(device):
    mesh = flat_mesh(
        y_m=padded(np.linspace(-3000.0, 3000.0, 13), 3e4, 1.8),
        ground_z_m=np.concatenate([[0.0], padding(60.0, 3e4, 1.5)]),
        air_height_m=5e4,
    )
    return make_problem(
        mesh, position_m=np.zeros(1), frequency_hz=np.array([1.0, 10.0]), device=device
    )


@pytest.mark.parametrize("device", ["no_such_device", "mps"])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(EarthError, match="cannot be used"):
        small_problem(device)


@pytest.mark.gpu
def test_a_gpu_gives_the_responses_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    one, two = (small_problem(device) for device in ("cpu", "cuda"))
    rho = 10 ** np.random.default_rng(0).uniform(1, 3, one.mesh.ground_shape)
    a, b = respond(one, rho), respond(two, rho)
    np.testing.assert_allclose(a.te_impedance_ohm, b.te_impedance_ohm, rtol=1e-9)
    np.testing.assert_allclose(a.tm_impedance_ohm, b.tm_impedance_ohm, rtol=1e-9)


@pytest.mark.parametrize("density", [0.004, 0.3], ids=["narrow", "wide"])
def test_a_band_factor_solves_and_whitens(density):
    generator = np.random.default_rng(0)
    half = sparse.random_array((300, 300), density=density, rng=generator)
    matrix = half @ half.T + sparse.eye_array(300)
    factor = BandFactor(matrix)
    sides = generator.standard_normal((300, 5))
    expected = np.linalg.solve(matrix.toarray(), sides)
    np.testing.assert_allclose(factor.solve(sides), expected, atol=1e-10)
    np.testing.assert_allclose(factor.solve(sides[:, 0]), expected[:, 0], atol=1e-10)
    whitened = factor.whiten(sides)
    np.testing.assert_allclose(whitened.T @ whitened, sides.T @ expected, atol=1e-10)


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(np.linalg.LinAlgError):
        BandFactor(sparse.diags_array([1.0, -1.0, 1.0]))
