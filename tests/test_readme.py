"""The README: short, its claims those of the committed run, its links and figures there."""

import re

from detransformer.files import repository_root

ROOT = repository_root()
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_is_short_and_has_one_figure():
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"!\[", README)) == 1


def test_claims_are_those_of_the_committed_run():
    claims = (ROOT / "results" / "reference" / "claims.md").read_text(encoding="utf-8")
    assert claims in README, "copy the rows of results/reference/claims.md"
    assert claims.count("\n") == 2 + 7


def test_links_of_all_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
