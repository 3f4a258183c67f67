"""The chat command: answers on standard output, and a dialogue that stays within the model's context."""

import io
from pathlib import Path

import pytest
from support.trained import load_trained, write_random

from megagpt.commands.chat import main
from megagpt.data.chat_template import ChatTemplate
from megagpt.errors import ConfigError
from megagpt.inference.dialogue import Dialogue
from megagpt.inference.sampling import Sampling

POSITIONS = 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("chat"), "byte", 257, POSITIONS)


def chat(checkpoint: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, *arguments: str, template: str = "chatml") -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["--checkpoint", str(checkpoint), "--chat-template", template, "--temperature", "0", *arguments])


def answer_to(checkpoint: Path, messages: list[dict[str, str]]) -> str:
    """Return the greedy answer of 8 tokens."""
    trained = load_trained(checkpoint)
    generator = trained.generator(POSITIONS, 1)
    completion = generator.add(ChatTemplate.load("byte", "chatml").prompt(messages), Sampling(8, temperature=0))
    list(generator.run())
    return completion.text


def test_each_line_is_answered_after_all_earlier_ones(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(checkpoint, ["Hi", "", "/clear", "A", "/exit", "never"], monkeypatch, "--max-tokens", "8") == 0
    first, second = (answer_to(checkpoint, [{"role": "user", "content": text}]) for text in ("Hi", "A"))
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_the_oldest_turns_are_left_out_with_a_note_and_the_system_message_stays(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template has about 28 bytes for each message, so two turns do not fit in 128."""
    assert chat(checkpoint, ["Hello", "How are you"], monkeypatch, "--max-tokens", "8", "--system", "Be") == 0
    printed = capsys.readouterr()
    assert "note: the oldest 2 messages are left out: the context has 128 tokens" in printed.err
    alone = answer_to(checkpoint, [{"role": "system", "content": "Be"}, {"role": "user", "content": "How are you"}])
    assert printed.out.endswith(f"{alone}\n")


def test_a_message_that_is_too_long_is_refused_and_the_dialogue_goes_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(checkpoint, ["x" * 200, "Hi"], monkeypatch, "--max-tokens", "8") == 0
    printed = capsys.readouterr()
    assert "note: the message has " in printed.err and "the model's context has room for 120" in printed.err
    assert printed.out == answer_to(checkpoint, [{"role": "user", "content": "Hi"}]) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens 0: expected 1 to"),
        (["--max-tokens", "128"], "--max-tokens 128: expected below 128, the model's context"),
        (["--temperature", "-1"], "--temperature -1: expected 0"),
        (["--system", "caf\udce9"], "--system: byte 0xe9"),
        (["--chat-template", "nothing.jinja"], "nothing.jinja: No such file or directory"),
        (["--checkpoint", "nowhere"], "nowhere: no checkpoint here"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(checkpoint, ["Hi"], monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_without_a_template_says_what_to_do(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(checkpoint)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_turns_are_dropped_until_prompt_and_answer_fit() -> None:
    """By bytes: "<|im_start|>" and so on are text for this tokenizer."""
    dialogue = Dialogue(ChatTemplate.load("byte", "chatml"), positions=200, max_tokens=20)
    dropped = []
    for number in range(6):
        dialogue.add("user", f"question {number}")
        prompt = dialogue.prompt()
        text = bytes(prompt.ids).decode()
        assert len(prompt.ids) + 20 <= 200 and text.endswith("<|im_start|>assistant\n") and f"question {number}" in text
        assert text.startswith("<|im_start|>user")
        dropped.append(prompt.n_dropped)
        dialogue.add("assistant", f"answer {number}")
    assert dropped[0] == 0 and sum(dropped) >= 6 and all(number % 2 == 0 for number in dropped)
    dialogue.add("user", "x" * 300)
    with pytest.raises(ConfigError, match="has room for 180"):
        dialogue.prompt()
