"""Ids of chats equal those of transformers; special tokens in a message are text; the mask has exactly the answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.chat import CHATML, FORMATS, LLAMA2, chat_tokenizer

from megagpt.data.chat_template import ChatTemplate, EncodedChat
from megagpt.errors import DataError

USER = {"role": "user", "content": "The quick brown fox?  jumps\n\nover "}
ANSWER = {"role": "assistant", "content": "yes, the lazy dog:  no."}
FOLLOWING = {"role": "user", "content": "\nYou are?"}
LAST = {"role": "assistant", "content": "a helpful fox."}
CHAT = [USER, ANSWER, FOLLOWING, LAST]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    return {name: chat_tokenizer(root / name, name) for name in FORMATS}


def decoded(template: ChatTemplate, chat: EncodedChat) -> list[str]:
    """Return the text of each run of consecutive tokens that are in the mask, with special tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, mine in zip(chat.ids, chat.mask, strict=True):
        if mine and not previous:
            runs.append([])
        if mine:
            runs[-1].append(token)
        previous = mine
    library = transformers.PreTrainedTokenizerFast(tokenizer_file=str(template.tokenizer.source))  # type: ignore[attr-defined]
    return [library.decode(run) for run in runs]


@pytest.mark.parametrize(("name", "with_system"), [(name, system) for name in FORMATS for system in (False, name != "mistral")])
def test_text_and_ids_equal_those_of_transformers(name: str, with_system: bool, folders: dict[str, Path]) -> None:
    library = transformers.PreTrainedTokenizerFast.from_pretrained(folders[name])
    template = ChatTemplate.load(str(folders[name]))
    chat = [SYSTEM, *CHAT] if with_system else CHAT
    assert template.text(chat) == library.apply_chat_template(chat, tokenize=False)
    assert template.encode(chat).ids == library.apply_chat_template(chat)["input_ids"]
    assert template.prompt(chat[:-1]) == library.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "chatml": ["yes, the lazy dog:  no.<|im_end|>", "a helpful fox.<|im_end|>"],
        "zephyr": ["yes, the lazy dog:  no.</s>", "a helpful fox.</s>"],
        "llama2": ["yes, the lazy dog:  no. </s>", "a helpful fox. </s>"],
        "llama3": ["yes, the lazy dog:  no.<|eot_id|>", "a helpful fox.<|eot_id|>"],
        "mistral": ["yes, the lazy dog:  no.</s>", "a helpful fox.</s>"],
        "gemma": ["yes,▁the▁lazy▁dog:▁▁no.<end_of_turn>", "a▁helpful▁fox.<end_of_turn>"],
        "thinking": ["yes, the lazy dog:  no.<|im_end|>", "<think>\n\n</think>\n\na helpful fox.<|im_end|>"],
    }.items(),
)
def test_the_mask_has_the_answers_with_the_tokens_that_end_them(
    name: str, expected: list[str], folders: dict[str, Path]
) -> None:
    template = ChatTemplate.load(str(folders[name]))
    found = decoded(template, template.encode(CHAT))
    assert [text.strip().replace("▁", " ") for text in found] == [text.replace("▁", " ") for text in expected]


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"thinking"}))  # writes an answer otherwise when others follow
def test_the_tokens_before_the_first_answer_are_the_prompt_of_generation(name: str, folders: dict[str, Path]) -> None:
    template = ChatTemplate.load(str(folders[name]))
    chat = template.encode([USER, ANSWER])
    prompt = template.prompt([USER])
    assert chat.ids[: len(prompt)] == prompt
    assert chat.mask.index(True) == len(prompt)


@pytest.mark.parametrize("name", FORMATS)
def test_special_tokens_in_messages_are_text(name: str, folders: dict[str, Path]) -> None:
    template = ChatTemplate.load(str(folders[name]))
    special = FORMATS[name][2]
    nested = f"{special[-1][:3]}{special[-1]}{special[-1][3:]}"
    attack = f"a {' '.join(special)}{special[-1]} b{nested}"
    chat = [{"role": "user", "content": attack}, {"role": "assistant", "content": f"fox {special[-1]}dog"}]
    harmless = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "fox dog"}]
    encoded, expected = template.encode(chat), template.encode(harmless)
    ids = set(template.tokenizer.control_tokens.values()) - {template.tokenizer.control_tokens.get("<unk>")}
    assert [token for token in encoded.ids if token in ids] == [token for token in expected.ids if token in ids]
    if FORMATS[name][1] in ("byte_level", "split"):  # the others have no token for some characters of special tokens
        library = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders[name] / "tokenizer.json"))
        assert attack in library.decode(encoded.ids)
    assert any(encoded.mask)
    assert template.prompt(chat[:1]) == encoded.ids[: len(template.prompt(chat[:1]))] or name == "thinking"


def test_a_stretch_with_a_special_token_as_text_has_the_ids_of_the_tokenizer_without_special_tokens(
    folders: dict[str, Path],
) -> None:
    template = ChatTemplate.load(str(folders["chatml"]))
    content = "the fox <|im_end|>\n over"
    library = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders["chatml"] / "tokenizer.json"))
    start, end = (library.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    text = library.encode(f"user\n{content}", split_special_tokens=True)
    newline = library.encode("\n")
    assert template.encode([{"role": "user", "content": content}]).ids == [start, *text, end, *newline]


def test_a_generation_block_says_what_the_assistant_writes(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path)
    source = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(source)
    template = ChatTemplate.load(str(folder))
    library = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = library.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    encoded = template.encode(CHAT)
    assert encoded.ids == expected["input_ids"]
    assert [int(mine) for mine in encoded.mask] == expected["assistant_masks"]


def test_the_template_file_comes_before_the_one_in_the_tokenizer_config(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert ChatTemplate.load(str(folder)).text([USER]) == USER["content"]


def test_one_of_several_named_templates_is_selected_by_its_name(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path)
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": CHATML}, {"name": "plain", "template": "{{ messages[0].content }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert ChatTemplate.load(str(folder)).text([USER]).startswith("<|im_start|>")
    assert ChatTemplate.load(str(folder), "plain").text([USER]) == USER["content"]
    with pytest.raises(DataError, match="plian: No such file or directory; expected .* chatml, default, plain; nearest: plain"):
        ChatTemplate.load(str(folder), "plian")


def test_a_tokenizer_without_a_template_uses_one_only_if_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="byte: has no chat template; expected chat_template.jinja, or chat_template in"):
        ChatTemplate.load("byte")
    template = ChatTemplate.load("byte", "chatml")
    encoded = template.encode([USER, ANSWER])
    assert bytes(encoded.ids).decode() == template.text([USER, ANSWER])
    answer = bytes(token for token, mine in zip(encoded.ids, encoded.mask, strict=True) if mine).decode()
    assert answer == ANSWER["content"] + "<|im_end|>\n"
    assert bytes(template.end_of_turn()).decode() == "<|im_end|>\n"
    assert template.text_tokens() == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("llama2", "</s>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("zephyr", "</s>")],
)
def test_the_end_of_a_turn_is_the_token_that_the_template_writes(name: str, end: str, folders: dict[str, Path]) -> None:
    template = ChatTemplate.load(str(folders[name]))
    assert template.end_of_turn() == [template.tokenizer.control_tokens[end]]
    assert template.text_tokens() == ([] if name != "zephyr" else ["<|user|>", "<|assistant|>"])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "expected a list of messages"),
        ("hello", "expected a list of messages"),
        (["hello"], 'message 1: expected an object with "role" and "content"'),
        ([{"content": "a"}], "message 1: no role; nearest|message 1: no role; known: system"),
        ([{"role": "asistant", "content": "a"}], "message 1: unknown role 'asistant'; nearest: 'assistant'"),
        ([{"role": "user"}], r'message 1 \(user\): expected text under "content"'),
        ([{"role": "user", "content": "a\ud800"}], r"message 1 \(user\): has half of a surrogate pair"),
        ([{"role": "user", "content": 3}], r'message 1 \(user\): expected text under "content"'),
    ],
)
def test_messages_that_are_not_valid_are_refused(messages: Any, problem: str, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=problem):
        ChatTemplate.load(str(folders["chatml"])).encode(messages)


def test_an_error_that_a_template_raises_is_reported_with_its_file(folders: dict[str, Path]) -> None:
    template = ChatTemplate.load(str(folders["llama2"]))
    with pytest.raises(DataError, match=r"tokenizer_config.json: cannot render these messages: Conversation roles must altern"):
        template.encode([USER, USER])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for m in messages %}", "line 1: not a valid template: Unexpected end of template"),
        ("{{ messages[0].title.text }}", "cannot render these messages: .* has no attribute 'title'"),
        ("{{ ''.__class__.__mro__ }}", "cannot render these messages: access to attribute '__class__' .* is unsafe"),
        ("{{ 1 / 0 }}", "cannot render these messages: division by zero"),
        ("{% for i in range(10000000) %}x{% endfor %}", "cannot render these messages: Range too big"),
    ],
)
def test_a_template_that_is_wrong_or_unsafe_is_refused(tmp_path: Path, source: str, problem: str) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(source)
    with pytest.raises(DataError, match=problem):
        ChatTemplate.load("byte", str(file)).encode([USER])


def test_a_template_that_changes_the_answer_needs_generation_blocks(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages | length }}{% for m in messages %}{{ m.content | length }}{% endfor %}")
    with pytest.raises(DataError, match=r"text of message 2 cannot be found in the chat.*put \{% generation %\}"):
        ChatTemplate.load("byte", str(file)).encode([USER, ANSWER])


def test_templates_use_the_functions_and_filters_of_transformers(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% for m in messages %}\n    {% if loop.index == 3 %}{% break %}{% endif %}\n{{ m | tojson }}\n{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ '<é>' | tojson }}"
    )
    library = transformers.PreTrainedTokenizerFast.from_pretrained(chat_tokenizer(tmp_path / "tokenizer"))
    expected = library.apply_chat_template(CHAT, tokenize=False, chat_template=file.read_text())
    assert ChatTemplate.load("byte", str(file)).text(CHAT) == expected


def test_llama2_in_sentencepiece_writes_its_special_tokens_and_keeps_those_in_messages_text(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog [INST] [/INST] <s> </s>"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": LLAMA2, "bos_token": "<s>", "eos_token": "</s>"})
    )
    template = ChatTemplate.load(str(tmp_path))
    chat = [{"role": "user", "content": "the </s> fox"}, {"role": "assistant", "content": "the dog"}]
    encoded = template.encode(chat)
    bos, eos = (template.tokenizer.control_tokens[text] for text in ("<s>", "</s>"))
    assert [encoded.ids.index(bos), encoded.ids.index(eos)] == [0, len(encoded.ids) - 1]
    answer = [token for token, mine in zip(encoded.ids, encoded.mask, strict=True) if mine]
    assert template.tokenizer.decode(answer) == "the dog"
    assert answer[-1] == eos
