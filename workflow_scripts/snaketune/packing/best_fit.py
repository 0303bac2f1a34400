"""Packs pieces into as few rows as possible, without cutting any.

Best-fit decreasing places the longest piece first, each into the row with the least room that still holds it. Of a
million pieces it leaves some thousandths of a percent unused. Of a few hundred it may need a row more than it should,
because each row keeps a gap shorter than the shortest piece; then rows are filled to the last token instead, one after
the other, and the better of the two counts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy as np

# With more pieces a row more or less does not count, and filling row by row would take long.
_FILL_AT_MOST = 10_000
# Pieces looked at to fill one row.
_CANDIDATES = 500


def assign_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each piece, by the better of the two ways: int64 (pieces,), all numbers from 0 on used.

    Args:
        lengths: int64 (pieces,), falling, each from 1 to `capacity`.
        capacity: Tokens of a row.
    """
    rows = best_fit_decreasing(lengths, capacity)
    least = -(-int(lengths.sum()) // capacity)
    if len(lengths) <= _FILL_AT_MOST and rows.max() + 1 > least:
        filled = fill_rows(lengths, capacity)
        if filled.max() < rows.max():
            return filled
    return rows


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row that each piece goes into.

    Pieces of one length are placed together: the row with the least sufficient room takes as many as it holds, then
    the next. Rows are kept by their room, so the work grows with the number of different lengths and not with that
    of pieces times rows: a million pieces take about a second.

    Args:
        lengths: int64 (pieces,), falling, each from 1 to `capacity`.
        capacity: Tokens of a row.

    Returns:
        int64 (pieces,); rows are numbered as they are opened.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # the rooms that rows have, rising
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
            if full < len(rows) and first < last:  # one row takes the few that are left
                row_of[first:last] = rows[full]
                put_back(rows[full : full + 1], room - (last - first) * length)
                first, full = last, full + 1
            put_back(rows[full:], room)
    return row_of


def fill_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each piece: the longest that is left, and those that fill what it leaves best.

    Arguments and result are those of `best_fit_decreasing`.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    left = list(range(len(lengths)))[::-1]  # pieces, the longest last
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
    """Returns the places, rising, of sizes whose sum is as near to `room` as any sum of them that fits."""
    within = (1 << (room + 1)) - 1
    sums = [1]  # bit s of sums[n]: some of the first n sizes add up to s
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
