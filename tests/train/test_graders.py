"""What completions are worth, case by case."""

# ruff: noqa: RUF001 (letters that look like others are cases)
import pytest

from train.rewards.functions import (
    accuracy_reward,
    format_reward,
    load_reward_function,
    same_answer,
)

WHOLE = "<think>4 sides</think>\n<answer>4</answer>"

FORMATS = [
    ("as published", WHOLE, 1),
    ("no white space", "<think>a</think><answer>4</answer>", 1),
    ("empty contents", "<think></think><answer></answer>", 1),
    ("white space after", WHOLE + " \n\t", 1),
    ("lines in both", "<think>a\n\nb</think> \n <answer>4\n5</answer>", 1),
    ("an opening tag inside", "<think>a <think> b</think><answer>4</answer>", 1),
    ("an answer within the thoughts", "<think><answer>3</answer></think><answer>4</answer>", 1),
    ("unicode", "<think>四邊\u00a0形 🙂</think>\u2003<answer>４</answer>", 1),
    ("very long", f"<think>{'a <' * 200_000}</think><answer>4</answer>", 1),
    ("nothing", "", 0),
    ("white space before", " " + WHOLE, 0),
    ("text before", "So: " + WHOLE, 0),
    ("text between", "<think>a</think> so <answer>4</answer>", 0),
    ("text after", WHOLE + ".", 0),
    ("no thoughts", "<answer>4</answer>", 0),
    ("no answer", "<think>4</think>", 0),
    ("thoughts twice", "<think>a</think><think>b</think><answer>4</answer>", 0),
    ("closed twice", "<think>a</think></think><answer>4</answer>", 0),
    ("nested answer", "<think>a</think><answer><answer>4</answer></answer>", 0),
    ("answer twice", WHOLE + "<answer>5</answer>", 0),
    ("not closed", "<think>a</think><answer>4", 0),
    ("other order", "<answer>4</answer><think>a</think>", 0),
    ("other case", "<Think>a</Think><Answer>4</Answer>", 0),
    ("many opening tags", "<think>" * 20_000, 0),
]


@pytest.mark.parametrize(
    ("completion", "value"), [case[1:] for case in FORMATS], ids=[case[0] for case in FORMATS]
)
def test_the_format_reward_is_that_of_the_paper(completion, value):
    assert format_reward(completion, {}) == value


ANSWERS = [  # where it stands
    ("in the answer", WHOLE, "4", 1),
    ("without thoughts", "<answer>4</answer>", "4", 1),
    ("text around", "I say <answer>4</answer>!", "4", 1),
    ("the first counts", "<answer>4</answer><answer>5</answer>", "4", 1),
    ("not the second", "<answer>5</answer><answer>4</answer>", "4", 0),
    ("within the thoughts is first", "<think><answer>5</answer></think><answer>4</answer>", "4", 0),
    (
        "nested: what stands in the first is no number",
        "<answer><answer>4</answer></answer>",
        "4",
        0,
    ),
    ("not closed", "<answer>4", "4", 0),
    ("no tags", "4", "4", 0),
    ("empty", "<answer></answer>", "4", 0),
    ("white space", "<answer> \n </answer>", "4", 0),
    ("over lines", "<answer>\n4\n</answer>", "4", 1),
    ("nothing at all", "", "4", 0),
    ("a solution that is a number", "<answer>4</answer>", 4, 1),
]


@pytest.mark.parametrize(
    ("completion", "solution", "value"),
    [case[1:] for case in ANSWERS],
    ids=[case[0] for case in ANSWERS],
)
def test_the_first_answer_is_graded(completion, solution, value):
    assert accuracy_reward(completion, {"solution": solution}) == value


EQUAL = [
    ("4", "4.0"),
    ("4", "4."),
    ("-4", "−4"),
    ("4", "４"),
    ("1000", "1,000"),
    ("0.5", r"\frac12"),
    (r"$\frac{1}{2}$", "1/2"),
    ("½", "0.5"),
    ("1½", r"\frac{3}{2}"),
    ("1/3", "0.333333"),
    ("50%", "0.5"),
    ("90°", r"90^\circ"),
    ("12 cm", "12"),
    (r"5\text{ cm}", "5cm"),
    ("4", "The answer is 4."),
    ("4", r"\boxed{4}"),
    ("4", r"\(2^2\)"),
    ("2√3", r"2\sqrt{3}"),
    (r"\pi", "π"),
    ("x²+2x+1", "(x+1)^2"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("x=5", "5"),
    ("y=2x+1", "2x+1=y"),
    ("(1,2)", "(1, 2)"),
    ("[1,2)", r"1\le x<2"),
    ("(-∞,3)", "x<3"),
    (r"(-1,0)\cup(1,2)", r"(1,2)\cup(-1,0)"),
    (r"\{1,2\}", "{2, 1}"),
    ("1,2", "2 and 1"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}"),
    ("red ball", "Red ball."),
    (r"\text{Yes}", "yes"),
    ("红色", "红色。"),
    ("B", "B"),
    ("B", "b"),
    ("B", "(B)"),
    ("B", "B."),
    ("B", "B. 12 cm"),
    ("B", "(B) a tree"),
    ("B", "(B) oranges"),
    ("B", "(B) (0, 1)"),
    ("B", r"\boxed{\text{B}}"),
    ("B", "**B**"),
    ("B", "The correct answer is (b)"),
    ("(b)", "B"),
    ("B. 12 cm", "B"),
    ("B. 12 cm", "12 cm"),
    ("B: a tree", "A tree"),
    ("12", "B. 12"),
    ("A, C", "C, A"),
    ("}{", "}{"),
    ("36", "36 cm²"),
    ("36", "Area = 36 cm^2"),
    ("36", "36 m/s"),
    ("36", "36 N"),
    ("36", "36°C"),
    ("36", r"36\text{ people}"),
    ("36 cm²", "36"),
    ("1/2 km", "0.5"),
    ("12", r"\$12"),
    ("1200", r"\$1,200"),
    ("1e-05", "0.00001"),
    ("2.5e-06", r"2.5\times10^{-6}"),
    ("2.5e-06", "2.5 × 10⁻⁶"),
    ("1e-2", r"\frac{1}{100}"),
    ("1e+16", "10000000000000000"),
    ("2024-01-02", "2024-01-02"),
    ("x<4", "x < 4"),
    ("42", "The answer is:\n42"),
    ("42", "6*7\n= 42"),
    ("42", "6*7 = 42"),
    ("42", r"\text{The answer is }\boxed{42}"),
    ("0.333...", "0.333..."),
    ("x=1, y=2", "x=1\ny=2"),
    ("x≠4", "x ≠ 4"),
    ("5 or 6", "6 or 5"),
    ("red ball", "red\nball"),
    ("B", "The answer is:\nB"),
    ("B", "B. 12\ncm"),
    ("B", "B. vitamin C"),
    ("B", "B. John F. Kennedy"),
    ("B", "(B) Both (A) and (R) are true"),
    ("B", "B. It is not."),
]


@pytest.mark.parametrize(("solution", "answer"), EQUAL)
def test_equal_answers_are_equal(solution, answer):
    assert same_answer(solution, answer)


DIFFERENT = [
    ("4", "5"),
    ("4", "-4"),
    ("4", "4 or 5"),
    ("4", "3, 4"),
    ("4", "5 4"),
    ("4", "<answer>4"),
    ("4", "four"),
    ("4", "x"),
    ("2", r"\frac{2}{1"),
    ("2", "}}}2{{{"),
    ("2", r"\{2"),
    ("2√3", "2"),
    ("0.333", "1/3"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("no", "on"),
    ("red ball", "ball"),
    ("red ball", "ball red"),
    ("B", "A"),
    ("B", "A or B"),
    ("B", "A, B"),
    ("A", "(A) or (B)"),
    ("A", "(A), (B)"),
    ("A", "A. / B."),
    ("A", "[A] [B]"),
    ("B", "AB"),
    ("B", "B or not"),
    ("B", "12"),
    ("A", "A cat"),
    ("C", "C=5"),
    ("B. 12 cm", "A. 12 cm"),
    ("B. 12 cm", "13 cm"),
    ("A, C", "A"),
    ("4", ""),
    ("", ""),
    ("4", "4" * 10_000),
    ("4", "5" * 100_000 + " or"),
    ("4", "🙂" * 1000),
    ("5 million", "5"),
    ("5 x", "5"),
    ("2 pi", "2"),
    ("4", "4 or 5 cm"),
    ("4", "≠4"),
    ("4", "<4"),
    ("1.6e-19", "9.1e-31"),
    ("0.00000012", "0.00000034"),
    ("1234567", "1234568"),
    ("2024-01-02", "2024-02-01"),
    ("42", "42 or 41"),
    ("42", "Either 42 or 41"),
    ("42", "not 42"),
    ("42", "It is not 42."),
    ("42", "It isn’t 42"),
    ("42", "!=42"),
    ("42", "41\n42"),
    ("42", "41\n\n42"),
    ("42", "42\n41"),
    ("42", "41. 42."),
    ("42", "41 -> 42"),
    ("42", "41 ... 42"),
    ("42", "41 | 42"),
    ("42", "41 = 42"),
    ("42", "x=41\nx=42"),
    ("42", "$41$ $42$"),
    ("42", "41 $42$"),
    ("42", r"$\boxed{41}$ $\boxed{42}$"),
    ("42", "\\[41\\]\n\\[42\\]"),
    (r"\pi", "3\n\\pi"),
    ("yes", "Yes. No."),
    ("B", "B. C"),
    ("B", "B\nC"),
    ("B", "B. 12 cm\nC. 13 cm"),
    ("B", "B. 5 or C. 6"),
    ("B. 12 cm", "B. 12 cm\nC. 13 cm"),
]


@pytest.mark.parametrize(("solution", "answer"), DIFFERENT)
def test_different_answers_are_different(solution, answer):
    assert not same_answer(solution, answer)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("acuracy", "'acuracy' is neither"),
        ("no.such.module:reward", "cannot be imported: ModuleNotFoundError"),
        ("tests.train.graders_of_a_user:nothing", "cannot be imported: AttributeError"),
        ("tests.train.graders_of_a_user:not_callable", "is no function but 3"),
    ],
)
def test_a_function_that_is_not_there_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        load_reward_function(function)
