"""The tables of the documents are what the committed results say."""

import pathlib
import re

import pytest

from benchmarks.shared import report

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_documents_say_what_the_results_say(name):
    text = (ROOT / name).read_text()
    assert report.rendered(text) == text, "run python -m benchmarks.shared.report"


def test_another_figure_is_noticed():
    text = (ROOT / "README.md").read_text()
    changed, n = re.subn(r"(<!-- table: gpt_oss -->.*?)\d\.\d \|", r"\g<1>0.1 |", text, count=1, flags=re.DOTALL)  # fmt: skip
    assert n == 1 and changed != text
    assert report.rendered(changed) == text


def test_each_table_is_in_a_document_and_each_picture_is_there():
    text = "".join(path.read_text() for path in report.DOCUMENTS)
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(report.TABLES)
    assert text.count("<!-- table:") == text.count("<!-- end -->")
    for path in report.DOCUMENTS:
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text()):
            assert (path.parent / picture).is_file(), picture


def test_unknown_tables_are_refused():
    with pytest.raises(KeyError, match="nothing"):
        report.rendered("<!-- table: nothing -->\n<!-- end -->")
