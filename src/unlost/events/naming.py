"""Facts are named in the past tense, orders in the imperative. A heuristic for English; it only warns."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unlost.events.model import Event


class NamingWarning(UserWarning):
    """UL1005: the name of an event class does not read as a fact, or that of a command not as an order."""


_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Past forms that do not end in -ed. Those that are also the base form (put, set, read) count as facts.
_IRREGULAR = _set(
    """
    arisen arose awoke awoken beat beaten became become been began begun bent bet bid bit bitten
    bled blew blown born bought bound bred broadcast broke broken brought built burnt burst came
    cast caught chose chosen clung come cost crept cut dealt did done dove drank drawn dreamt drew
    driven drove drunk dug eaten fallen fed fell felt fit fled flew flown forbidden forecast
    foreseen foretold forgave forgiven forgot forgotten fought found froze frozen gave given gone
    got gotten grew grown heard held hid hidden hit hung hurt input kept knelt knew known laid lain
    leapt learnt led left lent let lit lost made meant met misled misread misspelt mistaken offset
    outbid outgrown output outsold overdrawn overpaid overran overridden overrode overtaken
    overthrown overwritten overwrote paid pled prepaid preset proven put quit ran rang read rebound
    rebuilt redrawn reheard relaid remade remet repaid rerun resat resent reset resold retaken
    rethrown retold rewon rewound rewritten ridden risen rode rose run rung said sat saw seen sent
    set sewn shaken shaven shed shone shot shown shrank shrunk shut slain slept slid slit sold
    sought sown spelt spent spilt split spoilt spoke spoken spread sprung spun stole stolen stood
    struck stuck stung stunk sung sunk swept swollen swore sworn swum swung taken taught thought
    threw thrown told took tore torn tread trodden unbound underpaid understood undertaken undertook
    underwent undid undone unmade unpaid unsent unsold unwound upheld upset went withdrawn withdrew
    withheld withstood woke woken won worn wound wove woven written wrote
    """
)
_NOT_PAST = _set(
    """
    bed bleed breed deed embed exceed feed greed heed hundred indeed need proceed red reed reseed
    seed shed shred sled speed succeed weed
    """
)
# Past forms that are verbs in their own right, so that a command may begin with them: SetPrice, FoundCompany.
_ALSO_BASE = _set(
    """
    beat become bet bid bound burst cast come cut fell fit found hit let put quit read rerun reset
    run saw set shed shut slit split spread upset wound
    """
)
# What may stand behind the participle: CheckedOut, ItemAddedToCart, LineAddedManually, OrderCreatedEvent, V2.
_AFTER = _set(
    """
    about above after again against ahead anew apart around as at away back before below between
    beyond by down early elsewhere event for forward free from halfway in into late live off offline
    on once online open out outside over overboard overdue past short through to together twice
    under until up upon v with within without
    """
)
_VERBS_LIKE_NOUNS = _set(
    """
    auction augment caution cement comment commission complement compliment condition decrement
    document envision experiment fragment function implement increment instrument mention motion
    partition position provision question requisition segment station supplement transition
    """
)
_VERBS_ON_ING = _set(
    """
    bring cling fling ping ring sing sling spring sting string swing wring
    """
)


def _is_past(word: str) -> bool:
    return word in _IRREGULAR or (len(word) > 3 and word.endswith("ed") and word not in _NOT_PAST)


def _reads_as_fact(words: list[str]) -> bool:
    """A past form that is the last word, or has an adverb, preposition or number behind it."""
    return any(
        _is_past(word) and (after in _AFTER or after.isdigit() or after.endswith("ly"))
        for word, after in pairwise([*words, "event"])
    )


def _reads_as_order(words: list[str]) -> bool:
    first = words[0]
    if first in _VERBS_LIKE_NOUNS or first in _VERBS_ON_ING:
        return True
    if first.endswith(("ing", "tion", "ment", "ness", "sion")):
        return False
    if len(words) > 1 and _is_past(words[-1]):
        return False
    return first in _ALSO_BASE or not _is_past(first)


def check_past_tense(cls: type[Event]) -> str | None:
    """The text of a `NamingWarning` if the class's name does not fit what it is, else None.

    Views, bases and classes with `past_tense=False` are not looked at. The caller issues the warning.

        check_past_tense(CreateOrder)  # "UL1005: CreateOrder does not read as a fact ..."
    """
    spec = cls.__unlost__
    if spec.abstract or spec.view_of is not None or not spec.past_tense:
        return None
    name = cls.__name__
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return None
    if spec.is_command:
        if _reads_as_order(words):
            return None
        return (
            f"UL1005: {name} does not read as an order to do something; name a command in the imperative "
            "(SendReceipt), or say past_tense=False"
        )
    if _reads_as_fact(words):
        return None
    return (
        f"UL1005: {name} does not read as a fact that has happened; name an event in the past tense "
        "(OrderCreated), or say past_tense=False"
    )
