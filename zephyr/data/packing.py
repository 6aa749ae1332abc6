"""Which examples share a row: best-fit packing, and token-budget micro-batches of one optimizer step."""

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows of `capacity` tokens as best-fit-decreasing finds; each item stays whole.

    The longest items go first, each into the fullest row that still has room. Returns the items of each row.
    Raises ValueError at an item longer than the capacity.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by the tokens still free in them
    free = 0  # bit r is set where some row has exactly r tokens free, so that the best fit is found in one step
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item of {length} tokens in rows of {capacity}")
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        left = room - length
        with_room[left].append(row)
        free |= 1 << left
    return rows


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split the items of one optimizer step into micro-batches of at most `budget` tokens, as few as best fit finds.

    An item longer than the budget is a micro-batch of its own.
    """
    long = [[item] for item, length in enumerate(lengths) if length >= budget]
    short = [item for item, length in enumerate(lengths) if length < budget]
    return long + [[short[i] for i in row] for row in best_fit([lengths[item] for item in short], budget)]
