"""Tables of tricky completions, one per scorer."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_lens.tasks.scoring.letters import answer_letter, same_choice
from spd_lens.tasks.scoring.numbers import final_number
from spd_lens.tasks.scoring.short_answers import same_short_answer
from spd_lens.tasks.scoring.values import same_number
from spd_lens.tasks.scoring.words import same_text, short_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 6 * 7 = 42\n#### 42", "42"),
        ("#### 12\nWait, no.\n#### 42", "42"),  # the last one counts
        ("#### 42\nThere were 7 days.", "42"),  # what follows the line does not
        ("####42", "42"),
        ("#### $1,234.50", "$1,234.50"),
        ("#### -7", "-7"),
        ("#### \u22127", "-7"),  # a typographic minus
        ("#### **18**", "18"),
        ("#### The final answer is 18.", "18"),
        ("#### Answer: 18 apples", "18"),
        ("#### \\(18\\)", "18"),
        ("#### 5 + 3 = 8", "8"),
        ("#### 8 = 5 + 3", "8"),
        ("#### 3/4 of a cup", "3/4"),
        ("#### 1 1/2 hours", "1 1/2"),
        ("#### 25%", "25%"),
        ("#### 25\\%", "25\\%"),
        ("#### 42.", "42"),
        ("#### 16\n#### 16\n#### 1", "16"),  # a repetition that ran out of tokens
        ("#### 16\n#### 1\n", "1"),  # a correction
        # headings that happen to contain a number
        ("#### Step 1: Add\n1 + 1 = 2\n#### Step 2: Multiply\n2 * 4 = 8\nThe answer is 8.", "8"),
        ("#### 1. Read the problem\nThere are 3.\n#### 2. Solve it\nIt is 9.", "9"),
        ("#### \nnothing there, but 5 before", "5"),
        # boxes
        ("Thus \\boxed{42}.", "42"),
        ("\\boxed{1} and then \\boxed{\\frac{3}{4}} of 8 days", "\\frac{3}{4}"),
        ("\\boxed{x = 12}", "12"),
        ("\\boxed{\\text{12 apples}}", "12"),
        ("\\boxed{2\\sqrt{9}}", "2\\sqrt{9}"),
        ("\\boxed{42", "42"),  # cut off
        # "answer is"
        ("The answer is 15 because 3 * 5.", "15"),
        ("**Answer:** 15 (of 20)", "15"),
        ("Answer: x = 15\nCheck: 15 - 3 = 12", "15"),
        ("The final answer is $15.00, from 3 bags.", "$15.00"),
        # the last number
        ("He has 3 + 4 = 7 left.", "7"),
        ("From 10-5 we get 5", "5"),
        ("so we have 18 - 15", "15"),  # an operator, not a sign
        ("so we have 18-15", "15"),
        ("so it is -15", "-15"),
        ("it rose by 1,200.50 dollars", "1,200.50"),
        ("a loss of -$30", "-$30"),
        ("a loss of $-30", "$-30"),
        ("2 million people", "2 million"),
        ("in 1,2,3 order", "3"),  # a list, not a thousands separator
        ("no number at all", None),
        ("", None),
        # what is said about the answer does not change it
        ("#### 20 (since x = 5)", "20"),
        ("#### 72 clips (48 in April, and 48/2 = 24 in May)", "72"),
        ("#### 72 clips, 48 in April and 48/2 = 24 in May", "72"),
        ("#### 48 + 24 = 72 (since 48/2 = 24)", "72"),
        ("#### 48/2 = 24, so 48 + 24 = 72", "72"),
        ("#### 18 dollars = 9 * 2", "18"),
        ("#### 2 hours = 120 minutes", "120"),
        ("#### 3 apples and 4 apples = 7 apples", "7"),
        ("#### Half of 36 is 18", "18"),
        ("#### 50% of 36 apples is 18", "18"),
        ("#### 9 eggs x $2 = $18", "$18"),
        ("#### 9 eggs at $2 each = $18", "$18"),
        ("#### 2(9) = 18", "18"),
        ("#### 2**4", "2^4"),
        ("\\boxed{9\\times2}", "9\\times2"),
        ("\\boxed{5 \\text{ or } 6}", "5 or 6"),
        ("#### 18\nBonus question: how many?\n#### 3", "18"),
        ("#### 5 apples and x = 3", "5"),
        ("#### 18 - 3 more than before", "18"),
        ("#### **72** (48 + 24)", "72"),
        ("#### 42. There were 7 days.", "42"),
        ("#### Total = 48 + 24 = 72 (where 24 = 48/2)", "72"),
        ("#### 20 [x = 5]", "20"),
        ("#### 20 apples = 4 bags of 5", "20"),
        ("#### 20 // x = 5", "20"),
        ("#### 20: x = 5", "20"),
        ("#### 20 $x = 5$", "20"),
        ("#### 25% of 80 = 20", "20"),
        ("\\boxed{20 (x = 5)}", "20"),
        ("\\boxed{x = 2\\sqrt{3}}", "2\\sqrt{3}"),
        ("The answer is 72 (48 in April, and 48 / 2 = 24 in May).", "72"),
        ("The answer is 15. The answer is for 3 people.", "15"),
        ("The answer is:\n29 apples, 3 more than before", "29"),
        ("The answer to the question is 8, not 5.", "8"),
        ("The answer is not 18 but 20.", "20"),
        ("\\boxed{18\\text{ dollars (}9 \\times 2)}", "18"),
        ("She sold 72 clips (48 in April, 24 in May).", "72"),
        ("### Answer\n18\nbecause 9 * 2 is that", "18"),
        ("#### Answer:\n18", "18"),
        ("We can now find the answer:\n1. 14 + 9 = 23\n2. 23 - 4 = 19", "19"),
        ("#### 2. The final answer is 20.", "20"),
        # a line that was cut off is no answer
        ("#### 3 * 4 = 12\n#### 3 * 4 =", "12"),
        # corrections
        ("\\boxed{17}? No. Final answer: 18", "18"),
        ("The answer is 41, but we need to add 38. So 41 + 38 = 79 people.", "79"),
        ("#### 42\nWait, no, I forgot one. It is 43.", "43"),
        ("#### 42\nWait, let me double-check: 42 / 6 = 7. Correct.", "42"),
        # in words and in LaTeX
        ("#### negative 5", "negative 5"),
        ("#### minus 5", "-5"),
        ("#### - 5", "-5"),
        ("#### Twenty-three apples", "Twenty-three"),
        ("The answer is one of the following: 5", "5"),
        ("No one knows.", None),
        ("#### 1{,}080", "1,080"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{12} so \\boxed{}", "12"),
        ("#### \\sqrt{16}", "\\sqrt{16}"),
        # not one number
        ("#### 5 or 6", "5 or 6"),
        ("#### 10-15 minutes", "10-15"),
        ("#### 12:30", "12:30"),
        ("#### 5:00 PM", "5"),
        ("#### 12/25/1937", "12/25/1937"),
    ],
)
def test_final_number(text, expected):
    assert final_number(text) == expected


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1,080", "1080"),
        ("1080", "$1,080.00"),
        ("1080", "1 080".replace(" ", "\u202f")),
        ("42", "42.0"),
        ("42", "042"),
        ("42", "+42"),
        ("0.5", "1/2"),
        ("0.5", ".50"),
        ("0.5", "\\frac{1}{2}"),
        ("1.5", "1 1/2"),
        ("50", "50%"),
        ("0.5", "50%"),
        ("50%", "0.5"),
        ("-3", "\u22123"),
        ("-3", "-$3"),
        ("-3", "$-3.00"),
        ("1/3", "0.3333333"),
        ("2000000", "2 million"),
        ("18", "18 apples"),
        ("1000", "1e3"),
        ("6", "2\\sqrt{9}"),
        ("\\sqrt{12}", "2\\sqrt{3}"),
        ("1080", "1{,}080"),
        ("1080", "1\\,080"),
        ("1080", "1~080"),
        ("1080", "1_080"),
        ("1080", "1'080"),
        ("1080.5", "1.080,50"),
        ("3.5", "3,50"),  # nobody writes a thousand so
        ("100000", "1,00,000"),
        ("45", "45^{\\circ}"),
        ("45", "45°"),
        ("70000", "7 \\times 10^4"),
        ("0.035", "3.5 × 10^{-2}"),
        ("16", "2^4"),
        ("64", "2^{6}"),
        ("0.2", "20 percent"),
        ("20", "20 per cent"),
        ("0.5", "½"),
        ("2.5", "2½"),
        ("0.5", "\\tfrac12"),
        ("1.5", "1\\frac{1}{2}"),
        ("23", "twenty-three"),
        ("205", "two hundred and five"),
        ("2.5", "two and a half"),
        ("0.75", "three quarters"),
        ("-5", "negative five"),
        ("0.2", "twenty percent"),
        ("20", "twenty percent"),
        ("1080", "1,\\!080"),
        ("-0.75", "-\\frac{3}{4}"),
        ("300000", "3\\times10^{5}"),
        ("72", "７２"),
        ("36", "3 dozen"),
        ("3", "3 dozen"),  # "How many dozens?"
        ("70000", "$70k"),
        ("12", "١٢"),
        ("12", "12 o'clock"),
        ("18", "9\\times2"),
        ("70000", "70\\text{,}000"),
        ("2.5", "2 and a half hours"),
        ("500", "5 hundred"),
        ("12:30", "12:30"),  # the gold answer itself, whatever it is
        ("10-15", "10-15"),
    ],
)
def test_same_number(gold, answer):
    if "sqrt" in gold + answer or "^" in answer or "times2" in answer:
        pytest.importorskip("math_verify")
    assert same_number(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "43"),
        ("42", "-42"),
        ("42", "4.2"),
        ("42", "42,000"),
        ("1,080", "1"),
        ("1/3", "0.33"),
        ("50", "0.5"),
        ("0.5", "5%"),
        ("3", "3/4"),
        ("1", "1 1/2"),
        ("2", "2\\sqrt{9}"),
        ("2", "2^9"),
        ("42", "1/0"),
        ("42", "none"),
        ("42", ""),
        ("42", None),
        ("1", "9^{9^{9^{9}}}"),  # never handed to a computer algebra system
        ("12", "12:30"),
        ("2", "2 and a half"),
        ("5", "5 hundred"),
        ("5", "5 or 6"),
        ("10", "10-15"),
        ("12", "12/25/1937"),
        ("3", "3,50"),
        ("1", "1,00,000"),
        ("2", "2^4"),
        ("2", "2\\sqrt{3}"),
        ("2\\sqrt{3}", "2"),
        ("7", "7 \\times 10^4"),
        ("twenty", "30"),
        ("100000001", "100000002.5e3"),
    ],
)
def test_different_number(gold, answer):
    assert not same_number(gold, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: B", "B"),
        ("answer: b", "B"),
        ("Answer: (b)", "B"),
        ("**Answer:** B", "B"),
        ("**Answer: B**", "B"),
        ("Answer:\n\nB", "B"),
        ("Answer: \\boxed{B}", "B"),
        ("Answer: $\\boxed{\\text{B}}$", "B"),
        ("The correct answer is B.", "B"),
        ("The answer is option C, because", "C"),
        ("The answer is: (A) Gravity", "A"),
        ("Answer: A\nWait.\nAnswer: D", "D"),
        ("Let me think. B is wrong.\nAnswer: C", "C"),
        ("Answer: A", "A"),
        ("B", "B"),
        ("B. Because of gravity", "B"),
        ("(C) foo", "C"),
        ("**D**", "D"),
        ("A", "A"),
        ("A. gravity", "A"),
        ("I would choose option B here", "B"),
        ("It must be (D), I think", "D"),
        # not clear, or not a letter
        ("A cat sat on the mat", None),
        ("A or B", None),
        ("Answer: A or B", None),
        ("Answer: a number of things", None),
        ("Answer: vitamin C", None),
        ("Answer: Because", None),
        ("Answer: E", None),
        ("It is C's fault", None),
        ("Answer:", None),
        ("", None),
        # free sentences
        ("B is correct.", "B"),
        ("A is correct.", "A"),
        ("C is the right answer.", "C"),
        ("It must be D since Mars is red.", "D"),
        ("The correct option is (C)", "C"),
        ("I choose B", "B"),
        ("I'd go with C.", "C"),
        ("Option D", "D"),
        ("So, A.", "A"),
        ("Therefore the correct choice is D", "D"),
        ("Of the options, only C is true.", "C"),
        ("Looks like C", "C"),
        ("C seems right", "C"),
        ("D is probably the best answer", "D"),
        ("The answer would have to be C", "C"),
        ("Ans: B", "B"),
        ("b) Mars", "B"),
        ("option (b) is correct", "B"),
        ("→ B", "B"),
        ("B) Mars", "B"),
        ("B because it is red", "B"),
        ("B\n\nBecause A is true of it", "B"),
        ("D. Not wrong", "D"),  # the choice is called that
        ("Option A is a city. Option B is correct", "B"),
        ("A good question! I think C is right", "C"),
        ("I think B", "B"),
        ("b.", "B"),
        # what is said to be wrong
        ("not A but C", "C"),
        ("A is wrong; B is right", "B"),
        ("The answer is not A but C", "C"),
        ("The answer isn't A; it's B.", "B"),
        ("A, B and D are wrong, so C.", "C"),
        ("Neither A nor B; C", "C"),
        ("(A) and (B) are false, (C) is true", "C"),
        ("B is not correct. A is not correct. C", "C"),
        ("We can eliminate A and C. B is impossible. That leaves D.", "D"),
        ("Not B. Not C. A fits.", "A"),
        ("The correct answer is not B, it is C", "C"),
        ("Option A is incorrect. Option B is incorrect. Option D fits.", "D"),
        ("Answer: B\nExplanation: The answer is not C because", "B"),
        ("The answer is B, not C.", "B"),
        ("It can't be A. So it must be C or D.", None),
        ("Both B and C are right", None),
        ("Answer: B/C", None),
        ("B&C", None),
        ("Answer: B|C", None),
        ("B (or maybe C)", None),
        ("B C D", None),
        ("anything but B", None),
        # other roles
        ("Vitamin D is good", None),
        ("plan B is not", None),
        ("Type A blood is common", None),
        ("It's a trap", None),
        ("U.S. is a country", None),
        ("D. H. Lawrence wrote it", None),
        ("Mr. B went home", None),
        ("C++ is a language", None),
        ("Let A = 5.", None),
        # wrapped and doubled marks
        ("'Answer: B'", "B"),
        ("Answer: The answer is (B)", "B"),
        ("Answer: <B>", "B"),
        ('**Answer:** "B"', "B"),
        ("Answer: [B]", "B"),
        ("“Answer: B”", "B"),
        ("(Answer: B)", "B"),
        ("Answer: __B__", "B"),
        ("Answer: Answer: B", "B"),
        ("Answer：B", "B"),
        ("Answer → B", "B"),
        ("Final Answer: C", "C"),
        ("ANSWER: b", "B"),
        ("### Answer\nC. Mars", "C"),
        ('The correct answer is option C, "Not wrong"', "C"),
        ("My answer: B", "B"),
        ("I believe the answer to the question is C.", "C"),
        ("Sure! Here's the answer: **B. Mars**", "B"),
        ("Thus \\boxed{B}", "B"),
        ("\\boxed{\\textbf{(D)}\\ 5}", "D"),
        # the list of choices is no answer, but what follows it is
        ("A. x\nB. y\nC. z\nD. w", None),
        ("A. x\nB. y\nC. z\nD. w\n\nB is right", "B"),
        ("A. x\nB. y\n\nAnswer: C", "C"),
        # corrections
        ("Answer: A. Wait, that's wrong. It must be C.", "C"),
        ("Answer: A\nWait, no, C is right.", "C"),
        ("A. Foo\nHmm, that is wrong: it's B.", "B"),
    ],
)
def test_answer_letter(text, expected):
    assert answer_letter(text) == expected


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("C", "Answer: C", True),
        ("C", "Answer: vitamin C", True),  # the choice itself; its letter is C as well
        ("B", "Answer: vitamin C", False),
        ("A", "vitamin D", True),  # the whole text is choice A, although a letter D stands in it
        ("D", "vitamin D", False),
        ("A", "Answer: Vitamin D.", True),
        ("A", "Answer: B", False),
        ("A", "", False),
        ("A", "It is vitamin D.", True),
        ("A", "The best one is vitamin D because of the sun.", True),
        ("A", "Answer: the sun's vitamin D", True),
        ("A", "It is not vitamin D.", False),
        ("A", "vitamin D or vitamin B", False),
        ("A", "I think it's vitamin D, not vitamin B.", True),
        ("C", "**Vitamin C**", True),
        ("C", "Answer: 'vitamin C'", True),
        ("B", "B is right, and vitamin C is not", True),
    ],
)
def test_same_choice(gold, text, right):
    assert same_choice(gold, ["vitamin D", "vitamin B", "vitamin C", "none"], text) is right


@pytest.mark.parametrize("text", ["3", "\\boxed{3}", "The answer is 3 because 5 - 2 = 3", "Answer: 3 and not 5"])
def test_the_number_of_a_choice_picks_it(text):
    assert same_choice("B", ["2", "3", "5", "6"], text)


@pytest.mark.parametrize("number", ["-300", "300/7", "1,300", "300,000", "300.5", "300%", "1300", "300 or 400"])
@pytest.mark.parametrize("before", ["The answer is ", "It is "])
def test_a_number_that_holds_a_choice_does_not_pick_it(before, number):
    assert not same_choice("A", ["300", "400", "500", "600"], before + number)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("cell", True),
        ("A cell.", True),
        ("Answer: cell", True),
        ("The answer is the cell, not a gene or an atom.", True),
        ("The answer is the cell, i.e. more than an atom.", True),
        ("An atom is not alive. The cell is.", True),
        ("It is not an atom, but a cell.", True),
        ("It cannot be the cell.", False),
        ("It isn't a cell", False),
        ("The cell is wrong.", False),
        ("Answer: cell is not the unit", False),
        ("It is neither a cell nor an atom", False),
        ("Everything but the cell", False),
        ("I rule out the cell.", False),
        ("Which of them? The cell?", False),
        ("the cell or an atom", False),
        ("a non-cell", False),
    ],
)
def test_the_text_of_a_choice_in_a_sentence(text, right):
    assert same_choice("B", ["the gene", "the cell", "the atom", "a star"], text) is right


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("(B)", "Answer: (B)", True),
        ("(B)", "Answer: B", True),
        ("(B)", "Answer: (B) 12/25/1937", True),
        ("(B)", "The answer is (B).", True),
        ("(B)", "Answer: (A)", False),
        ("(R)", "Answer: (R)", True),  # some subtasks have 18 options
        ("(B)", "Answer: Because", False),
        ("Yes", "Answer: yes.", True),
        ("Yes", "Answer: Yes, because he caused it", True),
        ("Yes", "**Answer:** **Yes**", True),
        ("Yes", "Answer: Yes and no", False),
        ("Yes", "Yes", True),
        ("Yes", "Answer: - Yes", True),  # some prompts list the answers so
        ("Yes", "- No", False),
        ("No", "Answer: Not really", False),
        ("True", "Answer: False", False),
        ("valid", "Answer: invalid", False),
        ("8", "Answer: 8 objects", True),
        ("8", "Answer: 8.0", True),
        ("8", "Answer: 80", False),
        ("8", "Answer: 5 + 3", False),
        ("-35", "Answer: -35", True),
        ("-35", "Answer: 35", False),
        ("barn damp dot", "Answer: barn, damp, dot", True),
        ("barn damp dot", "Answer: barn dot damp", False),
        ("barn damp dot", "Answer: barn", False),
        ("] ) }", "Answer: ])}", True),
        ("] ) }", "Answer: ] ) } )", False),
        (")", "Answer: )", True),
        (")", "Answer:", False),
        ("Yes", "", False),
        ("True", "Answer: The answer is True", True),
        ("False", "Answer: not ( True ) and ( True ) is False", True),
        ("True", "The expression evaluates to True.", True),
        ("Yes", "The answer is 'Yes'", True),
        ("Yes", "Yes! He did.", True),
        ("True", "'Answer: True'", True),
        ("True", "Answer: <True>", True),
        ("True", "Answer: $\\text{True}$", True),
        ("valid", "The argument is deductively valid.", True),
        ("valid", "The argument is not valid", False),
        ("valid", "The argument is invalid.", False),
        ("barn damp dot", "Answer: [barn, damp, and dot]", True),
        ("barn damp dot", "The sorted list is: barn damp dot", True),
        ("barn damp dot", "Answer: barn damp dot zebra", False),
        ("] ) }", "The closing brackets are ] ) }", True),
        ("] ) }", "Answer: `] ) }`.", True),
        ("] ) }", "Answer: ] ) } (closing all)", True),
        (")", "Answer: (B)", False),
        ("8", "There are 8 objects.", True),
        ("8", "Answer: eight", True),
        ("8", "I have 3 apples and 5 pears.\n3 + 5 = 8", True),
        ("8", "8\n\nExplanation: 5 + 3 objects", True),
        ("-35", "(5+3) * -4 - 3 = -35", True),
        ("(B)", "I think it's (B)", True),
        ("(I)", "I think it's (B)", False),
        ("(C)", "It must be (C) since it rained", True),
    ],
)
def test_short_answers(gold, text, right):
    assert same_short_answer(gold, text) is right
    assert same_short_answer(gold, short_answer(text)) is right


@pytest.mark.parametrize(
    "text",
    ["Answer:\n- barn\n- damp\n- dot", "1. barn\n2. damp\n3. dot", "barn\ndamp\ndot\n\nThese are sorted."],
)
def test_lists_line_by_line(text):
    assert same_short_answer("barn damp dot", text) and not same_short_answer("barn damp zebra", text)
    assert not same_short_answer("barn damp", text)


@pytest.mark.parametrize(
    ("gold", "said", "same"),
    [
        ("[]", "()", False),
        ("[]", "`[]`.", True),
        ("[]", "[[]]", False),
        ("()", "(())", False),
        ("[1, 2]", "[[1, 2]]", False),
        ("(a + b) * (c + d)", "((a + b) * (c + d))", True),
        ("日本", "日本。", True),
        (")", "(", False),
        ("!", "?", False),
        ("!", "...", False),
        ('""', '""', True),
        ('""', "", False),
        (".", "..", False),
        ("*", "**", False),
        ("{}", "[]", False),
        ("[1, 2]", "[1,2]", True),
        ("[1, 2]", "(1, 2)", False),
        ("(1, 2)", "[1, 2]", False),
        ("x != y", "`x != y`", True),
        ("x != y", "x = y", False),
        ("f", "f()", False),
        ("f(x)", "f(x", False),
        ("x", "!x", False),
        ("[]", "[[]]", False),
        ("a[0]", "a(0)", False),
        ("if x:", "if x;", False),
        ("Stop!", "Stop?", False),
        ("C++", "C", False),
        ("<br>", "br", False),
        ("n!", "n", False),
        ("__init__", "init", False),
        ("(B)", "B", True),
        ("B", "(B)", True),
        ("Paris", '**"Paris."**', True),
        ("Paris", "[Paris]", True),
        ("Stop!", "stop", True),
        ("é", "e\u0301", True),
        ("'a'", '"a"', True),
    ],
)
def test_same_text(gold, said, same):
    assert same_text(gold, said) is same


@given(gold=st.text(min_size=1).filter(str.strip))
def test_every_text_is_itself(gold):
    assert same_text(gold, gold)


@given(gold=st.text("()[]{}<>!?=+-/&|^~,;:", min_size=1), said=st.text("()[]{}<>!?=+-/&|^~,;:", min_size=1))
def test_symbols_are_the_same_only_as_such(gold, said):
    if gold.rstrip(".,;:") != said.rstrip(".,;:"):
        assert not same_text(gold, said)


@pytest.mark.parametrize("text", ["9^{9^{9^{9}}}", "9**9**9**9", "99999999!", "\\binom{99999999}{4999999}"])
def test_no_expression_keeps_scoring_busy(text):
    """In a thread, where `math-verify` has no time limit of its own."""
    worker = threading.Thread(target=same_number, args=("\\sqrt{4}", text), daemon=True)
    worker.start()
    worker.join(5)
    assert not worker.is_alive()


def test_scoring_survives_long_and_odd_text():
    """Model output can be anything; nothing here may raise or take long."""
    for text in (
        "#" * 20_000,
        "1," * 20_000,
        "\\boxed{" * 5_000,
        "1 " * 20_000,
        "9" * 5_000,
        "\x00\ud800",
        "-" * 20_000,
    ):
        final_number(text)
        same_number("1", text)
        answer_letter(text)
        same_choice("A", ["x", "y"], text)
        same_short_answer("(B)", short_answer(text))
