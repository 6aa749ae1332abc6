from zephyr.data.batch import Conversation, Pair, Segment, pack_conversations, pack_pairs


def test_conversations_lie_end_to_end_and_each_starts_anew():
    batch = pack_conversations([Conversation([5, 6, 7], [False, True, True]), Conversation([8, 9], [True, True])])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.segments == [Segment(0, 3, 0, 0), Segment(3, 5, 3, 3)]
    # 6 is predicted at row 0, 7 at row 1, 9 at row 3; nothing predicts 8, the first of its conversation
    assert batch.sources.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.sequences.tolist() == [0, 0, 1]
    assert batch.examples == 2


def test_a_pair_branches_behind_its_prompt():
    batch = pack_pairs([Pair([1, 2, 3], [4, 5], [6]), Pair([7], [8], [9, 10])])
    assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2]
    assert batch.segments == [Segment(0, 5, 0, 0), Segment(5, 6, 0, 3), Segment(6, 8, 6, 6), Segment(8, 10, 6, 7)]
    # the last prompt token predicts the first token of both branches
    assert batch.sources.tolist() == [2, 3, 2, 6, 6, 8]
    assert batch.targets.tolist() == [4, 5, 6, 8, 9, 10]
    # chosen sequences come first, then the rejected ones, in the order of the pairs
    assert batch.sequences.tolist() == [0, 0, 2, 1, 3, 3]
    assert batch.examples == 2
