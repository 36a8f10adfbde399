from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from plait.errors import InversionError
from plait.magnetotellurics.code_penalty import CodePenalty
from plait.magnetotellurics.coded_section import CodedSection, Region
from plait.magnetotellurics.data_model import SectionModel, StaticShiftModel
from plait.magnetotellurics.earth import flat_mesh
from plait.magnetotellurics.forward_1d import layered_impedance
from plait.magnetotellurics.forward_2d import make_problem
from plait.magnetotellurics.inversion import StoppingRule
from plait.magnetotellurics.layered_model import LayeredModel, column_impedances
from plait.magnetotellurics.linear_solver import sparse
from plait.magnetotellurics.model_map import pixel_map
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.penalty import PenaltyWithShifts
from plait.magnetotellurics.prior import Layer, Prior, Range
from plait.magnetotellurics.prior_inversion import (
    PriorInversion,
    StepOrder,
    coded_parts,
    invert_with_prior,
)
from plait.magnetotellurics.prior_network import Training, learn_prior
from plait.magnetotellurics.prior_sampler import draw_sections
from plait.magnetotellurics.prior_store import load_network, save_network
from plait.magnetotellurics.regularization import Smoothness, cell_roughness

from .sections import padded, padding

PRIOR = Prior(
    name="one layer",
    background_log10_rho=Range(1.8, 2.2),
    layers=(
        Layer(
            name="conductor",
            top_m=Range(200, 600),
            thickness_m=Range(200, 1000),
            log10_rho=Range(0.3, 1.3),
        ),
    ),
)
QUICK = Training(num_latent=6, num_hidden=64, num_sections=3000, num_steps=1500)


@pytest.fixture(scope="module")
def mesh():
    return flat_mesh(
        y_m=padded(np.linspace(-3000.0, 3000.0, 13), 4e4, 1.8),
        ground_z_m=np.concatenate([[0.0], padding(60.0, 4e4, 1.3)]),
        air_height_m=5e4,
    )


@pytest.fixture(scope="module")
def region(mesh):
    depth = mesh.z_m[mesh.num_air :]
    left = int(np.searchsorted(mesh.y_m, -3000.0))
    return Region(rows=(1, int(np.searchsorted(depth, 3000.0))), columns=(left, left + 12))


@pytest.fixture(scope="module")
def network(mesh, region):
    return learn_prior(PRIOR, region.grid(mesh, columns_per_code=1), training=QUICK)


@pytest.fixture(scope="module")
def section(mesh, region, network):
    return CodedSection(mesh=mesh, region=region, network=network)


@pytest.fixture(scope="module")
def parameters(section):
    start = section.encode(np.full(section.mesh.ground_shape, 2.0))
    return start + 0.3 * np.random.default_rng(5).standard_normal(len(start))


def test_sections_that_training_never_saw_are_coded_and_decoded_closely(network):
    drawn = draw_sections(PRIOR, z_m=network.grid.z_m, y_m=np.zeros(1), count=200, seed=99)
    error = network.decode(network.encode(drawn)) - drawn
    assert np.sqrt(np.mean(error**2)) < 0.12
    assert np.sqrt(np.mean((drawn - drawn.mean(0)) ** 2)) > 0.3  # what a mean column would miss
    assert network.learnt.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=0.2)
    assert 0.8 < network.learnt.code_size < 1.4


def test_decoded_random_codes_look_like_the_prior(network):
    codes = np.random.default_rng(0).standard_normal((500, network.num_latent))
    decoded = network.decode(codes)[:, :, 0]
    drawn = draw_sections(PRIOR, z_m=network.grid.z_m, y_m=np.zeros(1), count=500, seed=7)
    np.testing.assert_allclose(decoded.mean(0), drawn[:, :, 0].mean(0), atol=0.2)
    np.testing.assert_allclose(decoded.std(0), drawn[:, :, 0].std(0), atol=0.2)


def test_the_decoders_jacobian_has_a_row_for_each_cell_and_agrees_with_differences(network):
    generator = np.random.default_rng(1)
    codes, change = generator.standard_normal((2, 3, network.num_latent))
    step = 1e-6
    difference = (network.decode(codes + step * change) - network.decode(codes - step * change)) / (
        2 * step
    )
    product = np.einsum("ncl,nl->nc", network.jacobian(codes), change)
    np.testing.assert_allclose(product, difference.reshape(3, -1), rtol=1e-6, atol=1e-8)


def test_equal_seeds_learn_equal_networks_and_others_differ(mesh, region):
    grid = region.grid(mesh, columns_per_code=1)
    tiny = replace(QUICK, num_steps=20, num_sections=100)
    first, second, other = (
        learn_prior(PRIOR, grid, training=replace(tiny, seed=seed)).decode(np.ones((1, 6)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_a_saved_network_answers_bit_for_bit_and_brings_its_prior(network, tmp_path):
    save_network(network, tmp_path / "net")
    again = load_network(tmp_path / "net")
    codes = np.random.default_rng(2).standard_normal((4, network.num_latent))
    np.testing.assert_array_equal(again.decode(codes), network.decode(codes))
    assert again.prior == PRIOR
    assert again.learnt == network.learnt


@pytest.mark.parametrize("damage", ["cut", "sizes", "json", "format", "nan", "absent"])
def test_a_damaged_network_is_refused_with_its_file(network, tmp_path, damage):
    save_network(network, tmp_path)
    weights, record = tmp_path / "weights.safetensors", tmp_path / "prior.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage in ("sizes", "nan"):
        state = load_file(weights)
        state["mean"] = state["mean"][:-1] if damage == "sizes" else state["mean"] * np.nan
        save_file(state, weights)
    elif damage == "json":
        record.write_text(record.read_text()[:-20])
    elif damage == "format":
        record.write_text(record.read_text().replace('"format": 1', '"format": 2'))
    else:
        weights.unlink()
    with pytest.raises(InversionError, match=r"weights\.safetensors|prior\.json"):
        load_network(tmp_path)


def test_pixels_and_codes_fill_every_cell_once(section, parameters):
    cells = np.concatenate([section.pixel_cells, section.code_cells.ravel()])
    np.testing.assert_array_equal(np.sort(cells), np.arange(section.mesh.is_ground.size))
    log10_rho = section.log10_rho(parameters)
    decoded = section.network.decode(section.codes(parameters))
    (top, bottom), (left, _) = section.region.rows, section.region.columns
    np.testing.assert_array_equal(log10_rho[top:bottom, left + 4], decoded[4, :, 0])
    np.testing.assert_array_equal(
        log10_rho.ravel()[section.pixel_cells], parameters[: len(section.pixel_cells)]
    )


@pytest.mark.parametrize("columns_per_code", [1, 4, 12])
def test_the_section_of_sub_regions_or_of_one_code_has_the_right_slope(
    mesh, region, columns_per_code
):
    tiny = replace(QUICK, num_steps=20, num_sections=200)
    network = learn_prior(
        PRIOR, region.grid(mesh, columns_per_code=columns_per_code), training=tiny
    )
    section = CodedSection(mesh=mesh, region=region, network=network)
    assert section.num_codes == 12 // columns_per_code
    generator = np.random.default_rng(3)
    at, change = generator.standard_normal((2, section.num_parameters))
    step = 1e-6
    difference = section.log10_rho(at + step * change) - section.log10_rho(at - step * change)
    np.testing.assert_allclose(
        section.slope(at) @ change, difference.ravel() / (2 * step), rtol=1e-5, atol=1e-7
    )


def test_a_region_that_codes_do_not_fill_or_of_another_network_is_refused(mesh, region, network):
    with pytest.raises(InversionError, match="do not divide"):
        region.grid(mesh, columns_per_code=5)
    with pytest.raises(InversionError, match="outside the ground"):
        Region(rows=(0, 99), columns=(1, 2)).grid(mesh, columns_per_code=1)
    wide = Region(rows=region.rows, columns=(0, mesh.ground_shape[1]))
    with pytest.raises(InversionError, match="equal column widths"):
        wide.grid(mesh, columns_per_code=mesh.ground_shape[1] // 2)
    other = replace(region, rows=(2, region.rows[1] + 1))
    with pytest.raises(InversionError, match="learnt on other cells"):
        CodedSection(mesh=mesh, region=other, network=network)


def make_penalty(section, edge=np.inf, order=1):
    return CodePenalty(
        section=section,
        roughness=cell_roughness(
            section.mesh,
            smoothness=Smoothness(),
            inside=section.inside,
            inside_smoothness=Smoothness(horizontal=0.5, vertical=0.0),
        ),
        reference_log10_rho=np.full(section.mesh.ground_shape, 2.0),
        code=0.2,
        lateral=0.7,
        edge=edge,
        order=order,
    )


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("edge", [0.1, 1.0, np.inf])
def test_the_penaltys_quadratic_has_its_gradient(section, parameters, edge, order):
    inner = make_penalty(section, edge, order)
    penalty = PenaltyWithShifts(inner=inner, num_shifts=2, weight=3.0)
    at = np.concatenate([parameters, [0.3, -0.1]])
    near = penalty.near(at)
    gradient = 2 * (near.matrix @ (at - near.reference))
    change = np.random.default_rng(4).standard_normal(len(at))
    step = 1e-5
    difference = (penalty.value(at + step * change) - penalty.value(at - step * change)) / (
        2 * step
    )
    assert gradient @ change == pytest.approx(difference, rel=1e-6)


def test_small_changes_of_codes_cost_their_square_and_an_edge_its_logarithm(section, parameters):
    square, edges = make_penalty(section), make_penalty(section, edge=0.3)
    start = np.where(np.arange(len(parameters)) < len(section.pixel_cells), parameters, 0.0)
    for size, cost in ((1e-4, 1e-8), (3.0, 0.09 * np.log(101.0))):
        codes = np.zeros((section.num_codes, section.network.num_latent))
        codes[5:, 2] = size  # one step along the line
        stepped = np.append(start[: len(section.pixel_cells)], codes)
        saved = square.value(stepped) - edges.value(stepped)
        assert saved == pytest.approx(0.7 * (size**2 - cost), rel=1e-6, abs=1e-12)


def test_codes_that_go_on_along_a_straight_line_cost_nothing_on_columns_of_any_width(
    mesh, region, network, parameters
):
    uneven = replace(mesh, y_m=np.sign(mesh.y_m) * np.abs(mesh.y_m) ** 1.2)
    for section in (CodedSection(mesh=m, region=region, network=network) for m in (mesh, uneven)):
        plain = replace(
            make_penalty(section, order=2), roughness=0 * make_penalty(section).roughness
        )
        slope = np.linspace(-1, 1, section.network.num_latent)
        codes = 0.5 + np.outer(section.code_y_m / 3000, slope)
        straight = np.append(parameters[: len(section.pixel_cells)], codes)
        assert plain.value(straight) == pytest.approx(0.2 * np.sum(codes**2), rel=1e-9)
        bent = np.array(codes)
        bent[6, 1] += 0.5
        changed = np.append(parameters[: len(section.pixel_cells)], bent)
        more = plain.value(changed) - 0.2 * np.sum(bent**2)
        even = 0.7 * 6 * 0.25  # 1, -2 and 1 times 0.5
        assert more == pytest.approx(even, rel=1e-9 if section.mesh is mesh else 0.5)


@pytest.mark.parametrize(("columns_per_code", "share"), [(1, 0.3), (6, 0.5), (12, 1.0)])
def test_codes_on_a_line_have_a_share_of_the_weight_and_one_alone_has_all(
    survey, mesh, region, columns_per_code, share
):
    problem, observations, _ = survey
    tiny = replace(QUICK, num_steps=2, num_sections=50)
    grid = region.grid(mesh, columns_per_code=columns_per_code)
    section = CodedSection(
        mesh=mesh, region=region, network=learn_prior(PRIOR, grid, training=tiny)
    )
    parts = coded_parts(problem, observations, section=section, settings=PriorInversion())
    assert isinstance(parts.penalty, CodePenalty)
    assert parts.penalty.code == pytest.approx(share * PriorInversion().code_weight)
    assert isinstance(parts.start_penalty, CodePenalty)
    assert parts.start_penalty.code == PriorInversion().code_weight


def test_the_penaltys_quadratic_never_falls_below_it(section, parameters):
    at = np.array(parameters)
    generator = np.random.default_rng(8)
    # Closeness alone outside the region: no roughness of decoded cells, which are curved in codes.
    close = np.where(section.inside, 0.0, 1.0).ravel()
    bare = replace(make_penalty(section, edge=0.3), roughness=sparse.diags_array(close))
    near = bare.near(at)
    here = (at - near.reference) @ (near.matrix @ (at - near.reference))
    for _ in range(20):
        then = at + generator.standard_normal(len(at))
        change = (then - near.reference) @ (near.matrix @ (then - near.reference)) - here
        assert bare.value(then) - bare.value(at) <= change + 1e-6


def test_roughness_inside_the_region_counts_no_vertical_steps(section):
    roughness = make_penalty(section).roughness
    (top, bottom), (left, right) = section.region.rows, section.region.columns
    layer = np.zeros(section.mesh.ground_shape)
    layer[top + 2 : bottom - 2, left:right] = 1.0
    flat = layer.ravel()
    sides = 2 * (bottom - top - 4)  # only the two ends, which meet the smooth surroundings
    assert flat @ (roughness @ flat) == pytest.approx(sides)


def test_column_impedances_are_those_of_the_recursion_and_have_the_right_derivative():
    generator = np.random.default_rng(0)
    log10_rho, change = generator.uniform(0, 3, (7, 3)), generator.standard_normal((7, 3))
    thickness, frequency = generator.uniform(50, 500, 7), np.array([1e3, 1.0, 1e-3])
    ground = np.ones((7, 3), dtype=bool)
    ground[:2, 1] = False

    def impedance(values):
        return column_impedances(
            values, thickness_m=thickness, is_ground=ground, frequency_hz=frequency
        )

    z, slope = impedance(log10_rho)
    for column, first in ((0, 0), (1, 2)):
        exact = layered_impedance(
            frequency,
            resistivity_ohm_m=10 ** log10_rho[first:, column],
            thickness_m=thickness[first:-1],
        )
        np.testing.assert_allclose(z[:, column], exact, rtol=1e-12)
    step = 1e-6
    difference = impedance(log10_rho + step * change)[0] - impedance(log10_rho - step * change)[0]
    found = np.einsum("fcr,rc->fc", slope, change)
    np.testing.assert_allclose(found, difference / (2 * step), rtol=1e-6)


COMPONENTS = (
    Component.TE_LOG10_RHO, Component.TE_PHASE, Component.TM_LOG10_RHO, Component.TM_PHASE,
    Component.TIPPER_REAL,
)  # fmt: skip


@pytest.fixture(scope="module")
def survey(mesh):
    """A layer that ends in the middle of the line, six stations, 2 % noise."""
    frequency = np.array([100.0, 10.0, 1.0, 0.1])
    position = np.linspace(-2200.0, 2300.0, 6)
    f, r, c = (
        grid.ravel()
        for grid in np.meshgrid(
            range(4), range(6), [int(component) for component in COMPONENTS], indexing="ij"
        )
    )
    empty = Observations(
        frequency_hz=frequency, position_m=position, receiver_names=tuple("abcdef"),
        frequency_index=f, receiver_index=r, component=c,
        value=np.zeros(len(f)), error=np.full(len(f), 0.02),
    )  # fmt: skip
    problem = make_problem(mesh, position_m=position, frequency_hz=frequency)
    middle = (mesh.y_m[1:] + mesh.y_m[:-1]) / 2
    depth = (mesh.z_m[mesh.num_air + 1 :] + mesh.z_m[mesh.num_air : -1]) / 2
    truth = np.full(mesh.ground_shape, 2.0)
    truth[np.ix_((depth > 400) & (depth < 1200), middle < 500)] = 0.8
    model = SectionModel(problem=problem, observations=empty, model_map=pixel_map(mesh))
    noise = 0.02 * np.random.default_rng(11).standard_normal(len(f))
    return problem, replace(empty, value=model.predict(truth.ravel()) + noise), truth


def test_layered_predictions_are_the_2d_ones_over_layers_and_their_jacobian_is_right(
    survey, section, parameters
):
    problem, observations, _ = survey
    layers = np.broadcast_to(
        np.linspace(1, 3, section.mesh.ground_shape[0])[:, None], section.mesh.ground_shape
    )
    pixels = pixel_map(section.mesh)
    parts = {"problem": problem, "observations": observations, "model_map": pixels}
    np.testing.assert_allclose(
        LayeredModel(**parts).predict(layers.ravel()),
        SectionModel(**parts).predict(layers.ravel()),
        atol=1e-6,
    )
    model = LayeredModel(problem=problem, observations=observations, model_map=section)
    change = np.random.default_rng(6).standard_normal(len(parameters))
    step = 1e-6
    difference = model.predict(parameters + step * change) - model.predict(
        parameters - step * change
    )
    found = model.linearize(parameters)
    np.testing.assert_allclose(found.values, model.predict(parameters))
    np.testing.assert_allclose(found.jacobian @ change, difference / (2 * step), atol=1e-6)


def test_data_of_codes_and_shifts_have_the_right_derivative(survey, section, parameters):
    problem, observations, _ = survey
    inner = SectionModel(problem=problem, observations=observations, model_map=section)
    model = StaticShiftModel(section=inner, observations=observations)
    at = np.concatenate([parameters, np.linspace(-0.3, 0.3, 12)])
    change = np.random.default_rng(7).standard_normal(len(at))
    step = 1e-5
    difference = (model.predict(at + step * change) - model.predict(at - step * change)) / (
        2 * step
    )
    found = model.linearize(at).jacobian @ change
    assert np.linalg.norm(found - difference) < 1e-6 * np.linalg.norm(difference)


def test_a_learnt_prior_fits_the_noise_monotonically_and_beats_the_start_in_its_region(
    survey, section
):
    problem, observations, truth = survey
    settings = PriorInversion(stopping=StoppingRule(target_rms=1.0, max_steps=8))
    seen = []
    found = invert_with_prior(
        problem, observations, section=section, settings=settings, on_step=seen.append
    )
    rms = [record.rms for record in found.result.history]
    assert found.result.rms <= 1.0
    assert all(later <= earlier for earlier, later in pairwise(rms))
    inside = section.inside
    error = np.abs(found.log10_rho - truth)[inside].mean()
    assert error < 0.5 * np.abs(2.0 - truth)[inside].mean()
    assert np.abs(found.codes).max() <= settings.code_bound
    rest = invert_with_prior(
        problem, observations, section=section, settings=settings, resume=seen[0]
    )
    np.testing.assert_array_equal(rest.log10_rho, found.log10_rho)


def test_alternating_steps_fit_the_noise_monotonically_too(survey, section):
    problem, observations, _ = survey
    settings = PriorInversion(
        stopping=StoppingRule(target_rms=1.0, max_steps=8), order=StepOrder.ALTERNATING
    )
    found = invert_with_prior(problem, observations, section=section, settings=settings)
    rms = [record.rms for record in found.result.history]
    assert found.result.rms <= 1.0
    assert all(later <= earlier for earlier, later in pairwise(rms))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InversionError, match="code_weight"):
        PriorInversion(code_weight=0.0)
    with pytest.raises(InversionError, match="line_share"):
        PriorInversion(line_share=0.0)
    with pytest.raises(InversionError, match="lateral_edge"):
        PriorInversion(lateral_edge=0.0)
    with pytest.raises(InversionError, match="joint steps only"):
        PriorInversion(order=StepOrder.ALTERNATING, static_shift_weight=1.0)
    with pytest.raises(InversionError, match="positive"):
        Training(num_latent=0)
