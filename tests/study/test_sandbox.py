"""Programs that models write are run apart, and what they are tested by is in their prompt."""

import pytest

from deltaworks import nursery
from deltaworks.study.sandbox import allowed, body, passes
from deltaworks.study.scores import scores

PROMPT = '''def solve(numbers):
    """Return the largest.

    >>> solve([3, 9, 1])
    9
    >>> solve([2])
    2
    """
'''


@pytest.mark.parametrize(
    ("generated", "passed"),
    [
        ("    return max(numbers)\n", 1.0),
        ("    return max(numbers)\nprint(1)\ndef solve(n):\n    return 0\n", 1.0),  # read to the function's end
        ("    return numbers[0]\n", 0.0),  # right by chance for one test only
        ("    return str(max(numbers))\n", 0.0),
        ("    return max(numbers\n", 0.0),
        ("    while True:\n        pass\n", 0.0),
        ("    return [0] * 10**10\n", 0.0),
        ("    return unknown\n", 0.0),
        ("", 0.0),
    ],
)
def test_a_program_passes_when_all_its_tests_hold(generated, passed):
    assert passes(PROMPT, generated, seconds=1) == passed


@pytest.mark.parametrize(
    "generated",
    [
        "    import os\n    return max(numbers)\n",
        "    __import__('os').system('touch escaped')\n    return max(numbers)\n",
        "    open('escaped', 'w').close()\n    return max(numbers)\n",
        "    ().__class__.__base__.__subclasses__()\n    return max(numbers)\n",
        "    eval('1')\n    return max(numbers)\n",
        "    '{0.__class__}'.format(numbers)\n    return max(numbers)\n",
    ],
)
def test_a_program_that_reaches_outside_fails(generated):
    assert passes(PROMPT, "    return max(numbers)\n") == 1.0
    assert passes(PROMPT, generated) == 0.0


def test_the_hook_stands_behind_the_allowed_part(monkeypatch, tmp_path):
    import deltaworks.study.sandbox as sandbox

    monkeypatch.setattr(sandbox, "allowed", lambda source: True)
    monkeypatch.setattr(sandbox, "BUILTINS", [*sandbox.BUILTINS, "open", "__import__"])
    for attempt in (f"open({str(tmp_path / 'escaped')!r}, 'w')", "__import__('socket').socket()"):
        assert passes(PROMPT, f"    {attempt}\n    return max(numbers)\n") == 0.0
    assert list(tmp_path.iterdir()) == []
    assert passes(PROMPT, "    return max(numbers)\n") == 1.0


def test_what_has_no_tests_is_not_judged():
    assert passes('def f(a):\n    """Nothing to run."""\n', "    return a\n") is None
    assert passes('def f(a):\n    """\n    >>> import os\n    """\n', "    return a\n") is None


def test_the_body_ends_where_a_line_is_not_indented():
    assert body("    a = 1\n\n    return a\nelse:\n    b") == "    a = 1\n\n    return a\n"
    assert not allowed("a._b")
    assert allowed("[n.real for n in (1, 2)]")


def test_references_pass_and_scores_execute_only_when_told():
    rows = nursery.data("programs")["validation"].select(range(5))
    samples = [{"prompt": r["prompt"], "reference": r["completion"], "generated": r["completion"]} for r in rows]
    assert "passes" not in scores(samples)
    assert scores(samples, execute=True)["passes"] == 1.0
    samples[0]["generated"] = "    return None\n"
    assert scores(samples, execute=True)["passes"] == pytest.approx(0.8)
