"""Users with a profile, and what is retrieved from it."""

import numpy as np
import pytest

from deltaworks import nursery
from deltaworks.nursery import corpus, profile_sets

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def profiles():
    return {user: nursery.data(f"profile/{user}") for user in profile_sets.USERS}


def test_a_users_rows_are_the_users_and_no_base_has_seen_them(profiles):
    for user, data in profiles.items():
        assert corpus.split_of(user) == "validation"
        assert {row["module"] for split in data.values() for row in split} == {user}
        prompts = {name: set(split["prompt"]) for name, split in data.items()}
        assert not prompts["train"] & prompts["validation"]
        assert 3 * (len(data["validation"]) - 1) <= len(data["train"]) <= 3 * len(data["validation"])
    whole = nursery.data("profile")
    assert len(whole["train"]) == sum(len(data["train"]) for data in profiles.values())


def test_only_the_users_own_profile_is_retrieved_and_never_the_row_itself(profiles):
    for data in profiles.values():
        items = {row["prompt"] + row["completion"] + '"""\n\n' for row in data["train"]}
        for name, split in data.items():
            for row in split:
                assert row["prompt_1"].endswith(row["prompt"]) and row["prompt_4"].endswith(row["prompt_1"])
                front = row["prompt_4"].removesuffix(row["prompt"])
                shown = [piece + '"""\n\n' for piece in front.split('"""\n\n')[:-1]]
                assert len(shown) == 4 and len(set(shown)) == 4 and set(shown) <= items, name
                assert row["prompt"] + row["completion"] + '"""\n\n' not in shown


def test_bm25_is_what_its_formula_says():
    texts = ["get_name name", "setName", "close the file"]
    scores = profile_sets.bm25(["name of file"], texts, k=1.5, b=0.75)
    mean = (3 + 2 + 3) / 3
    rarity = {"name": np.log(1 + 1.5 / 2.5), "file": np.log(1 + 2.5 / 1.5)}

    def part(word: str, count: int, length: int) -> float:
        return rarity[word] * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * length / mean))

    assert scores[0] == pytest.approx([part("name", 2, 3), part("name", 1, 2), part("file", 1, 3)])
    assert profile_sets.words("getHTTPName_id2") == ["get", "http", "name", "id", "2"]


def test_a_user_that_there_is_not_is_said():
    with pytest.raises(ValueError, match="nursery:profile/asyncio: there is no such user; there are coll"):
        nursery.data("profile/asyncio")
