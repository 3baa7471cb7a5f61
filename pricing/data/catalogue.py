"""The built-in data set `catalogue`: made-up products with a known price formula and known noise.

    python -m pricing.data.catalogue 5             # prints five items, one JSON object a line
    python -m pricing.data.catalogue 5 --seed 1    # five others

Real listings hide what a product is worth, so nobody can say how good a model could be. Here every item is drawn from
the tables below and priced by

    fair_price = base(noun) * (size / first size of the noun) ** power(category)
                 * material * brand * each feature * count ** 0.85                  US dollars
    price      = fair_price * exp(SIGMA * z),  z ~ N(0, 1)                          US dollars, rounded to cents

and every factor is named in the title or the description: an item without a pack in its text is a single piece, and a
feature that is not in the text is absent. Colours, warranties and shop phrases do not change the price. A perfect
reader recovers fair_price, the median of price given the text, and is still off by `least_error(fair_price)` dollars on
average: the least reachable error.

Item 340 of seed 0 is "Canvas backpack (25-litre) in navy", described as
"Dunvale / with swivel wheels, rain cover / navy". Step by step:

    a backpack of 18 litres is $32, so one of 25 litres      32.00 * (25 / 18) ** 0.50  = 37.71
    canvas 1.00, Dunvale 0.84                                37.71 * 1.00 * 0.84        = 31.68
    swivel wheels 1.22, rain cover 1.06                      31.68 * 1.22 * 1.06        = 40.97
    a single piece                                           40.97 * 1 ** 0.85          = 40.97  fair_price
    and the noise, z = -0.464                                40.97 * exp(0.15 * z)      = 38.21  price

The same (seed, i) gives the same item on every machine and Python version: all draws come from `Random.random()`, the
only method whose sequence Python promises to keep, and each item has its own generator, so it does not depend on n.
"""
import argparse
import json
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache

SIGMA = 0.15                    # standard deviation of log(price / fair_price)
PACK_SHARE = 0.20               # of the items that can come in packs
PACK_POWER = 0.85               # a pack of six costs 6 ** 0.85 = 4.6 times one piece
FAIR_RANGE = (3.0, 600.0)       # dollars; draws outside are drawn again. 600 leaves 3.4 sigma up to the upper bound
PRICE_RANGE = (0.50, 999.49)    # dollars; the same for every data set


@dataclass(frozen=True)
class Category:
    """One kind of goods. `features` is keyed by a feature's wordings, which all mean the same and cost the same."""
    department: str             # which brands sell it
    dimension: str              # what the size measures
    unit: tuple                 # one, many, short: ("litre", "litres", "L")
    power: float                # of the size, in the price
    packs: tuple                # piece counts; () when sold singly only
    part: str                   # what is made of the material
    nouns: dict                 # noun: (dollars at the first size, sizes)
    materials: dict             # material: multiplier
    features: dict              # wordings: multiplier


@dataclass(frozen=True)
class Factors:
    """What decides an item's fair price: keys into the tables, and two numbers."""
    category: str
    brand: str
    noun: str
    size: float                 # in the category's unit
    material: str
    features: tuple             # of wordings
    count: int                  # pieces in the pack


BRANDS = {                      # multiplier, departments it sells in
    "Aldermoor":  (1.20, "home field"),   "Brightwick": (0.87, "home tech"),    "Cobaltine":  (1.12, "tech field"),
    "Dunvale":    (0.84, "home field"),   "Everpine":   (0.97, "field home"),   "Fjordlund":  (1.33, "home field"),
    "Gryphona":   (1.25, "tech play"),    "Hexaline":   (0.94, "tech home"),    "Ivelle":     (1.47, "home play"),
    "Junipero":   (1.03, "play home"),    "Kestrelle":  (1.37, "tech field"),   "Lumora":     (1.06, "home tech"),
    "Mapleford":  (1.14, "field play"),   "Norvik":     (1.00, "tech home"),    "Oddfellow":  (0.91, "play tech"),
    "Pellucid":   (1.28, "tech play"),    "Quillon":    (1.17, "play tech"),    "Ravenscar":  (1.09, "field tech"),
    "Solvane":    (0.81, "tech field"),   "Tamberly":   (0.86, "play home"),    "Umbrio":     (1.42, "tech play"),
    "Vantico":    (0.93, "tech field"),   "Wexcombe":   (1.22, "home play"),    "Yarrowby":   (0.82, "play field"),
}

CATEGORIES = {
    "Stationery": Category("play", "length", ("page", "pages", "pp"), 0.45, (2, 3, 6, 12), "cover",
        {"notebook": (3.5, (80, 120, 192)), "sketchbook": (5.5, (60, 100, 160)), "planner": (6.5, (120, 180, 240)),
         "journal": (5, (96, 160, 240)), "guest book": (7.5, (64, 96, 128))},
        {"kraft paper": 0.89, "cardboard": 0.92, "linen": 1.18, "leather": 1.52},
        {("elastic closure", "elastic band"): 1.09, ("ribbon marker", "bookmark ribbon"): 1.06,
         ("gilded edges", "gilt page edges"): 1.25, ("pen loop", "loop for a pen"): 1.04}),
    "Cables": Category("tech", "length", ("metre", "metres", "m"), 0.60, (2, 3, 5, 10), "sheath",
        {"USB-C cable": (4, (1.5, 2, 3)), "HDMI cable": (5.5, (2, 3, 5)), "ethernet cable": (3.5, (2, 5, 10)),
         "extension cord": (7, (2, 3, 5)), "speaker wire": (5, (5, 10, 15))},
        {"PVC": 0.89, "rubber": 1.00, "silicone": 1.11, "braided nylon": 1.22},
        {("gold-plated contacts", "gold-plated plugs"): 1.11, ("right-angle plug", "90-degree plug"): 1.07,
         ("double shielding", "twin-layer shielding"): 1.18, ("fibre-optic core", "optical core"): 1.68}),
    "Toys": Category("play", "count", ("piece", "pieces", "pcs"), 0.55, (2, 3), "parts",
        {"jigsaw puzzle": (5.5, (250, 500, 1000)), "building set": (11, (150, 300, 600)),
         "marble run": (10.5, (60, 100, 180)), "magnetic tile kit": (13.5, (32, 64, 100)),
         "model railway": (34, (40, 80))},
        {"cardboard": 0.89, "plastic": 1.00, "bamboo": 1.18, "beech wood": 1.32},
        {("storage box", "tub to store it in"): 1.07, ("glow-in-the-dark details", "luminous details"): 1.11,
         ("motorised unit", "electric motor unit"): 1.42, ("missing instructions", "lost manual"): 0.77}),
    "Lighting": Category("home", "power", ("watt", "watts", "W"), 0.50, (2, 4, 6), "shade",
        {"LED bulb": (4, (5, 7, 9, 12)), "desk lamp": (21, (6, 8, 12)), "floor lamp": (48, (12, 18, 24)),
         "ceiling light": (36, (18, 24, 36)), "work light": (20, (20, 30, 50))},
        {"plastic": 0.89, "aluminium": 1.00, "frosted glass": 1.11, "brass": 1.39},
        {("dimmer", "adjustable brightness"): 1.11, ("motion sensor", "movement detector"): 1.18,
         ("app control", "smartphone control"): 1.29, ("chipped paint", "chipped finish"): 0.77}),
    "Kitchen": Category("home", "capacity", ("litre", "litres", "L"), 0.55, (2, 3), "body",
        {"saucepan": (13.5, (1.5, 2, 3)), "stockpot": (20, (6, 8, 12)), "kettle": (17.5, (1.2, 1.7, 2)),
         "mixing bowl": (7, (2, 3, 5)), "casserole dish": (22, (2.5, 4, 6))},
        {"aluminium": 0.89, "stainless steel": 1.00, "cast iron": 1.29, "copper": 1.65},
        {("non-stick coating", "non-stick interior"): 1.11, ("glass lid", "see-through lid"): 1.09,
         ("induction base", "induction-ready base"): 1.15, ("small dents", "minor dents"): 0.78}),
    "Luggage": Category("field", "volume", ("litre", "litres", "L"), 0.50, (2, 3), "shell",
        {"backpack": (32, (18, 25, 35)), "duffel bag": (28, (30, 45, 70)), "suitcase": (56, (35, 60, 95)),
         "tote bag": (14, (10, 15, 20)), "messenger bag": (29, (8, 12, 16))},
        {"polyester": 0.89, "canvas": 1.00, "polycarbonate": 1.18, "leather": 1.71},
        {("laptop sleeve", "padded laptop pocket"): 1.11, ("swivel wheels", "spinner wheels"): 1.22,
         ("rain cover", "waterproof cover"): 1.06, ("USB port", "built-in charging port"): 1.13}),
    "Audio": Category("tech", "output", ("watt", "watts", "W"), 0.40, (), "cabinet",
        {"bluetooth speaker": (53, (10, 20, 40)), "soundbar": (110, (60, 120, 240)),
         "subwoofer": (143, (100, 200, 400)),
         "amplifier": (130, (30, 50, 100)), "party speaker": (104, (50, 100, 300))},
        {"plastic": 0.89, "MDF": 1.00, "aluminium": 1.11, "walnut": 1.29},
        {("voice assistant", "hands-free voice control"): 1.15, ("waterproof casing", "IPX7 waterproofing"): 1.11,
         ("multi-room streaming", "whole-house streaming"): 1.22, ("minor scratches", "small scuffs"): 0.77}),
    "Drives": Category("tech", "capacity", ("gigabyte", "gigabytes", "GB"), 0.60, (2, 3, 5), "casing",
        {"USB stick": (5, (32, 64, 128)), "memory card": (6.5, (64, 128, 256)), "portable SSD": (43, (500, 1000, 2000)),
         "internal SSD": (31, (250, 500, 1000)), "hard drive": (38, (1000, 2000))},
        {"plastic": 0.89, "aluminium": 1.04, "rubber": 1.11, "titanium": 1.29},
        {("hardware encryption", "built-in encryption"): 1.22, ("water resistance", "splash-proof seal"): 1.09,
         ("high-speed controller", "fast controller"): 1.18, ("refurbished memory", "reconditioned memory"): 0.68}),
    "Power Tools": Category("field", "rating", ("volt", "volts", "V"), 0.70, (), "housing",
        {"cordless drill": (75, (12, 18, 24)), "circular saw": (100, (18, 24, 36)), "impact driver": (88, (12, 18, 24)),
         "angle grinder": (81, (18, 24, 36)), "chainsaw": (150, (18, 36, 60))},
        {"plastic": 0.92, "nylon": 1.00, "aluminium": 1.11, "magnesium": 1.22},
        {("brushless motor", "motor without brushes"): 1.25, ("two batteries", "twin battery kit"): 1.32,
         ("laser guide", "laser line"): 1.09, ("reconditioned parts", "refurbished internals"): 0.72}),
    "Garden": Category("field", "height", ("foot", "feet", "ft"), 0.75, (2, 4), "frame",
        {"trellis": (39, (4, 6, 8)), "raised bed": (80, (2, 3, 4)), "pergola": (280, (8, 10, 12)),
         "garden arch": (82, (6, 7, 8)), "gazebo": (230, (8, 10, 12))},
        {"pine": 0.89, "galvanised steel": 1.04, "cedar": 1.22, "wrought iron": 1.36},
        {("weatherproof finish", "weather-resistant finish"): 1.07, ("planter boxes", "built-in planters"): 1.18,
         ("retractable canopy", "fold-back canopy"): 1.25, ("solar lights", "solar-powered lights"): 1.15}),
    "Bedding": Category("home", "width", ("centimetre", "centimetres", "cm"), 0.80, (2, 4), "filling",
        {"pillow": (12, (50, 70, 90)), "quilt": (35, (135, 200, 225)), "blanket": (24, (130, 150, 200)),
         "bed topper": (38, (90, 135, 180)), "mattress": (100, (90, 135, 180))},
        {"polyester": 0.85, "cotton": 1.00, "wool": 1.25, "goose down": 1.55},
        {("cooling fabric", "cool-touch fabric"): 1.11, ("anti-allergy treatment", "hypoallergenic treatment"): 1.09,
         ("removable cover", "zip-off cover"): 1.07, ("organic certificate", "certified organic label"): 1.18}),
    "Displays": Category("tech", "diagonal", ("inch", "inches", "in"), 1.30, (), "panel",
        {"monitor": (209, (22, 24, 27, 32)), "television": (330, (32, 40, 50)), "portable display": (187, (13, 15, 17)),
         "photo frame": (90, (7, 10, 15)), "pen tablet": (220, (10, 13, 16))},
        {"TN": 0.89, "VA": 0.96, "IPS": 1.07, "OLED": 1.36},
        {("high refresh rate", "fast 144 Hz refresh"): 1.18, ("4K resolution", "ultra-HD resolution"): 1.25,
         ("height-adjustable stand", "adjustable stand"): 1.07, ("dead pixels", "a few stuck pixels"): 0.72}),
    "Furniture": Category("home", "width", ("centimetre", "centimetres", "cm"), 0.70, (), "frame",
        {"writing desk": (200, (100, 120, 140)), "bookcase": (160, (60, 80, 100)), "sideboard": (300, (100, 120, 160)),
         "coffee table": (140, (80, 100, 120)), "dining table": (330, (120, 160, 200))},
        {"chipboard": 0.81, "pine": 0.92, "oak": 1.22, "walnut": 1.42},
        {("soft-close drawers", "drawers that close softly"): 1.15, ("tempered glass top", "toughened glass top"): 1.18,
         ("assembly service", "assembly at home"): 1.11, ("showroom wear", "shop-floor marks"): 0.72}),
    "Instruments": Category("play", "length", ("inch", "inches", "in"), 1.20, (), "body",
        {"tambourine": (26, (8, 10)), "ukulele": (85, (21, 23, 26)), "djembe": (119, (20, 24, 26)),
         "acoustic guitar": (196, (36, 38, 41)), "cello": (442, (38, 42, 48))},
        {"basswood": 0.85, "maple": 1.04, "mahogany": 1.18, "rosewood": 1.39},
        {("padded carry bag", "padded gig bag"): 1.07, ("hand-painted finish", "hand-painted artwork"): 1.15,
         ("electric pickup", "built-in pickup"): 1.22, ("repaired crack", "mended crack"): 0.68}),
}

# Wordings. A template names the facts it states in braces; noun, part and dimension are always known and state nothing.
FACTS = {"brand", "size", "material", "features", "pack", "colour", "warranty", "shop"}
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 10: "ten", 12: "twelve"}
PACKS = ("{n}-pack", "pack of {n}", "set of {n}", "pack of {word}", "set of {word}", "box of {n}", "bundle of {word}")
CHATTER = {                     # does not change the price
    "colour": ("black", "white", "grey", "navy", "teal", "crimson", "olive", "mustard", "lilac", "sand", "sky blue",
               "sage green", "off-white", "burgundy"),
    "warranty": ("2-year warranty", "12-month guarantee", "one year of cover", "limited warranty", "3-year guarantee"),
    "shop": ("free returns", "ships in 24 hours", "while stocks last", "a popular gift", "top rated", "new arrival"),
}
TITLES = (
    "{brand} {material} {noun}, {size}",          "{brand} {noun} {size} {material}",
    "{size} {material} {noun} by {brand}",        "{noun} - {brand} - {size}",
    "{material} {noun} ({size}) in {colour}",     "{brand} {size} {noun}, {colour}",
    "{noun}, {size}, {colour}, {brand}",          "{brand} | {noun} | {size} | {material}",
    "{material} {noun} from {brand}, {colour}",   "{brand} {colour} {noun}",
    "{brand} {noun} with {features}",             "{size} {noun} with {features}, {colour}",
    "{colour} {material} {noun}, {features}",     "{brand} {size} {material} {noun} + {features}",
    "{pack} {brand} {noun} {size}",               "{brand} {size} {material} {noun} - {pack}",
    "{noun} {size}, {pack}, {colour}",            "{pack}: {material} {noun}, {size}",
    "{noun} by {brand} ({pack})",                 "{brand} {noun}, {pack}, {features}",
)
STYLES = (                      # joiners, templates: prose, specification list, terse
    ((". ",),
     ("made by {brand}", "from {brand}", "by the makers at {brand}", "{brand} puts its name on this {noun}",
      "the {dimension} is {size}", "it has a {dimension} of {size}", "{size} in {dimension}",
      "{material} {part}", "the {part} is {material}", "its {part} is made of {material}", "we chose {material}",
      "comes with {features}", "it has {features}", "note the {features}", "you get {features}",
      "sold as a {pack}", "this is a {pack}", "you receive one {pack}",
      "in {colour}", "finished in {colour}", "{colour} looks good anywhere", "{warranty}", "with {warranty}", "{shop}",
      "{material} {noun} from {brand}", "a {noun} in {material} with {features}", "{brand} makes it in {material}",
      "{brand} sells it as a {pack}", "{material} {part}, {dimension} of {size}", "{shop}, with {warranty}")),
    (("; ", ". ", " | ", ", "),
     ("brand: {brand}", "maker: {brand}", "{dimension}: {size}", "{dimension} {size}", "{part}: {material}",
      "{part} in {material}", "features: {features}", "extras: {features}", "quantity: {pack}", "contents: {pack}",
      "colour: {colour}", "service: {warranty}", "{warranty}", "{shop}")),
    ((", ", " / ", " - "),
     ("{brand}", "{size}", "{material}", "{material} {part}", "{features}", "with {features}", "{pack}", "{colour}",
      "{warranty}", "{shop}", "{size} {dimension}", "{brand} {noun}")),
)


def _pick(rng, options):
    """One of `options`. `rng.choice` may change between Pythons, `rng.random` may not."""
    return options[int(rng.random() * len(options))]


def _shuffled(rng, options):
    return sorted(options, key=lambda _: rng.random())


def _draw(rng) -> Factors:
    """Draw an item's factors until its fair price lies in FAIR_RANGE."""
    while True:
        name = _pick(rng, tuple(CATEGORIES))
        category = CATEGORIES[name]
        noun = _pick(rng, tuple(category.nouns))
        factors = Factors(
            category=name,
            brand=_pick(rng, [brand for brand, (_, sells) in BRANDS.items() if category.department in sells.split()]),
            noun=noun,
            size=_pick(rng, category.nouns[noun][1]),
            material=_pick(rng, tuple(category.materials)),
            features=tuple(_shuffled(rng, category.features)[:_pick(rng, (0, 1, 1, 2, 2, 3))]),
            count=_pick(rng, category.packs) if category.packs and rng.random() < PACK_SHARE else 1)
        if FAIR_RANGE[0] <= _fair_price(factors) <= FAIR_RANGE[1]:
            return factors


def _fair_price(factors: Factors) -> float:
    """The fair price by the formula at the top of this file, in dollars."""
    category = CATEGORIES[factors.category]
    base, sizes = category.nouns[factors.noun]
    price = base * (factors.size / sizes[0]) ** category.power
    price *= category.materials[factors.material] * BRANDS[factors.brand][0]
    for wordings in factors.features:
        price *= category.features[wordings]
    return round(price * factors.count ** PACK_POWER, 4)    # drops the last bits, in which maths libraries differ


def _noisy(rng, fair_price: float) -> float:
    """fair_price * exp(SIGMA * z) in dollars and whole cents, z by Box and Muller, drawn again while the price is out
    of PRICE_RANGE."""
    while True:
        z = math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())
        price = round(fair_price * math.exp(SIGMA * z), 2)
        if PRICE_RANGE[0] <= price <= PRICE_RANGE[1]:
            return price


@lru_cache(maxsize=None)
def _facts(template: str) -> frozenset:
    """The facts that a template states."""
    return frozenset(re.findall(r"{(\w+)}", template)) & FACTS


def _pick_fitting(rng, templates, facts):
    """One of the templates that state nothing outside `facts`."""
    return _pick(rng, [template for template in templates if _facts(template) <= facts])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _write(rng, factors: Factors) -> tuple:
    """(title, description) that state the factors: the description states what the title does not."""
    category = CATEGORIES[factors.category]
    one, many, short = category.unit
    size = format(factors.size, "g")
    features = [_pick(rng, wordings) for wordings in factors.features]
    words = {"brand": factors.brand, "noun": factors.noun, "material": factors.material,
            "part": category.part, "dimension": category.dimension}
    words.update((name, _pick(rng, wordings)) for name, wordings in CHATTER.items())
    facts = {"brand", "size", "material"} | ({"features"} if features else set())
    if factors.count > 1:
        facts.add("pack")
        words["pack"] = _pick(rng, PACKS).format(n=factors.count, word=COUNTS[factors.count])

    template = _pick_fitting(rng, TITLES, facts | {"colour"})
    words["size"] = _pick(rng, (f"{size}-{one}", f"{size} {short}", f"{size}{short}"))
    words["features"] = features[0] if features else ""      # a title has room for one
    title = template.format_map(words)
    if rng.random() < 0.5:
        title = " ".join(map(_capital, title.split(" ")))

    left = facts - _facts(template)
    left.update(_shuffled(rng, CHATTER)[:_pick(rng, (1, 1, 1, 2))])
    if "{features}" in template and features[1:]:
        features = features[1:]
        left.add("features")
    words["size"] = _pick(rng, (f"{size} {many}", f"{size} {short}"))
    words["features"] = _pick(rng, (" and ", ", ", " plus ")).join(features)
    return _capital(title), _describe(rng, words, left)


def _describe(rng, words: dict, left: set) -> str:
    """State every fact of `left` once, in one style and any order."""
    joiners, templates = _pick(rng, STYLES)
    joiner = _pick(rng, joiners)
    phrases = []
    while left:
        template = _pick_fitting(rng, templates, left)
        left = left - _facts(template)
        phrase = template.format_map(words)
        phrases.append(_capital(phrase) if joiner == ". " else phrase)
    return _capital(joiner.join(phrases)) + ("." if joiner == ". " else "")


def generate(n: int, seed: int = 0) -> list[dict]:
    """The first `n` items of catalogue `seed`: title, category, brand, description, price and fair_price (US dollars).

    Raises ValueError for n below 1."""
    if n < 1:
        raise ValueError(f"n, the number of items, must be at least 1, not {n}")
    items = []
    for i in range(n):
        rng = random.Random(f"{seed}:{i}")      # a string is hashed by SHA-512, the same everywhere
        factors = _draw(rng)
        title, description = _write(rng, factors)
        fair_price = _fair_price(factors)
        items.append({"title": title, "category": factors.category, "brand": factors.brand, "description": description,
                      "price": _noisy(rng, fair_price), "fair_price": fair_price})
    return items


def least_error(fair_price: float, sigma: float = SIGMA) -> float:
    """The mean absolute error, in dollars, of the best guess for one item: its median, fair_price.

    With X = exp(sigma Z):  E|X - 1| = E(X - 1)+ + E(1 - X)+, and as E[X; Z > 0] = exp(sigma^2 / 2) Phi(sigma),
    the two are exp(sigma^2 / 2) Phi(sigma) - 1/2 and 1/2 - exp(sigma^2 / 2) Phi(-sigma). Their sum times fair_price is
    fair_price exp(sigma^2 / 2) (2 Phi(sigma) - 1), and 2 Phi(sigma) - 1 = erf(sigma / sqrt 2).
    """
    return fair_price * math.exp(sigma ** 2 / 2) * math.erf(sigma / math.sqrt(2))


def main():
    parser = argparse.ArgumentParser(prog="python -m pricing.data.catalogue", description="Print made-up products.")
    parser.add_argument("n", type=int, help="how many items")
    parser.add_argument("--seed", type=int, default=0, help="which catalogue (default: 0)")
    args = parser.parse_args()
    try:
        for item in generate(args.n, args.seed):
            print(json.dumps(item))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
