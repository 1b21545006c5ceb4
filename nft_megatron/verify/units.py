r"""Units of measurement: whether answer and gold name different ones.

An answer without the gold's unit is right, and so is one that adds a unit: the question has it. Two units that are not the
same are wrong even where one converts into the other: ``3000\text{ m}`` for ``3\text{ km}`` is refused, as no factor is ever
applied. A word that is not in the table (ways, people) is no unit.
"""

from __future__ import annotations

import functools
import re

from nft_megatron.verify.numbers import is_digits

_NAMES = """
mm: millimeter millimeters millimetre millimetres · cm: centimeter centimeters centimetre centimetres
m: meter meters metre metres · km: kilometer kilometers kilometre kilometres
in: inch inches · ft: foot feet · yd: yard yards · mi: mile miles
mg: milligram milligrams · g: gram grams · kg: kilogram kilograms · lb: lbs · oz: ounce ounces · t: ton tons tonne tonnes
ms: millisecond milliseconds · s: sec secs second seconds · min: mins minute minutes · h: hr hrs hour hours
day: days · week: weeks · month: months · year: yr yrs years
l: L liter liters litre litres · ml: mL milliliter milliliters millilitre millilitres · gal: gallon gallons
dollar: dollars USD · cent: cents · euro: euros EUR · pound: pounds · rupee: rupees
degree: degrees deg · rad: radian radians · percent: pct
n: N newton newtons · j: J joule joules · kj: kJ · w: W watt watts · kw: kW · hz: Hz hertz · v: V volt volts
a: amp amps · k: K kelvin
pa: Pa pascal pascals · ev: eV · mol: mole moles · acre: acres · mph · kph: kmh
"""
_CANONICAL = {
    spelling: unit
    for entry in re.split(r"\n|·", _NAMES.strip())
    for unit, _, others in [entry.strip().partition(":")]
    for spelling in [unit, *others.split()]
}
_SAME = {"mph": {"mi": 1, "h": -1}, "kph": {"km": 1, "h": -1}}
_CURRENCY = {"$": "dollar", "£": "pound", "€": "euro", "¢": "cent", "₹": "rupee"}
_TAIL = re.compile(
    r"(?:(?<=[0-9})])|(?<=[A-Za-z])(?=[~\s\\]))[~\s]*+(?!\^)"
    r"((?:[A-Za-z/.~\s{}]|\\,|\^\{?-?[1-9]\}?|\\(?:text|textrm|mathrm|mbox|rm|operatorname)(?![A-Za-z]))++)$"
)
_REMEMBERED = 4096  # units of texts: a gold meets the answers of its group
_MAX_TAIL = 60  # characters
_NO_UNIT_ENDS = ("", ")", "]", "!", "'", ":")
_DEGREE = re.compile(r"\^\s*+\{?\s*+\\circ\s*+\}?|\\degree(?![A-Za-z])|°")
_PERCENT = re.compile(r"\\?%$")
_FONT = re.compile(r"\\(?:text|textrm|mathrm|mbox|rm|operatorname)(?![A-Za-z])|\\,")
_WORD = re.compile(r"([A-Za-z]++)\s*+(?:\^\s*+(-?[1-9]))?+|(/)")
_BRACE = re.compile("[{}]")
# (K-1)/L is no number per liter: a single letter without a font is a unit only behind plain digits.
_SINGLE_LETTER = re.compile("(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_DECIMAL = re.compile(r"\s*+[-+]?+\s*+[0-9][0-9.,{}]*+[~\s]*+")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def units_clash(answer: str, gold: str) -> bool:
    r"""Whether both name a unit, and not the same.

    >>> units_clash(r"3\text{ km}", r"3\text{ m}"), units_clash(r"5 \text{ cents}", r"\$5"), units_clash("3", r"3\text{ m}")
    (True, True, False)
    >>> units_clash("9 cm^2", r"9\text{ sq. cm}"), units_clash(r"4\text{ ways}", r"4\text{ cm}"), units_clash("5 mph", "5 km/h")
    (False, False, True)
    """
    gold_unit = unit_of(gold)
    if not gold_unit:
        return False
    unit = unit_of(answer)
    return bool(unit) and unit != gold_unit and "".join(answer.split()) != "".join(gold.split())


def without_same_unit(answer: str, gold: str) -> tuple[str, str] | None:
    r"""Both without their unit, if it is the same and stands behind them in letters.

    >>> without_same_unit("2 h", r"2\text{ hours}"), without_same_unit("2", r"2\text{ hours}")
    (('2', '2'), None)
    """
    if not unit_of(gold) or unit_of(answer) != unit_of(gold):
        return None
    answer, gold = _without_unit(answer), _without_unit(gold)
    return (answer, gold) if answer and gold else None


def _without_unit(text: str) -> str:
    """What stands before the unit in letters; empty if there is none."""
    tail = _TAIL.search(text, max(len(text) - _MAX_TAIL, 0))
    if tail is None:
        return ""
    start = tail.end() - len(tail[1].lstrip("} "))  # the brace of a fraction before the unit
    before = text[:start].strip("~ ")
    return before if before.count("{") == before.count("}") else ""


@functools.lru_cache(_REMEMBERED)
def unit_of(text: str) -> dict[str, int]:
    """The unit at the end of ``text`` (a currency: at its beginning) as powers of base units; empty if there is none."""
    if is_digits(text):
        return {}
    text = text.strip().strip("$" if text.count("$") % 2 == 0 else "").rstrip(".").strip()
    money = text.removeprefix("\\")[:1] if text[:1] in ("\\", *_CURRENCY) else ""
    if money in _CURRENCY:
        return {_CURRENCY[money]: 1}
    if _PERCENT.search(text):
        return {"percent": 1}
    if signs := list(_DEGREE.finditer(text)) if "circ" in text or "degree" in text or "°" in text else []:
        scale = re.sub(r"\\[a-z]++|[^A-Za-z]", "", text[signs[-1].end() :])
        return {f"degree{scale}": 1} if scale in ("", "C", "F") else {}
    tail = _TAIL.search(text, max(len(text) - _MAX_TAIL, 0)) if text[-1:] not in _NO_UNIT_ENDS else None
    if tail is None:
        return {}
    words = tail[1]
    if "\\" not in words and _SINGLE_LETTER.search(words) and not _DECIMAL.fullmatch(text, 0, tail.start(1)):
        return {}
    return _read(_BRACE.sub("", _FONT.sub(" ", words)))


def _read(words: str) -> dict[str, int]:
    unit: dict[str, int] = {}
    sign, power = 1, 1
    for found in _WORD.finditer(words):
        word = found[1]
        if word is None or word == "per":
            sign = -1
            continue
        if word in _POWERS:
            power = _POWERS[word]
            continue
        if word in ("squared", "cubed"):
            power = 2 if word == "squared" else 3
            if unit:
                unit[list(unit)[-1]] *= power
            power = 1
            continue
        name = _CANONICAL.get(word) or _CANONICAL.get(word.lower() if len(word) > 2 else word)
        if name is None:
            return {}
        exponent = sign * power * int(found[2] or 1)
        for base, number in _SAME.get(name, {name: 1}).items():
            unit[base] = unit.get(base, 0) + exponent * number
        power = 1
    return unit
