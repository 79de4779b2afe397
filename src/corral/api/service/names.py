"""Names for things that were given none: two friendly words."""

from __future__ import annotations

from corral.runtime import Random

ADJECTIVES = (
    "able", "amber", "brave", "bright", "brisk", "calm", "clear", "clever", "cool", "cosy", "daring", "eager", "early",
    "easy", "fair", "fine", "fleet", "fond", "frank", "fresh", "gentle", "glad", "golden", "good", "grand", "green",
    "handy", "happy", "hardy", "honest", "jolly", "keen", "kind", "light", "lively", "lucky", "merry", "mild", "neat",
    "nimble", "noble", "open", "patient", "plain", "proud", "quick", "quiet", "rapid", "ready", "rosy", "royal",
    "silent", "silver", "simple", "smart", "snug", "solid", "steady", "still", "sunny", "swift", "tidy", "warm", "wise",
)  # fmt: skip
NOUNS = (
    "badger", "bay", "bear", "bison", "brook", "buck", "canyon", "cedar", "cliff", "colt", "condor", "coyote", "crane",
    "creek", "deer", "dove", "eagle", "elk", "elm", "falcon", "fern", "filly", "finch", "foal", "fox", "gecko", "grove",
    "hare", "hawk", "heron", "horse", "ibex", "jay", "lake", "lark", "lynx", "maple", "mare", "meadow", "mesa", "moose",
    "mule", "mustang", "oak", "orchard", "otter", "owl", "pinto", "pony", "prairie", "quail", "raven", "ridge", "river",
    "robin", "sage", "sorrel", "spring", "stag", "stream", "swan", "valley", "willow", "wren",
)  # fmt: skip


def friendly(random: Random) -> str:
    """Like ``brave-otter``: 4,096 of them."""
    return f"{ADJECTIVES[random.below(len(ADJECTIVES))]}-{NOUNS[random.below(len(NOUNS))]}"


def numbered(random: Random) -> str:
    """Like ``brave-otter-3f2a``, when the plain ones are taken."""
    return f"{friendly(random)}-{random.token(2).hex()}"
