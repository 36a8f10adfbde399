"""The alternating step: pixels everywhere, then the region's codes again.

Pixels may leave the decoder's reach in the first half; the second half encodes them and steps in
the codes from there [the order of Zhou et al. 2024, Geophysics 89, WA67]. A pair of halves is kept
only if it lowers RMS; one that does not is done again as a joint step, so RMS never rises.
"""

from dataclasses import dataclass

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.coded_section import CodedSection
from plait.magnetotellurics.data_model import DataModel
from plait.magnetotellurics.inversion import Attempt, StepRule, Trial, linear_step
from plait.magnetotellurics.linear_step import LinearStep
from plait.magnetotellurics.misfit import Misfit
from plait.magnetotellurics.penalty import Penalty


@dataclass(frozen=True, kw_only=True)
class AlternatingRule:
    """A StepRule that makes a pixel step, encodes, and makes a code step.

    Attributes:
        rule: of both halves.
        section: pixels and codes.
        pixels: predicts the data of a section given by the pixels of all ground cells.
        pixel_penalty: roughness of those pixels.
        coded: predicts the data of pixels and codes.
        code_penalty: of pixels and codes.
        misfit: of the observations.
        pixel_bounds: of log10 rho.
    """

    rule: StepRule
    section: CodedSection
    pixels: DataModel
    pixel_penalty: Penalty
    coded: DataModel
    code_penalty: Penalty
    misfit: Misfit
    pixel_bounds: tuple[float, float]

    def next_trial(
        self, step: LinearStep, *, now: Trial, attempt: Attempt, target_rms: float
    ) -> Trial:
        """Give the end of both halves, or of a joint step if they do not lower RMS."""
        encoded = attempt(self._after_pixels(now, target_rms), now.trade_off)
        again = linear_step(self.coded, self.misfit, self.code_penalty, encoded.parameters)
        then = self.rule.next_trial(again, now=encoded, attempt=attempt, target_rms=target_rms)
        best = min((encoded, then), key=lambda trial: trial.rms)
        if best.rms < now.rms:
            return best
        return self.rule.next_trial(step, now=now, attempt=attempt, target_rms=target_rms)

    def _after_pixels(self, now: Trial, target_rms: float) -> RealArray:
        """Step in all pixels from the present section, and encode what comes out."""
        mesh = self.section.mesh

        def attempt(parameters: RealArray, trade_off: float) -> Trial:
            inside = np.clip(parameters, *self.pixel_bounds)
            values = self.pixels.predict(inside)
            return Trial(
                parameters=inside,
                values=values,
                residual=self.misfit.residual(values),
                rms=self.misfit.rms(values),
                roughness=self.pixel_penalty.value(inside),
                trade_off=trade_off,
            )

        here = attempt(self.section.log10_rho(now.parameters)[mesh.is_ground], now.trade_off)
        step = linear_step(self.pixels, self.misfit, self.pixel_penalty, here.parameters)
        then = self.rule.next_trial(step, now=here, attempt=attempt, target_rms=target_rms)
        cells = np.full(mesh.ground_shape, self.section.fixed_log10_rho)
        cells[mesh.is_ground] = (then if then.rms < here.rms else here).parameters
        return self.section.encode(cells)
