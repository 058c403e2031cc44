"""Words of emotion are taken out of captions, and nothing else is."""

import doctest

import pytest

import face_data.captions
from face_data.captions import take_emotion_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a smiling woman", "a woman"),
        ("an angry woman", "a woman"),
        ("a happy elderly man and a sad child", "an elderly man and a child"),
        ("a very angry, screaming man with a beard", "a man with a beard"),
        ("a woman is smiling at the camera", "a woman"),
        ("the man looks tired and bored", "the man"),
        ("a boy with a big smile on his face", "a boy"),
        ("an old man with a smile and a hat", "an old man with a hat"),
        ("woman, happy, smiling, brown hair", "woman, brown hair"),
        (
            "a close-up portrait of a 30-year-old Asian woman experiencing intense jealousy and envy, with"
            " furrowed brows and pursed lips, studio lighting",
            "a close-up portrait of a 30-year-old Asian woman, studio lighting",
        ),
        (
            "Full-face shot of a young African man, his expression of pure joy. He is smiling. The background"
            " is blurred.",
            "Full-face shot of a young African man. The background is blurred.",
        ),
        (
            "A portrait of a woman looking surprised, mouth wide open, eyes wide, in front of a wall.",
            "A portrait of a woman, in front of a wall.",
        ),
        ("a man with tears in his eyes", "a man"),
        ("Happy", ""),
    ],
)
def test_words_of_emotion_go_with_what_hangs_on_them(text, expected):
    clean, taken = take_emotion_words(text)
    assert clean == expected and taken
    # Nothing is left to take.
    assert take_emotion_words(clean) == (clean, [])


@pytest.mark.parametrize(
    "text",
    [
        "a girl in a park",
        "a content creator in Sadler's Wells",
        "a woman with  two spaces, who was here",
        "a man from Madrid with a painted hat, reading",
        "a boy tearing paper",
        "",
    ],
)
def test_other_captions_stay_as_they_are(text):
    assert take_emotion_words(text) == (text, [])


# A word of each category of the data set EmoNet-Face.
EMOTIONS = """
amusement elation pleasure contentment thankfulness affection infatuation hope triumph pride interest awe astonishment
concentration contemplation relief longing teasing impatience lust doubt fear distress confusion embarrassment shame
disappointment sadness bitterness contempt disgust anger malevolence sourness pain helplessness fatigue numbness
intoxication jealousy
"""


@pytest.mark.parametrize("emotion", EMOTIONS.split())
def test_each_emotion_of_a_taxonomy_of_forty_is_known(emotion):
    assert take_emotion_words(f"a photo of a man expressing {emotion}") == ("a photo of a man", [emotion])


def test_each_word_is_told_as_often_as_it_was_there():
    assert take_emotion_words("A SMILING girl, a smiling boy")[1] == ["smiling", "smiling"]


def test_the_example_of_the_documentation_holds():
    assert doctest.testmod(face_data.captions).failed == 0
