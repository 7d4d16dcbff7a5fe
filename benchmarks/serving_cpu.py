"""Sixteen requests of unequal length on a CPU: vLLM's engine, and `generate` in two ways.

.venv-vllm/bin/python benchmarks/serving_cpu.py [--rounds 5] [--threads 2]

vllm        all requests are given to the engine at once; each leaves when it is done.
one by one  `generate` for one request after another.
padded      one left-padded batch; all wait for the longest.

Greedy, float32, random weights. The engine runs first, in a process of its own. A round answers all
requests; one is not counted. Tokens a second are those that were asked for. The tokens of all three
ways are compared.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

SIZES = {"hidden_size": 256, "num_heads": 4, "num_hidden_layers": 4, "vocab_size": 4096}
REQUESTS = 16
PROMPT, NEW = (16, 512), (16, 128)  # tokens, least and most
Answers = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # the process of the engine
    args = parser.parse_args()
    # Before torch is imported; vLLM would otherwise choose the cores itself.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if args.engine:
        serve(args.engine, args.rounds)
        return
    import torch

    from osdn import OSDNConfig, OSDNForCausalLM

    torch.manual_seed(0)
    config = OSDNConfig(**SIZES, pad_token_id=0, max_position_embeddings=1024)
    model = OSDNForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        command = [sys.executable, __file__, "--engine", directory, "--rounds", str(args.rounds)]
        subprocess.run([*command, "--threads", str(args.threads)], check=True)
        with open(f"{directory}/found.json") as file:
            found = {"vllm": json.load(file)}
    found["one by one"] = timed(lambda: one_by_one(model), args.rounds)
    found["padded"] = timed(lambda: padded(model), args.rounds)
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} threads, "
        f"torch {torch.__version__}, {args.rounds} rounds"
    )
    tokens, (base, answers) = sum(new for _, new in requests()), found["vllm"]
    for name, (seconds, made) in found.items():
        same = sum(a == b for a, b in zip(made, answers))
        print(
            f"{name:11s} {tokens / median(seconds):8.1f} tokens/s "
            f"({tokens / max(seconds):.1f} to {tokens / min(seconds):.1f}), "
            f"vllm is {median(seconds) / median(base):5.2f} times as fast, "
            f"{same} of {REQUESTS} answers as vllm's"
        )


def requests() -> list[tuple[list[int], int]]:
    """(prompt, how many tokens are asked for) of each request."""
    choose = random.Random(1)
    lengths = [(choose.randint(*PROMPT), choose.randint(*NEW)) for _ in range(REQUESTS)]
    return [([choose.randrange(1, SIZES["vocab_size"]) for _ in range(n)], m) for n, m in lengths]


def timed(answer: Callable[[], Answers], rounds: int) -> tuple[list[float], Answers]:
    """Seconds of each round, and the last answers; one round comes before and is not counted."""
    answers, seconds = answer(), []
    for _ in range(rounds):
        began = time.perf_counter()
        answers = answer()
        seconds.append(time.perf_counter() - began)
    return seconds, answers


def one_by_one(model: object) -> Answers:
    return [generated(model, [prompt], new)[0] for prompt, new in requests()]


def padded(model: object) -> Answers:
    """All wait for the longest; what a request did not ask for is thrown away."""
    prompts, news = zip(*requests())
    made = generated(model, list(prompts), max(news))
    return [answer[:new] for answer, new in zip(made, news)]


def generated(model: object, prompts: Answers, new: int) -> Answers:
    """What `generate` adds to each prompt."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    made = model.generate(  # type: ignore[attr-defined]
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return made[:, longest:].tolist()


def serve(directory: str, rounds: int) -> None:
    """The engine's times and answers, into found.json beside the model."""
    from vllm import LLM, SamplingParams

    # Without kept prefixes: the same prompts come again in every round.
    engine = LLM(
        model=directory, skip_tokenizer_init=True, dtype="float32", max_model_len=1024,
        kv_cache_memory_bytes=2**29, enable_prefix_caching=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests()]
    sampling = [
        SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        for _, new in requests()
    ]

    def answer() -> Answers:
        made = engine.generate(prompts, sampling, use_tqdm=False)
        return [list(x.outputs[0].token_ids) for x in made]

    with open(f"{directory}/found.json", "w") as file:
        json.dump(timed(answer, rounds), file)


if __name__ == "__main__":
    main()
