"""What the world does not contain: objects, colours, backgrounds, motions, effects and large numbers.

Every list is written as one string of entries that are separated by commas; every third entry is held out.
"""

from omnivideo.synthetic.knowledge import split_list

UNKNOWN_OBJECTS = split_list("""
    cat, dragon, car, hexagon, dog, king, bicycle, heart, elephant, doctor, arrow, horse, princess, bus, cube, lion,
    pirate, airplane, pentagon, tiger, teacher, boat, rectangle, bear, knight, ship, oval, wolf, wizard, truck,
    octagon, rabbit, ninja, rocket, cylinder, mouse, robot, tractor, diamond, monkey, clown, helicopter, cone,
    giraffe, farmer, motorcycle, crescent, zebra, dancer, submarine, cross, penguin, singer, scooter, trapezoid,
    owl, nurse, taxi, rhombus, eagle, queen, tank, ellipse, parrot, soldier, tram, parallelogram, chicken, cowboy,
    ferry, prism, duck, mermaid, canoe, polygon, swan, vampire, sled, heptagon, cow, zombie, skateboard, decagon,
    pig, ghost, wheelchair, sheep, witch, house, cuboid, goat, baby, castle, pyramid, camel, boy, church, torus,
    kangaroo, girl, tower, helix, koala, man, letter, panda, woman, lighthouse, question mark, fox, child,
    skyscraper, plus sign, squirrel, dinosaur, barn, check mark, hedgehog, unicorn, windmill, smiley, snake, alien,
    tent, flag, crocodile, monster, igloo, map, turtle, angel, temple, frog, santa claus, palace, clock, fish,
    superhero, hut, watch, shark, astronaut, factory, key, whale, policeman, lamp, dolphin, chef, apple, chair,
    octopus, painter, banana, table, crab, footballer, pizza, sofa, lobster, skeleton, cake, bed, snail, fairy,
    burger, door, bee, giant, sandwich, window, butterfly, dwarf, cookie, book, spider, mother, carrot, pencil, ant,
    father, cherry, phone, ladybird, grandmother, lemon, laptop, mosquito, sailor, pear, bird, waiter, strawberry,
    guitar, seagull, judge, tomato, piano, crow, guard, mushroom, violin, peacock, student, egg, drum, flamingo,
    scientist, bread, trumpet, turkey, driver, cheese, umbrella, pigeon, boxer, ice cream, hat, bat, gardener,
    donut, shoe, tree, candle, shirt, flower, balloon, glove, rose, kite, crown, tulip, sword, cactus, cloud,
    guitarist, hammer, moon, teapot, ladder, leaf, sun, cup, gift, sunflower, planet, bottle, ring, spoon, coin,
    bush, comet, fork, anchor, pumpkin, snowman, knife, wheel, face, snowflake, vase, bell, hand, lightning bolt,
    basket, chain, eye, fountain, backpack, treasure chest, foot, satellite, ufo, fence, nose, telescope, statue
""")
PSEUDO_ONSETS = ("bl", "gr", "z", "fl", "kr", "m", "sn", "tr", "v", "w", "pl", "dr", "qu", "j", "th", "sp", "g", "n")
PSEUDO_VOWELS = ("a", "e", "i", "o", "u", "oo", "ee", "a", "o")
PSEUDO_ENDINGS = ("bble", "zork", "mpf", "lix", "nk", "ggo", "rp", "dle", "xin", "wump", "tik", "zzle")
UNKNOWN_COLOURS = split_list("""
    magenta, teal, beige, navy, silver, maroon, olive, bronze, copper, khaki, indigo, coral, salmon, peach, fuchsia,
    burgundy, cream, ivory, charcoal, slate, tan, ochre, mauve, taupe, sepia, chartreuse, periwinkle, vermilion,
    cerulean, sienna, umber, amber, rust, platinum, mahogany, mint, pistachio, bordeaux, terracotta, puce, ecru,
    claret, auburn, blond, ultramarine, celadon, viridian, rainbow-coloured, multicoloured, black, pink, brown,
    grey, gray, neon, pearl-coloured, sand-coloured, caramel-coloured, skin-coloured, wine-coloured, plum-coloured
""")
UNKNOWN_PLACES = split_list("""
    the beach, a forest, the city, a desert, paris, london, new york, the mountains, the sea, a lake, a river, the
    jungle, a park, a garden, a street, a highway, a bridge, my room, a kitchen, a bedroom, an office, a classroom,
    a school, a stadium, a field, a meadow, a farm, a village, an island, a volcano, a cave, a sunset, the sunrise,
    the night sky, a starry sky, the galaxy, the snow, the rain, an overcast sky, fog, a thunderstorm, a wooden
    floor, a brick wall, wallpaper, a checkerboard, a rainbow, the grass, sand, water, ice, flames, a stage, a
    museum, a library, a supermarket, a restaurant, a train station, the airport, the subway, a rooftop, an attic, a
    swimming pool, a playground, the zoo, a circus, a harbour, a waterfall, a canyon, a glacier, the savanna, a
    swamp, tokyo, berlin, rome, venice, mars, the great wall, a curtain, a football pitch, outer space, a vineyard,
    a market, africa, the north pole, a hospital, a dungeon, a bookshelf
""")
UNKNOWN_BACKGROUND_COLOURS = split_list("""
    red, blue, green, magenta, yellow, teal, orange, beige, purple, navy, cyan, silver, violet, maroon, turquoise,
    olive, crimson, ivory, golden, khaki, scarlet, coral, striped, indigo, dotted, patterned, mint, cream,
    checkered, floral
""")
# The verb, and after a colon its participle.
UNKNOWN_MOTIONS = split_list("""
    spin: spinning, rotate by 45 degrees: rotating by 45 degrees, jump: jumping, bounce: bouncing, spiral:
    spiralling, zigzag: zigzagging, explode: exploding, wave: waving, dance: dancing, wobble: wobbling, shake:
    shaking, vibrate: vibrating, roll: rolling, flip: flipping, swing: swinging, orbit the other one: orbiting the
    other one, fly in loops: flying in loops, run around: running around, hop: hopping, twist: twisting, pulse:
    pulsing, blink: blinking, flicker: flickering, topple over: toppling over, crawl: crawling, swim: swimming,
    walk: walking, run: running, climb: climbing, tumble: tumbling, whirl: whirling, twirl: twirling, do a
    somersault: doing a somersault, gallop: galloping, follow a curve: following a curve, move diagonally: moving
    diagonally, teleport: teleporting, split in half: splitting in half, collide: colliding, rotate: rotating, turn
    around: turning around, do a backflip: doing a backflip, rock back and forth: rocking back and forth, swirl:
    swirling, sway: swaying, shiver: shivering, tilt: tilting, lean over: leaning over, skip: skipping, sprint:
    sprinting, stumble: stumbling, circle around the middle: circling around the middle, bounce off the walls:
    bouncing off the walls, bounce up and down like crazy: bouncing up and down like crazy, crash: crashing, chase
    the other: chasing the other, melt: melting, burst: bursting, evaporate: evaporating, unfold: unfolding,
    stretch: stretching, bend: bending, turn upside down: turning upside down, spin like a top: spinning like a top,
    fly away: flying away, pirouette: pirouetting, rotate clockwise: rotating clockwise, oscillate: oscillating,
    dive: diving, ripple: rippling
""")
UNKNOWN_EFFECTS = split_list("""
    make it loop, give it a transparent background, add text saying sale, add music, blur it, make it 4k, make it
    monochrome, play it in reverse, use a cartoon style, zoom the camera in, fade it out, add a border, add a
    shadow, make it 3d, use a gradient, add an outline, mirror it, crop it, add subtitles, add a soundtrack, add a
    voice, make it look like an oil painting, use watercolours, sharpen it, increase the contrast, lower the
    brightness, add a filter, make it sepia toned, pan the camera, shake the camera, add a caption, write my name on
    it, write hello, put a watermark on it, add a logo, export it as a gif, save it as a pdf, send it by email,
    upload it, print it, share it, make it hd, upscale it, denoise it, add grain, add fog, add glitter, add
    sparkles, make it glow, make it shiny, make it metallic, add a texture, use a pattern, add stripes, add dots
    pattern, make it transparent, make it see-through, lower the opacity, add a reflection, change the lighting, add
    a spotlight, make it realistic, make it photorealistic, use pixel art, use anime style, make a collage, make a
    slideshow, add a transition, add fireworks, add confetti, rotate the picture, flip the picture, change the
    aspect ratio, make it vertical, make it widescreen, change the resolution, change the frame rate, play it at 60
    fps, add a sound effect, add a countdown, add a timer, add a title, add credits, add a speech bubble, add a
    frame around it, round the corners, feather the edges, add depth of field, use a fisheye lens, use a wide angle,
    tilt the camera, track it with the camera, add motion blur, make it retro, make it look old, use neon lights,
    make a poster, make a meme, make a logo, turn it into a sketch, make it hand-drawn, animate the lighting, colour
    grade it, invert the colours, add a vignette, remove the noise, stabilize it, add a grid, add axes, label it,
    add narration
""")
LARGE_NUMBERS = split_list("""
    five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen,
    nineteen, twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety, a hundred, one hundred, two hundred, a
    thousand, a million, a dozen, two dozen, twenty-five, ninety-nine, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 20, 24,
    30, 40, 50, 99, 100, 200, 1000
""")
