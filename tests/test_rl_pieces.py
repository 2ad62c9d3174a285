"""Prompts, rewards, seeds and metrics of reinforcement learning, and the flags it refuses."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.data.order import Order
from megalora.data.prompts import Prompt, load_prompts
from megalora.data.tokenizers import ByteTokenizer, Encoder, encoder_for
from megalora.rollouts.advice import rl_warnings
from megalora.rollouts.arguments import check_rl_args
from megalora.rollouts.engine import Answer, Sampling
from megalora.rollouts.metrics import Outcome, summarize
from megalora.rollouts.replicas import Replicas
from megalora.rollouts.rewards import BUILT_IN, load_reward
from megalora.rollouts.sampler import Sampler
from megalora.rollouts.seeds import sampling_seed
from tests.support.chat_templates import AS_JSON, hugging_face_tokenizer

BYTES = ByteTokenizer()
QUESTION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}]


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def load(file: str, encoder: Encoder | None = None, **given: Any) -> list[Prompt]:
    given = {"max_length": 64, "seed": 0, **given}
    prompts, _ = load_prompts(file, encoder or encoder_for(BYTES), **given)
    return list(prompts)


# === Prompts ===


def test_a_text_is_read_as_it_stands_with_all_columns(tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "answer": {"sum": 2}, "level": 3}
    file = write(tmp_path / "rows.jsonl", row)
    assert load(file) == [Prompt([BYTES.bos, *b"1+1="], {"sum": 2}, row, f"{file} line 1")]


def test_a_chat_of_bytes_ends_with_the_role_that_answers(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"prompt": QUESTION, "answer": 2})
    (prompt,) = load(file)
    turns = [BYTES.system, *b"Be kind.", BYTES.eos, BYTES.user, *b"1+1?", BYTES.eos]
    assert prompt.tokens == [BYTES.bos, *turns, BYTES.assistant]


def test_a_chat_goes_through_the_tokenizer_s_template_and_ends_by_its_token(
    tmp_path: Path,
) -> None:
    tokenizer = hugging_face_tokenizer(AS_JSON, bos=True)
    encoder = encoder_for(tokenizer)
    file = write(tmp_path / "rows.jsonl", {"prompt": QUESTION, "answer": 2})
    prompts, _ = load_prompts(file, encoder, max_length=500, seed=0)
    expected = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompts[0].tokens) == expected
    ends = {tokenizer.get_vocab()[token] for token in ("<|eos|>", "<|im_end|>")}
    assert set(prompts.stop) == ends
    assert encoder.decode([*encoder.prompt("Good")[1:], *ends]) == "Good"
    texts, _ = load_prompts(write(tmp_path / "t.jsonl", {"prompt": "a", "answer": 0}), encoder,
                            max_length=500, seed=0)  # fmt: skip
    assert texts.stop == (tokenizer.eos_token_id,)
    assert texts[0].tokens == tokenizer("a").input_ids


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *({"prompt": f"{n}", "answer": n} for n in range(20)))
    trained, held_out = load_prompts(
        file, encoder_for(BYTES), eval_fraction=0.2, max_length=9, seed=1
    )
    assert held_out is not None
    parts = [{prompt.answer for prompt in part} for part in (trained, held_out)]
    assert [len(part) for part in parts] == [16, 4]
    assert set().union(*parts) == set(range(20))
    with pytest.raises(ValueError, match=r"eval_dataset .*rows.jsonl has 20 rows of dataset"):
        load_prompts(file, encoder_for(BYTES), eval_dataset=file, max_length=9, seed=1)
    few = write(tmp_path / "few.jsonl", {"prompt": "1", "answer": 1})
    with pytest.raises(ValueError, match="has 1 rows, too few to hold some out"):
        load_prompts(few, encoder_for(BYTES), eval_fraction=0.2, max_length=9, seed=1)


BAD_ROWS = {
    "no answer": ({"prompt": "2"}, r"no `answer`, but \['prompt'\]"),
    "no prompt": ({"question": "2"}, "no `prompt` and no `answer`"),
    "a number": ({"prompt": 5, "answer": 2}, "`prompt` is 5, not a list"),
    "nothing": ({"prompt": None, "answer": 2}, "`prompt` has no message"),
    "no messages": ({"prompt": [], "answer": 2}, "`prompt` has no message"),
    "an answer": ({"prompt": [{"role": "assistant", "content": "a"}], "answer": 2}, "assistant's"),
    "another role": ({"prompt": [{"role": "cat", "content": "a"}], "answer": 2}, "'cat'"),
    "too long": ({"prompt": "a" * 64, "answer": 2}, "has 65 tokens, where 1 to 64 leave room"),
    "a list": ([1], "it is a list"),
}


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, case: str) -> None:
    row, message = BAD_ROWS[case]
    file = write(tmp_path / "rows.jsonl", {"prompt": "1", "answer": 1}, row)
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert str(error.value).startswith(f"dataset {file} line 2: ")


# === Rewards ===


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("exact", " Paris\n", "Paris", 1),
        ("exact", "Paris!", "Paris", 0),
        ("exact", "b", ["a", "b"], 1),
        ("exact", "[1, 2]", {"a": 1}, 0),
        ("exact", "7", 7, 1),
        ("contains", "It is Paris.", "Paris", 1),
        ("contains", "It is Rome.", ["Paris", "Rome"], 1),
        ("contains", "It is", "Paris", 0),
        ("number", "5 + 2 = 7.", 7, 1),
        ("number", "so 10-3", 3, 1),
        ("number", "= -3", 3, 0),
        ("number", "1,000.0 dollars", "10 * 100\n#### 1000", 1),
        ("number", "about 1e-5", 1e-5, 1),
        ("number", "none", 0, 0),
    ],
)
def test_built_in_rewards(name: str, completion: str, answer: object, expected: float) -> None:
    assert BUILT_IN[name](completion, answer) == expected


OWN = """
import sys
from dataclasses import dataclass
from fractions import Fraction

@dataclass
class Mark:
    value: "float"

def two(completion, answer): return Mark(len(completion) / answer).value
def three(completion, answer, row): return row["level"] > 2
def default(completion, answer, row=None, *, strict=False): return Fraction(1, 2)
def one(completion): return 1.0
def fails(completion, answer, row): return row["nothing"]
def text(completion, answer): return "1"
def none(completion, answer): pass
def infinite(completion, answer): return float("inf")
number = 3
"""
PROMPT = Prompt([1], 2, {"prompt": "a", "answer": 2, "level": 3}, "rows.jsonl line 4")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own_rewards.py"
    path.write_text(OWN)
    (tmp_path / "broken_rewards.py").write_text("1 +")
    monkeypatch.syspath_prepend(tmp_path)
    return path


@pytest.mark.parametrize(("name", "expected"), [("two", 0.5), ("three", 1.0), ("default", 0.5)])
def test_a_function_of_ones_own_is_given_what_it_takes(
    own: Path, name: str, expected: float
) -> None:
    for module in (own, "own_rewards"):
        value = load_reward(f"{module}:{name}")("a", PROMPT)
        assert (type(value), value) == (float, expected)


@pytest.mark.bad_input("a number that is not one")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"fails for rows.jsonl line 4 \(KeyError: 'nothing'\) in \S+ line \d+: mend"),
        ("text", r"returns '1' \(str\) for rows.jsonl line 4: return a finite float"),
        ("none", r"returns None \(NoneType\) for rows.jsonl line 4"),
        ("infinite", r"returns inf \(float\) for rows.jsonl line 4"),
    ],
)
def test_a_reward_that_is_no_number_is_named_with_its_row(
    own: Path, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^reward \S+own_rewards.py:{name} {message}"):
        load_reward(f"{own}:{name}")("a", PROMPT)


def test_an_answer_without_a_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"reward number fails for rows.jsonl line 4 .*no number"):
        load_reward("number")("1", PROMPT._replace(answer="two"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("likes", "reward 'likes' is no function: give exact, contains, number, module:function"),
        (":", "reward ':' is no function"),
        ("nowhere.py:f", "nowhere.py cannot be imported .*FileNotFoundError"),
        ("no_such_module:f", "no_such_module cannot be imported .*ModuleNotFoundError"),
        ("broken_rewards:f", "broken_rewards cannot be imported .*SyntaxError"),
        ("own_rewards:f", r"own_rewards has no such function, but \[.*'three', 'two'\]"),
        ("own_rewards:number", "own_rewards has no such function"),
        ("own_rewards:one", "cannot be called with completion and answer"),
    ],
)
def test_a_name_that_is_no_reward_is_refused(own: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(name)


# === Seeds, metrics, advice ===


def test_each_epoch_has_every_prompt_in_an_order_of_its_own() -> None:
    order = Order(10, seed=3)
    epochs = [order.take(10 * epoch, 10) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.take(7, 8) == [*epochs[0][7:], *epochs[1][:5]]
    assert Order(10, seed=4).take(0, 10) != epochs[0]
    assert len({sampling_seed(seed, n) for seed in (1, 2) for n in range(100)}) == 200


def test_what_an_iteration_is_known_by() -> None:
    outcomes = [Outcome(r, 3, n, n < 4) for r, n in ((1, 2), (1, 4), (0, 3), (1, 3))]
    assert summarize(outcomes, 2, times=[1.0, 3.0, 4.0]) == {
        "reward/mean": 0.75,
        "reward/std": pytest.approx(0.1875**0.5),
        "answer/tokens": 3.0,
        "answer/ended": 0.75,
        "reward/no-advantage": 0.5,
        "tokens-per-second/sampled": 6.0,
        "tokens-per-second/learned": 24.0,
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 8}, []),
        ({"rank": 1}, ["lora_rank is 1: "]),
        ({"rank": 64}, ["lora_rank is 64: rank 64 has collapsed with large batches"]),
        ({"rank": 128}, ["lora_rank is 128: ranks of 128 and more"]),
        ({"rank": 8, "init": "pissa"}, ["lora_init is pissa: "]),
    ],
)
def test_ranks_and_starts_that_do_badly_are_told(fields: dict[str, Any], said: list[str]) -> None:
    found = rl_warnings(LoRAConfig(**fields))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


@dataclass(frozen=True)
class SecondOfTwo(Replicas):
    """The ranks of the second replica, as if the first had given outcomes of its own."""

    others: tuple[Outcome, ...] = ()

    def each(self, work: Callable[[], Any]) -> list[Any]:
        return [list(self.others), work()]


class Echo:
    """An engine that answers each prompt with its last byte, and ends or not."""

    def sync(self) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        ends = [[prompt[-1], *sampling.stop] for prompt in prompts]
        return [
            Answer(tokens[: 2 - n % 2], [-1.0] * (2 - n % 2), ended=not n % 2)
            for n, tokens in enumerate(ends)
        ]


def test_a_replica_learns_from_its_own_rewards_and_all_tell_theirs(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *({"prompt": f"{n}", "answer": "3"} for n in range(4)))
    lines: list[str] = []
    others = (Outcome(9.0, 2, 1, True),) * 2
    sampler = Sampler(
        engine=Echo(),
        reward=load_reward("exact"),
        encoder=encoder_for(BYTES),
        replicas=SecondOfTwo(1, 2, speaks=True, others=others),
        show=lines.append,
        num_shown=1,
    )
    episodes = sampler.sample(load(file), Sampling(max_tokens=2, stop=(BYTES.eos,)))
    assert [prompt.place[-1] for prompt in episodes.prompts] == ["3", "4"]
    assert episodes.rewards.tolist() == [0.0, 1.0]
    assert episodes.outcomes == [*others, Outcome(0.0, 2, 2, True), Outcome(1.0, 2, 1, False)]
    assert lines == ["  2 -> 2 (reward 0)"]


# === Flags ===

RIGHT: dict[str, Any] = {
    **{"dataset": "rows.jsonl", "eval_dataset": None, "eval_interval": None, "eval_fraction": 0.05},
    **{"group_size": 8, "num_updates": 2, "max_tokens": 8, "seq_length": 16, "print_answers": 0},
    **{"rollout": "megatron", "rollout_url": None, "rollout_batch_size": 8, "eval_prompts": 8},
    **{"rollout_directory": None, "rollout_timeout": 300.0},
    **{"kl_weight": 0.0, "clip_low": None, "clip_high": None, "train_iters": 5},
    **{"global_batch_size": 64, "data_parallel_size": 2, "micro_batch_size": 4},
    **{"lora_rank": 8, "lora_dropout": None},
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0),
    **dict.fromkeys(("calculate_per_token_loss", "overlap_moe_expert_parallel_comm"), False),
    **dict.fromkeys(("mtp_num_layers", "rampup_batch_size")),
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"dataset": None}, "dataset is not given"),
    ({"group_size": 1}, "group_size is 1: set --group-size to 2 or more"),
    ({"num_updates": 0}, "num_updates is 0"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 16}, "max_tokens 16 leaves no room for a prompt in seq_length 16"),
    ({"rollout_batch_size": 0}, "rollout_batch_size is 0"),
    ({"eval_prompts": 0}, "eval_prompts is 0"),
    ({"print_answers": -1}, "print_answers is -1"),
    ({"kl_weight": -1.0}, "kl_weight is -1.0"),
    ({"kl_weight": float("nan")}, "kl_weight is nan"),
    ({"clip_low": 1.0}, "clip_low is 1.0"),
    ({"clip_high": float("nan")}, "clip_high is nan"),
    ({"eval_interval": 0}, "eval_interval is 0"),
    ({"eval_interval": 5, "eval_fraction": 1.0}, "eval_fraction is 1.0"),
    ({"eval_dataset": "e.jsonl"}, "eval_dataset is 'e.jsonl': set --eval-interval too"),
    ({"global_batch_size": 48}, "global_batch_size 48 over 2 data-parallel ranks"),
    ({"micro_batch_size": 32}, "global_batch_size 64 over 2 data-parallel ranks is not divisible"),
    ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1: answers are sampled without dropout"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"calculate_per_token_loss": True}, "calculate_per_token_loss is True"),
    ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm is True"),
    ({"mtp_num_layers": 1}, "mtp_num_layers is 1"),
    ({"rampup_batch_size": ["1", "1", "8"]}, "rampup_batch_size is"),
    ({"lora_rank": 0}, "lora_rank is 0"),
    ({"lora_dropout": 0.1}, "lora_rank is 8 and lora_dropout 0.1"),
    ({"rollout_url": "http://a"}, "rollout_url is 'http://a', but rollout is megatron"),
    ({"rollout": "sglang"}, "rollout_url is None, but rollout is sglang"),
    ({"rollout": "vllm", "rollout_url": "http://a"}, "rollout_directory is None, but rollout is"),
    ({"rollout_directory": "d"}, "rollout_directory is 'd', but rollout is megatron"),
    ({"rollout_timeout": 0.0}, "rollout_timeout is 0.0"),
]


def refusal(changes: dict[str, Any]) -> str:
    try:
        check_rl_args(argparse.Namespace(**RIGHT | changes))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_flags_that_the_loop_cannot_follow_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    assert refusal(changes).startswith(message)


def test_flags_that_go_together_are_taken() -> None:
    assert refusal({}) == ""
    server = {"rollout": "sglang", "rollout_url": "http://localhost:30000"}
    assert refusal({**server, "eval_interval": 5, "clip_high": 0.3}) == ""
