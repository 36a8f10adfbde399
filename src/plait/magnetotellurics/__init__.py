"""Magnetotellurics: survey files, 1-D and 2-D forward modelling, sensitivities and inversion.

Conventions, stated here once. Time factor e^{+i w t}. Axes: x along strike (north in a survey),
y along the profile (east in a survey), z down with z = 0 at the surface. SI inside the library:
metres, seconds, hertz, ohm metres, and impedances E/H in ohm; field units (mV/km/nT) and degrees
appear only in files. With these signs the phase of Zxy of a half-space is +45 degrees and that of
Zyx is -135 degrees. TE (E-polarization) is Ex with Zxy, TM (H-polarization) is Hx with Zyx, and
the tipper Tzy is Hz/Hy. Numbers are float64 and complex128 throughout.
"""
