from hypothesis import given, settings
from hypothesis import strategies as st

from scale.data.packing import Span, best_fit, concat, rejoin

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def spans_of(lengths):
    return [Span(0, i, 0, n) for i, n in enumerate(lengths)]


def covered(rows):
    return sorted((s.doc, p) for row in rows for s in row for p in range(s.start, s.stop))


def every_position(lengths):
    return [(doc, p) for doc, n in enumerate(lengths) for p in range(n)]


@given(lengths, st.integers(2, 128))
@settings(max_examples=60, deadline=None)
def test_best_fit_places_every_position_once_and_cuts_only_long_documents(lengths, seq_len):
    rows = best_fit(spans_of(lengths), seq_len)
    assert covered(rows) == every_position(lengths)
    assert all(sum(s.length for s in row) <= seq_len for row in rows)
    for row in rows:
        for span in row:
            whole = (span.start, span.stop) == (0, lengths[span.doc])
            assert whole or lengths[span.doc] > seq_len


def test_best_fit_takes_the_tightest_room():
    # sorted 6 5 4 3 2: 6 and 5 open rows with rooms 4 and 5; 4 fills the first exactly, 3 then 2 fill the second
    rows = best_fit(spans_of([4, 3, 6, 2, 5]), 10)
    assert sorted(sorted(s.length for s in row) for row in rows) == [[2, 3, 5], [4, 6]]


@given(lengths, st.integers(2, 128))
@settings(max_examples=60, deadline=None)
def test_concat_is_one_stream_in_order_with_only_the_last_row_short(lengths, seq_len):
    rows = concat(spans_of(lengths), seq_len)
    assert [(s.doc, p) for row in rows for s in row for p in range(s.start, s.stop)] == every_position(lengths)
    assert all(sum(s.length for s in row) == seq_len for row in rows[:-1])
    assert 0 < sum(s.length for s in rows[-1]) <= seq_len


@given(lengths, st.integers(2, 128))
@settings(max_examples=60, deadline=None)
def test_rejoin_undoes_cutting(lengths, seq_len):
    assert rejoin(best_fit(spans_of(lengths), seq_len)) == spans_of(lengths)


def test_rejoin_keeps_a_gap():
    assert rejoin([[Span(0, 1, 0, 5)], [Span(0, 1, 6, 9)]]) == [Span(0, 1, 0, 5), Span(0, 1, 6, 9)]
