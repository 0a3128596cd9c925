"""Prompts to sample from: JSONL files given by the user, and templates whose answers vary in length.

One prompt is ``{"id": str, "domain": str, "messages": [...]}``. Four domains: ``math``,
``instructions`` (both from files), ``short_long`` (naturally very short or very long answers) and
``requested`` (a length is asked for in words).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOPICS = (
    "photosynthesis, the French Revolution, black holes, bread baking, chess openings, coral reefs, the printing "
    "press, volcanoes, public libraries, solar panels, the Roman Empire, jazz music, beekeeping, the water cycle, "
    "glaciers, electric cars, the human heart, poetry, gardening on a balcony, the stock market, antibiotics, "
    "lighthouses, medieval castles, machine learning, sleep, tea ceremonies, bicycles, the moon landing, "
    "rainforests, democracy, sourdough, whales, time zones, the Silk Road, robotics, opera, earthquakes, nutrition, "
    "origami, the internet, mountain climbing, vaccines, recycling, ancient Egypt, deserts, photography, trains, "
    "wolves, inflation, dreams, the violin, cybersecurity, wetlands, marathon running, comets, cheese making, board "
    "games, the Renaissance, urban farming, penguins, the periodic table, language learning, weather forecasting, "
    "submarines, graphic design"
).split(", ")
COUNTRIES = (
    "France, Japan, Brazil, Canada, Egypt, Kenya, Norway, Peru, India, Italy, Spain, Chile, Ghana, Nepal, Cuba, Iran, "
    "Poland, Greece, Turkey, Mexico, Vietnam, Austria, Portugal, Finland, Morocco, Iceland, Ireland, Thailand"
).split(", ")
WORDS = (
    "house, river, friend, green, winter, bread, window, happy, book, night, mother, bridge, small, music, garden, "
    "stone, horse, letter, clean, summer, cloud, silver, chair, brave, island, ocean, mirror, candle"
).split(", ")
SHORT = (
    "What is the capital of {country}?",
    "What is {a} + {b}? Answer with the number only.",
    "What is {a} times {c}?",
    "Translate '{word}' into French.",
    "Give one synonym for '{word}'.",
    "Is {a} an even number? Answer yes or no.",
    "What is the opposite of '{word}'? One word.",
    "Which continent is {country} in?",
    "Spell '{word}' backwards.",
    "Name one famous person connected with {topic}.",
    "True or false: {topic} existed a thousand years ago.",
    "Say hello in the language of {country}.",
    "Reply with only the word '{word}'.",
    "What currency is used in {country}?",
)
LONG = (
    "Write a detailed essay about {topic}.",
    "Write a long story about a traveller from {country} and {topic}.",
    "Explain {topic} thoroughly, covering history, causes, examples and common misconceptions.",
    "Write a complete beginner's guide to {topic} with sections and examples.",
    "Compare life in {country} and {country2} in detail.",
    "Write a dialogue between two experts who disagree about {topic}.",
    "Plan a two-week trip through {country}, day by day.",
    "Write a blog post about {topic} and why it matters.",
    "Describe a day in a town in {country} where everyone works on {topic}.",
)
REQUESTED = (
    "Explain {topic} in about {n} words.",
    "Write about {topic}. Your answer must be equal to {n} tokens.",
    "Write about {topic}. Your answer must be at most {n} tokens.",
    "Write about {topic}. Your answer must be at least {n} tokens.",
    "Describe {topic} in {k} sentences.",
    "Describe {topic} in one sentence.",
    "List {k} facts about {topic}.",
    "Write a story of {n} words about {country}.",
    "Give me {k} tips for someone new to {topic}, one line each.",
    "In one short paragraph, tell me about {country}.",
    "Write {k} paragraphs about {topic}.",
    "Summarize the most important thing about {topic} in {n} words or fewer.",
)
REQUESTED_LENGTHS = (20, 30, 50, 64, 80, 100, 128, 150, 200, 256, 300, 400)
FAMILIES = {"short_long": (SHORT, LONG), "requested": (REQUESTED,)}
"""Of each domain, the templates that its prompts are drawn from in turn."""
FIELDS: dict[str, Sequence[object]] = {
    "topic": TOPICS,
    "word": WORDS,
    "a": range(2, 100),
    "b": range(2, 100),
    "c": range(2, 13),
    "k": range(2, 10),
    "n": REQUESTED_LENGTHS,
}
"""What a template is filled with, beside ``country`` and ``country2``, which are two different ones."""


class PromptFileError(ValueError):
    """A prompt file that cannot be used; the message names the file, the line and what is missing."""


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer. ``id`` is unique in its file; ``domain`` groups the evaluation.

    ``images`` are files, in the order of the image parts of ``messages``.
    """

    id: str
    domain: str
    messages: list[dict[str, Any]]
    images: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text of the conversation."""
        return "\n".join(part for message in self.messages for part in _texts(message["content"]))

    @property
    def digest(self) -> str:
        """Of what is asked, whatever a chat template makes of it (some write the day's date)."""
        return hashlib.sha256(json.dumps([self.messages, self.images], sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        fields = {"id": self.id, "domain": self.domain, "messages": self.messages}
        return json.dumps(fields | ({"images": self.images} if self.images else {}), ensure_ascii=False)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Prompt:
        """Raises ValueError naming the field that is missing or cannot be used."""
        for name in ("id", "domain", "messages"):
            if name not in row:
                raise ValueError(f"no field {name!r}")
        messages, images = row["messages"], row.get("images") or []
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError("field 'messages' must be a list of objects with 'role' and 'content'")
        if not isinstance(images, list):
            raise ValueError("field 'images' must be a list of files")
        return cls(str(row["id"]), str(row["domain"]), messages, [str(path) for path in images])


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part and (part["type"] != "text" or isinstance(part.get("text"), str))


def _texts(content: Any) -> list[str]:
    """The text of a message: a string, or a list of parts of which images have none."""
    if isinstance(content, str):
        return [content]
    return [str(part["text"]) for part in content if part.get("type") == "text"]


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts. Raises PromptFileError naming the line."""
    prompts: dict[str, Prompt] = {}
    for number, row in _rows(path):
        try:
            prompt = Prompt.from_dict(row)
        except ValueError as error:
            raise PromptFileError(f"{path}:{number}: {error}") from None
        if prompt.id in prompts:
            raise PromptFileError(f"{path}:{number}: a second prompt of the id {prompt.id!r}")
        prompts[prompt.id] = prompt
    return list(prompts.values())


def template_prompts(count: int, domain: str, seed: int) -> list[Prompt]:
    """``count`` different prompts of domain ``short_long`` or ``requested``, drawn from the templates.

    Raises ValueError when there are not so many.
    """
    rng = random.Random(f"{seed}:{domain}")
    families = FAMILIES[domain]
    available = min(len(families) * sum(map(_num_texts, family)) + turn for turn, family in enumerate(families))
    if count > available:
        raise ValueError(f"templates: {domain} has {available} different prompts, {count} are asked for")
    texts: dict[str, None] = {}
    while len(texts) < count:
        template = rng.choice(families[len(texts) % len(families)])
        texts[_fill(template, rng)] = None
    return [_prompt(f"{domain}-{seed}-{index}", domain, text) for index, text in enumerate(texts)]


def _fill(template: str, rng: random.Random) -> str:
    country, country2 = rng.sample(COUNTRIES, 2)
    values = {name: rng.choice(choices) for name, choices in FIELDS.items()}
    return template.format(country=country, country2=country2, **values)


def _num_texts(template: str) -> int:
    """How many different texts a template can become."""
    sizes = {name: len(choices) for name, choices in FIELDS.items()}
    sizes |= {"country": len(COUNTRIES), "country2": len(COUNTRIES) - 1}
    return math.prod(sizes[name] for _, name, _, _ in string.Formatter().parse(template) if name)


def _prompt(identifier: str, domain: str, text: str) -> Prompt:
    return Prompt(identifier, domain, [{"role": "user", "content": text}])


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            yield number, parse_object(line, f"{path}:{number}", PromptFileError)


def parse_object(line: bytes, where: str, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """The JSON object in a line of a file. Raises ``error`` naming ``where``."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise error(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise error(f"{where}: not a JSON object")
    return row
