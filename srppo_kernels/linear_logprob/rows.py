"""Which rows of a call take part, and how blocks of them are read and written.

On a CPU masked rows are dropped by their index, so that they cost nothing. On a GPU the number of live rows is known
only to the device, and asking for it would wait: the Triton kernels compact rows there and read the number themselves.
The torch backend computes every row on a GPU; masked ones are replaced by zeros before the first operation and after
the last, so that a NaN in them reaches nobody.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srppo_kernels.linear_logprob import gpu


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a call: all of them, those of ``index``, or those where ``live``."""

    start: int
    stop: int
    index: Tensor | None = None  # [count], absolute and ascending
    live: Tensor | None = None  # [stop - start] bool
    dense: bool = False  # the call has no mask, so that most rows are live

    @property
    def count(self) -> int:
        """Number of rows that are computed."""
        return self.stop - self.start if self.index is None else self.index.shape[0]

    @staticmethod
    def of(live: Tensor, *, backend: str = "", dense: bool = False) -> "Rows":
        """The rows where ``live``; compacted here where that needs no wait, by the Triton kernels on the device."""
        n = live.shape[0]
        if live.device.type != "cpu" or backend in gpu.FAMILY:
            return Rows(0, n, live=live, dense=dense)
        index = live.nonzero()[:, 0]
        return Rows(0, n) if index.shape[0] == n else Rows(0, n, index=index)

    def keep(self, wanted: Tensor) -> tuple["Rows", Tensor | None]:
        """Those of these rows that are ``wanted`` (``[count]`` bool), and their positions among these rows.

        Where rows are not compacted all of them stay, and the positions are None: a row with no gradient is then
        computed with a gradient of zero.
        """
        if self.live is not None:
            return self, None
        position = wanted.nonzero()[:, 0]
        if position.shape[0] == self.count:
            return self, None
        return Rows(
            self.start, self.stop, index=position + self.start if self.index is None else self.index[position]
        ), (position)

    def part(self, a: int, b: int) -> "Rows":
        """Rows ``a`` to ``b``, counted among these rows."""
        if self.index is not None:
            return Rows(self.start, self.stop, index=self.index[a:b])
        b = min(b, self.count)
        return replace(
            self, start=self.start + a, stop=self.start + b, live=None if self.live is None else self.live[a:b]
        )

    def take(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """``values[rows]`` of a per-row vector of the whole call, with ``fill`` where a row is masked."""
        if self.index is not None:
            return values[self.index]
        values = values[self.start : self.stop]
        return values if self.live is None else values.masked_fill(~self.live, fill)  # keeps an integer dtype

    def block(self, matrix: Tensor, a: int, b: int, dtype: torch.dtype, *, pad_to: int = 0) -> Tensor:
        """Rows ``a`` to ``b`` (counted among these rows) of ``matrix``, contiguous, zero rows appended to
        ``pad_to``."""
        b = min(b, self.count)
        if self.index is not None:
            x = matrix[self.index[a:b]]
        else:
            x = matrix[self.start + a : self.start + b]
            if self.live is not None:
                x = torch.where(self.live[a:b, None], x, 0)
        x = x.to(dtype).contiguous()
        missing = pad_to - x.shape[0]
        return x if missing <= 0 else torch.cat([x, x.new_zeros(missing, x.shape[1])])

    def whole(self, values: Tensor, total: int) -> Tensor:
        """A vector of the whole call, zero elsewhere, with ``values`` of these rows, which are zero where masked."""
        if self.index is None and self.count == total:
            return values
        return self.put(values.new_zeros(total), values)

    def all_of(self, whole: Tensor, values: Tensor) -> bool:
        """Whether ``values`` of these rows may take the place of ``whole``: they are all rows, in its dtype."""
        compacted = self.index is not None or self.live is not None
        return not compacted and values.shape == whole.shape and values.dtype == whole.dtype

    def put(self, whole: Tensor, values: Tensor) -> Tensor:
        """Writes ``values`` of these rows into ``whole`` (which is zero elsewhere), and returns it."""
        values = values.to(whole.dtype)
        if self.index is not None:
            return whole.index_copy_(0, self.index, values)
        if self.live is not None:
            values = torch.where(self.live if values.dim() == 1 else self.live[:, None], values, 0)
        whole[self.start : self.stop] = values
        return whole
