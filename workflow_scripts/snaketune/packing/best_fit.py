"""Packs slices into as few rows as possible, without cutting any.

Best-fit decreasing places slices longest first, each into the fullest row that still has room for it. With a
million slices, it leaves a few thousandths of a percent unused. With a few hundred, it may need one row too
many, because each row keeps a gap shorter than the shortest slice. In that case a second algorithm fills rows
one at a time, as close to the last token as it can, and the better result wins.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy as np

# With more slices than this, one row does not matter, and filling row by row is slow.
_FILL_AT_MOST = 10_000
# Slices considered for filling one row.
_CANDIDATES = 500


def assign_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each slice from the better algorithm: int64 (slices,), numbered from 0 without gaps.

    Args:
        lengths: int64 (slices,), in descending order, each from 1 to `capacity`.
        capacity: Tokens per row.
    """
    rows = best_fit_decreasing(lengths, capacity)
    least = -(-int(lengths.sum()) // capacity)
    if len(lengths) <= _FILL_AT_MOST and rows.max() + 1 > least:
        filled = fill_rows(lengths, capacity)
        if filled.max() < rows.max():
            return filled
    return rows


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each slice.

    Slices of equal length are placed together: the row with the least sufficient room takes as many as fit,
    then the next row does. Rows are grouped by free room, so the work grows with the number of distinct
    lengths, not with slices times rows. A million slices take about a second.

    Args:
        lengths: int64 (slices,), in descending order, each from 1 to `capacity`.
        capacity: Tokens per row.

    Returns:
        int64 (slices,); rows are numbered in the order they are opened.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # distinct free rooms, ascending
    rows_with: dict[int, list[np.ndarray]] = {}
    opened = 0

    def put_back(rows: np.ndarray, room: int) -> None:
        if len(rows) and room:
            if room not in rows_with:
                insort(rooms, room)
                rows_with[room] = []
            rows_with[room].append(rows)

    begins = np.flatnonzero(np.diff(lengths, prepend=0))
    for first, last in zip(begins.tolist(), [*begins[1:].tolist(), len(lengths)], strict=True):
        length = int(lengths[first])
        while first < last:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                rows = rows_with[room].pop()
                if not rows_with[room]:
                    del rows_with[room], rooms[at]
            else:
                room = capacity
                wanted = -(-(last - first) // (room // length))
                rows = np.arange(opened, opened + wanted)
                opened += wanted
            each = room // length
            full = min(len(rows), (last - first) // each)
            row_of[first : first + full * each] = np.repeat(rows[:full], each)
            put_back(rows[:full], room - each * length)
            first += full * each
            if full < len(rows) and first < last:  # one row takes the remainder
                row_of[first:last] = rows[full]
                put_back(rows[full : full + 1], room - (last - first) * length)
                first, full = last, full + 1
            put_back(rows[full:], room)
    return row_of


def fill_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each slice. A row takes the longest slice left, then those that best fill the rest.

    Takes and returns the same as `best_fit_decreasing`.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    left = list(range(len(lengths)))[::-1]  # slices, longest last
    sizes = lengths[::-1].tolist()
    row = 0
    while left:
        row_of[left.pop()] = row
        room = capacity - sizes.pop()
        end = bisect_right(sizes, room)
        for place in _fill(sizes[max(0, end - _CANDIDATES) : end][::-1], room):
            row_of[left.pop(end - 1 - place)] = row
            sizes.pop(end - 1 - place)
        row += 1
    return row_of


def _fill(sizes: list[int], room: int) -> list[int]:
    """Returns the indices, ascending, of the sizes with the largest sum that does not exceed `room`."""
    within = (1 << (room + 1)) - 1
    sums = [1]  # bit s of sums[n] is set if some of the first n sizes add up to s
    for size in sizes:
        if sums[-1] >> room:
            break
        sums.append((sums[-1] | sums[-1] << size) & within)
    total = sums[-1].bit_length() - 1
    chosen = []
    for place in range(len(sums) - 2, -1, -1):
        if not sums[place] >> total & 1:
            chosen.append(place)
            total -= sizes[place]
    return chosen[::-1]
