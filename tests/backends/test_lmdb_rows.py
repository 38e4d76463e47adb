"""What `match` reads off rows is what is packed into them."""

from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.entries import Entry
from kvcensus.backends.lmdb.rows import HOLDER, masks_by_head, pack_row, unpack_row

_HOLDERS = [(place, scope) for place in (1, 2, 257) for scope in (1, 2)]


@st.composite
def stretches(draw: st.DrawFn) -> list[bytes]:
    """Rows of one size: without an entry, or with as many entries each, most of them laid out and held alike."""
    count = draw(st.integers(1, 12))
    entries = draw(st.integers(-1, 3))
    if entries < 0:
        return [b""] * count
    held = st.lists(st.sampled_from(_HOLDERS), min_size=entries, max_size=entries, unique=True)
    usual, child_bytes = draw(held), draw(st.integers(1, 2))
    odd = draw(st.sets(st.integers(0, count - 1), max_size=2))
    rows = []
    for index in range(count):
        holders = draw(held) if index in odd else usual
        child = bytes(draw(st.integers(1, 2)) if index in odd else child_bytes)
        parents = [bytes(3 - len(child)), b"p", b"p"]
        made = [Entry(*holder, 1, index, 16, 0, 0, False, parent) for holder, parent in zip(holders, parents)]
        rows.append(pack_row(child, made))
    return rows


@given(st.lists(stretches(), max_size=3))
def test_masks_say_in_which_rows_each_holder_is(parts: list[list[bytes]]) -> None:
    rows = [row for part in parts for row in part]
    expected: dict[bytes, int] = {}
    for at, row in enumerate(rows):
        for entry in unpack_row(row)[1] if row else ():
            head = HOLDER.pack(entry.place, entry.scope)
            expected[head] = expected.get(head, 0) | 1 << at
    assert masks_by_head(rows) == expected
