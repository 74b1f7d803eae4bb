"""Conversion of MediaWiki source to plain prose, for the packaged demo corpus.

mwparserfromhell parses; this module gives the text of each node. A node that has no text (a formula, a family-tree
template) leaves a gap mark. The parenthesis, or else the paragraph, around a gap is dropped, so that no sentence has a
hole.
"""

import re
from collections.abc import Callable

import mwparserfromhell
from mwparserfromhell.nodes import Comment, ExternalLink, Heading, HTMLEntity, Node, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

GAP = "\ue000"  # something unprintable stood here
ITEM = "\ue001"  # a bullet, number or definition term starts here
REFERENCE = "\ue003"  # a footnote mark stood here
QUOTE = "\ue002"  # a quotation set apart from the text starts or ends here

_APPARATUS = {
    "see also", "references", "external links", "further reading", "notes", "footnotes", "bibliography", "sources",
    "citations", "notes and references", "references and notes", "explanatory notes", "cited sources", "works cited",
    "literature", "selected bibliography", "selected works", "works", "publications", "filmography", "discography",
    "list of works", "gallery", "image gallery", "in-line notes and references", "primary sources",
    "secondary sources", "references and further reading", "reference literature",
}  # fmt: skip

_DROPPED_TAGS = {"ref", "references", "table", "gallery", "timeline", "imagemap", "score", "del", "s", "hr"}
_GAP_TAGS = {"math", "chem", "source", "syntaxhighlight", "pre", "hiero"}
_MEDIA_OR_CATEGORY = re.compile(r"\s*(file|image|media|category|[a-z]{2,3}(-[a-z-]+)?)\s*:", re.IGNORECASE)

_SUPERSCRIPT = str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ")
_SUBSCRIPT = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")

_CHARACTERS = {
    "'": "'", "'s": "'s", '\' "': "' \"", '" \'': "\" '", '-"': '"', "=": "=", "!": "|", "pipe": "|", "·": "·",
    "dot": "·", "nbsp": " ", "spaces": " ", "space": " ", "thinsp": " ", "ndash": "–", "en dash": "–",
    "snd": " – ", "spaced ndash": " – ", "mdash": "—", "mdashb": "—", "em dash": "—", "minus": "−", "times": "×",
    "shy": "", "zwj": "", "wbr": "",
}  # fmt: skip

# Templates that print one of their arguments as it stands (which one; -1 is the last).
_PRINTS_ARGUMENT = {
    "lang": 1, "transl": -1, "nowrap": 0, "small": 0, "smaller": 0, "big": 0, "sc": 0, "smallcaps": 0, "linktext": 0,
    "vanchor": 0, "anchor text": 0, "midsize": 0, "nobold": 0, "resize": -1, "script": -1, "nastaliq": 0, "tooltip": 0,
    "abbr": 0, "rtl-lang": 1, "nq": 0, "ipa": 0, "angle bracket": 0, "visible anchor": 0, "not a typo": 0,
    "flag": 0, "flagcountry": 0, "native name": 1, "formatnum": 0, "gaps": 0, "unicode": 0, "polytonic": 0,
    "script/arabic": 0, "script/hebrew": 0, "proper name": 0, "em": 0, "strong": 0, "code": 0, "mono": 0, "var": 0,
    "okina": 0, "bibleref2": 0, "math": 0, "mvar": 0,
}  # fmt: skip

# Reading aids that leave no hole when they are removed.
_SILENT = re.compile(
    r"(cite|vcite|citation|harv|sfn|ipac?-|ipa-|respell|pron|refn|efn|#tag:ref|rp$|ref label|note label|cn$|fact$|who$|"
    r"by whom|which|when$|where$|clarify|vague|according to whom|page needed|verify|dubious|full$|sic$|isbn|issn|oclc|"
    r"doi|flagicon|coord|anchor$|inflation-f|dead link|weasel|qualify|wikt|commons|reflist|increase|decrease|steady|"
    r"audio|listen|see below|see above|better source|update|better|failed|unreliable|citation|nonspecific|specify|"
    r"main$|see also|further|details|about|other uses|redirect|hatnote|use [a-z]+ |pp-|clear|portal|wayback|icon$)"
)

_UNITS = {
    "km2": "km²", "m2": "m²", "cm2": "cm²", "mm2": "mm²", "sqmi": "square miles", "sqft": "square feet",
    "sqkm": "km²", "km3": "km³", "m3": "m³", "cumi": "cubic miles", "cuyd": "cubic yards", "cuft": "cubic feet",
    "C": "°C", "F": "°F", "K": "K", "C-change": "°C", "F-change": "°F", "mi": "miles", "ft": "feet", "in": "inches",
    "nmi": "nautical miles", "lb": "pounds", "oz": "ounces", "acre": "acres", "yd": "yards", "kph": "km/h",
    "km/h": "km/h", "impgal": "imperial gallons", "USgal": "US gallons", "gal": "gallons", "oilbbl": "barrels",
    "oilbbl/d": "barrels per day", "m3/s": "m³/s", "PD/sqmi": "people per square mile", "PD/km2": "people per km²",
    "/sqmi": "per square mile", "/km2": "per km²", "ozt": "troy ounces", "foot": "foot", "mile": "mile",
    "inch": "inch", "pound": "pound", "ha": "hectares", "t": "tonnes", "LT": "long tons", "ST": "short tons",
    "g/cm3": "g/cm³", "kg/m3": "kg/m³", "kg/m2": "kg/m²", "e6acre": "million acres", "e6sqmi": "million square miles",
}  # fmt: skip
_BETWEEN_VALUES = {"-": "–", "–": "–", "to": " to ", "and": " and ", "or": " or ", "x": " by ", "by": " by ",
                   "×": " × ", "+/-": " ± ", "±": " ± "}  # fmt: skip
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")  # fmt: skip


def to_prose(source: str) -> str:
    """Return the prose of one article, a blank line between paragraphs; "" where there is none (a list of links)."""
    source = re.sub(r"<!--.*?(-->|\Z)", "", source, flags=re.DOTALL)
    source = re.sub(r"<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", REFERENCE, source, flags=re.DOTALL | re.IGNORECASE)
    source = re.sub(r"__[A-Z]+__", "", source)
    paragraphs = []
    for section in _kept_sections(mwparserfromhell.parse(source)):
        paragraphs += _paragraphs(_render(section))
    return "\n\n".join(paragraphs)


def _kept_sections(article: Wikicode) -> list[list[Node]]:
    """Return the nodes of each section, without headings, and without references and the like."""
    sections: list[list[Node]] = [[]]
    dropped_level = 7  # headings have levels 1 to 6
    for node in article.nodes:
        if isinstance(node, Heading):
            title = node.title.strip_code().strip().lower()
            if node.level <= dropped_level:
                dropped_level = node.level if title in _APPARATUS else 7
            sections.append([])
        elif dropped_level == 7:
            sections[-1].append(node)
    return sections


def _render(nodes: list[Node] | Wikicode | None) -> str:
    if nodes is None:
        return ""
    return "".join(_render_node(node) for node in (nodes.nodes if isinstance(nodes, Wikicode) else nodes))


def _render_node(node: Node) -> str:
    if isinstance(node, Text):
        return str(node.value)
    if isinstance(node, HTMLEntity):
        return str(node.normalize())
    if isinstance(node, Tag):
        return _render_tag(node)
    if isinstance(node, Wikilink):
        title = str(node.title)
        if _MEDIA_OR_CATEGORY.match(title):
            return ""
        return _render(node.text) if node.text is not None else _render(node.title).lstrip(":")
    if isinstance(node, ExternalLink):
        return _render(node.title) if node.title is not None else GAP
    if isinstance(node, Template):
        return _render_template(node)
    if isinstance(node, Heading):
        return "\n\n"
    return "" if isinstance(node, Comment) else GAP


def _render_tag(tag: Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return "\n\n" if name in {"table", "gallery"} else ""
    if name in _GAP_TAGS:
        return GAP
    if name in {"li", "dt"} and tag.wiki_markup:
        return ITEM
    if name == "dd":
        return "\n\n"
    if name == "br":
        return " "
    contents = _render(tag.contents)
    if name == "sup":
        return _script(contents, _SUPERSCRIPT)
    if name == "sub":
        return _script(contents, _SUBSCRIPT)
    if name in {"blockquote", "poem"}:
        return f"\n\n{QUOTE}{_one_line(contents)}{QUOTE}\n\n"
    if name in {"p", "div", "center", "ul", "ol", "li"}:
        return f"\n\n{ITEM if name == 'li' else ''}{contents}\n\n"
    return contents


def _script(contents: str, table: dict[int, int]) -> str:
    text = contents.strip()
    return text.translate(table) if all(ord(character) in table for character in text) else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _render_template(template: Template) -> str:
    name = _one_line(_render(template.name)).replace("_", " ").lower()
    name, colon, inline_argument = name.partition(":") if name.startswith("formatnum:") else (name, "", "")
    arguments = [_render(p.value).strip() for p in template.params if not p.showkey]
    if colon:
        arguments = [inline_argument]
    named = {str(p.name).strip(): _render(p.value).strip() for p in template.params if p.showkey}
    for position in (1, 2):  # {{quote|1=text}} names what is positional
        if str(position) in named and len(arguments) == position - 1:
            arguments.append(named[str(position)])

    if name in _CHARACTERS:
        return _CHARACTERS[name]
    if name in _TEMPLATES:
        return _TEMPLATES[name](arguments, named)
    if name in _PRINTS_ARGUMENT:
        which = _PRINTS_ARGUMENT[name]
        return arguments[which] if -len(arguments) <= which < len(arguments) else GAP
    if name.startswith("lang-") and arguments:
        return arguments[0]
    if _SILENT.match(name) or ("date" in named and not arguments):
        return ""
    return GAP


def _convert(arguments: list[str], named: dict[str, str]) -> str:
    """Render {{convert|20|-|25|cm|in}} as 20–25 cm; the converted value is left out."""
    text = ""
    for position, argument in enumerate(arguments):
        if argument in _BETWEEN_VALUES:
            text += _BETWEEN_VALUES[argument]
        elif re.fullmatch(r"[\d.,/+⁄ −-]+(e\d+)?", argument):
            text += argument if re.fullmatch(r"[\d.,/⁄-]+", argument) else argument.replace("+", " ")
        else:
            unit = _UNITS.get(argument, argument)
            joiner = "-" if named.get("adj") == "on" else " "
            text += f"{joiner}{unit.rstrip('s') if joiner == '-' and unit[:1].isalpha() else unit}"
            rest = arguments[position + 1 :]
            if len(rest) >= 2 and re.fullmatch(r"[\d.]+", rest[0]) and rest[1] in {"in", "oz", "lb", "ft"}:
                return f"{text} {rest[0]} {_UNITS[rest[1]]}"  # 5 feet 6 inches
            return text
    return GAP


def _as_of(arguments: list[str], named: dict[str, str]) -> str:
    year, month, day = [*arguments, "", "", ""][:3]
    if month.isdigit() and 1 <= int(month) <= 12:
        month = _MONTHS[int(month) - 1]
    return ("as of " if "lc" in named else "As of ") + " ".join(part for part in (day, month, year) if part)


def _fraction(arguments: list[str], named: dict[str, str]) -> str:
    match arguments:
        case [bottom]:
            return f"1/{bottom}"
        case [top, bottom]:
            return f"{top}/{bottom}"
        case [whole, top, bottom]:
            return f"{whole} {top}/{bottom}"
    return GAP


def _chemical(arguments: list[str], named: dict[str, str]) -> str:
    """Render {{chem|Sn|9|4-}} as Sn₉⁴⁻."""
    text = ""
    for argument in arguments:
        if re.fullmatch(r"\d+", argument):
            text += argument.translate(_SUBSCRIPT)
        else:
            text += argument.translate(_SUPERSCRIPT) if re.fullmatch(r"\d*[+-−]", argument) else argument
    return text


def _nihongo(arguments: list[str], named: dict[str, str]) -> str:
    english, *japanese = [argument for argument in arguments[:3] if argument] or [GAP]
    return f"{english} ({', '.join(japanese)})" if japanese else english


def _quotation(arguments: list[str], named: dict[str, str]) -> str:
    text = arguments[0] if arguments else named.get("text", named.get("quote", GAP))
    return f"\n\n{QUOTE}{_one_line(text)}{QUOTE}\n\n"


def _value(arguments: list[str], named: dict[str, str]) -> str:
    power = f"×10{named['e'].translate(_SUPERSCRIPT)}" if "e" in named else ""
    return (arguments[0] if arguments else "") + power + (f" {named['u']}" if "u" in named else "")


def _first(pattern: str) -> Callable[[list[str], dict[str, str]], str]:
    return lambda arguments, named: pattern.format(arguments[0]) if arguments else GAP


_TEMPLATES: dict[str, Callable[[list[str], dict[str, str]], str]] = {
    "convert": _convert,
    "cvt": _convert,
    "as of": _as_of,
    "frac": _fraction,
    "sfrac": _fraction,
    "fraction": _fraction,
    "chem": _chemical,
    "nihongo": _nihongo,
    "quote": _quotation,
    "cquote": _quotation,
    "quotation": _quotation,
    "blockquote": _quotation,
    "val": _value,
    "angbr": _first("⟨{}⟩"),
    "circa": _first("c. {}"),
    "c.": _first("c. {}"),
    "us$": _first("US${}"),
    "usd": _first("US${}"),
    "ill": lambda arguments, named: arguments[1] if len(arguments) > 1 else GAP,
    "music": lambda arguments, named: {"flat": "♭", "sharp": "♯", "natural": "♮"}.get("".join(arguments[:1]), GAP),
    "keypress": lambda arguments, named: "+".join(arguments),
    "e": lambda arguments, named: "×10" + "".join(arguments[:1]).translate(_SUPERSCRIPT),
    "sup": lambda arguments, named: _script("".join(arguments[:1]), _SUPERSCRIPT),
    "sub": lambda arguments, named: _script("".join(arguments[:1]), _SUBSCRIPT),
    "uss": lambda arguments, named: "USS " + "".join(arguments[:1]),
    "ss": lambda arguments, named: "SS " + "".join(arguments[:1]),
}

_ENDS_SENTENCE = re.compile(r"[.!?…][\"'”’»)\]]*$")
_MIN_PARAGRAPH_CHARACTERS = 60
_MIN_ITEM_WORDS = 15


def _paragraphs(text: str) -> list[str]:
    """Return the printable paragraphs of a rendered section."""
    blocks: list[str] = []
    for line in text.split("\n"):
        line = line.strip()
        starts_block = line.startswith((ITEM, QUOTE)) or not blocks or not blocks[-1] or blocks[-1].startswith(ITEM)
        if line and not starts_block:
            blocks[-1] += " " + line
        else:
            blocks.append(line)
    kept = [_printable(block) for block in blocks if block.strip(GAP + REFERENCE + " ")]
    paragraphs = []
    for index, paragraph in enumerate(kept):
        follower = kept[index + 1] if index + 1 < len(kept) else ""
        if paragraph.endswith(":") and not follower:  # announces a list, formula or picture that is not printed
            paragraph = _without_last_sentence(paragraph)
        if paragraph:
            paragraphs.append(paragraph)
    return paragraphs


def _printable(block: str) -> str:
    """Return the block as it should be read, or "" where it is not prose."""
    is_item, is_quote = block.startswith(ITEM), QUOTE in block
    text = _tidy(block)
    first = next((character for character in text if character.isalnum()), "")
    if GAP in text or first.islower() or not first:
        return ""
    if re.search(r"\{\||\|\}|^\||\[\[|\]\]|\{\{|\}\}|</?[a-z]+[ />]|https?://|\|", text):
        return ""
    if is_quote:
        return text
    if "ISBN" in text or (is_item and len(text.split()) < _MIN_ITEM_WORDS):
        return ""
    if len(text) < _MIN_PARAGRAPH_CHARACTERS or not (_ENDS_SENTENCE.search(text) or text.endswith(":")):
        return ""
    return text


def _without_last_sentence(paragraph: str) -> str:
    ends = list(re.finditer(r"[.!?][\"'”’)]*\s+(?=[A-Z\"“])", paragraph))
    shortened = paragraph[: ends[-1].end()].strip() if ends else ""
    return shortened if len(shortened) >= _MIN_PARAGRAPH_CHARACTERS else ""


def _tidy(text: str) -> str:
    """Repair spaces and punctuation where something was removed."""
    text = text.replace(ITEM, " ").replace(QUOTE, " ")
    text = re.sub(rf"(?<=[.!?\"”)]){REFERENCE}+(?=\w)", " ", text).replace(REFERENCE, "")
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"[\u00ad\u200b-\u200f\u2060\ufeff]", "", text)
    text = _one_line(text)
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
    text = re.sub(r"\(\s+", "(", text)
    text = re.sub(r"[,;]\.$", ".", text)
    return _one_line(text)
