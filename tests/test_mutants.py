"""The table of deliberate bugs fits the source; `make mutants` plants them."""

from __future__ import annotations

import re

import pytest

from mutants import COPIED, MUTANTS, ROOT, Mutant, occurrences, selections


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_that_a_bug_replaces_is_found_once(mutant: Mutant):
    assert occurrences(mutant) == 1, f"{mutant.file} changed: write the bug anew"
    assert mutant.old != mutant.new


def test_bugs_have_names_and_tests_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    files = {selection[0].split("::")[0] for mutant in MUTANTS for selection in selections(mutant.tests)}
    assert not [file for file in files if not (ROOT / file).is_file()]
    assert "tests" in COPIED and "cpflex" in COPIED


def test_the_documented_table_is_of_these_bugs():
    rows = re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|", (ROOT / "docs" / "mutants.md").read_text(), re.MULTILINE)
    assert rows == [(mutant.name, mutant.file) for mutant in MUTANTS]
