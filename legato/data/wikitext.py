"""Conversion of MediaWiki source to plain prose, for the packaged demo corpus.

mwparserfromhell parses; this module gives the text of each node. A node that has no text (a formula, a family-tree
template) leaves a gap mark. The parenthesis, or else the paragraph, around a gap is dropped, so that no sentence has a
hole.
"""

import calendar
import re
from itertools import pairwise

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Node, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

GAP = "\ue000"  # something unprintable stood here
ITEM = "\ue001"  # a bullet, number or definition term starts here
REFERENCE = "\ue003"  # a footnote mark stood here

_APPARATUS = re.compile(
    r"see also|external links|further reading|citations|works cited|literature|filmography|discography|list of works|"
    r"((in-line |explanatory )?notes|footnotes|(primary |secondary |cited )?sources|references)"
    r"( and (references|notes|further reading))?|(selected )?(bibliography|works|publications)|(image )?gallery|"
    r"reference literature"
)
_DROPPED_TAGS = {"ref", "references", "table", "gallery", "timeline", "imagemap", "score", "del", "s", "hr"}
_GAP_TAGS = {"math", "chem", "source", "syntaxhighlight", "pre", "hiero"}
_BLOCK_TAGS = {"blockquote", "poem", "p", "div", "center", "ul", "ol", "li"}
_MEDIA_OR_CATEGORY = re.compile(r"\s*(file|image|media|category|[a-z]{2,3}(-[a-z-]+)?)\s*:", re.IGNORECASE)

_SUPERSCRIPT = str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ")
_SUBSCRIPT = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")

_CHARACTERS = {
    "'": "'", "'s": "'s", '\' "': "' \"", '" \'': "\" '", "=": "=", "!": "|", "·": "·", "nbsp": " ", "spaces": " ",
    "ndash": "–", "snd": " – ", "spaced ndash": " – ", "mdash": "—", "mdashb": "—", "minus": "−", "times": "×",
}  # fmt: skip
# Templates that print their last argument as it stands, or else their first.
_PRINTS = re.compile(
    r"(?P<last>lang|rtl-lang|transl|native name|resize|script)|lang-.*|nowrap|small(er)?|big|sc|linktext|vanchor|"
    r"midsize|nobold|nastaliq|tooltip|abbr|nq|ipa|angbr|flag|polytonic|nihongo|visible anchor|c?quote|quotation"
)
# Reading aids that leave no hole when they are removed.
_SILENT = re.compile(
    r"(cite|vcite|citation|harv|sfn|ipac?-|ipa-|respell|pron|refn|efn|#tag:ref|rp$|ref label|note label|cn$|fact$|who$|"
    r"by whom|which|when$|where$|clarify|vague|according to whom|page needed|verify|dubious|full$|sic$|isbn|issn|oclc|"
    r"doi|flagicon|coord|anchor$|inflation-f|dead link|weasel|qualify|wikt|commons|reflist|increase|decrease|steady|"
    r"audio|listen|see below|see above|better source|update|better|failed|unreliable|citation|nonspecific|specify|"
    r"main$|see also|further|details|about|other uses|redirect|hatnote|use [a-z]+ |pp-|clear|portal|wayback|icon$)"
)
_UNITS = {
    "C": "°C", "F": "°F", "mi": "miles", "ft": "feet", "in": "inches", "lb": "pounds", "oz": "ounces", "yd": "yards",
    "nmi": "nautical miles", "acre": "acres", "ha": "hectares", "sqmi": "square miles", "sqft": "square feet",
    "PD/sqmi": "people per square mile", "oilbbl": "barrels", "oilbbl/d": "barrels per day", "LT": "long tons",
    "e6acre": "million acres",
}  # fmt: skip
_BETWEEN_VALUES = {"-": "–", "–": "–", "to": " to ", "and": " and ", "or": " or ", "x": " by ", "by": " by "}
_MIN_PARAGRAPH_CHARACTERS = 60
_MIN_ITEM_WORDS = 15


def to_prose(source: str) -> str:
    """Return the prose of one article, a blank line between paragraphs; "" where there is none (a list of links)."""
    source = re.sub(r"<!--.*?(-->|\Z)", "", source, flags=re.DOTALL)
    source = re.sub(r"<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", REFERENCE, source, flags=re.DOTALL | re.IGNORECASE)
    source = re.sub(r"__[A-Z]+__", "", source)
    text, dropped_level = "", 7  # headings have levels 1 to 6
    for node in mwparserfromhell.parse(source).nodes:
        if isinstance(node, Heading) and node.level <= dropped_level:
            title = node.title.strip_code().strip().lower()
            dropped_level = node.level if _APPARATUS.fullmatch(title) else 7
        if dropped_level == 7:
            text += _printed(node)
    return "\n\n".join(_paragraphs(text))


def _render(code: Wikicode | None) -> str:
    return "" if code is None else "".join(map(_printed, code.nodes))


def _printed(node: Node) -> str:
    if isinstance(node, Template):
        return _template(node)
    if isinstance(node, Tag):
        return _tag(node)
    if isinstance(node, Wikilink):
        if _MEDIA_OR_CATEGORY.match(str(node.title)):
            return ""
        return _render(node.text) if node.text is not None else _render(node.title).lstrip(":")
    if isinstance(node, ExternalLink):
        return GAP if node.title is None else _render(node.title)
    if isinstance(node, Heading):
        return "\n\n=\n\n"  # no paragraph, but one that stands between two
    if isinstance(node, HTMLEntity):
        return str(node.normalize())
    return str(node) if isinstance(node, Text) else GAP


def _tag(tag: Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return "\n\n" if name in {"table", "gallery"} else ""
    if name in _GAP_TAGS:
        return GAP
    if tag.wiki_markup and name in {"li", "dt", "dd"}:
        return "\n\n" if name == "dd" else ITEM
    contents = " " if name == "br" else _render(tag.contents)
    if name in {"sup", "sub"}:
        table = _SUPERSCRIPT if name == "sup" else _SUBSCRIPT
        contents = contents.strip()
        return contents.translate(table) if all(ord(character) in table for character in contents) else contents
    return f"\n\n{ITEM if name == 'li' else ''}{contents}\n\n" if name in _BLOCK_TAGS else contents


def _template(template: Template) -> str:
    name = " ".join(_render(template.name).split()).replace("_", " ").lower()
    # {{quote|1=...}} and {{quote|text=...}} name what is positional.
    positional = [each for each in template.params if not each.showkey or str(each.name).strip() in ("1", "2", "text")]
    arguments = [_render(each.value).strip() for each in positional]
    if name in _CHARACTERS:
        return _CHARACTERS[name]
    if name in {"convert", "cvt"}:
        return _convert(arguments, template.has("adj"))
    if name == "as of":
        year, month, day = [*arguments, "", "", ""][:3]
        month = calendar.month_name[int(month)] if month in map(str, range(1, 13)) else month
        return ("as of " if template.has("lc") else "As of ") + " ".join(filter(None, (day, month, year)))
    if arguments and (found := _PRINTS.fullmatch(name)):
        printed = arguments[-1 if found["last"] else 0]
        return f"\n\n{' '.join(printed.split())}\n\n" if "quot" in name else printed
    return "" if _SILENT.match(name) or (template.has("date") and not arguments) else GAP


def _convert(arguments: list[str], is_adjective: bool) -> str:
    """Render {{convert|20|-|25|cm|in}} as 20–25 cm; the converted value is left out."""
    text = ""
    for position, argument in enumerate(arguments):
        if argument in _BETWEEN_VALUES:
            text += _BETWEEN_VALUES[argument]
        elif re.fullmatch(r"[\d.,/+⁄ −-]+", argument):
            text += argument.replace("+", " ")
        elif argument in _UNITS or re.fullmatch(r"[°a-zA-Z][a-zA-Z/]*[23]?", argument):
            unit = argument if is_adjective else _UNITS.get(argument, argument)
            text = f"{text} {re.sub('[23]$', lambda power: power[0].translate(_SUPERSCRIPT), unit)}"
            rest = arguments[position + 1 : position + 3]
            both = argument in ("ft", "lb") and len(rest) == 2 and rest[1] in ("in", "oz")  # 5 feet 6 inches
            return f"{text} {_convert(rest, is_adjective)}" if both else text
        else:
            break
    return GAP


def _paragraphs(text: str) -> list[str]:
    """Return the printable paragraphs of a rendered article."""
    blocks = [""]
    for line in map(str.strip, text.split("\n")):
        if line and blocks[-1] and not line.startswith(ITEM) and not blocks[-1].startswith(ITEM):
            blocks[-1] += " " + line
        else:
            blocks.append(line)
    kept = [_printable(block) for block in blocks if block.strip(GAP + REFERENCE + " ")]
    paragraphs = []
    for paragraph, follower in pairwise([*kept, ""]):
        if paragraph.endswith(":") and not follower:  # announces a list, formula or picture that is not printed
            ends = list(re.finditer(r"[.!?][\"'”’)]*\s+(?=[A-Z\"“])", paragraph))
            paragraph = paragraph[: ends[-1].end()].strip() if ends else ""
        if len(paragraph) >= _MIN_PARAGRAPH_CHARACTERS:
            paragraphs.append(paragraph)
    return paragraphs


def _printable(block: str) -> str:
    """Return the block as it should be read, or "" where it is not prose."""
    text = _tidy(block)
    first = next((character for character in text if character.isalnum()), "")
    if GAP in text or first.islower() or not first or "ISBN" in text:
        return ""
    if re.search(r"\{\||\|\}|^\||\[\[|\]\]|\{\{|\}\}|</?[a-z]+[ />]|https?://|\|", text):
        return ""
    if block.startswith(ITEM) and len(text.split()) < _MIN_ITEM_WORDS:
        return ""
    return text if len(text) >= _MIN_PARAGRAPH_CHARACTERS and re.search(r"([.!?…][\"'”’»)\]]*|:)$", text) else ""


def _tidy(text: str) -> str:
    """Repair spaces and punctuation where something was removed."""
    text = re.sub(rf"(?<=[.!?\"”)]){REFERENCE}+(?=\w)", " ", text.replace(ITEM, " ")).replace(REFERENCE, "")
    text = re.sub(r"'{2,}|[\u00ad\u200b-\u200f\u2060\ufeff]", "", text)
    text = " ".join(text.split())
    text = re.sub(rf"^[{GAP} ]+|(?<=[.!?\"”)])[{GAP} ]+$", "", text)
    text = re.sub(rf"(?<=[.!?])\s*{GAP}\s*(?=[A-Z])", " ", text)
    text = re.sub(rf"\s*\([^()]*{GAP}[^()]*\)", "", text)
    previous = ""
    while previous != text:  # emptied parentheses nest
        previous = text
        text = re.sub(r"([(\[])(\s*(?:[,;:/–-]|or|and|also)(?=[\s,;:)\]]))+\s*", r"\1", text)
        text = re.sub(r"\s*[,;:/]*\s*([)\]])", r"\1", text)
        text = re.sub(r"\s*(\(\s*\)|\[\s*\])", "", text)
        text = re.sub(r"([,;])(\s*[,;])+", r"\1", text)
    text = re.sub(r"\.(\s\.)+", lambda dots: "." * (1 + dots[0].count(" .")), text)
    text = re.sub(r"\s+([,;:?!)]|\.(?!\.))(?=\s|$)", r"\1", text)
    text = re.sub(r"[,;]\.$", ".", re.sub(r"\(\s+", "(", text))
    return " ".join(text.split())
