"""The commands of docs/finetuning.md, from a Hugging Face model to a tuned one that answers over HTTP."""

import json
import re
import shlex
import signal
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from support.command_runner import call, enter_here, launched, module_of
from support.commands import ROOT
from support.documented import page_commands, page_files
from support.job import Job, free_port
from support.scratch_clone import write_base_model

PAGE = ROOT / "docs" / "finetuning.md"
LEARN = ["model.n_positions=64", "training.epochs=30", "training.global_batch_size=4", "optimizer.learning_rate=0.01"]
QUESTIONS = {"the fox?": "yes", "the dog?": "no", "the quick?": "brown"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write what the page starts from, and return the commands of its first section."""
    section = PAGE.read_text().split("\n## ")[1]
    (tmp_path_factory.mktemp("page") / "section.md").write_text(section)
    return [command for command in page_commands(PAGE) if command.split("#")[0].strip() in section]


def ask(url: str, question: str) -> str:
    body = {"model": "chat", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 10}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: str = json.load(response)["choices"][0]["message"]["content"]
    return answer


def test_the_tuned_model_gives_the_learned_answers_here_over_http_and_in_transformers(
    path: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_base_model(Path("models/base"), n_positions=64)
    for name, repeated in (("chats", 20), ("held_out", 1)):
        lines = [json.dumps({"prompt": question, "response": answer}) + "\n" for question, answer in QUESTIONS.items()]
        Path(f"{name}.jsonl").write_text("".join(lines * repeated))
    for name, text in page_files(PAGE).items():
        Path(name).write_text(text)
    outputs = {}
    for command in path:
        program, *words = shlex.split(command)
        if program == "deepspeed":
            run = launched(program, words)
            job = Job(2, [*run.arguments, "--set", *LEARN], tmp_path / "logs", enter_here(), run.module)
            assert job.finish(200) == [0, 0], job.output()
            continue
        module = module_of(words[0])
        if module in ("serve", "chat"):
            continue
        result = call(module, words[1:])
        assert result.code == 0, f"{command}\n{result.output}"
        outputs[module] = result.output
    assert "checked with transformers" in outputs["convert_checkpoint"]
    assert re.search(r"perplexity", outputs["evaluate"])
    losses = [json.loads(line) for line in Path("runs/chat/metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["eval_loss"] < 0.1

    port = free_port()
    (serve,) = [shlex.split(command)[2:] for command in path if "serve.py" in command]
    server = Job(1, [*serve[:-1], str(port)], tmp_path / "server", enter_here(), "serve")
    server.wait_for(f"http://127.0.0.1:{port}", 100)
    assert {question: ask(f"http://127.0.0.1:{port}", question) for question in QUESTIONS} == QUESTIONS
    server.send(signal.SIGTERM)
    server.finish(30)

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("models/tuned")
    model = transformers.AutoModelForCausalLM.from_pretrained("models/tuned", dtype=torch.float32)
    for question, answer in QUESTIONS.items():
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        ids = model.generate(prompt, max_new_tokens=10, do_sample=False)
        assert tokenizer.decode(ids[0, prompt.shape[1] :]).split("<|im_end|>")[0] == answer
