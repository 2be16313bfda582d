"""Reading the answer out of a completion, and deciding whether it is right.

Everything here works on plain text and is a pure function; `tests/tasks/test_scoring.py` has a table of tricky cases
for each. `reading` says which part of a completion is its answer; `numbers`, `letters` and `words` read it;
`short_answers` compares BBH's; `values` and `spelled` say what a number is.
"""
