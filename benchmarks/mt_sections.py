"""The made-up truths of the benchmarks of the learnt prior, by coordinates, and their data."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from plait.magnetotellurics.arrays import BoolArray, RealArray
from plait.magnetotellurics.coded_section import Region
from plait.magnetotellurics.earth import Mesh, flat_mesh
from plait.magnetotellurics.forward_2d import Problem, make_problem
from plait.magnetotellurics.jacobian import predict
from plait.magnetotellurics.observations import Component, Observations

TE = (Component.TE_LOG10_RHO, Component.TE_PHASE)
TE_TM = (*TE, Component.TM_LOG10_RHO, Component.TM_PHASE)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A section by coordinates.

    Attributes:
        name: for the rows.
        log10_rho: of y and z, in metres, evaluated on points.
        target: where the body is, of y and z.
        base_m: depth of the body's lower boundary under y, NaN where there is none.
        below_log10_rho: just under it; the boundary of a result is where it passes the middle
            between the body's and this value.
        body_log10_rho: of the body.
    """

    name: str
    log10_rho: Callable[[RealArray, RealArray], RealArray]
    target: Callable[[RealArray, RealArray], BoolArray]
    base_m: Callable[[RealArray], RealArray]
    body_log10_rho: float
    below_log10_rho: float


def _dipping_base(y: RealArray) -> RealArray:
    return np.where((y > 1000) & (y < 9000), 350 + 300 * y / 10000, np.nan)


def _dipping(y: RealArray, z: RealArray) -> RealArray:
    base = 350 + 300 * np.clip(y / 10000, 0, 1)
    return np.where(z < 200, 2.0, np.where(z < base, 1.0, 2.5))


DIPPING = Truth(
    name="dipping base",
    log10_rho=_dipping,
    target=lambda y, z: (z > 200) & (z < _dipping_base(y)),
    base_m=_dipping_base,
    body_log10_rho=1.0,
    below_log10_rho=2.5,
)


def _in_block(y: RealArray, z: RealArray) -> BoolArray:
    return (np.abs(y - 5000) < 1500) & (z > 250) & (z < 550)


BLOCK = Truth(
    name="block",
    log10_rho=lambda y, z: np.where(_in_block(y, z), 0.8, 2.0),
    target=_in_block,
    base_m=lambda y: np.where(np.abs(y - 5000) < 1500, 550.0, np.nan),
    body_log10_rho=0.8,
    below_log10_rho=2.0,
)


def _crust_base(y: RealArray) -> RealArray:
    """Lower boundaries of two conductors: a dipping one, and a lens."""
    dipping = 18e3 + 8e3 * (y - 90e3) / 110e3
    lens = 24e3 + 6e3 * np.sin(np.pi * (y - 280e3) / 140e3)
    one, two = (y > 90e3) & (y < 200e3), (y > 280e3) & (y < 420e3)
    return np.select([one, two], [dipping, lens], np.nan)


def _in_crust_body(y: RealArray, z: RealArray) -> BoolArray:
    top = np.where(y < 240e3, 6e3, 8e3)
    return (z > top) & (z < _crust_base(y))


def _crust(y: RealArray, z: RealArray) -> RealArray:
    host = np.where(z < 40e3, 3.4, 3.8)
    host = np.where((y > 450e3) & (y < 560e3) & (z < 60e3), 4.0, host)
    return np.where(_in_crust_body(y, z), 0.7, host)


CRUST = Truth(
    name="two crustal conductors",
    log10_rho=_crust,
    target=_in_crust_body,
    base_m=_crust_base,
    body_log10_rho=0.7,
    below_log10_rho=3.4,
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Mesh, stations, frequencies and the region of the prior of one benchmark."""

    mesh: Mesh
    region: Region
    position_m: RealArray
    frequency_hz: RealArray

    def problem(self) -> Problem:
        """Make the forward problem."""
        return make_problem(self.mesh, position_m=self.position_m, frequency_hz=self.frequency_hz)


def prospect(refine: int = 1) -> Layout:
    """10 km x 1 km: 50 columns of 200 m, 36 rows from 4 m, 20 stations, 10 frequencies.

    With refine = n every cell of the body of the mesh is cut in n x n.
    """
    mesh = _box(1e4, 1e3, cells=(36, 50), num_pads=(9, 9), air_m=5e4, refine=refine)
    return Layout(
        mesh=mesh,
        region=Region(rows=(0, 36 * refine), columns=(9 * refine, 59 * refine)),
        position_m=np.linspace(350.0, 9650.0, 20),
        frequency_hz=np.logspace(4, 0, 10),
    )


def province(refine: int = 1) -> Layout:
    """750 km x 80 km: 100 columns of 7.5 km, 44 rows from 166 m, 26 stations, 10 frequencies.

    The prior's region ends at 50 km.
    """
    mesh = _box(7.5e5, 8e4, cells=(44, 100), num_pads=(11, 9), air_m=2e6, refine=refine)
    depth = mesh.z_m[mesh.num_air :]
    last = int(np.searchsorted(depth, 5e4)) // refine
    return Layout(
        mesh=mesh,
        region=Region(rows=(0, last * refine), columns=(11 * refine, 111 * refine)),
        position_m=np.linspace(15000.0, 735000.0, 26),
        frequency_hz=np.logspace(1, -3, 10),
    )


def _box(
    length_m: float,
    depth_m: float,
    *,
    cells: tuple[int, int],
    num_pads: tuple[int, int],
    air_m: float,
    refine: int,
) -> Mesh:
    """Rows that grow by 9 %, equal columns, and pads to both sides and below."""
    num_rows, num_columns = cells
    z = np.concatenate([[0.0], np.cumsum(1.09 ** np.arange(num_rows))])
    z *= depth_m / z[-1]
    width = length_m / num_columns
    aside = np.cumsum(width * 1.6 ** np.arange(1, num_pads[0] + 1))
    under = depth_m + np.cumsum((z[-1] - z[-2]) * 1.5 ** np.arange(1, num_pads[1] + 1))
    y = np.concatenate([-aside[::-1], np.linspace(0, length_m, num_columns + 1), length_m + aside])
    ground = np.concatenate([z, under])
    return flat_mesh(y_m=_cut(y, refine), ground_z_m=_cut(ground, refine), air_height_m=air_m)


def _cut(nodes: RealArray, parts: int) -> RealArray:
    shares = np.arange(parts) / parts
    inner = (nodes[:-1, None] + shares * np.diff(nodes)[:, None]).ravel()
    return np.append(inner, nodes[-1])


def on_cells(
    mesh: Mesh, function: Callable[[RealArray, RealArray], RealArray], samples: int = 8
) -> RealArray:
    """Average a function of y and z over each ground cell."""
    shares = (np.arange(samples) + 0.5) / samples
    z = mesh.z_m[mesh.num_air :]
    y_points = (mesh.y_m[:-1, None] + shares * mesh.width_m[:, None]).ravel()
    z_points = (z[:-1, None] + shares * np.diff(z)[:, None]).ravel()
    y_grid, z_grid = np.meshgrid(y_points, z_points)
    fine = function(y_grid, z_grid)
    return fine.reshape(len(z) - 1, samples, -1, samples).mean((1, 3))


def centres(mesh: Mesh) -> tuple[RealArray, RealArray]:
    """Give y and z of the centres of the ground cells, each mesh.ground_shape."""
    z = mesh.z_m[mesh.num_air :]
    y_grid, z_grid = np.meshgrid((mesh.y_m[1:] + mesh.y_m[:-1]) / 2, (z[1:] + z[:-1]) / 2)
    return y_grid, z_grid


def empty(layout: Layout, components: tuple[Component, ...]) -> Observations:
    """Lay out one datum for each frequency, station and component, without values."""
    f, r, c = (
        grid.ravel()
        for grid in np.meshgrid(
            np.arange(len(layout.frequency_hz)),
            np.arange(len(layout.position_m)),
            [int(component) for component in components],
            indexing="ij",
        )
    )
    return Observations(
        frequency_hz=layout.frequency_hz,
        position_m=layout.position_m,
        receiver_names=tuple(f"{i:02d}" for i in range(len(layout.position_m))),
        frequency_index=f,
        receiver_index=r,
        component=c,
        value=np.zeros(len(f)),
        error=np.ones(len(f)),
    )


def clean_data(layout: Layout, truth: Truth, components: tuple[Component, ...]) -> Observations:
    """Predict the data of a truth on a mesh."""
    observations = empty(layout, components)
    rho = 10 ** on_cells(layout.mesh, truth.log10_rho)
    return replace(observations, value=predict(layout.problem(), rho, observations))


def noisy(clean: Observations, *, share: float, floor: float, seed: int) -> Observations:
    """Add noise of a share of each value, at least the floor, and weigh all data alike (W = 1).

    The one error is the root mean square of the noise's deviations, so that RMS is the residual's
    norm over the noise's expected norm.
    """
    deviation = np.maximum(share * np.abs(clean.value), floor)
    noise = deviation * np.random.default_rng(seed).standard_normal(clean.num_data)
    error = np.full(clean.num_data, np.sqrt(np.mean(deviation**2)))
    return replace(clean, value=clean.value + noise, error=error)


def with_errors(clean: Observations, *, relative: float, seed: int) -> Observations:
    """Add noise of a share of |Z| to log10 rho and phases, and give them the errors of it."""
    is_phase = clean.component % 4 == 1
    error = np.where(is_phase, relative, 2 * relative / np.log(10))
    noise = error * np.random.default_rng(seed).standard_normal(clean.num_data)
    return replace(clean, value=clean.value + noise, error=error)


def base_error_m(mesh: Mesh, log10_rho: RealArray, truth: Truth) -> float:
    """Mean error of the depth of the body's lower boundary, over the columns that have one.

    Going down from the middle of the body, it is the depth at which log10 rho, linear between
    centres of cells, passes the middle of the body's and the ground's below; if it never does, the
    bottom of the mesh's body (its last row of the true depth's double) is taken.
    """
    y_grid, z_grid = centres(mesh)
    y, z = y_grid[0], z_grid[:, 0]
    base = truth.base_m(y)
    middle = (truth.body_log10_rho + truth.below_log10_rho) / 2
    errors = []
    for column in np.flatnonzero(np.isfinite(base)):
        inside = truth.target(np.full(len(z), y[column]), z)
        first = int(np.flatnonzero(inside).mean())
        values = log10_rho[first:, column]
        over = np.flatnonzero(values > middle)
        found = 2 * base[column]
        if len(over) and over[0] == 0:
            found = z[first]
        elif len(over):
            low, high = first + over[0] - 1, first + over[0]
            share = (middle - log10_rho[low, column]) / (
                log10_rho[high, column] - log10_rho[low, column]
            )
            found = min(found, z[low] + share * (z[high] - z[low]))
        errors.append(abs(found - base[column]))
    return float(np.mean(errors))


def value_error(mesh: Mesh, log10_rho: RealArray, truth: Truth) -> float:
    """Mean absolute error of log10 rho over the cells that lie wholly in the target, by area."""
    inside = on_cells(mesh, lambda y, z: 1.0 * truth.target(y, z)) > 1 - 1e-9
    area = mesh.ground_thickness_m[:, None] * mesh.width_m[None, :]
    error = np.abs(log10_rho - truth.body_log10_rho)
    return float(np.sum((error * area)[inside]) / np.sum(area[inside]))
