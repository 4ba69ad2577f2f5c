r"""Mathematical answers: what a text gives as its answer, how it reads, and when two are the same.

A gold answer and the answer of a completion are read by one function, so that a gold written back
letter for letter is right. math-verify reads LaTeX expressions, and compares them. It takes the
first part of some notations for the whole (`100_2` for 100), or another meaning (`1:2:3` for a
sixth, `Evelyn` for a product of letters): those are rewritten here, compared as text, or not read.

    "2n-1", "$2n-1$", "so $a_n = 2n-1$", "... #### 2n-1"  ->  an expression
    "4:3:2"                                              ->  a ratio: equal up to a common factor
    "Evelyn", r"\text{(B)}", "12:30", "101_2"            ->  text: equal letter for letter
    "3 hours 20 minutes", "nothing to parse"             ->  None: not read
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from .math_notation import (
    BRACED,
    WORD,
    as_ratio,
    is_text,
    letters,
    plain_latex,
    split_list,
    text_letters,
    unreadable,
)

# `$` opens only before, and closes only after, what is no white space, and never before a digit:
# "$5 and $7" are sums of money
MATH = re.compile(
    r"\$\$(?P<display>.+?)\$\$|(?<!\\)\$(?=[^\s$])(?P<inline>(?:\\\$|[^$\n])*?)(?<=[^\s\\])\$(?!\d)"
    r"|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]",
    re.DOTALL,
)
BETWEEN = re.compile(r"[\s,;.$]*(?:\\text\s*\{)?[\s,;]*(?:and|or|,|;)[\s,;$}]*")
ENDS_WITH_ANSWER = re.compile(
    r".*(?:\b(?:is|are|equals?|be|answer)\b\s*:?|:|(?<![<>!=])=)\s*(?P<answer>[^:=]*?)[.\s]*$",
    re.DOTALL,
)
SENTENCE = 8  # words, from which on a text is a solution, whose last number is its answer
# Of a completion, so that reading it takes no more than a time in proportion to its length
MAX_ANSWER = 2000  # characters of an answer, all its parts together
MAX_BETWEEN = 50  # characters between two parts of one
MAX_ANNOUNCED = 20  # "answer"s, the last ones, that a formula is looked for behind
NEAR = 100  # characters from such a word to its formula
OPENING = re.compile(r"\$|\\[(\[]")


@dataclass(frozen=True)
class Answer:
    """One answer as it was read."""

    kind: str  # expression | ratio | text
    text: str  # its letters, without white space and font commands
    value: Any  # of math-verify: [expression, its LaTeX]; None for text
    repeats: tuple[str, ...] = ()  # a list of which a part is there twice: all parts, sorted
    percent: Any = None  # of 50%: the value of 50


class Reader:
    """Reads and compares answers, without a limit of time: whoever asks it can end it."""

    def __init__(self) -> None:
        # math-verify has no stubs, and is an extra
        import math_verify  # pyright: ignore[reportMissingImports]
        from latex2sympy2_extended import (  # pyright: ignore[reportMissingImports]
            NormalizationConfig,
        )

        self._math_verify = math_verify
        # units=False: its list has single letters, which would make 5 of 5t
        self._latex = math_verify.LatexExtractionConfig(
            normalization_config=NormalizationConfig(units=False), boxed_match_priority=0
        )

    def read(self, text: str) -> Answer | None:
        """The answer that a text is, or ends with; None where it cannot be read as a whole."""
        text = text.rpartition("####")[2].strip()  # GSM8K's mark
        boxed = boxed_answer(text)
        if boxed is not None:
            return self._read_bare(boxed)
        formulas = list(MATH.finditer(text))
        if formulas:
            return self._read_bare(_joined(text, formulas))
        return self._read_bare(text)

    def read_completion(self, text: str) -> Answer | None:
        r"""The answer in the last \boxed{}, or in LaTeX after "answer".

        None without one, and for one of more than MAX_ANSWER characters.
        """
        content = boxed_answer(text)
        if content is None:
            content = _announced(text)
        if content is None or len(content) > MAX_ANSWER:
            return None
        return self.read(re.sub(r"\s+", " ", content))

    def same(self, gold: Answer, given: Answer) -> bool:
        """Equal letters, or the same value for math-verify."""
        if gold.text == given.text:
            return True
        if "text" in (gold.kind, given.kind):
            return gold.text.lower() == given.text.lower()
        if gold.kind != given.kind or gold.repeats != given.repeats:
            return False
        if _is_condition(given.value[0]) and not _is_relation(gold.value[0]):
            return False  # of 2x = 6, math-verify would compare the 6
        if self._equal(gold.value, given.value):
            return True
        if ("=" in gold.text) != ("=" in given.text):  # x = 1 or x = 2 is 1, 2 as x = 1 is 1
            return self._equal(_solutions(gold.value[0]), _solutions(given.value[0]))
        if gold.percent is None:  # the sign may be left out, as in "what percent?"
            return given.percent is not None and self._equal(gold.value, given.percent)
        return given.percent is None and self._equal(gold.percent, given.value)

    def _equal(self, gold: Any, given: Any) -> bool:
        return self._math_verify.verify(gold, given, timeout_seconds=0)

    def _read_bare(self, text: str) -> Answer | None:
        """One answer without a box or dollar signs around it."""
        if is_text(text):
            return Answer("text", text_letters(text), None)
        latex = plain_latex(text)
        words = WORD.findall(BRACED.sub(" ", latex))
        if words:
            return self._read_prose(text, len(words))
        if not latex or unreadable(latex):
            return None
        ratio = as_ratio(latex)
        share = latex.removesuffix(r"\%") if latex.count("%") == 1 else latex
        value = self._parse(ratio or (latex if share == latex else rf"\frac{{{share}}}{{100}}"))
        if not value or isinstance(value[0], str):
            return None
        kind = "ratio" if ratio is not None and ratio.startswith("(") else "expression"
        percent = None if share == latex else self._parse(share)
        return Answer(kind, letters(latex), value, _repeats(latex, value[0]), percent)

    def _read_prose(self, text: str, num_words: int) -> Answer | None:
        """Of a sentence: what comes last, after "is" or "="; of a longer one, its last number."""
        announced = ENDS_WITH_ANSWER.match(text)
        if announced and announced["answer"]:
            found = self._read_bare(announced["answer"])
            if found is not None and found.kind != "text":
                return found
        if num_words < SENTENCE:
            return None
        config = [self._math_verify.ExprExtractionConfig()]
        value = self._math_verify.parse(text, config, parsing_timeout=0)
        return Answer("expression", letters(value[1]), value) if len(value) == 2 else None

    def _parse(self, latex: str) -> list[Any]:
        return self._math_verify.parse(
            rf"\boxed{{{latex}}}",
            extraction_config=[self._latex],
            extraction_mode="first_match",
            parsing_timeout=0,
        )


def boxed_answer(text: str) -> str | None:
    r"""What is in the last \boxed{} or \fbox{}; in the last ones, if "and", "or", "," joins them.

    None where there is no box, or the last is not closed or empty.
    """
    boxes = []  # (start, end, content)
    for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text):
        if boxes and match.start() < boxes[-1][1]:
            continue  # inside another
        end = closing_brace(text, match.end() - 1)
        content = "" if end is None else text[match.end() : end].strip()
        boxes.append((match.start(), len(text) if end is None else end + 1, content))
    if not boxes or not boxes[-1][2]:
        return None
    start, _, content = boxes[-1]
    parts, size = [content], len(content)
    for earlier_start, earlier_end, content in reversed(boxes[:-1]):
        if not content or not _joins(text[earlier_end:start]) or size > MAX_ANSWER:
            break
        start = earlier_start
        parts.append(content)
        size += len(content)
    return ", ".join(reversed(parts))


def closing_brace(text: str, opening: int) -> int | None:
    """Index of the brace that closes the one at `opening`; None where there is none."""
    depth = 0
    for index in range(opening, len(text)):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return None


def _content(match: re.Match) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _joined(text: str, formulas: list[re.Match]) -> str:
    """The last formula with the words around it if they are few, as units are; with those before
    it that "and", "or" or "," joins to it."""
    last = formulas[-1]
    start, parts = last.start(), [_content(last)]
    for earlier in reversed(formulas[:-1]):
        if not _joins(text[earlier.end() : start]):
            break
        start = earlier.start()
        parts.append(_content(earlier))
    answer = ", ".join(reversed(parts))
    before, after = text[:start].strip(), text[last.end() :].strip(" .")
    if not before or (start == formulas[0].start() and after.startswith(("%", "\\%"))):
        return f"{answer} {after}".strip()  # $12$ cm
    more = start != formulas[0].start() and WORD.search(after)
    return text if more and len(WORD.findall(text)) < SENTENCE else answer


def _announced(text: str) -> str | None:
    """The LaTeX that follows the last "answer" within NEAR characters."""
    words = deque(re.finditer(r"(?i)\banswer\b", text), maxlen=MAX_ANNOUNCED)
    formulas = (_formula(text, word.end(), NEAR) for word in reversed(words))
    found = next((formula for formula in formulas if formula is not None), None)
    if found is None:
        return None
    parts, size, end = [_content(found)], len(found[0]), found.end()
    while size <= MAX_ANSWER and (following := _formula(text, end, MAX_BETWEEN)) is not None:
        if not _joins(text[end : following.start()]):
            break
        parts.append(_content(following))
        size, end = size + len(following[0]), following.end()
    return ", ".join(parts)


def _formula(text: str, start: int, near: int) -> re.Match | None:
    """The first one that begins within `near` characters from `start` on."""
    end = min(start + near, len(text))
    openings = OPENING.finditer(text, start, min(end + 2, len(text)))
    at = (opening.start() for opening in openings if opening.start() <= end)
    found = (MATH.match(text, place, end + MAX_ANSWER) for place in at)
    return next((formula for formula in found if formula is not None), None)


def _joins(between: str) -> bool:
    return len(between) <= MAX_BETWEEN and BETWEEN.fullmatch(between) is not None


def _repeats(latex: str, value: Any) -> tuple[str, ...]:
    """A set has every element once, a list need not."""
    parts = split_list(latex)
    if len(parts) < 2 or len(parts) == len(getattr(value, "args", ())):
        return ()
    return tuple(sorted(map(letters, parts)))


def _solutions(value: Any) -> Any:
    """Of a set of equations that name one variable, its values; anything else as it is."""
    equations = [arg for arg in getattr(value, "args", ()) if getattr(arg, "is_Equality", False)]
    names = {equation.lhs for equation in equations}
    one_name = len(names) == 1 and next(iter(names)).is_Symbol
    if not (one_name and len(equations) == len(value.args) > 1):
        return value
    return type(value)(*(equation.rhs for equation in equations))


def _is_relation(value: Any) -> bool:
    return bool(getattr(value, "is_Relational", False) or getattr(value, "is_Boolean", False))


def _is_condition(value: Any) -> bool:
    """An equation in a variable that does not say what the variable, or a function of it, is."""
    if not getattr(value, "is_Equality", False):
        return False
    named = value.lhs.is_Symbol or value.lhs.is_Function
    return bool(value.lhs.free_symbols) and not named
