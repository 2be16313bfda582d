"""Tables of text."""

from rich.console import Console

from spd_lens.output.tables import markdown, terminal


def test_a_markdown_table_has_a_rule_for_every_column():
    assert markdown(["a", "b"], [["x", 1], ["y", 2.5]]) == ["| a | b |", "| --- | --- |", "| x | 1 |", "| y | 2.5 |"]
    assert markdown(["a", "b", "c"], [], align="---:") == ["| a | b | c |", "| --- | ---: | ---: |"]


def test_a_terminal_table_shows_title_head_and_every_row():
    console = Console(width=40)
    with console.capture() as shown:
        console.print(terminal(["name", "value"], [["one", "1"], ["two", "2"]], title="numbers"))
    words = [line.strip("┃│ ").replace("┃", "│").split("│") for line in shown.get().splitlines()]
    assert [[word.strip() for word in line] for line in words if line[0].strip().isalpha()] == [
        ["numbers"],
        ["name", "value"],
        ["one", "1"],
        ["two", "2"],
    ]
