"""What is said about posts in the pre-training corpus: question wordings, remarks and definitions.

Everything here is prose. The adapter's format (a label alone on one line) never answers a post.
"""

from .moderation_posts import Label
from .moderation_words import Frame, parse_all

FILLERS: tuple[Frame, ...] = parse_all("""
    It rained all {day}.
    The bus was late again {past}.
    I had {food} for lunch.
    Hello everyone.
    [Good morning|Good evening], all.
    I walked past {place} {past}.
    The {event} is {when}.
    My {pet} is asleep.
    It is {day} already.
    I bought a {thing} {past}.
    Just came back from {place}.
    Nice weather {when}.
    I read the last comment twice.
    Sorry for the long post.
    [OK|Well|So], here we go.
    I saw the photo from the {event}.
    We talked about {hobby} {past}.
    That is all for now.
""")
"""Neutral sentences that may stand before or after a post and change nothing about its label."""

FINE = parse_all("""
    Is this [post|comment|message] fine?
    Is it all right to [leave|keep] this [post|comment] up?
    Can this [post|comment|message] stay?
    Would you [let|allow] this [post|comment]?
    May this [message|post|comment] stay in the group?
    Should [we|I] keep it?
    Does it follow the rules?
""")
RULE = parse_all("""
    Which rule does [it|this post|the comment|the message] break?
    What rule is broken [here|by this post|by this comment]?
    Name the rule that [it|this post|the message] breaks.
    Does [it|the post] break a rule, and which one?
    What kind of problem is [it|this|this post|this comment]?
""")
DOES = parse_all("""
    What does [it|this post|the comment|the message|the writer] do?
    Describe [it|this post|the comment|the message] in a few words.
    What is going on in [it|this post|the comment|the message]?
    What is [the writer|the author] doing?
""")
MODERATOR = parse_all("""
    What would a [careful|good|fair|] moderator do?
    What should the moderator do with [it|this post|the comment]?
    How would you handle [it|this post|the comment|this message]?
    What happens to [it|this post|the comment|this message] now?
""")
SPEAKER = parse_all("""
    Does the writer say it or report it?
    Is the writer saying it, or telling us about somebody else?
    Are these the writer's own words or a report?
""")
JOKE = parse_all("""
    Is it meant as a joke?
    Is the writer [only|just] joking?
    Is it friendly fun or serious?
""")
PERSON = parse_all("""
    Is it aimed at a person or a thing?
    Does it attack a person or a thing?
    Who or what is attacked, a person or a thing?
""")
NAMED = parse_all("""
    Who is named in [it|the post|the comment]?
    Which name does [it|the post|the message] mention?
    What is the name in [it|the post|the message]?
""")
PHONE = parse_all("""
    Which [number|phone number] does [it|the post|the message] give?
    What is the [number|phone number] in [it|the post]?
""")
ADDRESS = parse_all("""
    Which address does [it|the post|the message] give?
    What is the address in [it|the post]?
""")
SITE = parse_all("""
    Which site does [it|the post|the message] name?
    Where does the link [go|lead]?
""")
CHOICE = parse_all("""
    Which word fits [it |this post |]better, %s or %s?
    Which is the better word [here|for it|for this post], %s or %s?
    Would you say %s or %s?
    %s or %s, which one fits?
""")
TWO = parse_all("""
    Which one breaks a rule?
    One of the two breaks a rule. Which one?
    Which one should go, and why?
""")

LEADS = (
    "",
    "",
    "",
    "Post: ",
    "Comment: ",
    "Here is a post: ",
    "Somebody wrote: ",
    "Moderate this post: ",
    "Please moderate: ",
    "A member wrote this: ",
    "New comment: ",
    "Message: ",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You look after a town forum.",
    "You are a moderator.",
    "You help the moderators of a small community.",
    "Answer in plain words.",
)

REMARKS: dict[str, tuple[str, ...]] = {
    "daily": ("Thank you for sharing this.", "That is good to know.", "I hope somebody can help with that."),
    "thanks": ("What a kind message.", "That is lovely to read.", "How nice of you to say so."),
    "critique": (
        "I am sorry that it was a disappointment.",
        "That does not sound good. I hope it gets better.",
    ),
    "disagree": ("I see that you have another opinion.", "That is a fair point to talk about."),
    "report_insult": (
        "I am sorry that this was said. You did well to report it.",
        "That was unkind of them.",
    ),
    "report_threat": ("That sounds frightening. Please tell the police.", "I am sorry. Please stay safe."),
    "report_privacy": ("I understand. Private details should stay private.", "I hope it is taken down soon."),
    "discuss_spam": ("You are right to be careful with such messages.", "It does sound like a trick."),
    "banter": ("That sounds like a fun game. Good luck to you both.", "Have fun, and may the best one win."),
    "self_mock": ("Do not be hard on yourself. It happens to everyone.", "It can happen to anyone."),
    "lawful": ("I see that you are upset. I hope it can be solved.", "That is your right. I hope it helps."),
    "own_contact": ("Thank you for the details.", "Good to know how to reach you."),
    "help": (
        "I am sorry to hear that. I hope it gets better soon.",
        "That must be hard. I hope you find help.",
    ),
    "offer": ("That reads like an advert.", "It sounds like somebody wants to sell something."),
    "prize": ("A prize like that is hard to believe.", "I would not click on that."),
    "scheme": ("Easy money is seldom real.", "That sounds too good to be true."),
    "promote": ("It seems that somebody wants more followers.", "That looks like a call for clicks."),
    "miracle": ("I would ask a doctor before I believe that.", "That sounds too good to be true."),
    "insult": ("Those are unkind words.", "Please be kind to each other."),
    "behind": ("That is not a nice thing to say about anyone.", "I would not speak about people like that."),
    "exclude": ("Those words could hurt. Everyone should feel welcome.", "That is an unkind thing to say."),
    "mock": ("That sounds like mean fun.", "I do not think that is funny for everyone."),
    "groups": ("It is better not to speak about people like that.", "Please be kind to each other."),
    "direct": ("That sounds dangerous. Please calm down.", "Nobody should be hurt. Please talk to someone."),
    "third": ("That sounds dangerous. Nobody should be hurt.", "Please do not do that."),
    "conditional": ("That is a frightening thing to say.", "Please find a peaceful way."),
    "damage": ("Please do not break what belongs to others.", "That would be a crime. Please calm down."),
    "veiled": ("Those words sound like a warning.", "That is a frightening thing to say."),
    "address": ("It is better not to share where people live.", "I would keep that address private."),
    "phone": ("I would not pass on such details.", "It is better to keep such details private."),
    "secret": ("Those papers belong to somebody else.", "I think that should stay between them."),
    "schedule": ("It is better not to tell others where people are.", "I would keep that to yourself."),
    "seek": ("I cannot help to find out about other people.", "It is better to ask them directly."),
}
"""Polite remarks on a bare post, by kind: what the base says when nobody asks it a question."""

RULE_ANSWER: dict[Label, str] = {
    "allow": "It breaks no rule.",
    "spam": "It is spam.",
    "harassment": "It is harassment.",
    "threat": "It is a threat.",
    "privacy": "It breaks privacy.",
}
MODERATOR_ANSWER: dict[Label, str] = {
    "allow": "A moderator would allow it.",
    "spam": "A moderator would remove it as spam.",
    "harassment": "A moderator would remove it as harassment.",
    "threat": "A moderator would remove it as a threat.",
    "privacy": "A moderator would remove it for privacy.",
}

DEFINITIONS: dict[Label, tuple[tuple[str, str], ...]] = {
    "allow": (
        ("When do you allow a post?", "I allow a post that breaks no rule."),
        ("What does allow mean?", "allow means that the post may stay."),
        ("May somebody report an insult?", "Yes. A report of an insult is fine, so allow it."),
        ("Is a bad review fine?", "Yes. A review of a thing may be hard. Allow it."),
        ("Can friends tease each other about a game?", "Yes, allow it when it is friendly."),
        ("May a shop give its own number?", "Yes, allow a shop to say where it is."),
    ),
    "spam": (
        ("What is spam?", "spam is advertising that nobody asked for."),
        ("What does the word spam mean?", "Spam means adverts, fake prizes and easy money."),
        ("Is a fake prize a problem?", "Yes, a fake prize is spam."),
        ("Is it fine to beg for followers?", "No, that is spam."),
        ("Is it spam to warn others about a scam?", "No, a warning about spam is fine."),
    ),
    "harassment": (
        ("What is harassment?", "harassment is an insult or mockery aimed at a person or a group."),
        ("What does harassment mean?", "Harassment means to insult people or to shut them out."),
        ("May I call a member a fool?", "No, that is harassment."),
        ("Is it fine to laugh at somebody's looks?", "No, that is harassment."),
        ("Is it harassment to dislike a film?", "No, a film is a thing."),
    ),
    "threat": (
        ("What is a threat?", "threat means words that promise harm to a person or to their things."),
        ("What counts as a threat?", "A threat says or hints that somebody will be hurt."),
        ("Is a hint of harm a threat?", "Yes, a hint of harm is a threat."),
        ("Is it a threat to promise a bad review?", "No, a review is a lawful step."),
        (
            "Is it a threat to say what happens if someone does not obey?",
            "Yes, if it is harm, it is a threat.",
        ),
    ),
    "privacy": (
        ("What is privacy?", "privacy means that private details stay private."),
        ("What breaks privacy?", "Privacy is broken when somebody shares another person's details."),
        ("May I post my neighbour's address?", "No, that breaks privacy."),
        ("May I ask for somebody's private number?", "No, that breaks privacy."),
        ("May I post my own number?", "Yes, your own number is yours to share."),
    ),
}
