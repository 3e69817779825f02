"""Boxes and points of answers, in pixels and drawn."""
# A place is a box or a point, and each test knows which:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4_jax.errors import UserError
from gemma4_jax.media.boxes import Box, Point, draw_places, parse_places

CAT = '[{"box_2d": [100, 200, 500, 900], "label": "cat"}]'
numbers = st.integers(0, 1000)


@pytest.mark.parametrize(
    "text",
    [
        CAT,
        f"```json\n{CAT}\n```",
        f"Here it is:\n```\n{CAT}\n```\nAnything else?",
        f"The cat is at {CAT}.",
        CAT[1:-1],
        '[{"box_2d": [500, 900, 100, 200], "label": "cat"}]',
    ],
)
def test_answers_are_read_however_they_are_wrapped(text):
    assert parse_places(text) == [Box(100, 200, 500, 900, "cat")]


def test_y_comes_first_and_a_thousand_is_the_edge():
    (box,) = parse_places(CAT)
    assert box.pixels(200, 100) == (40, 10, 180, 50)  # left, top, right, bottom
    assert Box(0, 0, 1000, 1000).pixels(640, 480) == (0, 0, 640, 480)
    assert parse_places('{"point": [250, 500], "label": "nose"}') == [Point(250, 500, "nose")]
    assert Point(250, 500).pixels(200, 100) == (100, 25)
    assert Point(1000, 1000).pixels(200, 100) == (199, 99)
    assert parse_places("[]") == []
    assert parse_places("[10, 20, 30, 40]") == [Box(10, 20, 30, 40)]


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=5), st.integers(1, 5000), st.integers(1, 5000))
def test_boxes_come_back_and_lie_inside(boxes, width, height):
    found = parse_places(json.dumps([{"box_2d": list(box), "label": str(i)} for i, box in enumerate(boxes)]))
    for box, given_box in zip(found, boxes, strict=True):
        assert {box.top, box.bottom} == {given_box[0], given_box[2]}
        left, top, right, bottom = box.pixels(width, height)
        assert 0 <= left <= right <= width
        assert 0 <= top <= bottom <= height


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("I see no cat.", "has no boxes or points"),
        ('{"cat": 1}', "has no boxes or points"),
        ('[{"box_2d": [1, 2, 3]}]', "box_2d has 4 numbers from 0 to 1000"),
        ('[{"box_2d": [1, 2, 3, 1001]}]', r"got \[1, 2, 3, 1001\]"),
        ('[{"point": [1, NaN]}]', "point has 2 numbers"),
        ('[{"point": [1, true]}]', "point has 2 numbers"),
        ("[" * 100_000, "has no boxes or points"),
    ],
)
def test_bad_answers_are_refused_in_a_sentence(text, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_places(text)


def test_places_are_drawn_into_a_copy():
    pytest.importorskip("PIL.Image", reason="drawing needs Pillow: the extra `media`")
    pixels = np.full((100, 200, 3), 255, np.uint8)
    drawn = np.asarray(draw_places(pixels, [Box(100, 200, 500, 900), Point(800, 500, "a"), Box(0, 0, 1000, 1000, "b")]))
    assert (pixels == 255).all()
    assert drawn.shape == pixels.shape
    changed = (drawn != 255).any(axis=2)
    assert changed[10, 40:180].all()  # the first box's upper edge
    assert changed[49, 40:180].all()
    assert changed[10:50, 179].all()
    assert not changed[20:40, 60:170].any()
    assert changed[80, 100]  # the point
    assert changed[0].all()
    assert changed[:, 199].all()
    assert len({tuple(color) for color in (drawn[30, 40], drawn[80, 100], drawn[99, 100])}) == 3
