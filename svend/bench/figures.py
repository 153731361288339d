"""Figures as files, without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def begin_figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure and an array of its axes, (rows, columns).

    size: in inches, width first. options: more that `pyplot.subplots` takes.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )


def write_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write a figure as an image, and let go of it."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=dpi)
    plt.close(figure)
