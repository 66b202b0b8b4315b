"""Write data/tiny: a small English that a child might hear, and minimal pairs over it.

    python data/make_tiny.py             writes train.txt, dev.txt and blimp/*.jsonl in data/tiny
    python data/make_tiny.py --bigram    prints what a bigram model of train.txt scores on the pairs

A seeded grammar makes both. One subject-verb couple and one adjective-noun couple in five is kept
for the pairs: it stands in every scored sentence and nowhere in the text, so no scored sentence can
be remembered, and what is measured is whether the model has the rule. Words come by rank (Zipf), so
some are rare. The same Python or a later one writes the same bytes: only random() is drawn on.
"""
import collections
import json
import math
import random
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent / "tiny"
TRAIN_SENTENCES, DEV_SENTENCES, PAIRS = 24_000, 1_500, 100


class Noun(NamedTuple):
    one: str
    many: str
    gender: str                     # "f", "m" or "n": herself, himself, itself


class Verb(NamedTuple):
    base: str
    third: str                      # she breaks
    past: str                       # she broke
    participle: str                 # she has broken


def nouns(text: str, gender: str) -> list[Noun]:
    """Nouns from words, "one" or "one/many", in order of frequency."""
    pairs = [word.split("/") for word in text.split()]
    return [Noun(one, *(many or [one + "s"]), gender) for one, *many in pairs]


def regular(base: str) -> Verb:
    """push: pushes, pushed; love: loves, loved."""
    third = base + ("es" if base.endswith(("sh", "ch", "ss")) else "s")
    past = base + ("d" if base.endswith("e") else "ed")
    return Verb(base, third, past, past)


def verbs(text: str) -> list[Verb]:
    """Verbs from words, "base" (regular) or "base/third/past/participle", by frequency."""
    parts = [word.split("/") for word in text.split()]
    return [Verb(*part) if len(part) == 4 else regular(part[0]) for part in parts]


WOMEN = nouns("girl mother sister woman/women queen aunt lady/ladies princess/princesses daughter "
              "grandmother wife/wives witch/witches actress/actresses waitress/waitresses nun", "f")
MEN = nouns("boy father brother man/men king uncle prince son grandfather policeman/policemen "
            "husband wizard fireman/firemen waiter monk", "m")
ANIMALS = nouns("dog cat bird horse mouse/mice duck rabbit bear cow frog pig wolf/wolves lion "
                "monkey goose/geese tiger fox/foxes kitten puppy/puppies goat elephant owl "
                 "calf/calves "
                "turtle spider snake donkey hen chick lamb squirrel parrot zebra beetle", "n")
THINGS = nouns("ball cup book box/boxes toy hat cake apple chair shoe bed table car boat tree key "
               "flower spoon door knife/knives star basket blanket leaf/leaves bell kite bottle "
               "button tooth/teeth drum ladder plate shelf/shelves pillow foot/feet bucket lamp "
               "ribbon loaf/loaves candle puzzle feather penny/pennies scarf/scarves", "n")
PEOPLE = [noun for couple in zip(WOMEN, MEN) for noun in couple]
LIVING = [noun for trio in zip(WOMEN, MEN, ANIMALS) for noun in trio] + ANIMALS[len(MEN):]
IRREGULAR_NOUNS = [n for n in LIVING + THINGS if not n.many.startswith(n.one)]
WOMEN_NAMES = "Anna Mary Lucy Emma Rosa Ella Jane".split()
MEN_NAMES = "Tom Ben Jack Sam Peter Max Leo".split()

IRREGULAR_VERBS = verbs(
    "see/sees/saw/seen take/takes/took/taken break/breaks/broke/broken hide/hides/hid/hidden "
    "draw/draws/drew/drawn bite/bites/bit/bitten choose/chooses/chose/chosen "
    "shake/shakes/shook/shaken steal/steals/stole/stolen throw/throws/threw/thrown "
    "tear/tears/tore/torn forget/forgets/forgot/forgotten wear/wears/wore/worn "
    "know/knows/knew/known")
TRANSITIVE = [verb for couple in zip(IRREGULAR_VERBS, verbs(
    "find/finds/found/found push kick love hold/holds/held/held touch "
    "bring/brings/brought/brought lift pull need want help clean follow")) for verb in couple]
TRANSITIVE += verbs("chase carry/carries/carried/carried visit watch catch/catches/caught/caught "
                    "admire paint collect feed/feeds/fed/fed repair trust mention")
INTRANSITIVE = verbs("sleep/sleeps/slept/slept run/runs/ran/run sit/sits/sat/sat laugh "
                     "cry/cries/cried/cried jump smile fall/falls/fell/fallen wait dance "
                     "swim/swims/swam/swum sneeze sing/sings/sang/sung arrive yawn "
                     "grow/grows/grew/grown disappear whisper tremble snore vanish")
REFLEXIVE = verbs("wash hurt/hurts/hurt/hurt see/sees/saw/seen help hide/hides/hid/hidden "
                  "like dress love bite/bites/bit/bitten clean know/knows/knew/known "
                  "shake/shakes/shook/shaken admire trust draw/draws/drew/drawn paint")
THINKING = verbs("know/knows/knew/known see/sees/saw/seen hear/hears/heard/heard "
                 "forget/forgets/forgot/forgotten remember guess")
LINKING = verbs("like see/sees/saw/seen know/knows/knew/known help follow chase love want push "
                "watch")
ADJECTIVES = ("big little red happy old small good blue new funny green sad nice brown young "
              "white soft pretty black yellow clean quiet warm brave tiny round kind angry "
              "heavy lazy shiny hungry clever purple sleepy gentle dusty curious noisy "
              "wooden").split()
PLACES = "near behind beside with by above under".split()
FOR_ONE, FOR_MANY = "this that a every one".split(), "these those some many two three".split()
WEAK = {False: "a one".split(), True: "some many two three no".split()}     # what "there is" takes
STRONG = {False: "every this".split(), True: "most all".split()}            # what it does not


def is_kept(first: str, second: str) -> bool:
    """Whether the couple of two words is kept for the pairs: true of one in five."""
    return zlib.crc32(f"{first} {second}".encode()) % 5 == 0


class Speaker:
    """Says sentences of the grammar; `scored` marks a couple that is kept for the pairs."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, words: list, flat: float = 4.0):
        """A word, with weight 1 / (rank + flat): the first ones often, the last ones seldom."""
        sums, total = [], 0.0
        for rank in range(len(words)):
            total += 1 / (rank + flat)
            sums.append(total)
        point = self.random.random() * total
        return words[next(i for i, s in enumerate(sums) if s > point)]

    def couple(self, first: str, words: list, key=lambda word: word, scored: bool = False):
        """A word to stand with `first`: of the kept couples for the pairs, else of the others."""
        fitting = [word for word in words if is_kept(first, key(word)) == scored]
        return self.pick(fitting or words[:1], flat=12.0 if scored else 4.0)

    def verb(self, noun: Noun, words: list[Verb], scored: bool = False) -> Verb:
        return self.couple(noun.one, words, lambda verb: verb.base, scored)

    def noun_for(self, words: list[Verb], among: list[Noun]) -> Noun:
        """A noun that has at least one couple kept with these verbs."""
        fitting = [n for n in among if any(is_kept(n.one, v.base) for v in words)]
        return self.pick(fitting, flat=12.0)

    # -- noun phrases ----------------------------------------------------------

    def determiner(self, many: bool) -> str:
        return "the" if self.chance(0.5) else self.pick(FOR_MANY if many else FOR_ONE)

    def adjectives(self, noun: Noun, most: int = 2) -> list[str]:
        count = sum(self.chance(0.3) for _ in range(most))
        chosen = [self.couple(noun.one, ADJECTIVES) for _ in range(count)]
        return list(dict.fromkeys(chosen))

    def plain(self, noun: Noun, many: bool, determiner: str = "") -> str:
        """A noun phrase without a modifier behind it: the small dogs."""
        words = [determiner or self.determiner(many), *self.adjectives(noun)]
        return fix_article(" ".join(words + [noun.many if many else noun.one]))

    def anything(self, owner: str = "") -> str:
        """Any noun phrase; with an owner, sometimes hers: her ball."""
        noun = self.pick(LIVING if self.chance(0.4) else THINGS)
        return self.plain(noun, self.chance(0.5), owner if self.chance(0.6) else "")

    def place(self, many: bool | None = None, again: float = 0.0) -> str:
        """A prepositional phrase: near the cats, sometimes with another inside it."""
        many = self.chance(0.5) if many is None else many
        inner = self.plain(self.pick(LIVING + THINGS), many)
        return f"{self.pick(PLACES)} {inner}" + (f" {self.place()}" if self.chance(again) else "")

    def relative(self, noun: Noun, many: bool) -> str:
        """A relative clause: that likes the cats, or: that the cats like."""
        other, someone = self.chance(0.5), self.pick(LIVING)
        if self.chance(0.5):
            return f"that {present(self.verb(noun, LINKING), many)} {self.plain(someone, other)}"
        return f"that {self.plain(someone, other)} {present(self.verb(someone, LINKING), other)}"

    def subject(self, noun: Noun, many: bool, determiner: str = "") -> str:
        """A noun phrase with what may stand behind it."""
        text, kind = self.plain(noun, many, determiner), self.random.random()
        if kind < 0.38:
            return f"{text} {self.place(again=0.25)}"
        return f"{text} {self.relative(noun, many)}" if kind < 0.76 else text

    # -- sentences of the text -------------------------------------------------

    def predicate(self, noun: Noun, many: bool) -> str:
        """What the subject does: tense, verb and object."""
        kind = self.random.random()
        if kind < 0.25:
            verb, rest = self.verb(noun, INTRANSITIVE), ""
        elif kind < 0.60 and noun in LIVING:
            verb, rest = self.verb(noun, REFLEXIVE), " " + reflexive(noun, many)
        else:
            verb, rest = self.verb(noun, TRANSITIVE), " " + self.anything(owner(noun, many))
        tense = self.random.random()
        if tense < 0.50:
            return present(verb, many) + rest
        if tense < 0.70:
            return verb.past + rest
        if tense < 0.88:
            sometimes = self.pick(["", "", "often ", "already ", "never ", "once "])
            return f"{'have' if many else 'has'} {sometimes}{verb.participle}{rest}"
        return f"{self.pick(['can', 'will', 'must'])} {verb.base}{rest}"

    def statement(self) -> str:
        noun, many = self.pick(LIVING), self.chance(0.5)
        if self.chance(0.10):
            women = self.chance(0.5)
            name = self.pick(WOMEN_NAMES if women else MEN_NAMES)
            noun = (WOMEN if women else MEN)[0]
            return f"{name} {self.predicate(noun, False)}."
        return f"{self.subject(noun, many)} {self.predicate(noun, many)}."

    def negation(self) -> str:
        """No dog has ever slept; and no under the verb, where ever would be wrong."""
        noun, many = self.pick(LIVING), self.chance(0.5)
        verb = self.verb(noun, TRANSITIVE)
        have = "have" if many else "has"
        if self.chance(0.65):
            head = self.subject(noun, many, "no")
            ever = "ever " if self.chance(0.8) else ""
            return f"{head} {have} {ever}{verb.participle} {self.anything()}."
        head = f"{self.plain(noun, many)} that {present(self.verb(noun, LINKING), many)} " \
               f"{self.plain(self.pick(LIVING), self.chance(0.5), 'no')}"
        adverb = self.pick(["often", "already", "never", "once"])
        return f"{head} {have} {adverb} {verb.participle} {self.anything()}."

    def thought(self) -> str:
        """Mary knows that the dog pushes the ball; Mary knows what the dog pushes."""
        noun, many = self.pick(LIVING), self.chance(0.5)
        verb, who = self.verb(noun, TRANSITIVE), self.pick(WOMEN_NAMES + MEN_NAMES)
        head = f"{who} {self.pick(THINKING).third}"
        form = verb.past if self.chance(0.3) else present(verb, many)
        if self.chance(0.5):
            return f"{head} that {self.subject(noun, many)} {form} {self.anything()}."
        return f"{head} {self.pick(['what', 'who'])} {self.subject(noun, many)} {form}."

    def question(self) -> str:
        """What does the dog push? Does the dog sleep? What did the dog push before it slept?"""
        noun, many, kind = self.pick(LIVING), self.chance(0.5), self.random.random()
        verb, do = self.verb(noun, TRANSITIVE), self.pick(["did", "do" if many else "does"])
        head = self.subject(noun, many)
        if kind < 0.35:
            return f"{self.pick(['what', 'who'])} {do} {head} {verb.base}?"
        if kind < 0.65:
            after = self.verb(noun, TRANSITIVE).base
            start = f"{self.pick(['what', 'who'])} {do} {head} {verb.base}"
            start = f"{start} {self.pick(['before', 'after'])} {pronoun(noun, many)}"
            return f"{start} could {after} {self.anything()}?"
        if kind < 0.85:
            return f"{do} {head} {verb.base} {self.anything()}?"
        return f"{do} {head} {self.verb(noun, INTRANSITIVE).base}?"

    def existence(self) -> str:
        """There is a cup; every cup is red, with a determiner that the first could not have."""
        noun, many = self.pick(LIVING + THINGS), self.chance(0.5)
        if self.chance(0.6):
            text = self.plain(noun, many, self.pick(WEAK[many]))
            return f"there {'are' if many else 'is'} {text} {self.place()}."
        text = self.plain(noun, many, self.pick(STRONG[many]))
        be = "are" if many else "is"
        return f"{text} {self.place()} {be} {self.couple(noun.one, ADJECTIVES)}."

    def sequence(self) -> str:
        """The dog slept before it could push the ball."""
        noun, many = self.pick(LIVING), self.chance(0.5)
        first, second = self.verb(noun, TRANSITIVE), self.verb(noun, TRANSITIVE)
        start = f"{self.plain(noun, many)} {first.past} {self.anything()}"
        return f"{start} {self.pick(['before', 'after'])} {pronoun(noun, many)} could " \
               f"{second.base} {self.anything()}."

    def sentence(self) -> str:
        kinds = [self.statement] * 11 + [self.negation] * 2 + [self.thought] * 2 \
            + [self.question] * 2 + [self.existence, self.sequence]
        return finish(kinds[int(self.random.random() * len(kinds))]())


def fix_article(text: str) -> str:
    """"a apple" -> "an apple", at the start of a noun phrase."""
    return "an" + text[1:] if text[:2] == "a " and text[2] in "aeiou" else text


def finish(text: str) -> str:
    return text[0].upper() + text[1:]


def present(verb: Verb, many: bool) -> str:
    return verb.base if many else verb.third


def reflexive(noun: Noun, many: bool) -> str:
    return "themselves" if many else {"f": "herself", "m": "himself", "n": "itself"}[noun.gender]


def owner(noun: Noun, many: bool) -> str:
    return "their" if many else {"f": "her", "m": "his", "n": "its"}[noun.gender]


def pronoun(noun: Noun, many: bool) -> str:
    return "they" if many else {"f": "she", "m": "he", "n": "it"}[noun.gender]


# -----------------------------------------------------------------------------
# The paradigms. Each takes a Speaker and gives (good, bad); every attractor
# disagrees with the subject, so that the nearest noun is the wrong guide.

def agreement(say: Speaker, middle, among: list[Noun] = LIVING) -> tuple[str, str]:
    many = say.chance(0.5)
    noun = say.noun_for(INTRANSITIVE + TRANSITIVE, among)
    verb = say.verb(noun, INTRANSITIVE + TRANSITIVE, scored=True)
    head = f"{say.plain(noun, many)}{middle(noun, many)}"
    rest = "." if verb in INTRANSITIVE else f" {say.anything()}."
    return f"{head} {present(verb, many)}{rest}", f"{head} {present(verb, not many)}{rest}"


def subject_verb_agreement_irregular_noun(say):
    return agreement(say, lambda noun, many: "", [n for n in IRREGULAR_NOUNS if n in LIVING])


def subject_verb_agreement_prepositional_phrase(say):
    return agreement(say, lambda noun, many: f" {say.place(not many)}")


def subject_verb_agreement_two_phrases(say):
    return agreement(say, lambda noun, many: f" {say.place(not many)} {say.place(not many)}")


def subject_verb_agreement_subject_relative(say):
    return agreement(say, lambda noun, many: f" that {present(say.verb(noun, LINKING), many)} "
                                             f"{say.plain(say.pick(LIVING), not many)}")


def subject_verb_agreement_object_relative(say):
    def clause(noun, many):
        other = say.pick(LIVING)
        return f" that {say.plain(other, not many)} {present(say.verb(other, LINKING), not many)}"
    return agreement(say, clause)


def determiner_noun(say: Speaker, among: list[Noun], count: int) -> tuple[str, str]:
    many, who = say.chance(0.5), say.noun_for(TRANSITIVE, LIVING)
    noun = say.pick(among, flat=12.0)
    kept = [adjective for adjective in ADJECTIVES if is_kept(noun.one, adjective)]
    chosen = [say.pick(kept, flat=12.0) for _ in range(count)]
    head = f"{say.plain(who, True)} {say.verb(who, TRANSITIVE).past} " + " ".join(
        [say.pick(["these", "those"] if many else ["this", "that"]), *dict.fromkeys(chosen)])
    forms = (noun.many, noun.one) if many else (noun.one, noun.many)
    return f"{head} {forms[0]}.", f"{head} {forms[1]}."


def determiner_noun_agreement_adjectives(say):
    return determiner_noun(say, LIVING + THINGS, 2)


def determiner_noun_agreement_irregular(say):
    return determiner_noun(say, IRREGULAR_NOUNS, 1)


def anaphor(say: Speaker, middle, wrong, many: bool) -> tuple[str, str]:
    noun = say.noun_for(REFLEXIVE, PEOPLE)
    verb = say.verb(noun, REFLEXIVE, scored=True)
    other = say.pick(MEN if noun.gender == "f" else WOMEN)
    head = f"{say.plain(noun, many)} {middle(noun, many, other)}"
    head = f"{head} {say.pick([verb.past, present(verb, many)])}"
    return f"{head} {reflexive(noun, many)}.", f"{head} {wrong(noun, other)}."


def anaphor_gender_agreement(say):
    return anaphor(say, lambda noun, many, other: f"{say.pick(PLACES)} {say.plain(other, False)}",
                   lambda noun, other: reflexive(other, False), False)


def anaphor_number_agreement(say):
    many = say.chance(0.5)

    def place(noun, many, other):
        return f"{say.pick(PLACES)} {say.plain(say.pick(PEOPLE), not many)}"
    return anaphor(say, place, lambda noun, other: reflexive(noun, not many), many)


def principle_a_relative_clause(say):
    def clause(noun, many, other):
        if say.chance(0.5):
            return f"that {say.plain(other, False)} {say.verb(other, LINKING).third}"
        return f"that {say.verb(noun, LINKING).third} {say.plain(other, False)}"
    return anaphor(say, clause, lambda noun, other: reflexive(other, False), False)


def ever(say: Speaker, heads) -> tuple[str, str]:
    many, noun = say.chance(0.5), say.noun_for(TRANSITIVE, LIVING)
    verb = say.verb(noun, TRANSITIVE, scored=True)
    rest = f"{'have' if many else 'has'} ever {verb.participle} {say.anything()}."
    good, bad = heads(noun, many)
    return f"{good} {rest}", f"{bad} {rest}"


def npi_licensor_present(say):
    def heads(noun, many):
        rest = f"{say.plain(noun, many, 'no')[3:]} {say.place()}"
        return f"no {rest}", f"{say.pick(['the', 'some'] if many else ['the', 'this'])} {rest}"
    return ever(say, heads)


def npi_scope(say):
    def heads(noun, many):
        other, link = say.pick(LIVING), present(say.verb(noun, LINKING), many)
        name, those = noun.many if many else noun.one, say.chance(0.5)
        rest = other.many if those else other.one
        return f"no {name} that {link} the {rest}", f"the {name} that {link} no {rest}"
    return ever(say, heads)


def irregular_form(say: Speaker, head, forms) -> tuple[str, str]:
    many, noun = say.chance(0.5), say.noun_for(IRREGULAR_VERBS, LIVING)
    verb = say.verb(noun, IRREGULAR_VERBS, scored=True)
    start, end = f"{say.subject(noun, many)}{head(many)}", f"{say.anything()}."
    good, bad = forms(verb)
    return f"{start} {good} {end}", f"{start} {bad} {end}"


def irregular_past_participle(say):
    def have(many):
        return (" have" if many else " has") + say.pick(["", " already", " often"])
    return irregular_form(say, have, lambda verb: (verb.participle, verb.past))


def irregular_past_simple(say):
    return irregular_form(say, lambda many: "", lambda verb: (verb.past, verb.participle))


def gap(say: Speaker, ending) -> tuple[str, str]:
    many, noun = say.chance(0.5), say.noun_for(TRANSITIVE, LIVING)
    verb = say.verb(noun, TRANSITIVE, scored=True)
    head = f"{say.pick(WOMEN_NAMES + MEN_NAMES)} {say.pick(THINKING).third}"
    body = f"{say.subject(noun, many)} {present(verb, many)}{ending()}."
    return f"{head} what {body}", f"{head} that {body}"


def wh_vs_that_with_gap(say):
    return gap(say, lambda: "")


def wh_vs_that_no_gap(say):
    return gap(say, lambda: f" {say.anything()}")[::-1]


def adjunct_island(say):
    many, noun = say.chance(0.5), say.noun_for(TRANSITIVE, LIVING)
    first, second = say.verb(noun, TRANSITIVE, scored=True), say.verb(noun, TRANSITIVE)
    head = f"{say.pick(['what', 'who'])} {say.pick(['did', 'do' if many else 'does'])}"
    head = f"{head} {say.plain(noun, many)} {first.base}"
    middle = f"{say.pick(['before', 'after'])} {pronoun(noun, many)} could {second.base}"
    thing = say.anything()
    return f"{head} {middle} {thing}?", f"{head} {thing} {middle}?"


def complex_np_island(say):
    many, noun = say.chance(0.5), say.noun_for(TRANSITIVE, LIVING)
    first, link = say.verb(noun, TRANSITIVE, scored=True), present(say.verb(noun, LINKING), many)
    head = f"{say.pick(['what', 'who'])} {'do' if many else 'does'}"
    head = f"{head} {say.plain(noun, many)} that {link}"
    thing = say.plain(say.pick(LIVING), say.chance(0.5))
    return f"{head} {thing} {first.base}?", f"{head} {first.base} {thing}?"


def transitive(say):
    many, noun = say.chance(0.5), say.noun_for(TRANSITIVE, LIVING)
    noun = noun if any(is_kept(noun.one, v.base) for v in INTRANSITIVE) else WOMEN[0]
    good, bad = say.verb(noun, TRANSITIVE, scored=True), say.verb(noun, INTRANSITIVE, scored=True)
    head, rest = say.subject(noun, many), say.anything()
    form = say.pick([lambda verb: verb.past, lambda verb: present(verb, many)])
    return f"{head} {form(good)} {rest}.", f"{head} {form(bad)} {rest}."


def existential_there_quantifiers(say):
    many, noun = say.chance(0.5), say.pick(LIVING + THINGS, flat=12.0)
    kept = say.couple(noun.one, ADJECTIVES, scored=True)
    rest = f"{kept} {noun.many if many else noun.one} {say.place()}."
    start = f"there {'are' if many else 'is'}"
    weak = fix_article(f"{say.pick(WEAK[many])} {rest}")
    return f"{start} {weak}", f"{start} {say.pick(STRONG[many])} {rest}"


PARADIGMS = {            # phenomenon (BLiMP's linguistics_term): (field, paradigms)
    "subject_verb_agreement": ("morphology", [
        subject_verb_agreement_irregular_noun, subject_verb_agreement_prepositional_phrase,
        subject_verb_agreement_two_phrases, subject_verb_agreement_subject_relative,
        subject_verb_agreement_object_relative]),
    "determiner_noun_agreement": ("morphology", [
        determiner_noun_agreement_adjectives, determiner_noun_agreement_irregular]),
    "anaphor_agreement": ("morphology", [anaphor_gender_agreement, anaphor_number_agreement]),
    "irregular_forms": ("morphology", [irregular_past_participle, irregular_past_simple]),
    "binding": ("syntax_semantics", [principle_a_relative_clause]),
    "npi_licensing": ("semantics", [npi_licensor_present, npi_scope]),
    "filler_gap_dependency": ("syntax", [wh_vs_that_with_gap, wh_vs_that_no_gap]),
    "island_effects": ("syntax", [adjunct_island, complex_np_island]),
    "argument_structure": ("syntax", [transitive]),
    "quantifiers": ("semantics", [existential_there_quantifiers]),
}


def make_pairs(paradigm, seed: int, known: set[str]) -> list[tuple[str, str]]:
    """PAIRS different pairs of one paradigm, none of whose sentences is among the known ones."""
    say, pairs = Speaker(seed), {}
    while len(pairs) < PAIRS:
        good, bad = map(finish, paradigm(say))
        if not {good, bad} & known and good != bad:
            pairs[good] = bad
    return list(pairs.items())


def write(folder: Path = HERE) -> None:
    """The text, its held-out part and the pairs, all from fixed seeds."""
    say, texts = Speaker(2024), {}
    train = [say.sentence() for _ in range(TRAIN_SENTENCES)]
    heard = set(train)
    dev = [s for s in (say.sentence() for _ in range(DEV_SENTENCES)) if s not in heard]
    texts["train.txt"], texts["dev.txt"] = "\n".join(train) + "\n", "\n".join(dev) + "\n"
    seed = 0
    for term, (field, paradigms) in PARADIGMS.items():
        for paradigm in paradigms:
            seed += 1
            name = paradigm.__name__
            lines = [json.dumps({"sentence_good": good, "sentence_bad": bad, "field": field,
                                 "linguistics_term": term, "UID": name, "pairID": str(i)})
                     for i, (good, bad) in enumerate(make_pairs(paradigm, seed, heard.union(dev)))]
            texts[f"blimp/{name}.jsonl"] = "\n".join(lines) + "\n"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())


# -----------------------------------------------------------------------------
# What counting neighbours can do

def split_words(sentence: str) -> list[str]:
    """Words in small letters, the last mark apart, between two boundary signs."""
    return ["<s>", *sentence[:-1].lower().split(), sentence[-1]]


def bigram_scores(folder: Path = HERE) -> dict[str, float]:
    """Accuracy by paradigm of a word bigram mixed with a unigram; ties to the good sentence."""
    sentences = [split_words(line) for line in (folder / "train.txt").read_text().splitlines()]
    ones = collections.Counter(word for words in sentences for word in words)
    twos = collections.Counter(two for words in sentences for two in zip(words, words[1:]))
    total = sum(ones.values())

    def score(sentence: str) -> float:
        words = split_words(sentence)
        return sum(math.log(0.9 * twos[a, b] / max(ones[a], 1)
                            + 0.1 * (ones[b] + 1) / (total + len(ones)))
                   for a, b in zip(words, words[1:]))

    scores = {}
    for path in sorted((folder / "blimp").glob("*.jsonl")):
        pairs = [json.loads(line) for line in path.read_text().splitlines()]
        right = sum(score(p["sentence_good"]) >= score(p["sentence_bad"]) for p in pairs)
        scores[path.stem] = right / len(pairs)
    return scores


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--bigram"]):
        sys.exit("expected no argument (write data/tiny anew) or --bigram (score its pairs).")
    if sys.argv[1:]:
        accuracy = bigram_scores()
        for name, value in accuracy.items():
            print(f"{name:<48} {value:6.1%}")
        print(f"{'mean of paradigms':<48} {sum(accuracy.values()) / len(accuracy):6.1%}")
    else:
        write()
