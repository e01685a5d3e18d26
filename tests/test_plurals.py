"""Word counts of one and of several."""

import pytest

from hftl.data.near_copies import describe_near_copies
from hftl.plurals import choose_verb, count_noun


@pytest.mark.parametrize(("count", "words"), [(0, "0 rows are"), (1, "1 row is"),
                                              (1200, "1,200 rows are")])  # fmt: skip
def test_noun_and_verb_follow_the_count(count: int, words: str) -> None:
    assert f"{count_noun(count, 'row')} {choose_verb(count, 'is')}" == words


def test_one_copy_is_one_copy() -> None:
    assert describe_near_copies(1, "text").startswith("1 text of validation and test is a near")
    assert describe_near_copies(2, "text").startswith("2 texts of validation and test are near")
