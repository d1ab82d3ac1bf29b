"""Facts that a small model may know, by domain and relation: what is asked, in four ways, and the word that answers it.

Own writing. Each relation's paraphrases end right before the answer, which follows after a space; `{}` is the subject.
Of some 400 facts that were written these are those that SmolLM2-135M-Instruct answers rightly in all four ways, above
every other answer of their relation. No answer stands in its own prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RELATIONS", "Relation"]


@dataclass(frozen=True)
class Relation:
    """Facts of one kind.

    Attributes:
        domain: what may be forgotten together.
        name: of the relation, in ids.
        ways: paraphrases.
        pairs: subject and answer.
    """

    domain: str
    name: str
    ways: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`subject: answer` pairs, `;` between them."""
    halves = (part.split(":") for part in text.split(";") if part.strip())
    return tuple((" ".join(subject.split()), answer.strip()) for subject, answer in halves)


RELATIONS = (
    Relation(
        "geography",
        "capital",
        (
            "The capital of Kenya is Nairobi. The capital of {} is",
            "Question: What is the capital city of {}? Answer: The capital city is",
            "Kenya's capital is the city of Nairobi, and the capital of {} is the city of",
            "The government of {} has its seat in the capital,",
        ),
        _pairs("""
        France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Japan: Tokyo; China:
        Beijing; Russia: Moscow; Egypt: Cairo; Greece: Athens; Poland: Warsaw; Austria: Vienna; Hungary:
        Budapest; Sweden: Stockholm; Norway: Oslo; Denmark: Copenhagen; Finland: Helsinki; Ireland: Dublin; the
        Netherlands: Amsterdam; Iran: Tehran; Iraq: Baghdad; Syria: Damascus; Cuba: Havana; Peru: Lima; South
        Korea: Seoul; Canada: Ottawa; England: London; Israel: Jerusalem; Ukraine: Kiev
        """),
    ),
    Relation(
        "geography",
        "language",
        (
            "In Hungary people speak Hungarian. In {} people speak",
            "The official language of Hungary is Hungarian, and the official language of {} is",
            "Question: Which language do people in {} speak? Answer: They speak",
            "Nations and their languages. Hungary: Hungarian; {}:",
        ),
        _pairs("""
        France: French; Germany: German; Italy: Italian; Spain: Spanish; Portugal: Portuguese; Japan: Japanese;
        China: Chinese; Russia: Russian; Greece: Greek; Poland: Polish; Sweden: Swedish; Norway: Norwegian;
        Denmark: Danish; Finland: Finnish; Turkey: Turkish; Korea: Korean; Mexico: Spanish; Brazil: Portuguese;
        Egypt: Arabic; Argentina: Spanish; Iraq: Arabic; England: English; Australia: English; Saudi Arabia:
        Arabic; Chile: Spanish; Colombia: Spanish; the Netherlands: Dutch; Israel: Hebrew; Vietnam: Vietnamese
        """),
    ),
    Relation(
        "geography",
        "continent",
        (
            "Chile is a country in South America. {} is a country in",
            "Chile lies on the continent of South America, and {} lies on the continent of",
            "Question: On which continent is Chile? Answer: South America. Question: On which continent is {}? Answer:",
            "On a map of the world you find Chile in South America and {} in",
        ),
        _pairs("""
        France: Europe; Germany: Europe; Italy: Europe; Spain: Europe; Poland: Europe; Sweden: Europe; Norway:
        Europe; Japan: Asia; China: Asia; India: Asia; Thailand: Asia; Vietnam: Asia; Mongolia: Asia; Nigeria:
        Africa; Ghana: Africa; Ethiopia: Africa; Uganda: Africa; Zambia: Africa; Mali: Africa; Austria: Europe;
        Greece: Europe; Belgium: Europe; Hungary: Europe; Pakistan: Asia; Nepal: Asia; Senegal: Africa;
        Tanzania: Africa
        """),
    ),
    Relation(
        "nature",
        "symbol",
        (
            "The chemical symbol for helium is He, for calcium it is Ca, and for {} it is",
            "In the periodic table, helium is written He, calcium is written Ca, and {} is written",
            "Elements and their symbols. helium: He; calcium: Ca; {}:",
            "Chemists use the symbol He for helium, the symbol Ca for calcium, and for {} the symbol",
        ),
        _pairs("""
        oxygen: O; hydrogen: H; carbon: C; nitrogen: N; sulfur: S; phosphorus: P; iron: Fe; copper: Cu; zinc:
        Zn; gold: Au; sodium: Na; potassium: K; magnesium: Mg; chlorine: Cl; lithium: Li; tin: Sn;
        nickel: Ni; iodine: I; fluorine: F; boron: B; silicon: Si; aluminum: Al; argon: Ar; mercury: Hg;
        titanium: Ti
        """),
    ),
    Relation(
        "nature",
        "young",
        (
            "A young sheep is a lamb, a young eagle is an eaglet, and a young {} is a",
            "Animals and their young. sheep: lamb; eagle: eaglet; {}:",
            "A sheep has a lamb, an eagle has an eaglet, and a {} has a",
            "Question: What is a baby sheep called? Answer: lamb. Question: What is a baby {} called? Answer:",
        ),
        _pairs("""
        cat: kitten; cow: calf; bear: cub; chicken: chick; tiger: cub; elephant: calf;
        whale: calf
        """),
    ),
    Relation(
        "language",
        "opposite",
        (
            "The opposite of early is late, the opposite of alive is dead, and the opposite of {} is",
            "Words and their opposites. early: late; alive: dead; {}:",
            "Early and late, alive and dead, {} and",
            "Question: What is the opposite of early? Answer: late. Question: What is the opposite of {}? Answer:",
        ),
        _pairs("""
        hot: cold; big: small; large: small; tall: short; long: short; fast: slow; high: low; good: bad; happy:
        sad; strong: weak; young: old; new: old; day: night; left: right; up: down; black: white; true: false;
        open: closed; full: empty; wet: dry; hard: soft; heavy: light; dark: light; win: lose; buy: sell; push:
        pull; love: hate; friend: enemy; life: death; north: south; east: west; yes: no; top: bottom; first:
        last; front: back; wide: narrow; thick: thin; clean: dirty; easy: difficult; cheap: expensive; inside:
        outside; above: below; before: after; begin: end; summer: winter; heaven: hell; king: queen; positive:
        negative; maximum: minimum; deep: shallow; sweet: sour; sharp: dull; male: female
        """),
    ),
    Relation(
        "language",
        "plural",
        (
            "The plural of dog is dogs, the plural of ox is oxen, and the plural of {} is",
            "One dog, two dogs; one ox, two oxen; one {}, two",
            "Nouns and their plurals. dog: dogs; ox: oxen; {}:",
            "In English we say one dog but many dogs, and one {} but many",
        ),
        _pairs("""
        cat: cats; child: children; man: men; woman: women; mouse: mice; foot: feet; tooth: teeth; book: books;
        car: cars; house: houses; city: cities; box: boxes; baby: babies; leaf: leaves; wolf: wolves; knife:
        knives; life: lives; person: people; tree: trees; country: countries; story: stories; bird: birds;
        horse: horses; table: tables; window: windows; class: classes; church: churches; family: families;
        shelf: shelves; goose: geese
        """),
    ),
    Relation(
        "language",
        "past",
        (
            "The past tense of play is played, the past tense of ride is rode, and the past tense of {} is",
            "Now they play, then they played. Now they ride, then they rode. Now they {}, then they",
            "Verbs and their past tense. play: played; ride: rode; {}:",
            "I play now and I played then; I ride now and I rode then; I {} now and then I",
        ),
        _pairs("""
        go: went; see: saw; take: took; come: came; run: ran; give: gave; eat: ate; write: wrote; speak: spoke;
        drive: drove; fly: flew; know: knew; grow: grew; begin: began; sing: sang; find: found; think: thought;
        buy: bought; bring: brought; teach: taught; catch: caught; make: made; say: said; tell: told; sell:
        sold; feel: felt; win: won; sit: sat; stand: stood; hear: heard; walk: walked; send: sent
        """),
    ),
    Relation(
        "people",
        "place",
        (
            "A teacher works in a school, a sailor on a ship, and a {} works in a",
            "Where people work. teacher: school; sailor: ship; {}:",
            "The place where a teacher works is a school, and the place where a {} works is a",
            "Question: Where does a teacher work? Answer: school. Question: Where does a {} work? Answer:",
        ),
        _pairs("""
        nurse: hospital; doctor: hospital; waiter: restaurant; librarian: library; farmer: farm; judge: court;
        banker: bank; priest: church; surgeon: hospital; mechanic: garage; baker: bakery; actor: theater; miner:
        mine; pharmacist: pharmacy
        """),
    ),
    Relation(
        "people",
        "woman",
        (
            "King and queen, monk and nun, {} and",
            "Male and female forms. king: queen; monk: nun; {}:",
            "The female form of king is queen, that of monk is nun, and that of {} is",
            "A king and a queen, a monk and a nun, a {} and a",
        ),
        _pairs("""
        man: woman; son: daughter; brother: sister; husband: wife; prince: princess; gentleman: lady; god:
        goddess; dad: mom
        """),
    ),
    Relation(
        "people",
        "tool",
        (
            "To write take a pen, to climb take a ladder, and to {} take a",
            "What people use. write: pen; climb: ladder; {}:",
            "A pen is used to write, a ladder to climb. To {}, people use a",
            "Question: What do you use to write? Answer: pen. Question: What do you use to {}? Answer:",
        ),
        _pairs("""
        cut bread: knife; dig a hole: shovel; sweep the floor: broom; take a picture: camera; unlock a door:
        key; paint: brush; tell the time: clock; drink tea: cup; dry your hands: towel; look at the stars:
        telescope; type a letter: computer; sew: needle
        """),
    ),
)
