"""lm-evaluation-harness gives a checkpoint, on any ranks, the scores of its export as the harness's own model "hf"."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from support.families import random_model
from support.pool import Pool
from support.runs import create_topology, tiny_config

from megagpt.errors import ConfigError
from megagpt.hugging_face.folder import ModelFolder
from megagpt.hugging_face.import_model import Import
from megagpt.hugging_face.peak_memory import PeakMemory
from megagpt.inference.source import open_source
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.topology import Topology
from megagpt.progress import NoProgress

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "num_fewshot": 1,
        "fewshot_split": "test",
        # The harness draws other examples at random for each number of replicas.
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["w7"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of transformers with a tokenizer of words that adds a BOS token, its checkpoint, and three tasks."""
    folder = tmp_path_factory.mktemp("harness")
    theirs = random_model("llama")
    theirs.save_pretrained(folder / "model")
    vocab = {{1: "<s>", 2: "</s>"}.get(n, f"w{n}"): n for n in range(61)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "model")
    Import(ModelFolder(folder / "model")).write(folder / "checkpoint", PeakMemory(), NoProgress())
    generator = torch.Generator().manual_seed(5)

    def words(length: int) -> str:
        return " ".join(f"w{int(n)}" for n in torch.randint(3, 60, (length,), generator=generator))

    documents = []
    for number in range(9):
        # One text begins with the BOS token itself, which must not be added again.
        question, text = (
            words(4 + number % 3),
            (number == 3) * "<s> " + words(20 * (1 + number % 6)),
        )  # the longest text has 120 tokens, the context 64
        ids = torch.tensor([[1, *fast.encode(question, add_special_tokens=False)]])
        out = theirs.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        answer = " ".join(f"w{token}" for token in out).partition("w7")[0] if number % 2 else words(6)
        choices = [" " + words(1 + index) for index in range(3)]
        documents.append({"question": question, "text": text, "answer": answer, "choices": choices, "label": number % 3})
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}}}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    return folder


def scores(folder: Path, model: Any) -> dict[str, dict[str, float]] | None:
    """Return the scores of a model, without their standard errors."""
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
        )
    if results is None:
        return None
    return {
        task: {name: value for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[str, float]]:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=2, max_length=64)
    found = scores(folder, model)
    assert found is not None
    return found


def native_scores(folder: Path, tensor: int | None) -> dict[str, dict[str, float]] | None:
    from megagpt.inference.harness import HarnessModel

    topology = Topology() if tensor is None else create_topology(tiny_config(parallel={"tensor": tensor}))
    parallel = ParallelContext.of(topology, False, DeferredGradients())
    trained = open_source(str(folder / "checkpoint")).load("cpu", "fp32", False, NoProgress(), parallel)
    return scores(folder, HarnessModel(trained, topology))


def test_a_checkpoint_has_the_scores_of_its_export(folder: Path, expected: dict[str, dict[str, float]]) -> None:
    """Shares of right answers exactly; perplexities from fp32 sums in another order: 1e-5."""
    found = native_scores(folder, None)
    assert found == {task: pytest.approx(values, rel=1e-5) for task, values in expected.items()}
    assert 0 < expected["answers"]["exact_match,none"] < 1 and 0 < expected["choices"]["acc,none"] < 1


def test_tensor_and_data_parallel_ranks_have_the_same_scores(
    folder: Path, expected: dict[str, dict[str, float]], ranks: Pool
) -> None:
    """Tensor 2 x data 2: the first rank has the results of all questions."""
    results = ranks.run(4, native_scores, folder, 2)
    assert results[0] == {task: pytest.approx(values, rel=1e-5) for task, values in expected.items()}
    assert results[1:] == [None] * 3


def test_an_answer_that_leaves_no_room_for_the_question_is_refused(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from megagpt.inference.harness import HarnessModel

    trained = open_source(str(folder / "checkpoint")).load("cpu", "fp32", False, NoProgress(), ParallelContext())
    request = Instance("generate_until", {}, ("w5 w6", {"until": ["w7"], "max_gen_toks": 64}), 0)
    with pytest.raises(ConfigError, match="a task asks for answers of 64 tokens, and the model's context has 64"):
        HarnessModel(trained, Topology()).generate_until([request])
