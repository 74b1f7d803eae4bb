"""Wiki markup becomes prose: hand-written cases, then the whole demo corpus."""

import re

import pytest

from legato.data.documents import Document, load_documents
from legato.data.wikitext import to_prose

OPENING = "The aardvark is a medium-sized, burrowing, nocturnal mammal native to Africa"


@pytest.fixture(scope="module")
def demo() -> list[Document]:
    pytest.importorskip("gensim", reason="needs the demo extra")
    return list(load_documents("demo"))


@pytest.mark.parametrize(
    ("source", "prose"),
    [
        ("'''{}''' ''indeed''.", "{} indeed."),
        ("[[Aardvark|{}]] and [[Asia]].", "{} and Asia."),
        ("{}<ref name=a>{{cite web|url=http://x.org}}</ref><ref name=a />.<!-- a note -->", "{}."),
        ("{}.<ref>Smith</ref>It digs.", "{}. It digs."),
        ("[[File:A.jpg|thumb|right|200px|A [[caption]] with {{convert|1|m}} [[File:B.png]] in it]] {}.", "{}."),
        ("[[Image:A.jpg]]{}.[[Category:Mammals]][[fr:Oryctérope]]", "{}."),
        ("{{Infobox|a={{b|c={{d}}}}|e=[[f|g]]}}\n{}.", "{}."),
        ("{}.\n\n{| class=wikitable\n! A\n|-\n| {|\n| inner\n|}\n|}\n\n{} too.", "{}.\n\n{} too."),
        ("{} ({{IPAc-en|a|r|d}}; ), or (; {{lang|af|erdvark}}).", "{}, or (erdvark)."),
        ("{} ({{lang-la|Orycteropus}}, [[Greek|digger]]).", "{} (Orycteropus, digger)."),
        ("{} &ndash; 5&nbsp;feet.", "{} – 5 feet."),
        ("{}, {{convert|20|-|25|cm|in}} or {{convert|5|ft|6|in}}.", "{}, 20–25 cm or 5 feet 6 inches."),
        ("{}, H<sub>2</sub>O and 10<sup>−3</sup>, ({{chem|Sn|9|4-}}).", "{}, H₂O and 10⁻³."),
        ("{}{{citation needed|date=May 2010}} {{as of|2009|3|lc=y}}.", "{} as of March 2009."),
        ("{} [http://x.org at home].", "{} at home."),
        ("== A ==\n{}.\n=== See also ===\n* [[x]]\n==== y ====\n{}!\n== B ==\n{}?", "{}.\n\n{}?"),
        ("{}.\n* [[Ant]]\n* [[Termite]]\n\n{} too.", "{}.\n\n{} too."),
        ("{}. It eats:\n* ants\n* termites", "{}."),
        ("{}.\n\n{}, with <math>x</math> of them.", "{}."),
        ("{}, which is {{unheard of|x}} long.", ""),
        ("{}, five ($ {{unheard of|x}} now).", "{}, five."),
        ("{}.\n<blockquote>{}!</blockquote>\n{{quote|text={}?}}", "{}.\n\n{}!\n\n{}?"),
        ("#REDIRECT [[Aardvark]]", ""),
    ],
)
def test_markup(source: str, prose: str) -> None:
    assert to_prose(source.replace("{}", OPENING)) == prose.replace("{}", OPENING)


def test_demo_corpus_is_of_the_expected_size(demo: list[Document]) -> None:
    assert len(demo) == 96
    assert 2.5e6 < sum(len(document.text) for document in demo) < 2.8e6
    assert len({document.source for document in demo}) == len(demo)
    assert demo[0].source == "gensim-enwiki/Anarchism"
    assert demo[0].text.startswith("Anarchism is a political philosophy that advocates self-governed societies")


DEBRIS = {
    "bold or italic marks": r"''",
    "links": r"\[\[|\]\]",
    "templates": r"\{\{|\}\}",
    "tables": r"\{\||\|\}|^\||^!|\|",
    "tags": r"</?[a-zA-Z]+[ >/]|/>|<!--|-->",
    "entities": r"&#?\w+;",
    "captions": r"\b(thumb|right|left|frame|upright)\||\d+px\b",
    "name spaces": r"\b(File|Image|Category|Media):",
    "headings": r"^=|==",
    "lists": r"^[*#:;•]",
    "emptied parentheses": r"\(\s*[,;:)]|[,;:/]\s*\)|\(\s|\s\)|\[\s*\]",
    "orphaned punctuation": r"\s[,;:](\s|$)|,[,;.]|;[,;]|[^.]\s\.(\s|$)",
    "white space": r"[^\S\n ]|  |^ | $",
    "marks of our own": r"[\ue000-\uf8ff]",
    "magic words": r"__[A-Z]+__|#REDIRECT",
    "reference lists": r"\bISBN\b|Retrieved on|\baccessdate\b|https?://",
    "an announced list that does not follow": r":\Z",
}


@pytest.mark.parametrize("kind", DEBRIS)
def test_demo_corpus_holds_no_debris(demo: list[Document], kind: str) -> None:
    pattern = re.compile(DEBRIS[kind], re.MULTILINE)
    found = {
        document.source: document.text[max(0, match.start() - 40) : match.end() + 20]
        for document in demo
        for match in pattern.finditer(document.text)
    }
    assert not found


def test_demo_paragraphs_are_sentences(demo: list[Document]) -> None:
    paragraphs = [paragraph for document in demo for paragraph in document.text.split("\n\n")]
    ends_well = sum(paragraph.rstrip("\"'”’)]»")[-1:] in ".!?…:" for paragraph in paragraphs)  # quoted verse may not
    starts_well = sum(not next(c for c in paragraph if c.isalnum()).islower() for paragraph in paragraphs)
    assert ends_well / len(paragraphs) > 0.995
    assert starts_well == len(paragraphs)
    assert sum(map(len, paragraphs)) / len(paragraphs) > 300


def test_demo_brackets_are_closed(demo: list[Document]) -> None:
    paragraphs = [paragraph for document in demo for paragraph in document.text.split("\n\n")]
    open_ended = [p for p in paragraphs if p.count("(") != p.count(")") or p.count("[") != p.count("]")]
    assert len(open_ended) <= 5  # four are so in the articles themselves: smileys, keyboards, a typing error
