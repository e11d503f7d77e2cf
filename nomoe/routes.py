"""Which experts each token went to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .files import atomic_output, check_output

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Routes:
    """Routing of a list of texts; entry i of each list belongs to text i."""

    # pieces of each text, special tokens and prompt included
    tokens: list[list[str]]
    # chosen experts, (tokens, MoE layers, K) int64, best first
    experts: list[npt.NDArray[np.int64]]
    # their router weights, (tokens, MoE layers, K) float32
    weights: list[npt.NDArray[np.float32]]
    # tokens sent to each expert, (MoE layers, E) int64
    counts: npt.NDArray[np.int64]
    # index of each MoE layer in the encoder
    layers: tuple[int, ...]

    def table(self) -> str:
        """Render each expert's share of a layer's tokens, and the mean weight sum, as text."""
        experts = self.counts.shape[1]
        lines = ["layer  " + "".join(f"{f'e{e}':>7}" for e in range(experts)) + "   weight sum"]
        shares = self.shares()
        sums = self.weight_sums()
        for row, layer in enumerate(self.layers):
            cells = "".join(f"{share:>7.1%}" for share in shares[row])
            lines.append(f"{layer:>5}  {cells}   {sums[row]:>10.3f}")
        return "\n".join(lines)

    def shares(self) -> npt.NDArray[np.float64]:
        """Each expert's share of a layer's routed rows, (MoE layers, E); zeros without tokens."""
        total = np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        return np.asarray(self.counts / total, dtype=np.float64)

    def weight_sums(self) -> npt.NDArray[np.float64]:
        """Mean over tokens of the sum of the K weights, (MoE layers,); zeros without tokens."""
        tokens = max(sum(len(one) for one in self.weights), 1)
        total = np.zeros(len(self.layers))
        for weights in self.weights:
            total += weights.astype(np.float64).sum(axis=(0, 2))
        return total / tokens

    def save_picture(self, path: str | Path, title: str = "") -> None:
        """Draw expert use by layer as a heat map.

        Args:
            path: Where to write, replacing what is there; .png, .svg or .pdf.
            title: A line above the picture.

        Raises:
            ValueError, FileNotFoundError, OSError: The path cannot be written.
            ModuleNotFoundError: matplotlib is absent (`pip install nomoe[plot]`).
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        path = Path(path)
        check_output(path, PICTURE_SUFFIXES, overwrite=True)
        layers, experts = self.counts.shape
        shares = self.shares()
        figure = Figure(figsize=(1.6 + 0.75 * experts, 1.6 + 0.5 * layers), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        highest = max(float(shares.max(initial=0)), 2 / experts)
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
        axes.set_xticks(range(experts), [f"{e}" for e in range(experts)])
        axes.set_yticks(range(layers), [f"{layer}" for layer in self.layers])
        axes.set_xlabel("expert")
        axes.set_ylabel("MoE layer")
        axes.set_title(title, fontsize=10)
        for row in range(layers):
            for column in range(experts):
                share = shares[row, column]
                dark = share < 0.6 * highest
                axes.text(
                    column,
                    row,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
        figure.colorbar(image, label=f"share of routed tokens (even: {1 / experts:.1%})")
        with atomic_output(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
