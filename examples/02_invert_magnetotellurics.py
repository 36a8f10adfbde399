"""Invert magnetotelluric data: a made-up basin, or an MT2DData file such as COPROD2's.

    python examples/02_invert_magnetotellurics.py [coprod2data.dat]

With a file, three pictures are written to the working directory.
"""

import sys
from dataclasses import replace

import numpy as np

from plait.magnetotellurics.data_model import SectionModel
from plait.magnetotellurics.forward_2d import make_problem
from plait.magnetotellurics.inversion import StoppingRule
from plait.magnetotellurics.mesh_design import MeshDesign, mesh_from_skin_depths
from plait.magnetotellurics.model_map import pixel_map
from plait.magnetotellurics.mt2d_data import read_mt2d_data
from plait.magnetotellurics.observations import Observations, as_log_data
from plait.magnetotellurics.plots import convergence_figure, fit_figure, section_figure
from plait.magnetotellurics.smooth_inversion import SmoothInversion, invert_smoothly

if len(sys.argv) > 1:
    observations = as_log_data(read_mt2d_data(sys.argv[1]))
    target, width, deepest = 1.3, 2500.0, 8e4
else:
    f, r, c = (g.ravel() for g in np.meshgrid(range(5), range(8), [0, 1, 4, 5], indexing="ij"))
    observations = Observations(
        frequency_hz=np.logspace(2, -1, 5), position_m=np.arange(8) * 1500.0,
        receiver_names=tuple("abcdefgh"), frequency_index=f, receiver_index=r, component=c,
        value=np.zeros(160), error=np.full(160, 0.03),
    )  # fmt: skip
    target, width, deepest = 1.0, 750.0, 6e3
design = MeshDesign(
    cells_per_skin_depth=6, growth=1.2, num_pad_skin_depths=3, station_width_m=width
)
mesh = mesh_from_skin_depths(
    observations.position_m, frequency_hz=observations.frequency_hz, min_resistivity_ohm_m=2.0,
    max_resistivity_ohm_m=300.0, design=design,
)  # fmt: skip
stations, frequencies = observations.position_m, observations.frequency_hz
problem = make_problem(mesh, position_m=stations, frequency_hz=frequencies)
if len(sys.argv) == 1:
    truth = np.full(mesh.ground_shape, 2.0)
    basin = (mesh.y_m[1:] > 3000) & (mesh.y_m[:-1] < 7500)
    truth[np.ix_(mesh.z_m[mesh.num_air + 1 :] < 1200, basin)] = 0.8
    made = SectionModel(problem=problem, observations=observations, model_map=pixel_map(mesh))
    noise = 0.03 * np.random.default_rng(0).standard_normal(160)
    observations = replace(observations, value=made.predict(truth.ravel()) + noise)
stopping = StoppingRule(target_rms=target, max_steps=12)
settings = SmoothInversion(start_log10_rho=1.5, stopping=stopping)
found = invert_smoothly(problem, observations, settings=settings)
for record in found.result.history:
    print(f"step {record.step}  rms {record.rms:6.3f}  after {record.duration_s:5.1f} s")
print(found.result.stopped_because)
if len(sys.argv) > 1:
    figure = section_figure(mesh, found.log10_rho, station_m=stations, max_depth_m=deepest)
    figure.savefig("section.png", dpi=120)
    fit_figure(observations, found.result.values).savefig("fit.png", dpi=80)
    convergence_figure(found.result.history, target_rms=target).savefig("convergence.png")
