"""What the sounds are called: wordings to train on, and others, of the same words, that only tests use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# One row per class: wordings for training / wordings for tests. Every word of a test wording occurs in training.
_WORDINGS: dict[str, tuple[str, str]] = {
    "speech": (
        "speech|a person talking|someone speaking|a man speaking|a woman talking|a human voice|people talking|a voice|"
        "spoken words|"
        "a person speaks|someone talks|a talking man|human speech|a conversation",
        "a woman speaking|a person speaking|a man talking|a human talking|the voice of a person|someone talking",
    ),
    "siren": (
        "siren|a siren|a siren wailing|an ambulance siren|a police siren|a wailing siren|an emergency vehicle|"
        "a police car|an ambulance|"
        "sirens|a fire engine siren|an emergency siren wails|a siren sounds",
        "a police siren wailing|the siren of an ambulance|a wailing emergency siren|an ambulance wailing|the siren of a police car",
    ),
    "alarm": (
        "alarm|an alarm|beeps|an alarm beeping|beeping|electronic beeps|an alarm clock|a smoke alarm|a beeping device|"
        "a timer beeps|"
        "an alarm beeps|warning beeps|a smoke detector beeping|an alarm sounds",
        "an alarm clock beeping|a beeping alarm|a device beeping|the beeps of an alarm|a beeping timer",
    ),
    "bell": (
        "bell|a bell|a bell ringing|a church bell|bells|a ringing bell|bells ringing|a bell rings|"
        "a church bell tolling|a tolling bell|"
        "a chime|a bell is struck|the chimes of a church",
        "a church bell ringing|a bell tolling|the bell of a church|church bells ringing|a bell chimes",
    ),
    "engine": (
        "engine|an engine|an engine running|a motor|a car engine|an idling engine|a truck engine|a motor running|"
        "an engine hums|a running car|"
        "a motor humming|the hum of an engine|a truck idling|a diesel engine",
        "a car engine running|an engine idling|a running motor|the hum of a motor|a truck engine running|a diesel motor humming",
    ),
    "rain": (
        "rain|the rain|rain falling|heavy rain|rainfall|falling rain|rain drops|raining|it is raining|rain pours|pouring rain|"
        "a rain shower|drops of rain on a roof|steady rain",
        "heavy rain falling|rain pouring|rain on a roof|the drops of falling rain|a heavy rain shower",
    ),
    "wind": (
        "wind|the wind|wind blowing|a strong wind|the wind blows|blowing wind|gusts of wind|a howling wind|wind howls|"
        "a breeze|a gust|"
        "windy weather|the wind is howling|a gusty breeze",
        "a strong wind blowing|the howling wind|wind howling|a blowing gust of wind|strong gusts",
    ),
    "thunder": (
        "thunder|a thunderstorm|thunder rumbling|rolling thunder|a clap of thunder|thunder rolls|a thunder clap|rumbling thunder|"
        "a storm rumbles|thunder claps|thunder roars|a rumble of thunder|thunder strikes",
        "thunder rolling|claps of thunder|a thunderstorm rumbling|the rumble of a thunderstorm|rolling claps of thunder",
    ),
    "birds": (
        "birds|a bird|birds singing|birds chirping|a bird sings|bird song|chirping birds|a singing bird|a bird chirps|songbirds|"
        "tweeting birds|a bird tweets|the song of a bird|birdsong",
        "a bird singing|a chirping bird|birds tweeting|the song of birds|a bird chirping",
    ),
    "dog": (
        "dog|a dog|a dog barking|dogs barking|a barking dog|barks|a dog barks|barking|dogs bark|a puppy barking|a dog is barking|"
        "the bark of a dog|a puppy yaps",
        "dogs are barking|a puppy barks|barking dogs|the barking of a dog|the barks of dogs",
    ),
    "knocking": (
        "knocking|a knock|knocking on a door|someone knocks|knocks|a person knocking|knocking on wood|"
        "a knock on the door|tapping on wood|"
        "someone is knocking|a door is knocked|tapping|wooden knocks",
        "someone knocking on the door|knocks on a door|a person knocks on wood|a wooden door knocking|someone is tapping on wood",
    ),
    "guitar": (
        "guitar|a guitar|a guitar playing|an acoustic guitar|guitar music|plucked strings|a plucked guitar|"
        "someone plays guitar|guitar strings|"
        "a guitar melody|strumming|the strings of a guitar|a guitar is played",
        "an acoustic guitar playing|a guitar is plucked|someone plays an acoustic guitar|plucked guitar strings|playing a guitar melody",
    ),
    "organ": (
        "organ|an organ|an organ playing|organ music|a church organ|a pipe organ|organ chords|someone plays the organ|"
        "an organ is played|"
        "the pipes of an organ|chords on an organ|an organist",
        "a pipe organ playing|chords of an organ|church organ music|someone plays a pipe organ|a church organ is played",
    ),
    "flute": (
        "flute|a flute|a flute playing|flute music|a flute melody|someone plays the flute|a wooden flute|"
        "a flute is played|a flutist|a tune on a flute|"
        "the notes of a flute|a recorder|playing the flute",
        "playing a flute melody|a wooden flute playing|notes on a flute|a tune is played on the flute|someone plays a wooden flute",
    ),
    "drums": (
        "drums|a drum|drums playing|a drum kit|a drum beat|drumming|a drummer|percussion|someone plays the drums|"
        "a beat on the drums|"
        "a rhythm on drums|a drum set|drums are played",
        "a drum kit playing|a drummer drumming|the beat of a drum|someone plays a rhythm on the drums|percussion playing a beat",
    ),
    "fire": (
        "fire|a fire|a fire crackling|a crackling fire|crackling|flames|a campfire|wood burning|a burning fire|"
        "the fire crackles|burning wood|"
        "a fireplace|crackling flames|a campfire burns",
        "a campfire crackling|the crackling of burning wood|a crackling fireplace|flames burning|burning wood crackles",
    ),
    "telephone": (
        "telephone|a telephone|a telephone ringing|a phone ringing|a phone|a ringing telephone|a phone rings|"
        "a telephone rings|a ringtone|"
        "the ring of a phone|a phone call|a telephone bell|a ringing phone",
        "the ringing of a telephone|a phone is ringing|the ring of a telephone|a telephone call ringing|the ringtone of a phone",
    ),
    "crickets": (
        "crickets|a cricket|crickets chirping|a cricket chirps|chirping crickets|insects|insects chirping|"
        "crickets at night|a chirping insect|"
        "crickets chirp|the chirp of a cricket|insects buzzing at night|night insects",
        "a cricket chirping|crickets chirping at night|the chirp of insects|chirping night insects|the chirping of crickets",
    ),
}
TRAIN = {name: tuple(row[0].split("|")) for name, row in _WORDINGS.items()}
TEST = {name: tuple(row[1].split("|")) for name, row in _WORDINGS.items()}

_FRAMES = (
    (
        "{}",
        "{}",
        "{}",
        "the sound of {}",
        "a recording of {}",
        "{} can be heard",
        "sounds of {}",
        "{} nearby",
        "{} in the distance",
        "i hear {}",
    ),
    ("{}", "{}", "the sound of {}", "a recording of {} nearby", "i can hear {}", "{} heard in the distance"),
)
_PAIRS = (
    ("{} and {}", "{} with {} in the background", "{} with {}", "both {} and {}", "{} together with {}", "a mixture of {} and {}"),
    ("{} and {}", "{} together with {} in the background", "the sound of {} and {}", "a recording of {} with {}"),
)
_TRIPLES = (
    ("{}, {} and {}", "{} and {} with {} in the background", "a mixture of {}, {} and {}", "{} with {} and {}"),
    ("{}, {} and {}", "the sound of {}, {} and {}", "{} with {} and {} in the background"),
)


def caption(names: Sequence[str], random: np.random.Generator, *, test: bool) -> str:
    """A wording for one to three classes at once, in random order."""
    words = TEST if test else TRAIN
    order = random.permutation(len(names))
    parts = [str(random.choice(words[names[i]])) for i in order]
    frames = (_FRAMES, _PAIRS, _TRIPLES)[len(names) - 1][test]
    text = str(random.choice(frames)).format(*parts)
    if not test and random.random() < 0.15:
        text = text[0].upper() + text[1:] + ("." if random.random() < 0.5 else "")
    return text


def corpus(seed: int = 0, compositions: int = 4000) -> list[str]:
    """All training wordings in all frames and a seeded choice of compositions: what the tokenizer is trained on."""
    random = np.random.Generator(np.random.PCG64(seed))
    names = list(TRAIN)
    single = [frame.format(word) for words in TRAIN.values() for word in words for frame in _FRAMES[0]]
    several = [caption(list(random.choice(names, random.integers(2, 4), replace=False)), random, test=False) for _ in range(compositions)]
    return single + several
