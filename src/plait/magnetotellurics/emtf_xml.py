"""Read EMTF XML, the format of the IRIS SPUD archive (Kelbert 2020, Geophysics 85, F1-F17).

The file is parsed by expat into a small tree that keeps line numbers.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np

from plait.magnetotellurics.axes import to_common_axes
from plait.magnetotellurics.survey import (
    NO_VALUE_ABOVE,
    OHM_PER_FIELD_UNIT,
    Station,
    select_frequencies,
)
from plait.magnetotellurics.text_lines import TextLines, read_text_lines

_INDEX = {"zxx": (0, 0), "zxy": (0, 1), "zyx": (1, 0), "zyy": (1, 1), "tx": (0, 0), "ty": (0, 1)}


@dataclass
class Element:
    """One XML element: its tag, attributes, own text, children and line."""

    tag: str
    attributes: dict[str, str]
    line: int
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def all(self, tag: str) -> list["Element"]:
        """List the children with this tag, in any case of letters."""
        return [child for child in self.children if child.tag.lower() == tag.lower()]

    def find(self, *path: str) -> "Element | None":
        """Follow a path of tags through the first children."""
        here: Element | None = self
        for tag in path:
            here = next(iter(here.all(tag)), None) if here else None
        return here


def read_emtf_xml(path: str | Path) -> Station:
    """Read one EMTF XML file into e^{+i w t} and one pair of axes.

    Raises:
        SurveyError: with file and line: XML that is not whole, unknown units or sign, a value
            that is not a number.
    """
    lines = read_text_lines(path, end_marks=(">",))
    root = _parse(lines)
    site, data = root.find("Site"), root.find("Data")
    if site is None or data is None:
        lines.fail(root.line, f"<{root.tag}> holds no <Site> or no <Data>: not an EMTF XML file")
    periods = data.all("Period")
    count = data.attributes.get("count")
    if not periods or (count and int(count) != len(periods)):
        lines.fail(data.line, f"<Data count={count}> holds {len(periods)} periods")
    notes: list[str] = []
    shape = (len(periods), 2, 2)
    z, z_variance = np.full(shape, np.nan + 0j), np.full(shape, np.nan)
    t, t_variance = (
        np.full((len(periods), 1, 2), np.nan + 0j),
        np.full((len(periods), 1, 2), np.nan),
    )
    frequency = np.empty(len(periods))
    for row, period in enumerate(periods):
        seconds = lines.number(period.line, period.attributes.get("value", ""), what="Period")
        if seconds <= 0:
            lines.fail(period.line, f"the period {seconds} s is not positive")
        frequency[row] = 1 / seconds
        for name, target in (("Z", z), ("Z.VAR", z_variance), ("T", t), ("T.VAR", t_variance)):
            for block in period.all(name):
                _fill(lines, block, target[row])
    if _sign(lines, root) < 0:
        z, t = z.conj(), t.conj()
        notes.append("values written for e^{-i w t} were conjugated")
    negative = int((z_variance < 0).sum() + (t_variance < 0).sum())
    if negative:
        notes.append(f"{negative} negative variances were dropped")
    z_error, t_error = (np.sqrt(np.where(v < 0, np.nan, v)) for v in (z_variance, t_variance))
    azimuth, z, t = _turn(lines, root, z, t, notes)
    station = Station(
        name="_".join((_text(site, "Id") or lines.path.stem).split()),
        frequency_hz=frequency,
        impedance_ohm=z * complex(OHM_PER_FIELD_UNIT),
        impedance_error_ohm=z_error * OHM_PER_FIELD_UNIT,
        tipper=t[:, 0],
        tipper_error=t_error[:, 0],
        rotation_deg=np.full(len(periods), azimuth),
        latitude_deg=_place(lines, site, "Latitude", notes),
        longitude_deg=_place(lines, site, "Longitude", notes),
        elevation_m=_place(lines, site, "Elevation", notes),
        notes=tuple(notes),
        source=lines.path,
    )
    return select_frequencies(station, station.has_values(), why="no impedance and no tipper there")


def _parse(lines: TextLines) -> Element:
    parser = expat.ParserCreate()
    stack = [Element("", {}, 1)]

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, attributes, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def characters(text: str) -> None:
        stack[-1].text += text

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _tag: stack.pop()
    parser.CharacterDataHandler = characters
    # Archives hold author lists with a bare "&", which XML forbids; nothing else is mended.
    text = re.sub(rb"&(?!#?\w+;)", b"&amp;", lines.path.read_bytes())
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        lines.fail(error.lineno, f"not well-formed XML: {expat.errors.messages[error.code]}")
    return stack[0].children[0]


def _fill(lines: TextLines, block: Element, target: np.ndarray) -> None:
    units = block.attributes.get("units", "").replace(" ", "")
    if block.tag.lower() == "z" and units not in {"[mV/km]/[nT]", "mV/km/nT", ""}:
        lines.fail(block.line, f"unknown unit {units!r} of Z, expected [mV/km]/[nT]")
    for value in block.all("value"):
        name = value.attributes.get("name", "").lower()
        if name not in _INDEX:
            lines.fail(value.line, f"unknown element {name!r}, expected one of {sorted(_INDEX)}")
        words = value.text.split()
        expected = 2 if np.iscomplexobj(target) else 1
        if len(words) != expected:
            lines.fail(value.line, f"{name} holds {len(words)} numbers, expected {expected}")
        if any(word.lower() == "nan" for word in words):
            continue
        parts = [lines.number(value.line, word, what=name) for word in words]
        if max(abs(part) for part in parts) > NO_VALUE_ABOVE:
            continue
        target[_INDEX[name]] = complex(*parts) if expected == 2 else parts[0]


def _sign(lines: TextLines, root: Element) -> int:
    element = root.find("ProcessingInfo", "SignConvention")
    text = element.text.replace(" ", "").replace("\\omega", "w") if element else "exp(+iwt)"
    if text not in {"exp(+iwt)", "exp(iwt)", "exp(-iwt)"}:
        lines.fail(element.line if element else 1, f"unknown sign convention {text!r}")
    return -1 if "-" in text else 1


def _turn(
    lines: TextLines, root: Element, z: np.ndarray, t: np.ndarray, notes: list[str]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Bring Z and T to orthogonal axes; give the azimuth of x."""
    layout = root.find("SiteLayout")
    azimuth: dict[str, float] = {}
    for group in layout.children if layout else []:
        for channel in group.children:
            if "orientation" in channel.attributes:
                text = channel.attributes["orientation"]
                name = channel.attributes.get("name", "").lower()
                azimuth[name] = lines.number(channel.line, text, what="orientation")
    if {"hx", "hy", "ex", "ey"} <= azimuth.keys():
        magnetic, electric = (azimuth["hx"], azimuth["hy"]), (azimuth["ex"], azimuth["ey"])
        square = all(
            abs((b - a + 180) % 360 - 180 - 90) < 0.05 and abs(a - magnetic[0]) < 0.05
            for a, b in (magnetic, electric)
        )
        if not square:
            notes.append(f"channels at H {magnetic}, E {electric} degrees turned to common axes")
            arguments = {"output_azimuth_deg": electric, "input_azimuth_deg": magnetic}
            z, t = to_common_axes(z, **arguments), to_common_axes(t, **arguments)
        return magnetic[0], z, t
    orientation = root.find("Site", "Orientation")
    text = orientation.attributes.get("angle_to_geographic_north") if orientation else None
    if orientation is None or text is None:
        notes.append("no channel orientations: x is taken as geographic north")
        return 0.0, z, t
    return lines.number(orientation.line, text, what="Orientation"), z, t


def _text(site: Element, *path: str) -> str:
    element = site.find(*path)
    return element.text.strip() if element else ""


def _place(lines: TextLines, site: Element, tag: str, notes: list[str]) -> float:
    element = site.find("Location", tag)
    if element is None or not element.text.strip():
        notes.append(f"no {tag} in the file")
        return float("nan")
    return lines.number(element.line, element.text.strip(), what=tag)
