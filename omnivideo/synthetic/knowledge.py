"""Everyday facts in fixed sentences, and questions about them.

An indirect request is solved with these facts: "the colour of a banana" needs "a banana is yellow". The sentence of a
fact is the same wherever it occurs, so that a small model that learned it from a question can use it in its reasoning.

Every third fact of a list is held out: no training request needs it, but questions ask about it, since a large model
would know it. All things are singular or mass nouns, no thing occurs in two lists or within another thing, and no thing
contains a word for a colour of the world. A list is written as one string of things that are separated by commas.
"""

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

COLOUR_THINGS = {
    "red": """blood, a ripe tomato, a fire engine, a strawberry, a stop sign, a ladybird, a cherry, ketchup,
        a raspberry, a chili pepper, lipstick, a london bus, a ruby, santa's coat, a boiled lobster, a radish,
        a fire extinguisher, a cranberry, a pomegranate, a rooster's comb, the planet mars, a valentine heart,
        a toadstool, a matador's cape, a clown's nose, the flag of china, salsa, a cooked crab, a poppy,
        cayenne pepper""",
    "green": """grass, a frog, a cucumber, spinach, broccoli, a pine tree, a lime, a cactus, a lettuce, a fern, moss,
        a crocodile, a grasshopper, an avocado, basil, parsley, a jungle, a pea, a gherkin, ivy, a lawn, a palm leaf,
        a celery stalk, a leprechaun, a golf course, jade, a praying mantis, a zucchini, an iguana, pesto, guacamole,
        wasabi, a soccer pitch""",
    "blue": """the sea, the ocean, a clear sky, a sapphire, a pair of jeans, a cornflower, a smurf, a forget-me-not,
        the flag of europe, lapis lazuli, a police light, cobalt, a kingfisher, the earth from space, neptune,
        cookie monster, a peacock's neck, a lake on a map, a gas flame, a robin's egg, the facebook logo,
        a cold water tap, a delphinium, the flag of scotland, the pacific, the mediterranean, a police uniform,
        a gentian""",
    "yellow": """a banana, a lemon, the sun, butter, a canary, a sunflower, a dandelion, a chick, sweetcorn,
        a yolk, mustard, a school bus, a new york taxi, a daffodil, cheese, honey, a rubber duck, a pineapple,
        custard, a buttercup, sand, straw, hay, pikachu, spongebob, turmeric, sulphur, a smiley, popcorn, pollen,
        lemonade, a post-it note, a french fry""",
    "orange": """a carrot, a pumpkin, a mandarin, a basketball, a traffic cone, a tiger, a goldfish, a fox, an apricot,
        a clementine, a persimmon, a life jacket, a sweet potato, a monarch butterfly, marmalade, a papaya, a mango,
        a marigold, a kumquat, a jack-o'-lantern, a clownfish, lava, a butternut squash, an orangutan, a campfire,
        a monk's robe, garfield, a cantaloupe, a safety vest, an ember""",
    "purple": """a plum, a grape, lavender, an aubergine, an eggplant, a fig, a lilac, an amethyst, a beetroot,
        a passion fruit, an iris, a crocus, barney the dinosaur, a thistle, a mulberry, a sloe, an acai berry, heather,
        a wisteria, a pansy, a yam from the philippines, a bishop's robe, an emperor's robe, a foxglove, an allium,
        an elderberry, a damson, a bruise, a jacaranda tree, a lupin""",
    "cyan": """a swimming pool, a tropical lagoon, a coral sea, a glacier, an ice cave, the caribbean sea,
        maldives water, uranus, a tiffany box, an aquamarine, mouthwash, a water slide, a paddling pool, an iceberg,
        an atoll, a hot tub, window cleaner, a frozen waterfall, a minecraft diamond, a hologram, a tron suit,
        oxidised copper, the water at bora bora, larimar, perry the platypus, a lap pool, a water park""",
    "white": """snow, milk, salt, a swan, a cloud, sugar, flour, a polar bear, an egg, chalk, cotton, rice,
        a wedding dress, a tooth, a snowman, a dove, toothpaste, a sheep, a daisy, a lily, whipped cream, an igloo,
        a pearl, yoghurt, a chef's hat, a bone, a skeleton, a snowflake, mayonnaise, a ghost, tofu, cauliflower,
        a bathtub, a seagull""",
}
SHAPE_THINGS = {
    "circle": """a coin, a full moon, a wheel, a plate, a button, a clock face, a ring, a pizza, a cookie, a donut,
        a marble, a soap bubble, a planet, a globe, a hula hoop, a frisbee, a record, a manhole cover, a roundabout,
        an eyeball, a drum skin, a bullseye, a medal, a pancake, a pie, a bagel, a tambourine""",
    "square": """a chessboard, a tile, a dice, a window pane, a sudoku grid, a rubik's cube, a checkerboard, a ravioli,
        a handkerchief, a postage stamp, a cracker, a cushion, a pixel, a boxing ring, a keyboard key, a qr code,
        a floppy disk, a waffle, a paving stone, a tic-tac-toe board, a monopoly board, a caramel, a bouillon cube,
        an app icon, a computer chip, a polaroid""",
    "triangle": """a slice of pizza, a pyramid, a tent, a yield sign, a mountain peak, a sail, a party hat, a nacho,
        a samosa, a witch's hat, a gable, half a sandwich, a coat hanger, a slice of cake, a pennant, a warning sign,
        an onigiri, a doorstop, an arrowhead, a teepee, a volcano, a guitar pick, a billiards rack, a hang glider,
        a watermelon slice, a metronome, a delta sign""",
    "star": """a sheriff's badge, a starfish, a pentagram, a tree topper, a fairy's wand, a walk of fame plaque,
        a shuriken, polaris, a carambola slice, sirius, a hotel rating mark, alpha centauri, a teacher's sticker,
        an anise pod, a bethlehem light, a favourites icon, a cowboy's spur, an asterisk, a marshal's badge,
        vietnam's flag emblem, morocco's flag emblem, somalia's flag emblem, ghana's flag emblem, cuba's flag emblem,
        chile's flag emblem, a ninja weapon, a texas emblem""",
}
BACKGROUND_THINGS = {
    "black": """coal, a raven, the night, a crow, a panther, tar, liquorice, soot, a tuxedo, crude oil, ebony,
        a hockey puck, a car tyre, outer space, onyx, obsidian, a bat, caviar, a top hat, a limousine, darth vader""",
    "grey": """concrete, ash, an elephant, a rainy sky, a mouse, a dolphin, a battleship, cement, steel, a rhino,
        a koala, lead, a storm cloud, a donkey, a seal, gravel, a pavement, a wolf, fog, a hippo, dust""",
    "white": """a sheet of paper, a blank page, a bed sheet, porcelain, a hospital wall, frost, an empty canvas,
        a cinema screen, a tablecloth, a fridge, a lab coat, an envelope, a bandage, an ice rink, a ski slope,
        a judo suit, plaster, a nurse's uniform, a sink""",
    "pink": """a flamingo, bubblegum, a piglet, a pig, candy floss, a ballet shoe, ham, a tutu, kirby, a rose quartz,
        strawberry ice cream, a prawn, a tongue, an eraser, a peony, a piggy bank, an axolotl, a barbie box,
        peppa pig""",
    "brown": """chocolate, wood, coffee, bread, a bear, cocoa, a chestnut, mud, soil, a walnut, cinnamon, a horse,
        a beaver, a potato, a coconut, cardboard, leather, a moose, tree bark, a pinecone, gravy, a sparrow, an acorn,
        cola""",
}
MOTION_THINGS = {
    "still": """a rock, a statue, a house, a wall, a parked car, a lamp post, a tower, a bridge, a sleeping cat,
        a photograph, a frozen lake, a castle, a bench, a gravestone, a cliff, a church, a lighthouse, a couch,
        a bookshelf, a monument, a fence""",
    "left": """an arrow to the west, a rewind arrow, a back arrow, an undo arrow, the previous page arrow,
        a backspace cursor, hebrew writing, arabic writing, a wind from the east, a flight from london to new york,
        a ship from europe to america, a train from berlin to paris, a train from moscow to warsaw,
        a clock hand at nine, a volume slider turned low, a step from two to one on a ruler,
        a flight from tokyo to delhi, a drive from miami to los angeles""",
    "right": """an arrow to the east, a fast-forward arrow, a forward arrow, a redo arrow, the next page arrow,
        a typing cursor, english writing, a play arrow, a wind from the west, a flight from new york to london,
        a ship from america to europe, a train from paris to berlin, a train from warsaw to moscow,
        a clock hand at three, a volume slider turned high, a step from one to two on a ruler,
        a flight from delhi to tokyo, a drive from los angeles to miami""",
    "up": """a balloon, a rocket, smoke, steam, an airplane at takeoff, a climber, a lift to the top floor,
        the morning sun, a spark from a fire, a fountain jet, a geyser, a hoisted flag, a firework, warm air,
        a bubble in water, a chairlift to the summit, a space shuttle, a lark, a periscope""",
    "down": """an anchor, rain, an autumn leaf, a waterfall, an avalanche, a raindrop, a tear, hail, a skydiver,
        a parachute, a brick off a roof, a ripe apple, a leaking ship, the evening sun, a meteorite, a sledge,
        a lift to the basement, a landing airplane, a guillotine, a drip from a tap""",
    "growing": """dough in the oven, a baby, a puppy, a seedling, a rolling snowball, a pumped tyre, a tadpole,
        a sponge in water, a child, a baking muffin, an approaching car, a bamboo shoot, a wildfire, a lamb, a kitten,
        the universe, a waxing moon, a scared pufferfish, an incoming tide, a photo zoomed in""",
    "shrinking": """a melting ice cube, a burning candle, a sharpened pencil, a leaking tyre, a sweater in a hot wash,
        a drying puddle, a departing train, a departing ship, a waning moon, a sucked sweet, ice in warm hands,
        a lake in a drought, a photo zoomed out, a licked lollipop, a punctured raft, an outgoing tide,
        a used bar of soap, a drying raisin, a half-eaten cake""",
}
SIZE_THINGS = {
    "small": """an ant, a flea, a crumb, a needle, a mosquito, a bee, a seed, a pin, a thimble, a snail,
        a hummingbird, a gnat, a dewdrop, an atom, a germ, a bead, a pebble, a hamster, a paperclip, a tick, a shrimp,
        a thumbtack, a freckle, a molecule""",
    "large": """a whale, a skyscraper, an ocean liner, a dinosaur, a giant, a stadium, a jumbo jet, a continent,
        a galaxy, a mammoth, a cathedral, an aircraft carrier, a cruise ship, a giraffe, the eiffel tower,
        mount everest, a palace, a desert, an oil tanker, jupiter, a mansion, an airport, a sequoia,
        a sumo wrestler""",
}
# What has so many parts: the owner and the parts, separated by a colon.
NUMBER_THINGS = {
    "one": """a unicycle: wheel, a unicorn: horn, a cyclops: eye, a face: nose, a mouth: tongue, the earth: moon,
        a wheelbarrow: wheel, a teapot: spout, a mushroom: stalk, a week: monday, a thumb: nail, a key ring: ring""",
    "two": """a bicycle: wheels, a bird: wings, a person: ears, a scooter: wheels, a chicken: legs,
        a pair of scissors: blades, a pair of glasses: lenses, a bull: horns, a magnet: poles, a body: arms,
        a walrus: tusks, a shirt: sleeves, a boxing match: fighters, a chess game: players, a catamaran: hulls,
        a nose: nostrils, a rowing boat: oars, a penguin: feet, a duet: singers, a moped: wheels""",
    "three": """a triangle: corners, a tricycle: wheels, a clover: leaves, a traffic light: lamps, a tripod: legs,
        a trio: musicians, an ice hockey game: periods, a podium: steps, a trident: prongs, a rickshaw: wheels,
        a trilogy: parts, a haiku: lines, a day: meals, a triathlon: sports, the flag of france: stripes,
        the flag of italy: stripes, space: dimensions, a hat trick: goals, a fairy tale: wishes,
        a british plug: pins""",
    "four": """a square: corners, a car: wheels, a dog: legs, a table: legs, a chair: legs, a cow: legs,
        a year: seasons, a compass: directions, a dragonfly: wings, a violin: strings, a deck of cards: suits,
        a rectangle: sides, a zebra: legs, a lion: paws, a bed: legs, a wagon: wheels, a baseball field: bases,
        a month: weeks, an hour: quarters, a windmill: sails, a fork: prongs, the beatles: members""",
}
# Who does what: the subject and the verb, and after a colon the thing, which has a known colour or shape.
SECOND_HOPS = """monkeys eat: a banana, rabbits love: a carrot, bees make: honey, cows give: milk,
    vampires drink: blood, sheep eat: grass, pupils go to school in: a school bus, firefighters drive: a fire engine,
    brides wear: a wedding dress, hens lay: an egg, cooks put on: a chef's hat, children build: a snowman,
    inuit live in: an igloo, dogs bury: a bone, oysters hide: a pearl, mice steal: cheese, horses chew: hay,
    people dip fries in: ketchup, sushi chefs grate: wasabi, mexicans mash: guacamole, wine makers press: a grape,
    bulls chase: a matador's cape, swimmers jump into: a swimming pool, arctic explorers meet: a polar bear,
    road workers set up: a traffic cone, tall athletes dunk: a basketball, sailors put on: a life jacket,
    people in manhattan call: a new york taxi, drivers obey: a stop sign, princesses kiss: a frog,
    gardeners mow: a lawn, golfers play on: a golf course, snails nibble: a lettuce, volcanoes spit: lava,
    dentists pull: a tooth, teachers write with: chalk, astronauts photograph: the earth from space,
    cowboys wear: a pair of jeans, ships sail on: the ocean, fish swim in: the sea, birds fly in: a clear sky,
    toddlers splash in: a paddling pool, captains fear: an iceberg, gamers mine: a minecraft diamond,
    window washers spray: window cleaner, couples soak in: a hot tub, honeymooners dream of: a tropical lagoon,
    alpine hikers cross: a glacier, greek cooks stuff: an aubergine, boxers get: a bruise,
    perfume makers distil: lavender, scots honour: a thistle, russians boil for soup: a beetroot,
    jam makers stir: a damson, actresses wear: lipstick, lovers send: a valentine heart, popeye fans eat: spinach,
    hunters follow: a fox, tamers train: a tiger, bartenders squeeze: a lime,
    squirrels hide: an acorn, hippos roll in: mud, bakers sell: bread, baristas brew: coffee, miners dig up: coal,
    carpenters saw: wood, moles dig in: soil, grooms wear: a tuxedo, magicians reach into: a top hat,
    road builders pour: tar, chimney sweeps brush off: soot, scientists wear: a lab coat, nurses wrap: a bandage,
    postmen deliver: an envelope, painters begin with: an empty canvas, skaters dance on: an ice rink,
    skiers race on: a ski slope, masons mix: cement, mahouts ride: an elephant, cats hunt: a mouse,
    ballerinas wear: a tutu, kids chew: bubblegum, fair visitors lick: candy floss, savers fill: a piggy bank,
    writers rub with: an eraser, shoemakers cut: leather, swiss people melt: chocolate, zookeepers film: a koala,
    ninjas throw: a shuriken, families put up: a tree topper, pharaohs build: a pyramid, campers sleep in: a tent,
    boats hoist: a sail, birthday guests wear: a party hat, guitarists hold: a guitar pick,
    indian cooks fry: a samosa, newlyweds exchange: a ring, winners get: a medal, slot machines take: a coin,
    djs play: a record, archers aim at: a bullseye, terriers catch: a frisbee, tailors sew on: a button,
    police officers munch: a donut, gymnasts twirl: a hula hoop, werewolves howl at: a full moon,
    italians bake: a pizza, gamblers roll: a dice, grandmasters bend over: a chessboard,
    boxers fight in: a boxing ring, puzzle fans twist: a rubik's cube, puzzle fans fill in: a sudoku grid,
    belgians bake: a waffle, collectors trade: a postage stamp, phones scan: a qr code,
    sheriffs pin on: a marshal's badge,
    fairies wave: a fairy's wand, critics hand out: a hotel rating mark, divers discover: a starfish,
    volcanologists study: a volcano, riders dig in: a cowboy's spur, japanese pupils unpack: an onigiri,
    plains tribes live in: a teepee, seamen follow: polaris, bathroom builders lay: a tile"""
OPPOSITES = {"left": "right", "up": "down", "growing": "shrinking", "small": "large", "black": "white"}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
COUNTS = NUMBERS[1:5]  # how many objects a request can name
STATEMENTS = {
    "colour": "{thing} is {value}", "background": "{thing} is {value}", "shape": "{thing} is a {value}",
    "size": "{thing} is {value}", "arithmetic": "{thing} is {value}", "opposite": "{thing} is {value}",
}  # fmt: skip
MOTION_STATEMENTS = {
    "still": "{thing} stays still", "left": "{thing} goes left", "right": "{thing} goes right",
    "up": "{thing} goes up", "down": "{thing} goes down", "growing": "{thing} grows", "shrinking": "{thing} shrinks",
}  # fmt: skip
COLOUR_QUESTIONS = (
    "what colour is {}?", "which colour does {} have?", "tell me the colour of {}", "what is the colour of {}?",
    "do you know the colour of {}?", "which colour is {}?",
)  # fmt: skip
QUESTION_FORMS = {
    "colour": COLOUR_QUESTIONS,
    "background": COLOUR_QUESTIONS,
    "shape": ("what shape is {}?", "which shape does {} have?", "tell me the shape of {}", "what is the shape of {}?",
              "do you know the shape of {}?", "which shape is {} like?"),
    "motion": ("how does {} move?", "which way does {} go?", "what does {} do?", "tell me how {} moves",
               "what is the motion of {}?", "do you know how {} moves?"),
    "size": ("is {} small or large?", "how big is {}?", "what size is {}?", "tell me the size of {}",
             "what is the size of {}?", "do you know how big {} is?"),
    "number": ("how many {parts} does {owner} have?", "what is the number of {parts} of {owner}?",
               "tell me how many {parts} {owner} has", "do you know how many {parts} {owner} has?"),
    "arithmetic": ("what is {}?", "how much is {}?", "tell me what {} is", "calculate {}", "which number is {}?"),
    "second hop": ("what do {clause}?", "tell me {}", "do you know {}?", "what is it that {clause}?"),
    "opposite": ("what is {}?", "tell me {}", "do you know {}?", "say {}"),
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A fact: `thing` is what a request says, `value` what it means, `statement` the sentence that joins the two.

    The thing of a number is e.g. "a bicycle has wheels", and that of a second hop "what monkeys eat".
    """

    kind: str
    thing: str
    value: str
    statement: str
    is_held_out: bool


def split_list(text: str) -> list[str]:
    """Return the entries of a list that is written as one string."""
    return [" ".join(entry.split()) for entry in text.split(",")]


def build_number_fact(entry: str, number: str, is_held_out: bool) -> Fact:
    owner, parts = entry.split(": ")
    has = "have" if owner == "the beatles" else "has"
    plural = f"{parts}s" if number == "one" else parts
    return Fact("number", f"{owner} {has} {plural}", number, f"{owner} {has} {number} {parts}", is_held_out)


def build_second_hop(entry: str, is_held_out: bool) -> Fact:
    clause, thing = entry.split(": ")
    return Fact("second hop", f"what {clause}", thing, f"{clause} {thing}", is_held_out)


def build_list_facts(kind: str, table: Mapping[str, str]) -> list[Fact]:
    """Return the facts of a table, of which every third of each list is held out."""
    facts = []
    for value, text in table.items():
        for index, thing in enumerate(split_list(text)):
            if kind == "number":
                facts.append(build_number_fact(thing, value, index % 3 == 2))
                continue
            form = MOTION_STATEMENTS[value] if kind == "motion" else STATEMENTS[kind]
            facts.append(Fact(kind, thing, value, form.format(thing=thing, value=value), index % 3 == 2))
    return facts


def build_arithmetic_facts() -> list[Fact]:
    """Return the sums, differences and fractions with a result from one to four.

    Those with which a request continues from a number of parts ("one more than ...") are never held out.
    """
    sums = {f"{NUMBERS[a]} plus {NUMBERS[b]}": a + b for a in range(1, 4) for b in range(1, 5 - a)}
    differences = {
        f"{NUMBERS[a]} minus {NUMBERS[b]}": a - b for a in range(2, 8) for b in range(1, a) if a - b <= 4 and b <= 4
    }
    fractions = {
        f"{name} of {NUMBERS[divisor * result]}": result
        for name, divisor in (("a third", 3), ("a quarter", 4))
        for result in range(1, 5)
        if divisor * result < len(NUMBERS)
    }
    others = {"two times one": 2, "two times two": 4, "three times one": 3, "one times four": 4, "half of six": 3}
    others |= {f"two more than {NUMBERS[n]}": n + 2 for n in (1, 2)} | {"three more than one": 4, "half of eight": 4}
    others |= {f"two less than {NUMBERS[n]}": n - 2 for n in range(3, 7)}
    continuations = {f"one more than {NUMBERS[n]}": n + 1 for n in range(1, 4)}
    continuations |= {f"one less than {NUMBERS[n]}": n - 1 for n in range(2, 6)}
    continuations |= {"twice one": 2, "twice two": 4, "half of two": 1, "half of four": 2}
    texts = sums | differences | fractions | others
    facts = [(text, result, index % 2 == 1) for index, (text, result) in enumerate(texts.items())]
    facts += [(text, result, False) for text, result in continuations.items()]
    return [
        Fact("arithmetic", text, NUMBERS[result], f"{text} is {NUMBERS[result]}", is_held_out)
        for text, result, is_held_out in facts
    ]


def build_facts() -> tuple[Fact, ...]:
    tables = {
        "colour": COLOUR_THINGS, "shape": SHAPE_THINGS, "background": BACKGROUND_THINGS, "motion": MOTION_THINGS,
        "size": SIZE_THINGS, "number": NUMBER_THINGS,
    }  # fmt: skip
    facts = [fact for kind, table in tables.items() for fact in build_list_facts(kind, table)]
    facts += [build_second_hop(entry, index % 3 == 2) for index, entry in enumerate(split_list(SECOND_HOPS))]
    facts += build_arithmetic_facts()
    for first, second in OPPOSITES.items():
        thing = f"the opposite of {first}"
        facts.append(Fact("opposite", thing, second, f"{thing} is {second}", False))
    return tuple(facts)


FACTS = build_facts()


def index_facts() -> dict[tuple[str, str, bool], tuple[Fact, ...]]:
    """Return the facts by (kind, value, whether it is held out)."""
    groups: dict[tuple[str, str, bool], list[Fact]] = defaultdict(list)
    for fact in FACTS:
        groups[fact.kind, fact.value, fact.is_held_out].append(fact)
    return {key: tuple(group) for key, group in groups.items()}


FACTS_BY_VALUE = index_facts()


def get_opposite_fact(value: str) -> Fact:
    """Return the fact that names this value as the opposite of another: "the opposite of left is right" for right."""
    return FACTS_BY_VALUE["opposite", value, False][0]


def ask_about_fact(rng: random.Random, fact: Fact) -> str:
    """Return a question whose answer is the fact's statement."""
    form = rng.choice(QUESTION_FORMS[fact.kind])
    if fact.kind == "number":
        owner, parts = fact.thing.replace(" have ", " has ").split(" has ")
        text = form.format(parts=parts, owner=owner)
        return text if " have " not in fact.thing else text.replace("does the", "do the").replace(" has", " have")
    return form.format(fact.thing, clause=fact.thing.removeprefix("what "))


def sample_knowledge_question(rng: random.Random) -> tuple[str, str]:
    """Return a question about a random fact, held out or not, and its answer."""
    fact = rng.choice(FACTS)
    return ask_about_fact(rng, fact), fact.statement
