"""Tokens from the cache, in any batch and beyond the context, equal those of the full text without a cache."""

import pytest
import torch
from support.exhaustive import more
from support.families import CASES, random_model
from support.pool import Pool
from support.runs import Tree, full_model, tiny_config
from support.texts import continued, engine_for, expected_greedy, greedy

from megagpt.errors import ConfigError, TrainingError
from megagpt.inference.engine import PREFILL_TOKENS, GenerationEngine
from megagpt.inference.load import load_hugging_face
from megagpt.inference.sampling import Sampling
from megagpt.model.chunk import build_chunk
from megagpt.model.gpt import GPTChunk
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.topology import Topology

POSITIONS, VOCABULARY = 16, 61
LARGE = {"n_positions": POSITIONS, "vocab_size": VOCABULARY, "init_std": 0.5, "tie_embeddings": False}
"""Large random weights and an output layer of its own, so that the text does not repeat one token."""
PROMPTS = [[5, 7, 11], [3], [1, 2, 3, 4, 5, 6, 7], [9, 8]]
OTHER_MODELS: dict[str, Tree] = {
    "ALiBi": {"position_embedding": "alibi"},
    "ALiBi, grouped heads, window": {"position_embedding": "alibi", "n_kv_head": 2, "attention_window": 3},
    "relative, sinks": {"position_embedding": "relative", "attention_sinks": True},
    "sinks, rotary, caps": {"attention_sinks": True, "position_embedding": "rotary", "attention_softcap": 3.0},
    "interleaved rotary, one norm": {
        "position_embedding": "rotary",
        "rotary": {"interleaved": True},
        "parallel_branches": "one_norm",
    },
    "window in some layers": {"attention_window": 2, "full_attention_every": 2},
    "no positions": {"position_embedding": "none"},
}
"""Models that no family of transformers has."""


def model_of(**keys: object) -> GPTChunk:
    return full_model(tiny_config(model={**LARGE, **keys})).eval()


@pytest.fixture(scope="module")
def model() -> GPTChunk:
    return model_of()


@pytest.mark.parametrize("length", [1, 3, POSITIONS - 1, POSITIONS, POSITIONS + 1, 5 * POSITIONS])
def test_greedy_tokens_within_and_beyond_the_context_equal_those_without_a_cache(length: int, model: GPTChunk) -> None:
    prompt = [(7 * n) % VOCABULARY for n in range(length)]
    tokens = greedy(model, prompt, 2 * POSITIONS + 5)
    assert tokens == expected_greedy(model, prompt, 2 * POSITIONS + 5)
    assert len(set(tokens[-POSITIONS:])) > 2  # else the window would make no difference


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_prompts_of_different_lengths_in_one_batch_give_the_tokens_of_each_alone(name: str) -> None:
    """12 new tokens go beyond the window, and for the longest prompt beyond the context."""
    model = model_of(**OTHER_MODELS[name])
    expected = [expected_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert continued(model, PROMPTS, Sampling(12, temperature=0)) == expected
    assert len({tuple(tokens[-4:]) for tokens in expected}) > 1


@pytest.mark.parametrize("case", CASES)
def test_every_family_generates_what_transformers_generates_in_a_batch_with_padding(case: str, tmp_path_factory) -> None:
    pytest.importorskip("transformers")
    theirs = random_model(case)
    folder = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(folder)
    ours, _ = load_hugging_face(folder)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    out = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
    )  # 7 + 9 tokens: the context of the GPT-2 case
    assert continued(ours, PROMPTS, Sampling(9, temperature=0)) == out[:, longest:].tolist()


def test_texts_that_join_and_leave_between_steps_do_not_change_each_other(model: GPTChunk) -> None:
    engine = engine_for(model, rows=2)
    lengths = [9, 8, 6, 12]
    sequences = []
    for prompt, length in zip(PROMPTS, lengths, strict=True):
        sequences.append(engine.add(prompt, Sampling(length, temperature=0)))
        engine.step()
    assert engine.n_running == 2 and engine.n_waiting > 0  # two rows: the others wait
    cancelled = engine.add([4, 4], Sampling(10, temperature=0))
    engine.cancel(cancelled)
    while engine.n_running or engine.n_waiting:
        engine.step()
    for sequence, prompt, length in zip(sequences, PROMPTS, lengths, strict=True):
        assert sequence.tokens == prompt + expected_greedy(model, prompt, length)
        assert sequence.finish_reason == "length"
    assert cancelled.finish_reason == "cancelled" and cancelled.tokens == [4, 4]
    assert engine.cache_share == 0  # every page is free again


def test_a_text_waits_until_there_are_pages_for_it(model: GPTChunk) -> None:
    engine = GenerationEngine(model, (), None, cache_tokens=2 * POSITIONS, max_rows=8)
    sequences = [engine.add([5, 7, 11], Sampling(8, temperature=0)) for _ in range(3)]
    engine.step()
    assert (engine.n_running, engine.n_waiting, engine.cache_share) == (2, 1, 1.0)
    engine.cancel(sequences[0])  # in the middle of its text
    engine.step()
    assert (engine.n_running, engine.n_waiting) == (2, 0)
    while engine.n_running:
        engine.step()
    assert sequences[2].tokens[3:] == expected_greedy(model, [5, 7, 11], 8)


def test_a_prompt_longer_than_one_forward_is_read_in_parts_while_others_go_on() -> None:
    model = model_of(n_positions=PREFILL_TOKENS + 100, position_embedding="rotary", n_layer=1)
    prompt = [(7 * n) % VOCABULARY for n in range(PREFILL_TOKENS + 50)]
    engine = engine_for(model, rows=2)
    other = engine.add([3, 1], Sampling(6, temperature=0))
    engine.step()
    long = engine.add(prompt, Sampling(2, temperature=0))
    engine.step()
    assert long.n_new == 0 and other.n_new == 2
    while engine.n_running:
        engine.step()
    assert long.tokens[len(prompt) :] == expected_greedy(model, prompt, 2)
    assert other.tokens[2:] == expected_greedy(model, [3, 1], 6)


def test_a_text_ends_before_an_end_token(model: GPTChunk) -> None:
    tokens = greedy(model, [5, 7, 11], 8)
    assert continued(model, [[5, 7, 11]], Sampling(8, temperature=0), end={tokens[0]}) == [[]]
    other = next(n for n, token in enumerate(tokens) if token != tokens[0])
    assert continued(model, [[5, 7, 11]], Sampling(8, temperature=0), end={tokens[other], 60}) == [tokens[:other]]


@pytest.mark.parametrize(("temperature", "top_k"), [(0, None), (5.0, None), (5.0, 40), (1.0, 1)])
def test_ids_that_the_tokenizer_does_not_have_are_never_generated(
    temperature: float, top_k: int | None, model: GPTChunk
) -> None:
    def sample(n_tokens: int | None) -> list[int]:
        samplings = [Sampling(40, temperature=temperature, top_k=top_k, seed=seed) for seed in range(4)]
        return [token for s in samplings for token in continued(model, [[3]], s, n_tokens=n_tokens)[0]]

    assert max(sample(20)) < 20 <= max(sample(None))
    assert greedy(model, [3, 4], 10, 20) == expected_greedy(model, [3, 4], 10, 20)


def test_samples_depend_on_the_seed_and_not_on_the_batch(model: GPTChunk) -> None:
    def sample(seeds: list[int], rows: int) -> list[list[int]]:
        engine = engine_for(model, rows)
        sequences = [engine.add([3], Sampling(30, seed=seed)) for seed in seeds]
        while engine.n_running or engine.n_waiting:
            engine.step()
        return [sequence.tokens for sequence in sequences]

    alone = [sample([seed], 1)[0] for seed in (1, 2, 3)]
    assert sample([1, 2, 3], 3) == alone
    assert alone[0] != alone[1] != alone[2]


def test_logprobs_are_those_of_the_model_whatever_the_sampling(model: GPTChunk) -> None:
    """fp32 logits; the expected values from the full text, in float64: 1e-5."""
    engine = engine_for(model)
    sequence = engine.add([5, 7, 11], Sampling(5, temperature=3.0, top_k=20, repetition_penalty=2.0, seed=4, logprobs=3))
    draws = []
    while engine.n_running or engine.n_waiting:
        draws += [generated.draw for generated in engine.step()]
    with torch.no_grad():
        logprobs = model.logits(torch.tensor([sequence.tokens]))[0].double().log_softmax(-1)
    for position, draw in enumerate(draws, 2):
        assert draw.token == sequence.tokens[position + 1]
        assert draw.logprob == pytest.approx(float(logprobs[position, draw.token]), abs=1e-5)
        values, ids = logprobs[position].topk(3)
        assert [token for token, _ in draw.top] == ids.tolist()
        assert [value for _, value in draw.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "0 tokens; expected at least 1"),
        ([3, VOCABULARY, 99], f"token id {VOCABULARY} is not in the model's vocabulary of {VOCABULARY}"),
        ([-1], "token id -1 is not"),
    ],
)
def test_a_prompt_that_the_model_cannot_read_is_refused(prompt: list[int], message: str, model: GPTChunk) -> None:
    with pytest.raises(ConfigError, match=message):
        greedy(model, prompt, 1)


def test_a_text_that_can_never_start_is_refused(model: GPTChunk) -> None:
    engine = GenerationEngine(model, (), None, cache_tokens=8, max_rows=1)
    engine.add([1], Sampling(15))
    small = model_of(n_positions=40)
    with pytest.raises(ConfigError, match="3 tokens and 14 new ones need a cache of 32 tokens; there is one of 16"):
        GenerationEngine(small, (), None, cache_tokens=16, max_rows=1).add([1, 2, 3], Sampling(14))


def test_scores_that_are_not_finite_end_that_text_with_an_error_and_no_token() -> None:
    """Token 9 alone has a broken embedding, so the other text of the batch is not affected."""
    broken = model_of()
    with torch.no_grad():
        broken.tokens.weight[9] = float("nan")
    engine = engine_for(broken, end=())
    good, bad = (engine.add(prompt, Sampling(3, temperature=0)) for prompt in ([5, 7], [9, 5, 7]))
    engine.step()
    assert (bad.finish_reason, bad.n_new) == ("error", 0) and isinstance(bad.error, TrainingError)
    assert good.finish_reason is None and good.n_new == 1
    for temperature in (0, 1.0):
        with pytest.raises(TrainingError, match="scores are not finite"):
            continued(broken, [[9]], Sampling(1, temperature=temperature))


def tokens_on_ranks(model: Tree, sampling: Sampling) -> list[list[int]]:
    config = tiny_config(model={**LARGE, **model}, parallel={"tensor": 4})
    parallel = ParallelContext.of(Topology.create(4, 1), False, DeferredGradients())
    chunk = build_chunk(config, parallel, range(config.model.n_layer)).eval()
    return continued(chunk, PROMPTS, sampling, n_tokens=50)


@pytest.mark.parametrize("keys", [{"n_kv_head": 2, "position_embedding": "rotary"}, *more({})])
def test_tensor_parallel_ranks_generate_what_one_process_does(keys: Tree, ranks: Pool) -> None:
    """Vocabulary 61 padded to 64 on 4 ranks: the last one has padding, and ids from 50 on are not drawn."""
    for sampling in (Sampling(14, temperature=0), Sampling(14, temperature=1.5, top_k=30, top_p=0.9, seed=3)):
        expected = continued(model_of(**keys), PROMPTS, sampling, n_tokens=50)
        assert ranks.run(4, tokens_on_ranks, keys, sampling) == [expected] * 4
