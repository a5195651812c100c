"""The grid of cells seen from above that rasteriser, view transform, warp and metric share."""

from dataclasses import dataclass

import torch

from ..settings import Count, Metres, Positive


@dataclass(frozen=True)
class BevGrid:
    """Square cells on the ground of the ego frame (x ahead, y left, metres).

    The cell in row v, column u has its centre at x = x0 + (u + ½) · size, y = y0 + (v + ½) · size; maps over it are
    (…, rows, columns). Cell coordinates (u, v) are integers at centres, as `bev_warp` has them.

    Args:
        x, y: lows and highs.
        size: side of a cell; it divides both ranges.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    size: float

    def __post_init__(self):
        for name, (low, high) in (("x", self.x), ("y", self.y)):
            cells = (high - low) / self.size if self.size > 0 else 0.0
            if cells < 0.5 or abs(cells - round(cells)) > 1e-6:
                raise ValueError(f"{name} is {(low, high)} with cells of {self.size} m, needs a whole number of cells")

    @property
    def rows(self) -> int:
        return round((self.y[1] - self.y[0]) / self.size)

    @property
    def columns(self) -> int:
        return round((self.x[1] - self.x[0]) / self.size)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.rows, self.columns

    @property
    def origin(self) -> torch.Tensor:
        """(2,) float64, the corner from which x and y grow."""
        return torch.tensor([self.x[0], self.y[0]], dtype=torch.float64)

    def finer(self, factor: int) -> "BevGrid":
        """The same ground in cells of 1/factor of the side."""
        return BevGrid(self.x, self.y, self.size / factor)

    def centres(self) -> torch.Tensor:
        """(rows, columns, 2) float64, x and y of every cell's centre."""
        v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in self.shape), indexing="ij")
        return self.points(torch.stack([u, v], dim=-1))

    def points(self, cells: torch.Tensor) -> torch.Tensor:
        """Cell coordinates (…, 2) as (u, v) → metres (…, 2) as (x, y)."""
        return (cells + 0.5) * self.size + self.origin.to(cells)

    def cells(self, points: torch.Tensor) -> torch.Tensor:
        """Metres (…, 2) as (x, y) → cell coordinates (…, 2) as (u, v)."""
        return (points - self.origin.to(points)) / self.size - 0.5

    def warp(self, then_T_now: torch.Tensor) -> torch.Tensor:
        """The transform of `bev_warp` that brings maps of another moment into the present.

        Args:
            then_T_now: (…, 4, 4) float64, from the present ego frame to that of the other moment. What stands on the
                plane z = 0 is moved; the cells' heights do not matter.

        Returns:
            (…, 2, 3) float32, formed in float64: present cells to cells of the other moment.
        """
        if then_T_now.dtype != torch.float64:
            narrow = str(then_T_now.dtype).removeprefix("torch.")
            raise TypeError(f"BevGrid.warp: then_T_now is {narrow}, needs float64 (poses lose centimetres in float32)")
        turn, shift = then_T_now[..., :2, :2], then_T_now[..., :2, 3]
        corner = self.origin.to(then_T_now.device)
        first = (turn @ (corner + 0.5 * self.size) + shift - corner) / self.size - 0.5  # where cell (0, 0) lies
        return torch.cat([turn, first[..., None]], dim=-1).float()


@dataclass
class GridConfig:
    """Settings of the ground that is looked at, metres in the ego frame."""

    x: tuple[Metres, Metres] = (-20.8, 62.4)
    y: tuple[Metres, Metres] = (-22.4, 22.4)
    z: tuple[Metres, Metres] = (-3.0, 5.0)  # of the LiDAR points that count
    cell: Positive = 0.8  # side of a feature cell
    upsample: Count = 4  # label cells along the side of a feature cell

    def validate(self) -> None:
        """ValueError where a range is empty or no whole number of cells."""
        for name in ("x", "y", "z"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} is {(low, high)}, needs to rise")
        self.features()

    def features(self) -> BevGrid:
        """The grid of the features."""
        return BevGrid(tuple(self.x), tuple(self.y), self.cell)

    def labels(self) -> BevGrid:
        """The grid of labels and predictions."""
        return self.features().finer(self.upsample)
