# SPDX-License-Identifier: Apache-2.0
"""
Captions without their words of emotion. Where the text says "smiling", it explains the face in the training picture,
and the AUs learn nothing.

Example:
    >>> take_emotion_words("a photo of an angry old man with a furious look, in a park")
    ('a photo of an old man, in a park', ['angry', 'furious'])
"""

import re


# The columns of tables and data sets that may hold captions, the most likely first.
CAPTION_COLUMNS = ("text", "caption", "prompt", "textdescription")
# Families of words, each a pattern of whole words: emotions and moods (those of the data set EmoNet-Face among them),
# what a face does, and what somebody does who shows them.
EMOTION_WORDS = """
happ(y|ily|iness|ier|iest) unhapp(y|ily|iness) joy(s|ful|fully|fulness|ous|ously)? cheer(ful|fully|fulness|y|ily|ing)
glad(ly|ness)? delight(ed|edly|ful|fully)? pleas(ed|ure|ured|ant|antly) content(ed|edly|ment|edness)
ecsta(sy|tic|tically) elat(ed|edly|ion) amus(ed|edly|ing|ement) euphori(a|c|cally) bliss(ful|fully)?
jubila(nt|ntly|tion) exuberan(t|tly|ce) excit(ed|edly|ement) thrill(ed)? enthusias(m|tic|tically) eager(ly|ness)?
hope(ful|fully|fulness)? optimis(m|tic|tically) grat(eful|efully|itude) thank(ful|fully|fulness) affection(ate|ately)?
lov(e|ing|ingly) ador(ation|ing|ingly) infatuat(ed|ion) tender(ly|ness)? passion(ate|ately)? lust(ful|fully)?
sexual(ly)? arous(ed|al) seduct(ive|ively) flirt(y|ing|atious|atiously)? triumph(ant|antly)? proud(ly)? pride(ful)?
victorious(ly)? smug(ly|ness)? arrogan(t|tly|ce) confiden(t|tly|ce) interest(ed|edly)? curio(us|usly|sity) intrigu(ed)?
fascinat(ed|ion) aw(e|ed|estruck) awe-struck wonder(ing|ment|struck)? astonish(ed|ment)? amaz(ed|ement)
surpris(e|ed|edly) shock(ed)? startl(ed|e) stunned concentrat(ed|ing|ion) focused contemplat(ion|ive|ively|ing)
thoughtful(ly|ness)? pensive(ly|ness)? brooding reliev(ed) relief relax(ed|ation)? calm(ly|ness)? peaceful(ly|ness)?
seren(e|ely|ity) longing(ly)? yearning wistful(ly|ness)? nostalgi(a|c) teas(ing|ingly) mischiev(ous|ously|ousness)
playful(ly|ness)? cheek(y|ily) impatien(t|tly|ce) irrita(ted|tedly|tion|ble|bility) annoy(ed|ance) frustrat(ed|ion)
agitat(ed|ion) doubt(s|ful|fully)? skeptic(al|ally|ism) sceptic(al|ally|ism) suspicious(ly)? fear(s|ful|fully)? afraid
scared? frighten(ed)? terrif(ied|ying) terror horrified horror panic(ked|king)? anxi(ous|ously|ety) nervous(ly|ness)?
worr(y|ied|iedly|ying) distress(ed)? desperat(e|ely|ion) despair(ing)? confus(ed|edly|ion) puzzl(ed|ement)
bewilder(ed|ment) perplex(ed)? baffled embarrass(ed|ment) asham(ed) sham(e|eful|efully) guilt(y|ily)? shy(ly|ness)?
bashful(ly)? humiliat(ed|ion) disappoint(ed|edly|ment) sad(ly|ness|der|dened)? sorrow(s|ful|fully)?
grie(f|ving|f-stricken) mourn(ful|fully|ing) melanchol(y|ic) gloom(y|ily)? depress(ed|ion) miserabl(e|y) misery
heartbroken dejected(ly)? upset lonely loneliness hopeless(ly|ness)? helpless(ly|ness)? bitter(ly|ness)?
resent(ful|fully|ment) contempt(uous|uously)? disdain(ful|fully)? scorn(ful|fully)? disgust(ed|edly)? revulsion
repuls(ed|ion) disapprov(al|ing|ingly) ang(er|ry|rily|ered) fur(y|ious|iously) rag(e|ing) enraged mad(ly)? outrag(e|ed)
wrath(ful)? hostil(e|ity) hat(e|red|eful) aggress(ive|ively|ion) malevol(ent|ently|ence) malic(e|ious|iously)
spite(ful|fully)? menacing(ly)? sinister cruel(ly|ty)? sour(ness|ly)? pain(s|ed|ful|fully)? agon(y|ized|izing)
anguish(ed)? suffering hurt fatigu(e|ed) exhaust(ed|ion) tired(ly|ness)? weary wear(ily|iness) sleepy drowsy bored
boredom boring numb(ness)? apath(y|etic) indifferen(t|ce) intoxicat(ed|ion) drunk(en)? jealous(ly|y)?
env(y|ious|iously) emotion(s|al|ally|less)? mood(y)? neutral determin(ed|ation) stern(ly|ness)? serious(ly|ness)?
grumpy grim(ly)? sulk(y|ing|ily)? pleading(ly)? compassion(ate)? sympath(y|etic) empath(y|etic)
smil(e|es|ed|ing|ingly|ey) grin(s|ned|ning)? laugh(s|ed|ing|ter|ingly)? giggl(e|es|ed|ing) chuckl(e|es|ed|ing) beaming
smirk(s|ed|ing)? frown(s|ed|ing)? scowl(s|ed|ing)? sneer(s|ed|ing)? snarl(s|ed|ing)? grimac(e|es|ed|ing)
pout(s|ed|ing|y)? wink(s|ed|ing)? cry(ing)? cries cried weep(s|ing|y)? wept sob(s|bed|bing)? tears tear(ful|fully|y)
scream(s|ed|ing)? yell(s|ed|ing)? shout(s|ed|ing)? shriek(s|ed|ing)? gasp(s|ed|ing)? yawn(s|ed|ing)? glar(e|es|ed|ing)
winc(e|es|ed|ing) cring(e|es|ed|ing) blush(es|ed|ing)? dimpl(es|ed)
"""

# What a face does, in more than one word.
EXPRESSION_PHRASES = (
    r"(?:raised|arched|lifted|furrowed|knitted|lowered|drawn|drawn-together) (?:eye)?brows?",
    r"(?:eye)?brows? (?:are |is )?(?:slightly )?(?:raised|arched|furrowed|knitted|lowered|drawn together)",
    r"(?:wide|widened|wide-open|squinted|squinting|narrowed) eyes",
    r"eyes (?:are )?(?:wide open|wide|widened|squinted|narrowed)",
    r"(?:wide|open|gap)[- ](?:eyed|mouthed|jawed)|slack-jawed",
    r"(?:wide[- ])?(?:open|gaping) mouth|mouth (?:is )?(?:slightly |wide |half )?(?:open|agape|ajar)|agape",
    r"(?:dropped|clenched|set) jaw|jaw (?:is )?(?:dropped|clenched|set)",
    r"(?:pursed|pressed|puckered|parted|trembling|quivering|curled|downturned|upturned) (?:lips?|mouth)",
    r"lips? (?:are |is )?(?:pursed|pressed together|pressed|puckered|parted|trembling|quivering|curled)",
    r"(?:bared|clenched|gritted) teeth|(?:showing|baring) (?:her |his |their |the )?teeth|toothy",
    r"(?:wrinkled|scrunched|scrunched-up) nose|nose (?:is )?(?:wrinkled|scrunched)",
    r"raised cheeks|corners? of (?:the|her|his|their) (?:mouth|lips)(?: \w+ed)?(?: (?:up|down)(?:wards?)?)?",
)

# Stands where a word was taken out.
_M = "\0"
_WORD = re.compile(rf"\b({'|'.join((*EXPRESSION_PHRASES, *EMOTION_WORDS.split()))})\b(?!-)", re.IGNORECASE)
_DEGREE = (
    r"(?:very|deeply|extremely|slightly|somewhat|intensely|mildly|genuinely|genuine|slight|intense|deep|strong|subtle|"
    r"mild|extreme|profound|pure|clear|visible|visibly|obvious|obviously|broad|big|huge|wide|warm|bright|gentle|soft|faint|sly|"
    r"heavy|quiet|utter|absolute|sheer|so|really|quite|both|overwhelming|overwhelmed by)"
)
_ARTICLE = r"(?:a|an|the|his|her|their|its|some|your)"
_SHOWN = (
    r"(?:facial )?(?:expressions?|looks?|gaze|stare|feelings?|sense|hint|mix|mixture|signs?|state|attitude|air|"
    r"demeanou?r)"
)
_LEAD = (
    r"(?:with|while|showing|shows?|expressing|expresses|displaying|displays|conveying|conveys|exhibiting|exhibits|"
    r"experiencing|experiences|feeling|feels|looking|looks|appearing|appears|seeming|seems|wearing|wears|having|has|being|making|filled|"
    r"full|of|in|out of|from|for|by|and|or|but|who|that|is|are|was|were|to)"
)
_FOLLOW = (
    r"(?=\s*(?:$|[.,;:!?)\n]|(?:and|or|with|while|as|in|on|at|by|from|against|under|near|before|after|who|that|because|"
    r"for|wearing)\b))"
)
# What was said of the emotion goes with it, until nothing changes any more.
_STEPS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (rf"\b{_DEGREE} {_M}", _M),
        (rf"{_M}(?:\s*(?:,|/|&|-|\band\b|\bor\b|,\s*and\b)\s*{_M})+", _M),
        (rf"\b(with|wearing|in) (?:{_ARTICLE} )?{_M}(?: and|,) (?={_ARTICLE} )", r"\1 "),
        (rf"\b(?:{_ARTICLE} )?{_SHOWN} of (?:{_ARTICLE} )?{_M}", _M),
        (rf"{_M} {_SHOWN}(?: on (?:{_ARTICLE} )?face)?\b", _M),
        (rf"{_M} (?:at|to|toward|towards|into) (?:{_ARTICLE} )?(?:camera|viewer|lens)\b", _M),
        (rf"{_M} (?:on|in|across) {_ARTICLE} (?:face|eyes)\b", _M),
        (rf"(?:,\s*)?\b{_LEAD} (?:{_ARTICLE} )?{_M}{_FOLLOW}", f" {_M}"),
        (rf"(?:,\s*)?\b{_ARTICLE} {_M}{_FOLLOW}", f" {_M}"),
    )
)


def take_emotion_words(text: str) -> tuple[str, list[str]]:
    """
    Take words of emotion and of expression out of an English caption, and what they leave dangling, such as "with a
    … look". A caption without such words stays as it is.

    Returns:
        `tuple[str, list[str]]`: the caption, which may be empty, and the words and phrases taken out, in lower case.
    """
    taken = []

    def mark(match: re.Match) -> str:
        taken.append(match[0].lower())
        return _M

    marked = _WORD.sub(mark, text.replace(_M, " "))
    if not taken:
        return text, []
    previous = None
    while previous != marked:
        previous = marked
        for pattern, replacement in _STEPS:
            marked = pattern.sub(replacement, marked)
    return _tidy(marked), taken


def _tidy(marked: str) -> str:
    # "an angry old man" is "an old man", and "an angry man" is "a man".
    marked = re.sub(rf"\b(a)n? {_M}+\s*(?=(\w))", _article, marked, flags=re.IGNORECASE)
    sentences = re.split(r"(?<=[.!?;])\s+", marked)
    # Where nothing but a subject is left, the sentence was about the expression.
    kept = [s for s in sentences if _M not in s or len(re.findall(r"\w+", s)) > (2 if len(sentences) > 1 else 0)]
    text = " ".join(" ".join(kept).replace(_M, " ").split())
    text = re.sub(r"\(\s*\)", "", text)
    text = re.sub(r"\s+([,.;:!?)])", r"\1", text)
    text = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", text)
    text = re.sub(r"[,;:]+([.!?])", r"\1", text)
    text = re.sub(r"^[\s,;:.]+(?:and |or )?", "", text)
    return re.sub(r"(?:[\s,;:]|\b(?:and|or|with)$)+$", "", text)


def _article(match: re.Match) -> str:
    return match[1] + ("n " if match[2].lower() in "aeiou" else " ")
