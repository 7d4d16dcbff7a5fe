"""A needle in a haystack of noise: RULER's S-NIAH-1 (arXiv 2404.06654), made without a network.

Five sentences are repeated up to the length; one sentence at a given depth says a number; the
model is asked for it. Prompts are those of RULER's niah_single_1 but for the keys, which are drawn
from a list of our own.
"""

from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, ClassVar

from osdn.errors import UserError
from osdn.evals.evaluation import Evaluation, option
from osdn.evals.models import LanguageModel
from osdn.evals.results import make_result, score
from osdn.evals.runner import Record, Sample

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = ("quiet", "bright", "narrow", "ancient", "gentle", "hollow", "crimson", "distant")
NOUNS = ("harbour", "lantern", "meadow", "compass", "orchard", "thunder", "bridge", "feather")
BEFORE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text?"
CUE = " The special magic number for {key} mentioned in the provided text is"
NEEDLE = "One of the special magic numbers for {key} is: {number}."
MAX_NEW_TOKENS = 48  # a sentence with the number in it
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
DEPTHS = (0, 25, 50, 75, 100)


def haystack(model: LanguageModel, item: dict[str, Any], budget: int) -> list[int]:
    """The prompt with as many noise lines as fit in `budget` tokens, the start token included.

    Raises:
        UserError: not even one line fits.
    """

    def build(lines: int) -> list[int]:
        text = [NOISE] * lines
        needle = NEEDLE.format(key=item["key"], number=item["number"])
        text.insert(round(lines * item["depth"] / 100), needle)
        question = (QUESTION + CUE).format(key=item["key"])
        return [*model.start, *model.encode(BEFORE + "\n".join(text) + question)]

    # How many lines fit is found by three sizes, as tokenizers join what meets at a border.
    least = len(build(1))
    if least > budget:
        raise UserError(
            f"lengths: {item['length']} tokens are too few for the question and one line of "
            f"noise, which take {least + MAX_NEW_TOKENS}"
        )
    line = (len(build(9)) - least) / 8  # tokens a line
    lines = 1 + int((budget - least) / line)
    # The estimate is off by a line or two: down first, then up.
    while lines > 1 and len(build(lines)) > budget:
        lines -= 1
    while len(prompt := build(lines + 1)) <= budget:
        lines += 1
    return build(lines) if len(prompt) > budget else prompt


class Asked(Sample):
    """A record."""

    length: int
    depth: int
    right: bool


@dataclass(frozen=True, kw_only=True)
class Needle(Evaluation):
    """The share of needles found, by length, and by depth and length."""

    task: ClassVar[str] = "needle"
    about: ClassVar[str] = "find a number in 1k to 32k tokens of noise"
    batch: ClassVar[int] = 4
    record: ClassVar[type[Sample]] = Asked

    lengths: tuple[int, ...] | None = option(
        "tokens of prompt and answer (default: 1024 to 32768, as far as the model can take)",
        default=None,
        least=1,
    )
    depths: tuple[int, ...] = option("of the needle, percent of the text", default=DEPTHS)
    samples: int = option("per length and depth", default=10, least=1)
    seed: int = option("of keys and numbers", default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise UserError(f"depths: expected percents from 0 to 100, got {list(self.depths)}")

    def items(self, model: LanguageModel) -> tuple[dict[str, Any], list[Record]]:
        """A needle for each length, depth and sample, short prompts first."""
        lengths = sorted(set(self.lengths or ()))
        if not lengths:
            # As far as the model goes; at least one length, so that there is a result.
            lengths = [one for one in LENGTHS if one <= (model.limit or one)] or LENGTHS[:1]
        model.check_length(lengths[-1], "lengths")
        depths = sorted(set(self.depths))
        items = []
        for length, depth, i in product(lengths, depths, range(self.samples)):
            # By the needle's own place: a length added later changes no other needle.
            rng = Random(f"{self.seed} {length} {depth} {i}")
            key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
            number = str(rng.randrange(10**6, 10**7))
            place = {"length": length, "depth": depth, "key": key, "number": number}
            items.append({"id": f"{length}-{depth}-{i}", **place})
        sizes = {"lengths": lengths, "depths": depths, "max_new_tokens": MAX_NEW_TOKENS}
        return {"protocol": "S-NIAH-1", **sizes}, items

    def answer(
        self, model: LanguageModel, items: list[Record], protocol: dict[str, Any]
    ) -> list[Record]:
        """Ask for a batch of needles."""
        new = protocol["max_new_tokens"]
        prompts = [haystack(model, item, item["length"] - new) for item in items]
        texts = model.continue_line(prompts, max_new_tokens=new)
        return [
            {
                "length": item["length"],
                "depth": item["depth"],
                "number": item["number"],
                "tokens": len(ids),
                "continuation": text,
                "right": item["number"] in text,  # seven digits: none comes by chance
            }
            for item, ids, text in zip(items, prompts, texts)
        ]

    def conclude(
        self, model: LanguageModel, protocol: dict[str, Any], records: list[Record]
    ) -> dict[str, Any]:
        """The result: the share of needles found by length, and a map of depth by length."""

        def share(length: int, depth: int) -> float:
            found = [r["right"] for r in records if r["length"] == length and r["depth"] == depth]
            return sum(found) / len(found)

        lengths, depths = protocol["lengths"], protocol["depths"]
        scores = [
            score("found", [r["right"] for r in records if r["length"] == n], group=f"{n:,} tokens")
            for n in lengths
        ]
        values = [[share(length, depth) for length in lengths] for depth in depths]
        grid = {
            "title": "Needles found (S-NIAH-1)",
            "x": "tokens",
            "y": "depth, percent",
            "columns": lengths,
            "rows": depths,
            "values": values,
        }
        return make_result(
            "needle",
            protocol=protocol,
            model=model.describe(),
            samples=len(records),
            scores=scores,
            maps=[grid],
        )
