"""Products of wide matrices in the order that the machine is quickest at."""

from __future__ import annotations

from torch import Tensor

TILE, STRIP = 32, 512
SOME = 1024


def strips(rows: Tensor) -> list[slice]:
    """Which rows to go through at a time, where each is by itself: all at once, but on CPUs as many as the cache holds.

    What is computed on the way is as large as those only.
    """
    step = SOME if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(low, low + step) for low in range(0, len(rows), step)]


def over_rows(a: Tensor, b: Tensor, *, any_order: bool = False) -> Tensor:
    """`a^T b`, such as a weight's gradient from `tokens x out` and `tokens x in`.

    CPUs with matrix units multiply half precision fast where the first factor's rows lie in one piece. Left to turn it
    on their own they take about twice the time, most of it for that.

    Args:
        a: `rows x p`.
        b: `rows x q`.
        any_order: whether the product may come as the transpose of `b^T a`, column by column.
    """
    if any_order and a.shape[1] > b.shape[1]:
        return over_rows(b, a).T
    long, wide = len(a) >= 1536 and b.shape[1] >= 1024, a.shape[1] >= 256  # as measured
    if long and wide and a.device.type == "cpu" and a.dtype.itemsize == 2:
        return _across(a) @ b
    return a.T @ b


def in_rows(matrix: Tensor) -> Tensor:
    """A matrix, put in the order of its rows where it is the transpose of one that is and a product with it is next."""
    turned = matrix.T.is_contiguous() and not matrix.is_contiguous() and min(matrix.shape) >= 512
    if turned and matrix.device.type == "cpu" and matrix.dtype.itemsize == 2:
        return _across(matrix.T)
    return matrix


def _across(matrix: Tensor) -> Tensor:
    """The transpose in one piece: tiles of rows are turned in the cache, then laid side by side."""
    rows, columns = matrix.shape
    whole = rows - rows % TILE
    turned = matrix.new_empty(columns, rows)
    for low in range(0, whole, STRIP):
        strip = matrix[low : min(low + STRIP, whole)]
        tiles = strip.view(-1, TILE, columns).transpose(1, 2).contiguous().transpose(0, 1)
        turned[:, low : low + len(strip)].unflatten(1, (-1, TILE)).copy_(tiles)
    turned[:, whole:].copy_(matrix[whole:].T)
    return turned


def over_batch(a: Tensor, b: Tensor) -> Tensor:
    """`sum_t a_t b_t^T` of `tokens x n x k` and `tokens x m x k`: `n x m`.

    One product needs both with tokens beside k. On CPUs these copies cost more than small products token by token do.
    """
    (_, n, k), m = a.shape, b.shape[1]
    if a.device.type == "cpu" and n * m <= (n + m) * k:
        return (a @ b.mT).sum(0)
    long_a, long_b = (one.transpose(0, 1).reshape(one.shape[1], -1) for one in (a, b))
    return long_a @ long_b.T
