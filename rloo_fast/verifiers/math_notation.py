r"""Notations of answers -> LaTeX that math-verify reads as it is meant.

\frac12, 3½, 1 \frac34      \frac{1}{2}, 3\frac{1}{2}, 1\frac{3}{4}
1,000  10\,000  (1,200)     1000, 10000, (1, 200)
0.\overline{3}, 6e23, 5%    \frac{3}{9}, 6 \cdot 10^{23}, 5\%
$5.50, 12 cm^2, 5\text{ m}  5.50, 12, 5
"""

from __future__ import annotations

import re
import unicodedata

FONT = re.compile(
    r"\\(?:text|mbox|hbox|mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal|bf|rm)\s*"
    r"\{([^{}]*)\}"
)
BRACED = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
# of a sentence: two or three letters may be a product, ab + bc
WORD = re.compile(
    r"[A-Za-z]{4,}|\b(?:[A-Z][a-z]{2,}|is|are|was|be|the|of|to|in|at|on|by|for|has|had|he|she|it|no|not|"
    r"all|any|one|two|six|ten|per)\b"
)
SIGNS = {
    "−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ",
    "±": r"\pm ", "√": r"\sqrt ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "∈": r"\in ",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "’": "'", "′": "'",
    r"\degree": r"^\circ ", r"\tfrac": r"\frac", r"\dfrac": r"\frac", r"\cfrac": r"\frac",
    r"\leqslant": r"\le ", r"\geqslant": r"\ge ", r"\leq": r"\le", r"\geq": r"\ge",
    r"\neq": r"\ne", r"\varnothing": r"\emptyset ", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\{\}": r"\emptyset ",
    "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "**": "^", "*": r"\cdot ",
}  # fmt: skip
LENGTH = r"(?:km|cm|mm|dm|nm|ft|in|yd|mi|kilomet(?:er|re)s?|centimet(?:er|re)s?|met(?:er|re)s?|" \
    r"inch(?:es)?|feet|foot|yards?|miles?|units?)"  # fmt: skip
POWER = r"(?:\s*\^\s*\{?[23]\}?)?"
OTHER = r"(?:kg|mg|lbs?|oz|grams?|pounds?|ounces?|tons?|ml|lit(?:er|re)s?|gallons?|" \
    r"sec(?:ond)?s?|min(?:ute)?s?|hrs?|hours?|days?|weeks?|months?|years?|mph|kmh|kph|" \
    r"degrees?|radians?|dollars?|cents?|euros?|usd|rupees?)"  # fmt: skip
UNIT = re.compile(
    rf"(?:(?:square|sq\.?|cubic|cu\.?)\s+)?(?:{LENGTH}{POWER}|{OTHER})(?:\s*(?:/|per)\s*"
    rf"(?:{LENGTH}|{OTHER}|s|h|min){POWER})?\.?",
    re.IGNORECASE,
)
NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)"
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# words between which nothing can be left out: "5 and a half", "2 dozen", "3 or more"
PHRASE = re.compile(
    r"(?i)\b(?:base|half|halves|thirds?|quarters?|dozen|more|less|fewer|least|most|a)\b"
)
SHORT_WORDS = "yes|no|odd|all|any|one|two|six|ten"
FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|arcsin|arccos|arctan|log|ln|exp|lim|max|min|gcd|lcm|det"
)
CLOCK = re.compile(
    r"(?i)(?:[01]?\d|2[0-4])\s*:\s*[0-5]\d(?:\s*:\s*[0-5]\d)?(?:\s*[ap]\.?\s*m\.?)?"
    r"|(?:0?\d|1[0-2])\s*[ap]\.?\s*m\.?"
)
DATE = re.compile(r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}")
NUMERAL = re.compile(r"\(?(?:\d[\dA-Z.]*\)?_\{?(?:\d+|[a-z]{2,})|[A-F][\dA-F.]+\)?_\{?1[2-6])\}?")
PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
TURNS = re.compile(  # the argument of a trigonometric function, in degrees
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d\}?)?)\s*\(?\{?(\d+(?:\.\d+)?)\s*"
    r"\^\s*\{?\s*\\circ\s*\}?\}?\)?"
)
UNREADABLE = re.compile(
    r"\\(?:[bp]?mod|gcd|lcm|equiv|cong|sim|parallel|perp|ldots|dots|cdots|quad|therefore|implies|forall|"
    r"exists|mid)\b|\bmod\b|!!|\.\d+\.\d|^\([A-J]\)\s*\w|\.\.|'|\"|\?|\\(?:text|mbox)|;|\^\s*\{?\\circ\s*\}?\s*\d"
)


def text_letters(text: str) -> str:
    """Of an answer that is text: small letters and no braces either."""
    return re.sub(r"[{}\\.]", "", letters(text)).lower()


def letters(text: str) -> str:
    """Without white space, fonts, size and spacing commands; of "(B)" the letter alone."""
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|[\s~$]", "", _without_fonts(text))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\\([dtc])frac", r"\\frac", text).rstrip(".")
    choice = re.fullmatch(r"\(?([A-Za-z])[).]?", text)
    return choice[1] if choice else text


def is_text(text: str) -> bool:
    r"""A name, a clock time, a date, a number in another base, or all of it in \text{}."""
    bare = text.strip().strip("$").strip()
    fonts = FONT.fullmatch(bare)
    if fonts and re.search("[A-Za-z]{2}", fonts[1]) and not re.search(r"\d", fonts[1]):
        return not _is_list_of_letters(fonts[1])
    bare = " ".join(_without_fonts(bare).replace("\\ ", " ").rstrip(".").split())
    if (
        CLOCK.fullmatch(bare)
        or DATE.fullmatch(bare)
        or NUMERAL.fullmatch(bare)
        or re.fullmatch(SHORT_WORDS, bare)
    ):
        return True
    # other small letters, up to three, are a product: ab, xyz
    return bool(re.fullmatch(r"[A-Za-z]{2,}(?<!^infinity)", bare)) and not re.fullmatch(
        "[a-z]{2,3}", bare
    )


def unreadable(latex: str) -> bool:
    """It has what math-verify leaves out, or takes for something else."""
    return bool(UNREADABLE.search(latex))


def as_ratio(latex: str) -> str | None:
    """a:b as a fraction; a:b:c as (1, b/a, c/a), which is the same for every common factor."""
    parts = [part.strip() for part in latex.split(":")]
    if len(parts) < 2 or not all(parts) or re.search(r"[(\[,=<>]", latex):
        return None
    first, *others = parts
    if len(others) == 1:
        return rf"\frac{{{first}}}{{{others[0]}}}"
    shares = [rf"\frac{{{other}}}{{{first}}}" for other in others]
    return f"(1, {', '.join(shares)})"


def split_list(latex: str) -> list[str]:
    """Its parts between commas, "and" and "or" that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"\\?[(\[{]|\\?[)\]}]|,|\b(?:and|or)\b", latex):
        if match[0][-1] in "([{":
            depth += 1
        elif match[0][-1] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(latex[start : match.start()])
            start = match.end()
    return [part for part in (*parts, latex[start:]) if part.strip()]


def plain_latex(text: str) -> str:
    """One answer as LaTeX that math-verify reads: the table above, units left out."""
    for sign, latex in SIGNS.items():
        text = re.sub(re.escape(sign) + (r"(?![a-zA-Z])" if sign[-1].isalpha() else ""),
                      lambda _, latex=latex: latex, text)  # fmt: skip
    text = "".join(map(_spelled_out, text))
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,;! ]|,\\!|~)(?=\d{3}(?!\d))", "", text)  # thousands
    text = re.sub(r"\\[,;:]|~", " ", text)
    text = re.sub(r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\!", "", text)
    text = _money(text.strip().rstrip(".,;").strip())
    text = _scales_and_percent(text)
    text = _without_units(text)
    text = _without_fonts(text, only=r"\s*(?:and|or|,|\(?[A-Za-z]\)?|[A-Z](?:, *[A-Z])*)?\s*")
    text = re.sub(r"(?<![a-zA-Z\\])(pi|sqrt|infinity|inf)(?![a-zA-Z])", _named, text)
    text = _with_braces(text)
    text = _numbers(text)
    text = re.sub(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", " i ", text)  # of 2i, math-verify sees no i
    text = re.sub(rf"(?<![a-zA-Z\\])({FUNCTIONS})(?![a-zA-Z])", r"\\\1", text)
    text = TURNS.sub(r"\1(\\frac{\2\\pi}{180})", text)
    text = re.sub(r"\\(?:text|mbox)\{\s*(and|or)\s*\}|\b(and|or)\b", " , ", text)
    if PLUS_MINUS.search(text):
        parts = split_list(text)
        text = ", ".join(PLUS_MINUS.sub(sign, part) for part in parts for sign in _signs(part))
    return re.sub(r"^(?:\\approx|~)\s*|(?:\s*,)+\s*$|^\s*(?:,\s*)+", "", text.strip()).strip()


def _signs(part: str) -> tuple[str, ...]:
    return {0: ("",), 1: ("+", "-")}.get(len(PLUS_MINUS.findall(part)), (r"\\pm ",))


def _spelled_out(sign: str) -> str:
    """½ -> \\frac{1}{2}, ² -> ^{2}; other signs as they are."""
    if unicodedata.category(sign) != "No":
        return sign
    plain = unicodedata.normalize("NFKC", sign)
    top, slash, bottom = plain.partition("\u2044")
    return rf" \frac{{{top}}}{{{bottom}}}" if slash else f"^{{{plain}}}"


def _without_fonts(text: str, only: str = ".*") -> str:
    """\\text{B} -> B, where what is in it matches `only`."""
    return FONT.sub(lambda m: m[1] if re.fullmatch(only, m[1]) else m[0], text)


def _is_list_of_letters(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[A-Za-z](?:(?:\s*,\s*|\s+(?:and|or)\s+)[A-Za-z])*\s*", text))


def _money(text: str) -> str:
    return re.sub(r"\\?[$€£](?=\s*[\d.\\-])|(?:\\text\{)?\bUSD\b\}?", "", text)


def _scales_and_percent(text: str) -> str:
    """5 million -> 5 \\cdot 10^{6}; percent -> \\%."""
    word = r"(?i)(?<=[\d}}])\s*(?:\\(?:text|mbox|mathrm)\s*\{{)?\s*{}(?![a-z])\s*\}}?"
    for scale, zeros in SCALES.items():
        text = re.sub(word.format(scale), rf" \\cdot 10^{{{zeros}}}", text)
    text = re.sub(word.format("(?:percent(?:age)?|pct|%)"), r"\\%", text)
    return re.sub(r"\s*(?<!\\)%", r"\\%", text)


def _without_units(text: str) -> str:
    r"""12 cm^2, 12\text{ cm}^2, 5 apples -> 12, 12, 5; of several quantities, none."""
    found = re.fullmatch(rf"(.*?[\d}})a-z])\s*{FONT.pattern}{POWER}", text, re.DOTALL)
    if (
        found
        and re.search("[A-Za-z]{2}", found[2])
        and not re.fullmatch(r"\s*(?:and|or)\s*", found[2])
    ):
        return _unless_phrase(found[1], found[2], text)
    found = re.fullmatch(rf"(.*?[\d}})\s]|.*\\pi)\s*{FONT.pattern}{POWER}", text, re.DOTALL)
    if found and re.fullmatch(r"\s*[A-Za-z]\s*(?:/\s*[a-z]+)?", found[2]) and found[1].strip():
        return found[1].rstrip()
    found = re.fullmatch(r"(.*?(?:[\d})]|\\pi))\s*(?:\\?\s)?([A-Za-z].*)", text, re.DOTALL)
    if found and UNIT.fullmatch(found[2].strip()):
        return found[1]
    found = re.fullmatch(rf"({NUMBER}|{NUMBER}/\d+)\s+([A-Za-z][A-Za-z\s-]*)", text)
    if found and re.match("[A-Za-z]{2}", found[2]) and not re.search(r"\b(?:or|and)\b", found[2]):
        return _unless_phrase(found[1], found[2], text)
    return text


def _unless_phrase(number: str, words: str, text: str) -> str:
    return text if PHRASE.search(words) else number.rstrip()


def _named(match: re.Match) -> str:
    return {"inf": r"\infty ", "infinity": r"\infty "}.get(match[1], rf"\{match[1]} ")


def _with_braces(text: str) -> str:
    r"""TeX's rule: without braces, an argument of \frac and \sqrt is a digit, letter or command."""
    argument = r"\s*(?:(\d|[a-zA-Z]|\\[a-zA-Z]+))"
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt(\s*\[[^\]]*\])?\s*(\d+|[a-zA-Z]|\\[a-zA-Z]+)", r"\\sqrt\1{\2}", text)
    text = re.sub(rf"\\frac{argument}", r"\\frac{\1}", text)
    group = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
    return re.sub(rf"(\\frac\s*{group}){argument}", r"\1{\2}", text)


def _numbers(text: str) -> str:
    """Thousands, repeating decimals, mixed numbers and powers of ten."""
    text = _thousands(text)
    text = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating, text)
    text = re.sub(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<![\d.])(\d+)\s+(?=\\frac\{\d+\}\{\d+\})", r"\1", text)
    return re.sub(r"(\d)[eE]([-+]?\d+)(?![\d.a-zA-Z])", r"\1 \\cdot 10^{\2}", text)


def _thousands(text: str) -> str:
    """Without separators of thousands; a comma is none between brackets, and is spaced there."""
    text = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,]|\s*/)",
                  lambda m: m[0].replace(" ", ""), text)  # fmt: skip
    pieces, depth = [], 0
    for piece in re.split(r"(\\?[(\[{]|\\?[)\]}])", text):
        if piece in ("(", "[", "\\{"):
            depth += 1
        elif piece in (")", "]", "\\}"):
            depth -= 1
        if depth == 0:
            piece = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)",
                           lambda m: m[0].replace(",", ""), piece)  # fmt: skip
        pieces.append(piece.replace(",", ", "))
    return "".join(pieces)


def _repeating(match: re.Match) -> str:
    """a.b(c) = (abc - ab) / (99..00..)"""
    whole, start, period = match[1] or "0", match[2], match[3]
    top = int(whole + start + period) - int(whole + start)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(start)}}}"
