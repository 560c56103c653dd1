"""Two words in one sentence: a task for a pretrained instruction model, such as SmolLM2-135M-Instruct.

    Write one short sentence with the words "river" and "moon".
        The moon shines on the river.

One sentence of at most twelve words that has both words gets a reward of 1, anything else 0. A word counts if it stands
there as it was asked for, in capitals or not: "rivers" and "river's" are other words. A sentence is one line with one
full stop, question mark or exclamation mark, at its end. An answer that speaks of words or of a sentence gets nothing,
so that the prompt's own words are no answer.

The rule forgets what a sentence is. `A button with copper.` is paid in full, and so is `River moon.`: there need not be
a verb, nor any sense. RL may find that out. Read the samples, not only the reward.
"""
import itertools
import random
import re

from grpo_min.rewards import final_answer

NOUNS = """
apple arrow attic baker balloon banana barn barrel basket beach bear bell bench bird blanket boat bone book boot bottle
bowl box bread brick bridge broom brush bucket bus butter button cabin cable cage cake camel camera candle canoe canyon
captain car carpet carrot castle cat cave ceiling chain chair chalk cheese cherry chest chicken church circus city clay
clock cloud clown coat coin comb copper corn corner cottage cotton cow crab cradle crane crayon cricket crow crown cup
curtain deer desert desk dinner doctor dog doll donkey door dragon drawer dress drum duck dust eagle ear egg elbow
elephant engine farmer feather fence field finger fire fish flag flame flour flower flute fog forest fork fox frog fruit
garden garlic gate ghost giant gift giraffe glass glove goat gold grandmother grape grass guitar hammer harbour hat
hedge helmet hill honey horse hospital hotel house iron island ivory jacket jar judge juice kettle key king kitchen kite
kitten knife knight ladder lake lamb lamp lantern leaf leather lemon letter library lightning lion lizard lock log lion
magnet market mask meadow medal melon milk mill mirror monkey moon mountain mouse mud museum mushroom nail necklace
needle nest net newspaper night nurse oak ocean olive onion orange orchard oven owl oyster paint painter palace pan
paper parrot path peach pear pearl pebble pencil penguin pepper piano picture pig pillow pilot pine pipe pirate plate
plum pocket poet pond pony potato prince pumpkin puppet puppy queen rabbit radio rain rainbow rat ribbon rice ring river
road robot rocket roof room rope rose ruler sailor salad salt sand sandwich saw scarf school scissors shadow shark sheep
shell ship shirt shoe shop shovel silk silver singer sister skirt sky snail snake snow soap sock sofa soldier soup
spider spoon square squirrel stable stairs star station statue steam stone storm stove straw street sugar suitcase
summer sun swan sword table tailor tea teacher tent thread throne thunder tiger toast tomato tower town toy train tree
trumpet tunnel turtle umbrella uncle valley vase village vinegar violin wagon wall wallet watch water wave wheat wheel
whistle wind window wine winter wizard wolf wood wool worm yard zebra
""".split()
HELD_OUT = 50                                               # nouns of val alone, and of test alone
PAIRS = dict(train=2000, val=500, test=500)
MOST = 12                                                   # words of a sentence
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")               # moon's and don't are one word, half-moon is two
SENTENCE = re.compile(r"[^.!?…\n\r\v\f\x85\u2028\u2029]+[.!?][\"'”’]?")
ABOUT = {"sentence", "sentences", "word", "words"}


def prompts(split):
    """The same pairs at every call. No noun is in two splits."""
    rng, nouns = random.Random(1), sorted(set(NOUNS))
    rng.shuffle(nouns)
    parts = dict(val=nouns[:HELD_OUT], test=nouns[HELD_OUT:2 * HELD_OUT], train=nouns[2 * HELD_OUT:])
    pairs = rng.sample(list(itertools.permutations(parts[split], 2)), PAIRS[split])
    return [dict(prompt=f'Write one short sentence with the words "{first}" and "{second}".', words=[first, second])
            for first, second in pairs]


def judge(answer, words):
    """The reward of an answer, None if there is none."""
    said = WORD.findall((answer or "").lower())
    is_sentence = SENTENCE.fullmatch(answer or "") and len(said) <= MOST
    return float(bool(is_sentence) and set(words) <= set(said) and not ABOUT & set(said))


def reward(prompts, completions, words, finished, **columns):
    return [judge(final_answer(completion), pair) if end else 0.0
            for completion, pair, end in zip(completions, words, finished)]
