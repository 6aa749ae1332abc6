"""Which examples share a row: best-fit packing, and token-budget micro-batches of one optimizer step."""

import heapq
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
    """Split items into micro-batches of at most `budget` tokens, as few as best fit finds.

    An item longer than the budget is a micro-batch of its own.
    """
    long = [[item] for item, length in enumerate(lengths) if length >= budget]
    short = [item for item, length in enumerate(lengths) if length < budget]
    return long + [[short[i] for i in row] for row in best_fit([lengths[item] for item in short], budget)]


def deal(lengths: Sequence[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """Each rank's micro-batches of one optimizer step: the same tokens for all, as nearly as items allow.

    With several ranks the items are spread evenly (longest first, each into the shortest micro-batch) over the least
    multiple of `ranks` micro-batches that keeps to the budget, so that no rank waits for another. Where items are too
    few or too long for that, some ranks get a micro-batch less.
    """
    packed = micro_batches(lengths, budget)
    if ranks > 1:
        most = max(budget, max(lengths, default=0))
        for count in range(-(-len(packed) // ranks) * ranks, len(lengths) + 1, ranks):
            spread = _spread(lengths, count)
            if max(sum(lengths[i] for i in members) for members in spread) <= most:
                packed = spread
                break
    packed.sort(key=lambda members: -sum(lengths[i] for i in members))
    hands: list[list[list[int]]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for first in range(0, len(packed), ranks):  # a round gives each rank one; the longest goes to who has least
        waiting = sorted(range(ranks), key=lambda rank: tokens[rank])
        for rank, members in zip(waiting, packed[first : first + ranks], strict=False):
            hands[rank].append(members)
            tokens[rank] += sum(lengths[i] for i in members)
    return hands


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """All items in `count` groups of nearly the same length."""
    groups = [(0, number) for number in range(count)]
    members: list[list[int]] = [[] for _ in range(count)]
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, number = heapq.heappop(groups)
        members[number].append(item)
        heapq.heappush(groups, (tokens + lengths[item], number))
    return members
