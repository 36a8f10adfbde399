import json
from dataclasses import replace

import numpy as np
import pytest

from plait.cli.forward import forward_command
from plait.cli.invert import invert_command
from plait.config import override
from plait.errors import InversionError, SurveyError
from plait.magnetotellurics.earth import flat_mesh
from plait.magnetotellurics.forward_2d import make_problem
from plait.magnetotellurics.influence import deliberately_different, influence_of
from plait.magnetotellurics.invert_job import InvertJob
from plait.magnetotellurics.invert_run import run_inversion
from plait.magnetotellurics.jacobian import predict
from plait.magnetotellurics.linear_solver import sparse
from plait.magnetotellurics.linear_step import LinearStep
from plait.magnetotellurics.observations import Observations
from plait.magnetotellurics.occam2d_data import read_occam2d_data, write_occam2d_data
from plait.magnetotellurics.posterior import posterior_of
from plait.magnetotellurics.prior import Range
from plait.magnetotellurics.prior_file import read_prior
from plait.magnetotellurics.profile import ProfileSettings
from plait.magnetotellurics.report_page import write_report
from plait.magnetotellurics.run_files import load_state
from plait.magnetotellurics.survey_files import read_observations

from .sections import padded, padding

PRIOR = """
name = "cover"
background_log10_rho = 1.0
[[layer]]
name = "cover"
top_m = 0
thickness_m = [300, 900]
log10_rho = [0.7, 1.2]
[[layer]]
name = "basement"
log10_rho = [1.8, 2.5]
"""
QUICK = [
    "training.num_sections=500",
    "training.num_steps=300",
    "training.num_hidden=32",
    "training.num_latent=4",
    "num_workers=1",
    "start_log10_rho=1.5",
]


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Seven stations on a cover of 10 ohm m, 500 m thick, over 150 ohm m; 3 % noise."""
    mesh = flat_mesh(
        y_m=padded(np.linspace(-3500.0, 3500.0, 15), 4e4, 1.8),
        ground_z_m=np.concatenate([[0.0], padding(50.0, 4e4, 1.3)]),
        air_height_m=5e4,
    )
    frequency, position = np.array([100.0, 10.0, 1.0]), np.linspace(-2900.0, 3100.0, 7)
    f, r, c = (g.ravel() for g in np.meshgrid(range(3), range(7), [0, 1, 4, 5], indexing="ij"))
    empty = Observations(
        frequency_hz=frequency, position_m=position, receiver_names=tuple("abcdefg"),
        frequency_index=f, receiver_index=r, component=c,
        value=np.zeros(len(f)), error=np.full(len(f), 0.03),
    )  # fmt: skip
    depth = (mesh.z_m[mesh.num_air + 1 :] + mesh.z_m[mesh.num_air : -1]) / 2
    rho = np.broadcast_to(np.where(depth < 500, 10.0, 150.0)[:, None], mesh.ground_shape)
    problem = make_problem(mesh, position_m=position, frequency_hz=frequency)
    noise = 0.03 * np.random.default_rng(3).standard_normal(len(f))
    folder = tmp_path_factory.mktemp("survey")
    values = predict(problem, rho, empty) + noise
    write_occam2d_data(folder / "line.dat", replace(empty, value=values), title="cover")
    (folder / "cover.toml").write_text(PRIOR)
    return folder


@pytest.fixture(scope="module")
def job(survey):
    whole = InvertJob(survey=str(survey / "line.dat"), prior=str(survey / "cover.toml"))
    return override(whole, [*QUICK, "num_seeds=2"])


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    said = []
    return run_inversion(job, folder, on_progress=said.append), folder, said


def test_a_run_with_a_prior_brings_the_conventional_section_and_another_priors(run):
    found, _, said = run
    assert len(found.learnt) == 2
    assert found.other is not None
    for section in (*found.learnt, found.smooth):
        assert section.result.rms <= 1.0 * 1.03
    assert found.priors[1].layers[0].thickness_m.low == 900.0
    assert found.ensemble_deviation.shape == found.problem.mesh.ground_shape
    # Codes leave the section less freedom than pixels, above all where no data reach.
    inside = found.learnt[0].section.inside
    assert np.median(found.learnt_deviation[inside]) > 0
    assert np.median(found.learnt_deviation[inside]) < np.median(found.resolution.deviation[inside])
    assert any("step 1" in line and "rms" in line for line in said)


def test_cells_under_different_priors_that_differ_too_much_are_hatched(run):
    found, _, _ = run
    others = [found.smooth, *([found.other] if found.other_fits else [])]
    differences = [np.abs(found.learnt[0].log10_rho - other.log10_rho) for other in others]
    np.testing.assert_array_equal(found.influence.moved, np.max(differences, axis=0))
    assert found.influence.from_prior.any()
    assert not found.influence.from_prior.all()
    assert found.influence.allowed.min() >= 0.1
    assert found.influence.allowed.max() <= 0.3


def test_a_prior_that_the_data_rule_out_is_named_and_does_not_count(run, tmp_path):
    found, _, _ = run
    bad = replace(found.other, result=replace(found.other.result, rms=3.0))
    contradicted = replace(found, other=bad)
    assert not contradicted.other_fits
    text = write_report(contradicted, tmp_path).read_text()
    assert "the data rule it out" in text


def test_what_no_code_can_say_is_added_smoothly_until_the_data_are_fitted(job, survey, tmp_path):
    path = survey / "resistive.toml"
    path.write_text(PRIOR.replace("[0.7, 1.2]", "[1.7, 1.9]").replace("= 1.0", "= 1.8"))
    settings = replace(job, prior=str(path), num_seeds=1)
    found = run_inversion(settings, tmp_path / "run", on_progress=lambda _: None)
    learnt = found.learnt[0]
    assert learnt.title.endswith("departures from it")
    assert learnt.coded.rms > 1.1
    assert learnt.result.rms <= 1.0 * 1.03
    assert learnt.result.rms <= max(1.0, found.smooth.result.rms)
    of_codes = learnt.section.log10_rho(learnt.coded.parameters)
    departures = [each.log10_rho - of_codes for each in (learnt, found.smooth)]
    rough = [sum((np.diff(x, axis=axis) ** 2).sum() for axis in (0, 1)) for x in departures]
    assert rough[0] < 0.9 * rough[1]
    assert [record.step for record in learnt.result.history] == list(
        range(len(learnt.result.history))
    )
    assert "departures" not in found.other.title
    assert learnt.title in write_report(found, tmp_path).read_text()
    sections = json.loads((tmp_path / "result.json").read_text())["sections"]
    kept = {each["title"]: each["rms_of_codes"] for each in sections}
    assert kept[learnt.title] == learnt.coded.rms
    assert kept[found.smooth.title] is None


def test_departures_that_do_not_fit_begin_again_at_the_section_that_does(job, survey, tmp_path):
    path = survey / "resistive.toml"
    path.write_text(PRIOR.replace("[0.7, 1.2]", "[1.7, 1.9]").replace("= 1.0", "= 1.8"))
    settings = replace(job, prior=str(path), num_seeds=1, max_steps=1)
    said = []
    found = run_inversion(settings, tmp_path / "run", on_progress=said.append)
    assert any(line.startswith("prior_0_from_smooth: step 1") for line in said)
    limit = max(job.target_rms, found.smooth.result.rms)
    assert found.learnt[0].result.rms <= limit < found.learnt[0].coded.rms


def test_the_report_holds_every_picture_that_it_shows_and_escapes_names(run, tmp_path):
    found, _, _ = run
    odd = replace(found, job=replace(found.job, survey="a<b>.dat"))
    page = write_report(odd, tmp_path)
    text = page.read_text()
    for name in (
        "section",
        "deviation",
        "learnt_deviation",
        "influence",
        "ensemble",
        "fit",
        "convergence",
    ):
        assert f'src="{name}.png"' in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "a&lt;b&gt;.dat" in text
    assert "<b>" not in text
    assert "made thicker" in text
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["from_prior_share"] < 1
    lines = (tmp_path / "response.csv").read_text().splitlines()
    assert len(lines) == 1 + found.observations.num_data


def test_a_cut_run_goes_on_where_it_was_and_ends_at_the_same_section(job, run, tmp_path):
    whole, _, _ = run
    single = replace(job, num_seeds=1)

    class CutError(Exception):
        pass

    said = []

    def cut(line):
        said.append(line)
        if line.startswith("prior_0: step 1"):
            raise CutError

    with pytest.raises(CutError):
        run_inversion(single, tmp_path / "run", on_progress=cut)
    rest = []
    again = run_inversion(single, tmp_path / "run", on_progress=rest.append)
    np.testing.assert_array_equal(again.learnt[0].log10_rho, whole.learnt[0].log10_rho)
    np.testing.assert_array_equal(again.smooth.log10_rho, whole.smooth.log10_rho)
    assert rest[0].startswith("continuing")
    assert not any(line.startswith("smooth: step") for line in rest)
    assert not any(line.startswith("prior_0: learning") for line in rest)
    assert not any(line.startswith("prior_0: step 1,") for line in rest)


def test_a_folder_of_another_run_is_refused_and_a_damaged_state_is_named(job, run, tmp_path):
    _, folder, _ = run
    with pytest.raises(InversionError, match="other settings"):
        run_inversion(replace(job, target_rms=2.0), folder, on_progress=lambda _: None)
    state = folder / "state_smooth.npz"
    path = tmp_path / "state.npz"
    path.write_bytes(state.read_bytes()[:200])
    with pytest.raises(InversionError, match=r"state\.npz"):
        load_state(path)
    assert load_state(tmp_path / "absent.npz") is None


def test_the_commands_write_report_section_and_responses(survey, tmp_path, capsys):
    invert_command(
        survey / "line.dat",
        settings=["num_workers=1", "start_log10_rho=1.5", "target_rms=1.05"],
        out=tmp_path / "run",
    )
    printed = capsys.readouterr()
    assert "rms" in printed.out
    assert "report.html" in printed.out
    assert "step 0" in printed.err
    forward_command(
        tmp_path / "run" / "section.rho",
        settings=["num_stations=4", "num_frequencies=3", "min_frequency_hz=1", "num_workers=1"],
        out=tmp_path / "forward",
    )
    table = (tmp_path / "forward" / "response.csv").read_text().splitlines()
    assert table[0] == "station,y_m,frequency_hz,component,value"
    assert len(table) == 1 + 4 * 3 * 6
    rho = [float(line.split(",")[4]) for line in table[1:] if "TE_LOG10_RHO" in line]
    assert min(rho) > 0.8
    assert max(rho) < 2.3
    page = (tmp_path / "forward" / "report.html").read_text()
    for name in ("section.png", "response.png"):
        assert f'src="{name}"' in page
        assert (tmp_path / "forward" / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("target_rms=-1", "target_rms"),
        ("max_steps=0", "max_steps"),
        ("num_workers=0", "num_workers=0"),
        ("huber=-2", "huber=-2"),
        ("static_shift_weight=0", "static_shift_weight=0"),
        ("start_log10_rho=9", "lies outside min_log10_rho"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_its_folder_is_made(
    survey, tmp_path, setting, message
):
    with pytest.raises(InversionError, match=message):
        invert_command(survey / "line.dat", settings=[setting], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_job_inverts_the_data_that_it_chooses_and_keeps_its_bounds(survey, tmp_path):
    (survey / "points.csv").write_text("c,TM,0,inf\n")
    whole = InvertJob(survey=str(survey / "line.dat"), num_workers=1)
    chosen = [
        "data.stations_left_out=a",
        "data.min_frequency_hz=5",
        f"data.left_out={survey / 'points.csv'}",
        "min_log10_rho=1.0",
        "max_log10_rho=1.9",
        "start_log10_rho=1.5",
    ]
    found = run_inversion(override(whole, chosen), tmp_path / "run", on_progress=lambda _: None)
    assert found.observations.num_data == 6 * 2 * 4 - 2 * 2
    assert found.observations.notes[-1].startswith("40 of 84 data dropped")
    assert found.smooth.log10_rho.min() >= 1.0
    assert found.smooth.log10_rho.max() <= 1.9
    write_report(found, tmp_path / "run")
    assert "40 of 84 data dropped" in (tmp_path / "run" / "report.html").read_text()


def test_a_survey_is_told_by_its_first_lines_and_anything_else_is_refused(survey, tmp_path):
    settings = ProfileSettings()
    direct = read_occam2d_data(survey / "line.dat")
    np.testing.assert_array_equal(
        read_observations(survey / "line.dat", settings=settings).value, direct.value
    )
    (tmp_path / "x.dat").write_text("hello")
    with pytest.raises(SurveyError, match="not an MT2DData"):
        read_observations(tmp_path / "x.dat", settings=settings)
    with pytest.raises(SurveyError, match="no station file"):
        read_observations(tmp_path, settings=settings)
    with pytest.raises(SurveyError, match="neither"):
        read_observations(tmp_path / "nothing", settings=settings)


def test_every_kind_of_survey_file_is_read(mt_data):
    settings = ProfileSettings(strike_deg=-45.0)
    for place in (
        "coprod2/coprod2data.dat",
        "modem2d_block2/de_JT.dat",
        "paralana_pb/occam2d/OccamDataFile.dat",
        "samtex_kap03",
    ):
        found = read_observations(mt_data / place, settings=settings)
        assert set(np.unique(found.component)) <= {0, 1, 4, 5, 8, 9}
        assert found.num_data > 500


def test_the_posterior_is_the_inverse_of_the_normal_matrix():
    generator = np.random.default_rng(0)
    jacobian, residual = generator.standard_normal((7, 11)), generator.standard_normal(7)
    factor = generator.standard_normal((11, 11))
    roughness = factor @ factor.T + np.eye(11)
    step = LinearStep(
        jacobian=jacobian,
        residual=residual,
        root_weight=np.ones(7),
        roughness=sparse.csc_array(roughness),
        departure=np.zeros(11),
        reference=np.zeros(11),
    )
    found = posterior_of(step, trade_off=0.4)
    covariance = np.linalg.inv(jacobian.T @ jacobian + 0.4 * roughness)
    np.testing.assert_allclose(found.deviation, np.sqrt(np.diag(covariance)), rtol=1e-9)
    moved = replace(step, reference=np.ones(11), departure=-np.ones(11)).model(0.4)
    still = step.model(0.4)
    np.testing.assert_allclose(found.reference_share, moved - still, rtol=1e-9)
    slope = generator.standard_normal((5, 11))
    carried = posterior_of(step, trade_off=0.4, slope=sparse.csr_array(slope), num_changed=4)
    np.testing.assert_allclose(
        carried.deviation, np.sqrt(np.diag(slope @ covariance @ slope.T)), rtol=1e-9
    )
    some = (np.arange(11) < 4).astype(float)
    moved = replace(step, reference=some, departure=-some).model(0.4)
    np.testing.assert_allclose(carried.reference_share, moved - still, rtol=1e-9, atol=1e-12)


def test_what_the_data_allow_is_two_deviations_within_limits():
    found = influence_of(
        np.array([[1.0, 1.0, 1.0]]),
        others=[np.array([[1.25, 1.15, 1.2]]), np.array([[1.0, 0.9, 1.0]])],
        deviation=np.array([[0.1, 0.01, 5.0]]),
    )
    np.testing.assert_allclose(found.moved, [[0.25, 0.15, 0.2]])
    np.testing.assert_allclose(found.allowed, [[0.2, 0.1, 0.3]])
    np.testing.assert_array_equal(found.from_prior, [[True, True, False]])


def test_the_different_prior_allows_no_thickness_of_the_first(survey):
    prior = read_prior(survey / "cover.toml")
    other = deliberately_different(prior)
    assert other.layers[0].thickness_m == Range(900.0, 1950.0)
    assert other.layers[1] == prior.layers[1]
