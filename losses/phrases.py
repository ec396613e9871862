"""What a prompt says of which things, and what would be nearly the same and wrong: hard negatives, by rules of English.

A prompt is read as things ("a red boot": article, attributes, noun) joined by links ("left of", "and", "sitting on").
Only a few dozen words that join things are known; all others are taken for attributes and nouns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

_ARTICLES = frozenset([
    "a", "an", "the", "one", "two", "three", "four", "five", "some", "several", "my", "your", "his", "her", "its",
    "our", "their", "this", "that",
])  # fmt: skip
_PLACES = ("left of", "right of", "above", "below")
_SIDES = re.compile(r"\b(?:(?:to|on|at) the )?(left|right)( side)? of\b")
_OPPOSITES = {
    "over": "under",
    "under": "over",
    "underneath": "on top of",
    "beneath": "on top of",
    "on top of": "underneath",
    "in front of": "behind",
    "behind": "in front of",
    "inside": "outside",
    "outside": "inside",
    "on the left": "on the right",
    "on the right": "on the left",
    "at the top": "at the bottom",
    "at the bottom": "at the top",
    "larger than": "smaller than",
    "bigger than": "smaller than",
    "smaller than": "larger than",
    "taller than": "shorter than",
    "shorter than": "taller than",
    "on": "under",
    "with": "without",
    "without": "with",
    "before": "after",
    "after": "before",
}
_BOTH_WAYS = (  # "a cat and a dog" is "a dog and a cat"
    *("and", "or", "with", "without", "by", "near", "near to", "close to", "next to", "beside", "alongside"),
    *("together with", "against", "touching", "between", "among", ","),
)
_ONE_WAY = ("in", "at", "from", "into", "onto", "through", "around", "across", "along", "for", "like", "as")
_VERBS = ("is", "are", "which is", "which are", "that is", "that are", "sits", "stands", "lies", "rests", "hangs")
_SIDE_FORMS = tuple(
    f"{before}{side}{middle} of"
    for before in ("", "to the ", "on the ", "at the ")
    for side in ("left", "right")
    for middle in ("", " side")
)
_LINKS = sorted(
    (tuple(link.split()) for link in {*_SIDE_FORMS, *_PLACES, *_OPPOSITES, *_BOTH_WAYS, *_ONE_WAY, *_VERBS}),
    key=len,
    reverse=True,
)
_FRAME = re.compile(
    r"(?:(?:this|there|here|it) (?:is|are) )?"
    r"(?:(?:(?:an?|the) )?(?:[\w-]+ ){0,3}?"
    r"(?:photo|photograph|picture|image|painting|drawing|sketch|print|illustration|rendering|close-up) of )?",
    re.IGNORECASE,
)
_NOUNS_IN_ING = frozenset([
    "building", "ceiling", "clothing", "darling", "drawing", "earring", "evening", "king", "lightning", "morning",
    "painting", "pudding", "railing", "ring", "sibling", "sling", "spring", "string", "swing", "thing", "wedding",
    "wing",
])  # fmt: skip
_EMPTY = _ARTICLES | frozenset([
    "and", "or", "of", "to", "be", "is", "are", "was", "being", "it", "there", "here", "these", "those", "which",
    "who", "whose", "photo", "photograph", "picture", "image", "painting", "drawing", "sketch", "print",
    "illustration", "rendering", "close-up", "left", "right", "top", "bottom", "side", "front", "back", "no", "not",
    "very",
])  # fmt: skip

_VOWEL = re.compile(r"hour|honest|heir|(?!uni[^nm]|us[eiu]|ute|eu|one\b)[aeiou]")  # as it sounds, by and large
_NEGATIONS = frozenset(["no", "not", "never", "neither", "nor"])


@dataclass(frozen=True)
class Thing:
    """A noun with its article and attributes: "a small red boot"."""

    article: str
    attributes: tuple[str, ...]
    noun: str

    @property
    def words(self) -> tuple[str, ...]:
        """All but the article."""
        return (*self.attributes, *self.noun.split())

    @property
    def indefinite(self) -> bool:
        """Whether its article depends on the sound that follows."""
        return self.article.lower() in ("a", "an")

    @property
    def negated(self) -> bool:
        """Whether it is what is not there: "no cat", "not a cat"."""
        return any(word.lower() in _NEGATIONS or word.lower().endswith("n't") for word in self.words)

    def __str__(self) -> str:
        article = self.article.lower() if self.indefinite else self.article
        return " ".join((article, *self.words)).strip()


@dataclass(frozen=True)
class Phrase:
    """A prompt, read: what stands in front, the things, and what stands after each of them."""

    frame: str
    things: tuple[Thing, ...]
    links: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        parts = [self.frame, *(part for pair in zip(map(str, self.things), self.links) for part in pair)]
        return " ".join(part for part in parts if part).replace(" ,", ",")


def read(prompt: str) -> Phrase:
    """A prompt's things and links."""
    text = " ".join(prompt.replace(",", " , ").split()).rstrip(" .!")
    frame = _FRAME.match(text)[0]
    words = text[len(frame) :].split()
    frame, own, link, things, links = frame.strip(), [], [], [], []

    def end() -> None:
        """The thing before a link is whole."""
        nonlocal own
        if own:
            things.append(_thing(own))
            own = []

    place = 0
    while place < len(words):
        length = _link_at(words, place, own)
        if length:
            end()
            link += words[place : place + length]
        else:
            if link:
                if things:
                    links.append(" ".join(link))
                else:
                    frame = " ".join((frame, *link)).strip()
                link = []
            own.append(words[place])
        place += max(length, 1)
    end()
    links.append(" ".join(link))  # what stands after the last, nothing as a rule
    return Phrase(frame, tuple(things), tuple(links[: len(things)]))


def _link_at(words: list[str], place: int, own: list[str]) -> int:
    """How many words from here on are a link; `own` are those of the thing so far."""
    lower = [word.lower() for word in words[place:]]
    for link in _LINKS:
        if tuple(lower[: len(link)]) == link:
            return len(link)
    word = lower[0]
    named = [one for one in own if one.lower() not in _ARTICLES]
    # "a cat sitting on", but "a running dog", and "a red building"
    return int(bool(named) and len(word) > 4 and word.endswith("ing") and word not in _NOUNS_IN_ING)


def _thing(words: list[str]) -> Thing:
    article = words[0] if words[0].lower() in _ARTICLES and len(words) > 1 else ""
    rest = words[1:] if article else words
    noun = rest.index("of") - 1 if "of" in rest[1:] else len(rest) - 1  # "a red bowl of soup"
    return Thing(article, tuple(rest[:noun]), " ".join(rest[noun:]))


def _reversed(link: str) -> list[str]:
    """What contradicts a link: its opposite first, then, for left, right, above and below, the other two."""
    lower, found = link.lower(), []
    side = _SIDES.search(lower)
    if side:
        other = "right" if side[1] == "left" else "left"
        opposite = side[0].replace(side[1], other)
        options, (start, stop) = (opposite, "above", "below"), side.span()
    else:
        known = [p for p in sorted((*_OPPOSITES, *_PLACES), key=len, reverse=True) if re.search(rf"\b{p}\b", lower)]
        if not known:
            return []
        start, stop = re.search(rf"\b{known[0]}\b", lower).span()
        if known[0] in _PLACES:
            options = ("below" if known[0] == "above" else "above", "left of", "right of")
        else:
            options = (_OPPOSITES[known[0]],)
    for option in options:
        found.append(link[:start] + option + link[stop:])
    return found


def _either_way(link: str) -> bool:
    """Whether what stands on both sides of a link may change places, and the prompt means the same."""
    rest = f" {link.lower()} "
    for words in sorted((*_BOTH_WAYS, *_VERBS), key=len, reverse=True):
        rest = rest.replace(f" {words} ", "  ")
    return not rest.strip()


def hard_negatives(prompt: str) -> list[str]:
    """Texts that share a prompt's words and mean something else, or less; each once, the most alike first.

    A link's opposite ("right of" for "left of", and "above" and "below" of them), the two things around a link in each
    other's place (where that matters), their attributes exchanged, one attribute less, one thing alone. What is negated
    ("no cat") stays as it is, with the links beside it.
    """
    phrase = read(prompt)
    things, links = phrase.things, phrase.links
    articles = {thing.words[0].lower(): thing.article for thing in things if thing.indefinite}  # as the prompt has them
    found: list[Phrase] = []

    def with_things(**changed: Thing) -> Phrase:
        return replace(phrase, things=tuple(changed.get(f"_{i}", thing) for i, thing in enumerate(things)))

    def described(thing: Thing, attributes: tuple[str, ...]) -> Thing:
        """The thing with other attributes, and the article of its first word, where that is another."""
        changed = replace(thing, attributes=attributes)
        first = changed.words[0].lower()
        if not thing.indefinite or first == thing.words[0].lower():
            return changed
        return replace(changed, article=articles.get(first, "an" if _VOWEL.match(first) else "a"))

    for i, link in enumerate(links):
        if any(thing.negated for thing in things[i : i + 2]):
            continue
        found += [replace(phrase, links=(*links[:i], other, *links[i + 1 :])) for other in _reversed(link)]
    joined = range(len(things) - 1)
    for i in joined:
        if not _either_way(links[i]) and not any(thing.negated for thing in things[i : i + 2]):
            found.append(with_things(**{f"_{i}": things[i + 1], f"_{i + 1}": things[i]}))
    for i in joined:
        a, b = things[i : i + 2]
        if a.attributes != b.attributes and a.noun != b.noun and not a.negated and not b.negated:
            exchanged = described(a, b.attributes), described(b, a.attributes)
            found.append(with_things(**{f"_{i}": exchanged[0], f"_{i + 1}": exchanged[1]}))
    for i, thing in enumerate(things):
        for k in range(0 if thing.negated else len(thing.attributes)):
            fewer = thing.attributes[:k] + thing.attributes[k + 1 :]
            found.append(with_things(**{f"_{i}": described(thing, fewer)}))
    there = [thing for thing in things if not thing.negated]
    if len(there) > 1:
        found += [Phrase(phrase.frame, (thing,), ("",)) for thing in there]
    sound = [one for one in found if all(map(_content, one.things))]  # "the left of a bag" has a thing "the"
    return [text for text in dict.fromkeys(map(str, sound)) if text != str(phrase)]


def content_words(prompt: str) -> list[str]:
    """The words that name what can be seen, in small letters, each once: no articles, no links, no "photo of"."""
    return list(dict.fromkeys(word for thing in read(prompt).things for word in _content(thing)))


def _content(thing: Thing) -> list[str]:
    found = (re.sub(r"^\W+|\W+$", "", word.lower()) for word in thing.words)
    return [word for word in found if word and word not in _EMPTY]
