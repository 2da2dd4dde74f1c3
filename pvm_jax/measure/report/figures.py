"""The report's figures: what a panel shows, as numbers, and how it is drawn.

Drawn by matplotlib, for the page as SVG whose texts are texts: small, sharp at any size, and in the
reader's own colours (`inline`); for papers and slides also as PDF and PNG.
"""

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pvm_jax.measure.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; each has a marker and a dash of
# its own besides.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b5558f",
    "#3f9fd0",
    "#808080",
)
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY)
MARKERS, DASHES = "osD^v", ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)), ":")
INK, GRID, PAPER = "#1f2328", "#d8dee4", "#ffffff"

# In a page, a colour of a figure is a variable that the page sets for light and for dark.
_VARIABLES = {
    INK: "var(--ink)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    SKY: "var(--sky)",
    GREY: "var(--grey)",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pvm-jax",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}
DPI = 200
WIDTH, HEIGHT = 4.5, 3.2  # inches: as wide as a phone, so that letters keep their size there
LEGEND_LETTERS = 28  # of a name, where two stand beside each other


class Series(NamedTuple):
    """One line, or one set of bars: an Estimate at each x. `reference`: drawn as a thin grey line
    without markers."""

    name: str
    x: list[float]
    y: list[Estimate]
    reference: bool = False


class Panel(NamedTuple):
    """One figure of numbers.

    Attributes:
        key: names its file and its entry in the JSON.
        title: what it shows, in a few words.
        text: two sentences for someone who has not read the paper: what it shows, and how to read
            it.
        x_label, y_label: with units.
        log: the axes that are logarithmic: "", "x", "y" or "xy".
        names: what stands at x = 0, 1, …; with them the panel is one of horizontal bars.
        bounds: of the y axis (of the bars' axis); None: as the numbers are.
        ordered: the series are layers or other steps of one thing, and get shades of one colour.
    """

    key: str
    title: str
    text: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log: str = ""
    names: Sequence[str] = ()
    bounds: tuple[float, float] | None = None
    ordered: bool = False

    def data(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {s.name: {"x": list(s.x), **_columns(s.y)} for s in self.series}
        return {
            "title": self.title,
            "x": self.x_label,
            "y": self.y_label,
            "names": list(self.names),
            "series": numbers,
        }


class AttentionMap(NamedTuple):
    """Where one token looked.

    Attributes:
        key, title, text: as of a Panel.
        frames: pictures [height, width, 3] in [0, 1].
        maps: by what looked, an attention map [rows, columns] for each frame; all of them share one
            scale.
    """

    key: str
    title: str
    text: str
    frames: Sequence[np.ndarray]
    maps: dict[str, list[np.ndarray]]

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "maps": {name: [m.tolist() for m in maps] for name, maps in self.maps.items()},
        }


def _columns(estimates: Sequence[Estimate]) -> dict[str, list[float | None]]:
    columns = zip(*estimates, strict=True) if estimates else ((), (), ())
    return {
        name: [float(v) if math.isfinite(v) else None for v in values]
        for name, values in zip(Estimate._fields, columns, strict=True)
    }


def check_matplotlib() -> None:
    """Raises ImportError where matplotlib is missing, with what to do."""
    if find_spec("matplotlib") is None:
        raise ImportError(
            "the report's figures are drawn by matplotlib: pip install 'pvm-jax[measure]'"
        )


class Drawing(NamedTuple):
    """A drawn panel: an <svg> element on a transparent ground, and files on white."""

    svg: str
    pdf: bytes
    png: bytes


def draw(panel: Panel | AttentionMap) -> Drawing:
    """Draws a panel.

    Raises:
        ImportError: without matplotlib.
    """
    check_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _draw_look(panel) if isinstance(panel, AttentionMap) else _draw_panel(panel)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # laid out once, not again for each file
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        pdf, png = BytesIO(), BytesIO()
        dates = {"CreationDate": None, "Creator": None, "Producer": None}
        figure.savefig(pdf, format="pdf", facecolor=PAPER, metadata=dates)
        figure.savefig(png, format="png", facecolor=PAPER, dpi=DPI, metadata={"Software": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    fonts = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
    text = re.sub(r"'?DejaVu Sans'?[^;\"]*", fonts, text)
    return Drawing(text, pdf.getvalue(), png.getvalue())


def inline(drawn: str) -> str:
    """`drawn` for a page that sets the variables: it follows light and dark, and the width it is
    given."""
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, variable)
    return re.sub(
        r'(<svg [^>]*?)width="[^"]*"',
        r"\1",
        re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", drawn, count=1),
        count=1,
    )


def standalone(drawn: str) -> str:
    """`drawn` as a file of its own, on white."""
    end = drawn.index(">") + 1
    return f'{drawn[:end]}<rect width="100%" height="100%" fill="{PAPER}"/>{drawn[end:]}'


def _draw_panel(panel: Panel) -> "Figure":
    from matplotlib.figure import Figure

    bars = bool(panel.names)
    rows = len(panel.names) * max(1, 0.75 * len(panel.series))
    height = 0.6 + 0.32 * rows + (0.3 if len(panel.series) > 1 else 0) if bars else HEIGHT
    names = sorted(len(series.name) for series in panel.series)
    wide = sum(names[-2:]) > 2 * LEGEND_LETTERS  # two do not fit beside each other
    height += 0.15 * (len(names) // 2) if wide else 0
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    if bars:
        _draw_bars(axes, panel)
    else:
        _draw_lines(axes, panel)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if len(panel.series) > 1:
        figure.legend(loc="outside upper left", ncols=1 if wide else 2, borderaxespad=0.2)
    return figure


def _draw_lines(axes: "Axes", panel: Panel) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    own = [series for series in panel.series if not series.reference]
    shades = [to_hex(c) for c in colormaps["viridis"](np.linspace(0.25, 0.85, len(own)))]
    for number, series in enumerate(own):
        colour = shades[number] if panel.ordered else CYCLE[number % len(CYCLE)]
        mean, low, high = np.array(series.y, float).reshape(-1, 3).T
        axes.fill_between(series.x, low, high, color=colour, alpha=0.18, linewidth=0)
        # Not clipped: a line at an end of the bounds is as thick as elsewhere.
        (line,) = axes.plot(series.x, mean, color=colour, linewidth=1.6, clip_on=False)
        if len(own) <= len(MARKERS):
            line.set(marker=MARKERS[number], linestyle=DASHES[number], markersize=4)
        if len(own) <= len(MARKERS) or number in (
            0,
            len(own) - 1,
        ):  # many are shades: the ends say which end is which
            line.set_label(series.name)
    for number, series in enumerate(s for s in panel.series if s.reference):
        mean = [estimate.mean for estimate in series.y]
        axes.plot(
            series.x,
            mean,
            color=GREY,
            label=series.name,
            linewidth=1.3,
            linestyle=DASHES[1 + number],
        )
    if "x" in panel.log:
        axes.set_xscale("log", base=2)
    if "y" in panel.log:
        axes.set_yscale("log")
    _plain_ticks(axes, panel)
    if panel.bounds:
        axes.set_ylim(*panel.bounds)


def _plain_ticks(axes: "Axes", panel: Panel) -> None:
    """Numbers as one writes them, 0.05 and 256, on logarithmic axes too; whole numbers where x
    counts something."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    if "x" in panel.log:
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
        axes.xaxis.set_major_formatter(plain)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if "y" in panel.log:
        shown = np.array([e for series in panel.series for e in series.y], float)
        low, high = np.nanmin(shown[shown > 0], initial=1.0), np.nanmax(shown, initial=1e-9)
        reach = high / low
        subs = (
            (1,)
            if reach > 300
            else (1, 3)
            if reach > 30
            else (1, 2, 5)
            if reach > 8
            else (1, 1.5, 2, 3, 4, 5, 7)
        )
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_bars(axes: "Axes", panel: Panel) -> None:
    thickness = 0.72 / len(panel.series)
    for number, series in enumerate(panel.series):
        mean, low, high = np.array(series.y, float).reshape(-1, 3).T
        places = np.array(series.x) + (number - (len(panel.series) - 1) / 2) * thickness
        colour = CYCLE[number % len(CYCLE)]
        axes.barh(places, mean, thickness * 0.92, color=colour, alpha=0.85, label=series.name)
        reach = np.nan_to_num(np.stack([mean - low, high - mean]))
        axes.errorbar(
            mean, places, xerr=np.maximum(reach, 0), fmt="none", ecolor=INK, elinewidth=1, capsize=2
        )
    axes.set_yticks(range(len(panel.names)), panel.names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if "x" in panel.log:
        axes.set_xscale("log")
    if panel.bounds:
        axes.set_xlim(*panel.bounds)


def _draw_look(look: AttentionMap) -> "Figure":
    from matplotlib.figure import Figure

    height, width = look.frames[0].shape[:2]
    columns = 1 + len(look.maps)
    side = WIDTH / columns
    size = (WIDTH, len(look.frames) * (side * min(max(height / width, 0.4), 2) + 0.05) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(look.frames), columns, squeeze=False)
    top = {name: max(float(m.max()) for m in maps) or 1.0 for name, maps in look.maps.items()}
    for row, (axes, frame) in enumerate(zip(grid, look.frames, strict=True)):
        extent = (0, frame.shape[1], frame.shape[0], 0)
        axes[0].imshow(frame, extent=extent)
        for axis, (name, maps) in zip(axes[1:], look.maps.items(), strict=True):
            axis.imshow(frame.mean(-1), extent=extent, cmap="gray", vmin=0, vmax=1)
            axis.imshow(
                maps[row],
                extent=extent,
                cmap="inferno",
                vmin=0,
                vmax=top[name],
                alpha=0.8,
                interpolation="nearest",
            )
        if row == 0:
            axes[0].set_title("image", fontsize=9)
            for axis, (name, maps) in zip(axes[1:], look.maps.items(), strict=True):
                axis.set_title(
                    f"{name}\n{sum(float(m.sum()) for m in maps):.0%} on the image", fontsize=9
                )
        for axis in axes:
            axis.set_axis_off()
    return figure
