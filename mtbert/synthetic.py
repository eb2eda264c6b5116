"""A generated corpus for runs without files: sentiment, paraphrase, similarity and inference in a small English.

A first run must show learning within a minute or two, from scratch, on something that a bag of words cannot read.
So the words are few and the meaning lies in how they are put together:

- **sentiment**: one or two clauses on parts of a film. Negation turns a clause round, a degree word strengthens or
  weakens it, and the connective says which clause counts ("but": the second; "although": the other one; "and": both).
- **paraphrase**, **similarity**: each sentence tells an `Event`: agent, action, object, place, negated or not.
  Synonyms, voice and word order vary freely; swapped roles, another number or a "never" keep nearly all words and
  change the meaning.
- **reviews**: many clauses on one film, most of them for or most of them against it; longer than the other texts.
- **triplets**: an event, the same told anew, and one that differs in one part.

Templates, compound nouns and (action, object) pairs are combinations of numbered parts, and one combination in four is
kept for the development files (`kept_for_dev`), as are a few nouns (`DEV_PEOPLE`, `DEV_THINGS`). So every development
sentence is new as a whole and readable in its parts.

The files have the CS224N format: tab-separated, `"` quoting, LF, an unnamed row number, `id`, texts, label. Triplets
have that of SimCSE: comma-separated, three texts.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

T = TypeVar("T")
Concept = tuple[str, ...]
"""Names of one thing; any of them may be written."""


class Draw:
    """Random choices addressed by (seed, stream), resting on `random()` alone: its bits are the same in every NumPy."""

    def __init__(self, seed: int, stream: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))

    def chance(self, probability: float) -> bool:
        return self._generator.random() < probability

    def below(self, bound: int) -> int:
        return int(self._generator.random() * bound)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def subset(self, items: Sequence[T], size: int) -> list[T]:
        """`size` of the items, none twice."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(size)]


def kept_for_dev(*parts: int) -> bool:
    """Whether this combination of numbered parts occurs in the development files only: one in four does."""
    return sum(parts) % 4 == 3


# ------------------------------------------------------------------------------------------ paraphrase and similarity

PEOPLE: list[Concept] = [
    ("doctor", "physician"),
    ("teacher", "instructor"),
    ("lawyer", "attorney"),
    ("chef", "cook"),
    ("writer", "author"),
    ("child", "kid"),
    ("sailor", "mariner"),
    ("boss", "manager"),
]
DEV_PEOPLE: list[Concept] = [("painter",), ("soldier",), ("baker",), ("pilot",)]
DEEDS: list[Concept] = [  # what a person does to a person; the past tense is also the participle
    ("hired", "employed"),
    ("helped", "assisted"),
    ("called", "phoned"),
    ("praised", "complimented"),
    ("warned", "alerted"),
    ("followed", "trailed"),
]
DEALINGS: list[Concept] = [  # what a person does to things
    ("bought", "purchased"),
    ("repaired", "mended"),
    ("found", "discovered"),
    ("cleaned", "washed"),
    ("ordered", "requested"),
    ("destroyed", "wrecked"),
]
NUMBERS: list[Concept] = [("two", "2"), ("three", "3"), ("four", "4"), ("five", "5")]
THINGS: list[Concept] = [
    ("cars", "automobiles"),
    ("sofas", "couches"),
    ("gifts", "presents"),
    ("coats", "jackets"),
    ("boats", "ships"),
    ("hats", "caps"),
    ("pictures", "images"),
    ("carpets", "rugs"),
]
DEV_THINGS: list[Concept] = [("ladders",), ("mirrors",)]
DEV_NOUN_SHARE = 0.08
"""How often a noun of a development event is one that training never shows."""
PLACES: list[Concept] = [
    ("in the shop", "in the store"),
    ("in the street", "in the road"),
    ("in the woods", "in the forest"),
    ("at the harbour", "at the port"),
    ("on the beach", "on the shore"),
    ("at the airport", "at the airfield"),
]
SLOTS = ("agent", "action", "object", "place", "negated")
EASY_SHARE = 0.3
"""Share of the negatives that differ in two or three slots at once."""
FRESH_SHARE = 0.7
"""Share of the pairs whose second sentence avoids the names that the first one used."""


@dataclass(frozen=True)
class Event:
    """What a sentence says. Sentences with equal events are paraphrases."""

    agent: Concept
    action: Concept
    object: Concept
    number: Concept | None  # None: the object is a person
    place: Concept
    negated: bool


Template = tuple[int, int]
"""Voice (active, passive, it was the agent who, it was the object that) and place (last, first, first with a comma)."""


def templates(dev: bool) -> list[Template]:
    return [(voice, place) for voice in range(4) for place in range(3) if kept_for_dev(voice, place) == dev]


def tell(event: Event, template: Template, draw: Draw, avoid: str = "") -> str:
    """The event as a sentence of 7 to 13 words, in names that do not occur in `avoid` where there are any."""

    def name(concept: Concept) -> str:
        return draw.pick([name for name in concept if name not in avoid] or concept)

    voice, place_order = template
    agent = f"the {name(event.agent)}"
    target = f"{name(event.number) if event.number else 'the'} {name(event.object)}"
    verb = f"never {name(event.action)}" if event.negated else name(event.action)
    place = name(event.place)
    clause = (
        f"{agent} {verb} {target}",
        f"{target} {'were' if event.number else 'was'} {verb} by {agent}",
        f"it was {agent} who {verb} {target}",
        f"it was {target} that {agent} {verb}",
    )[voice]
    return (f"{clause} {place}", f"{place} {clause}", f"{place} , {clause}")[place_order]


def _nouns(known: list[Concept], dev_only: list[Concept], draw: Draw, dev: bool) -> list[Concept]:
    return dev_only if dev and draw.chance(DEV_NOUN_SHARE) else known


def draw_event(draw: Draw, dev: bool) -> Event:
    """An event between two people, or of a person and a number of things.

    In training no (deed, person) or (dealing, thing) combination is one that is kept for the development files.
    """
    personal = draw.chance(0.6)
    actions, known, dev_only = (DEEDS, PEOPLE, DEV_PEOPLE) if personal else (DEALINGS, THINGS, DEV_THINGS)
    while True:
        agent = draw.pick(_nouns(PEOPLE, DEV_PEOPLE, draw, dev))
        action, target = draw.pick(actions), draw.pick(_nouns(known, dev_only, draw, dev))
        number = None if personal else draw.pick(NUMBERS)
        event = Event(agent, action, target, number, draw.pick(PLACES), draw.chance(0.3))
        if agent != target and (dev or not _kept(event)):
            return event


def _kept(event: Event) -> bool:
    actions, objects = (DEEDS, PEOPLE) if event.number is None else (DEALINGS, THINGS)
    return event.object in objects and kept_for_dev(actions.index(event.action), objects.index(event.object))


def change(event: Event, slot: str, draw: Draw, dev: bool) -> Event:
    """The event with another value in one slot (or in "number")."""
    if slot == "negated":
        return replace(event, negated=not event.negated)
    personal = event.number is None
    choices = {
        "agent": PEOPLE,
        "action": DEEDS if personal else DEALINGS,
        "object": PEOPLE if personal else THINGS,
        "number": NUMBERS,
        "place": PLACES,
    }[slot]
    taken = (event.agent, event.object) if slot in ("agent", "object") else (getattr(event, slot),)
    while True:
        values: dict[str, Any] = {slot: draw.pick([concept for concept in choices if concept not in taken])}
        changed = replace(event, **values)
        if dev or not _kept(changed):
            return changed


def swap_roles(event: Event) -> Event:
    return replace(event, agent=event.object, object=event.agent)


def _tell_pair(first: Event, second: Event, draw: Draw, dev: bool) -> tuple[str, str]:
    one = tell(first, draw.pick(templates(dev)), draw)
    avoid = one if draw.chance(FRESH_SHARE) else ""
    while True:
        two = tell(second, draw.pick(templates(dev)), draw, avoid)
        if two != one:
            return one, two


def paraphrase(draw: Draw, dev: bool) -> tuple[str, str, str]:
    """Two sentences and whether they say the same, each half of the time."""
    first = second = draw_event(draw, dev)
    duplicate = draw.chance(0.5)
    if not duplicate:
        personal = first.number is None
        if draw.chance(EASY_SHARE):
            for slot in draw.subset(SLOTS, 2 + draw.below(2)):
                second = change(second, slot, draw, dev)
        elif personal and _swappable(first, dev) and draw.chance(0.5):
            second = swap_roles(first)
        else:
            second = change(first, draw.pick(SLOTS if personal else (*SLOTS, "number")), draw, dev)
    return *_tell_pair(first, second, draw, dev), "1.0" if duplicate else "0.0"


def triplet(draw: Draw, dev: bool) -> tuple[str, str, str]:
    """A sentence, another that says the same, and one that differs in who, what, whom, where or whether."""
    first = draw_event(draw, dev)
    other = change(first, draw.pick(SLOTS), draw, dev)
    one, two = _tell_pair(first, first, draw, dev)
    return one, two, tell(other, draw.pick(templates(dev)), draw, one if draw.chance(FRESH_SHARE) else "")


def _swappable(event: Event, dev: bool) -> bool:
    return event.number is None and (dev or not _kept(swap_roles(event)))


def similarity(draw: Draw, dev: bool) -> tuple[str, str, str]:
    """Two sentences and in how many of the five slots their events agree, 0.0 to 5.0.

    Synonyms agree fully, the same things in another number half. Half of the person pairs that differ in agent and
    object swap the two.
    """
    first = second = draw_event(draw, dev)
    differing = draw.subset(SLOTS, draw.below(6))
    score = 5.0 - len(differing)
    if {"agent", "object"} <= set(differing) and _swappable(first, dev) and draw.chance(0.5):
        second = swap_roles(first)
        differing = [slot for slot in differing if slot not in ("agent", "object")]
    for slot in differing:
        if slot == "object" and first.number is not None and draw.chance(0.5):
            second = change(second, "number", draw, dev)
            score += 0.5
        else:
            second = change(second, slot, draw, dev)
    return *_tell_pair(first, second, draw, dev), str(score)


# ------------------------------------------------------------------------------------------------------- sentiment

KINDS = ["opening", "final", "wedding", "funeral", "battle", "dinner"]
PARTS = ["scene", "song", "speech", "dance"]
ASPECTS = ["film", "plot", "acting", "script", "music", "ending", "story", "cast"] + [
    f"{kind} {part}" for k, kind in enumerate(KINDS) for p, part in enumerate(PARTS) if not kept_for_dev(k, p)
]
DEV_ASPECTS = [f"{kind} {part}" for k, kind in enumerate(KINDS) for p, part in enumerate(PARTS) if kept_for_dev(k, p)]
ADJECTIVES = {
    +2: ["superb", "brilliant", "wonderful", "stunning"],
    +1: ["good", "clever", "charming", "funny", "fresh", "lively"],
    -1: ["bad", "dull", "clumsy", "bland", "stale", "weak"],
    -2: ["awful", "terrible", "dreadful", "horrible"],
}
STRONGER, WEAKER = ["very", "really", "truly"], ["slightly", "somewhat", "fairly"]
FRAMES = [  # a statement and its denial
    ("the {aspect} is {adjective}", "the {aspect} is not at all {adjective}"),
    ("the {aspect} seemed {adjective}", "the {aspect} never seemed {adjective}"),
    ("i found the {aspect} {adjective}", "i never found the {aspect} {adjective}"),
    ("everybody called the {aspect} {adjective}", "nobody called the {aspect} {adjective}"),
    ("many find the {aspect} {adjective}", "few find the {aspect} {adjective}"),
]


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def clause(frame: int, denied: int, draw: Draw, dev: bool) -> tuple[str, int]:
    """A statement on one part of a film and its value: ±1 or ±2.

    A stronger degree makes the adjective ±2, a weaker one ±1; a denial turns the sign and leaves ±1.
    """
    value = draw.pick([-2, -1, 1, 2])
    adjective = draw.pick(ADJECTIVES[value])
    degree = draw.below(4)
    if degree == 2:
        adjective, value = f"{draw.pick(STRONGER)} {adjective}", 2 * _sign(value)
    elif degree == 3:
        adjective, value = f"{draw.pick(WEAKER)} {adjective}", _sign(value)
    aspect = draw.pick(DEV_ASPECTS if dev and draw.chance(0.3) else ASPECTS)
    text = FRAMES[frame][denied].format(aspect=aspect, adjective=adjective)
    return text, -_sign(value) if denied else value


def _both(a: int, b: int) -> int:
    """Opposites cancel; of two of one sign the stronger counts."""
    return _sign(a) * max(abs(a), abs(b)) if _sign(a) == _sign(b) else 0


CONNECTIVES: list[tuple[str, Callable[..., int]]] = [
    ("{0} but {1}", lambda a, b: b),
    ("although {0} , {1}", lambda a, b: b),
    ("{0} although {1}", lambda a, b: a),
    ("{0} and {1}", _both),
]


def sentiment(draw: Draw, dev: bool) -> tuple[str, str]:
    """A sentence of one clause (one in three) or two, and its class 0…4, all equally likely."""
    target = draw.below(5) - 2
    while True:
        link = None if draw.chance(0.3) else draw.below(len(CONNECTIVES))
        forms = [(draw.below(len(FRAMES)), int(draw.chance(0.4))) for _ in range(1 if link is None else 2)]
        if kept_for_dev(link or 0, *(part for form in forms for part in form)) != dev:
            continue
        clauses, values = zip(*(clause(*form, draw, dev) for form in forms), strict=True)
        joined, combine = ("{0}", int) if link is None else CONNECTIVES[link]
        if combine(*values) == target:
            return joined.format(*clauses), str(target + 2)


def review(draw: Draw, dev: bool) -> tuple[str, str]:
    """Six clauses and more, and whether they speak for the film (1) or against it (0): their values add up to ±3 or
    more, though one in five says the opposite."""
    target = draw.pick([-1, 1])
    length, total = 6 + draw.below(9), 0
    clauses: list[str] = []
    while len(clauses) < length or target * total < 3:
        text, value = clause(draw.below(len(FRAMES)), int(draw.chance(0.4)), draw, dev)
        if target * value > 0 or draw.chance(0.25):
            clauses.append(text)
            total += value
    return " , ".join(clauses), "1" if target > 0 else "0"


# ----------------------------------------------------------------------------------------------------------- files

Sampler = Callable[[Draw, bool], tuple[str, ...]]
FILES: list[tuple[str, tuple[str, ...], Sampler]] = [
    ("ids-sst", ("sentence", "sentiment"), sentiment),
    ("quora", ("sentence1", "sentence2", "is_duplicate"), paraphrase),
    ("sts", ("sentence1", "sentence2", "similarity"), similarity),
    ("ids-cfimdb", ("sentence", "sentiment"), review),
]
VOCABULARY = ["ids-sst", "quora", "sts"]
"""Their training files hold every word that the others use."""


def generate(directory: Path, seed: int = 0, train: int = 4000, dev: int = 600) -> Path:
    """Write `train` and `dev` rows per task into `directory` (made if need be) and return it.

    `{ids-sst,quora,sts,ids-cfimdb}-{train,dev}.csv` and `nli-triplets.csv` (training rows only), byte for byte the same
    for the same arguments. No text, pair or triplet occurs twice. A smaller corpus of the same seed is the beginning of
    a larger one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for number, (name, columns, sample) in enumerate(FILES):
        for dev_split, size in ((False, train), (True, dev)):
            draw = Draw(seed, 2 * number + dev_split)
            rows: dict[tuple[str, ...], str] = {}  # texts → label, in the order drawn
            while len(rows) < size:
                *texts, label = sample(draw, dev_split)
                rows.setdefault(tuple(texts), label)
            split = "dev" if dev_split else "train"
            with (directory / f"{name}-{split}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerow(["", "id", *columns])
                for row, (key, label) in enumerate(rows.items()):
                    digest = hashlib.sha256("\t".join((name, split, *key)).encode()).hexdigest()
                    writer.writerow([row, digest[:25], *key, label])
    _write_triplets(directory / "nli-triplets.csv", Draw(seed, 2 * len(FILES)), train)
    return directory


def _write_triplets(path: Path, draw: Draw, size: int) -> None:
    rows: dict[tuple[str, ...], None] = {}
    while len(rows) < size:
        rows.setdefault(triplet(draw, False))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("sent0", "sent1", "hard_neg"), *rows])


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_tokenizer(texts: Iterable[str], path: Path, size: int = 30_000) -> Path:
    """Write a lower-case WordPiece `tokenizer.json` (Hugging Face) for `texts`; returns `path`.

    The vocabulary is the special tokens (ids 0 to 4), the characters, and the most frequent words, `size` in all; any
    other word is spelt in characters. `WordPieceTrainer` would also learn pieces between the two, but breaks ties
    differently in each run, and the same seed shall give the same ids. Pairs become `[CLS] a [SEP] b [SEP]` with token
    types 0 and 1, as in BERT.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted(set("".join(counts)))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    # a dict keeps the first of equal keys: words of one letter are characters already
    pieces = dict.fromkeys([*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters), *words])
    vocabulary = {piece: number for number, piece in enumerate(list(pieces)[:size])}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.save(str(path))
    return path


__all__ = ["generate", "train_tokenizer"]
