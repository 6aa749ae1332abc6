"""Which examples share a row: packing, and token-budget micro-batches of one optimizer step."""

import heapq
from bisect import bisect_right
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


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into rows of `capacity` tokens, each item whole: the fewest rows that any of three ways finds.

    No way is best everywhere: a little waste early on is good where many items are longer than half a row, and bad
    where all are short. Returns the items of each row. Raises ValueError at an item longer than the capacity.
    """
    wastes = (0, capacity // 16)
    return min(best_fit(lengths, capacity), *(look_ahead(lengths, capacity, waste) for waste in wastes), key=len)


def look_ahead(lengths: Sequence[int], capacity: int, waste: int) -> list[list[int]]:
    """Rows one after the other, each begun with the longest item left and filled up with the longest that fit, until
    one item fits exactly, or two do that leave no more than `waste` tokens free.

    Which two add up to a number is one step for all lengths at once: bit l of `present` is set where an item of
    length l is left, bit capacity - l of `mirrored` likewise.
    """
    left: list[list[int]] = [[] for _ in range(capacity + 1)]  # items by their length
    for item in reversed(range(len(lengths))):
        left[lengths[item]].append(item)
    present = sum(1 << length for length, items in enumerate(left) if items)
    mirrored = sum(1 << capacity - length for length, items in enumerate(left) if items)
    rows: list[list[int]] = []
    while present:
        row: list[int] = []
        room = capacity
        while fitting := present & ((2 << room) - 1):
            longest = fitting.bit_length() - 1
            taken = [longest]
            if row and longest < room:
                for total in range(room, max(room - waste, longest) - 1, -1):
                    both = present & (mirrored >> capacity - total) & ((1 << total) - 1)
                    if total % 2 == 0 and len(left[total // 2]) == 1:
                        both &= ~(1 << total // 2)  # the one item cannot be both
                    if both:
                        longer = both.bit_length() - 1
                        taken = [longer, total - longer]
                        break
            for length in taken:
                row.append(left[length].pop())
                if not left[length]:
                    present ^= 1 << length
                    mirrored ^= 1 << capacity - length
            room -= sum(taken)
        rows.append(row)
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

    With several ranks the items are spread evenly over the least multiple of `ranks` micro-batches that keeps to the
    budget, and within each round of one micro-batch a rank, so that no rank waits for another. Where items are too few
    or too long for that, some ranks get a micro-batch less.
    """
    packed = micro_batches(lengths, budget)
    if ranks > 1:
        most = max(budget, max(lengths, default=0))
        for count in range(-(-len(packed) // ranks) * ranks, len(lengths) + 1, ranks):
            spread = _in_rounds(lengths, count, ranks)
            if max(sum(lengths[i] for i in members) for members in spread) <= most:
                packed = [members for members in spread if members]
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


def _in_rounds(lengths: Sequence[int], count: int, ranks: int) -> list[list[int]]:
    """All items in `count` groups, `ranks` of which form a round; a round lasts as long as its longest group.

    Where an item is longer than the mean group, its round lasts as long as that item in any case: the other groups of
    the round are filled up to it, which makes the later rounds shorter.
    """
    left = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    while (more := count - len(groups)) > ranks and lengths[left[-1]] * more > sum(lengths[i] for i in left):
        longest = lengths[left[-1]]
        for _ in range(ranks):
            room, members = longest, []
            while fitting := bisect_right(left, room, key=lengths.__getitem__):
                members.append(left.pop(fitting - 1))
                room -= lengths[members[-1]]
            groups.append(members)
        if not left:
            return groups
    left.sort()
    return groups + [[left[place] for place in members] for members in _spread([lengths[i] for i in left], more)]


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """All items in `count` groups of nearly the same length: the longest first, each into the shortest group."""
    groups = [(0, number) for number in range(count)]
    members: list[list[int]] = [[] for _ in range(count)]
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, number = heapq.heappop(groups)
        members[number].append(item)
        heapq.heappush(groups, (tokens + lengths[item], number))
    return members
