"""What a card's values may be: host name, user, country, time zone, SSH keys. Every wrong one is named, not only the first."""

from __future__ import annotations

import difflib
import functools
import re
import zoneinfo
from collections.abc import Sequence

# ISO 3166-1, alpha-2: whose radio rules there are.
_CODES = (
    "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN "
    "CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM "
    "HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK "
    "ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW "
    "SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI "
    "VN VU WF WS YE YT ZA ZM ZW"
)
COUNTRIES = frozenset(_CODES.split())


def wrong_values(
    *, hostname: str, user: str | None, password: bool, ssh_keys: Sequence[str], wifi: bool, country: str | None, timezone: str | None
) -> list[str]:
    """What no system could take, a sentence each; `password` and `wifi` say whether the card gets one."""
    wrong = []
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", hostname):
        wrong.append(f"host name {hostname!r} is not allowed: letters, digits and '-', at most 63; give another host name")
    if user is not None and not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user):
        wrong.append(f"user name {user!r} is not allowed: small letters, digits, '_' and '-', at most 32; give another user name")
    if (password or ssh_keys) and user is None:
        wrong.append("a password or an SSH key needs a user; give --user")
    if country is not None and country not in COUNTRIES:
        cure = "the United Kingdom is GB" if country == "UK" else "give two capital letters like GB or DE"
        wrong.append(f"country {country!r} is none of ISO 3166's: {cure}")
    if wifi and country is None:
        wrong.append("Wi-Fi needs a country (--country): the radio of a Raspberry Pi stays off until it knows which rules apply")
    if timezone is not None and (problem := _wrong_timezone(timezone)):
        wrong.append(problem)
    bad = [key for key in ssh_keys if not re.fullmatch(r"(ssh|ecdsa|sk)-[^\s]+ [A-Za-z0-9+/=]+( .*)?", key) or "\n" in key]
    return wrong + [f"SSH key {key[:40]!r} is no public key; give a .pub file" for key in bad]


def _wrong_timezone(name: str) -> str | None:
    if not re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,2}", name):
        return f"time zone {name!r} is not of the form Europe/London"
    if (known := _known_timezones()) and name not in known:
        near = difflib.get_close_matches(name, known, 1)
        return f"time zone {name!r} is unknown; " + (f"is it {near[0]}?" if near else "give one like Europe/London")
    return None


@functools.cache
def _known_timezones() -> frozenset[str]:
    """Of this machine; empty where it has no list of them (Windows without the package tzdata)."""
    return frozenset(zoneinfo.available_timezones())
