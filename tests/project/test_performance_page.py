"""docs/performance.md's table is that of the file."""

from bench.performance_page import PAGE, TABLE, table, write_table


def test_its_table_is_that_of_the_file():
    page = PAGE.read_text()
    assert len(TABLE.findall(page)) == 1 and write_table(page) == page and len(table().splitlines()) > 15
