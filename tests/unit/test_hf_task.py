"""`--task hf`: from records to rows of tokens, and what the model sees of them."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config import TrainConfig
from harness.data import Loader, Task
from harness.errors import ConfigError, DataError
from harness.tasks.hf.encode import Encoded, Encoder
from harness.tasks.hf.mixture import _counts
from harness.tasks.hf.model import add_adapters, check_documents_apart, load_model
from harness.tasks.hf.packing import pack, prepare_rows
from harness.tasks.hf.readers import identity, records
from harness.tasks.hf.settings import LoraSettings, ModelSettings, SourceSettings, TokenizerSettings
from harness.tasks.hf.store import _batches, prepare_tokens
from harness.tasks.hf.tokenizer import load_tokenizer
from harness.training.tasks import build_task
from tests.support.hf import MODELS, chats, hf_config

SEGMENTS = [(0, 5), (10, 9), (20, 3), (30, 2), (40, 8), (50, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    return hf_config(folder)


@pytest.fixture(scope="module")
def task(config: TrainConfig) -> Task:
    return build_task(config)


@pytest.fixture(scope="module")
def tokenizer(folder: Path, task: Task) -> Any:
    (made,) = (path for path in (folder / "cache").glob("tokenizer-*") if path.is_dir())
    return load_tokenizer(
        TokenizerSettings(name=str(made)), ModelSettings(name="x"), (), cache_dir=folder / "cache"
    )


def documents(batch: dict[str, torch.Tensor], row: int) -> list[slice]:
    """The stretches of a row, padding included, each of which has positions of its own."""
    starts = torch.nonzero(batch["position_ids"][row] == 0).flatten().tolist()
    return [slice(*ends) for ends in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.parametrize("packing", ["whole", "cut", "off"])
def test_every_token_of_every_segment_is_packed_once(packing: Any) -> None:
    rows = list(pack(SEGMENTS, length=10, packing=packing))
    assert all(sum(count for _, count in row) <= 10 for row in rows)
    tokens = Counter(start + place for row in rows for start, count in row for place in range(count))
    assert tokens == Counter(start + place for start, count in SEGMENTS for place in range(count))
    if packing != "cut":
        assert sorted(segment for row in rows for segment in row) == SEGMENTS
    assert len(rows) == {"whole": 3, "cut": 3, "off": 6}[packing]


def test_packing_cut_cuts_where_a_row_ends_and_nowhere_else(tmp_path: Path) -> None:
    counted = np.ones(70, dtype=np.bool_)
    counted[36:] = False  # all but the first targets of the last document
    documents = [Encoded([1] * 8, None, 8), Encoded([2] * 26, None, 26), Encoded([3] * 36, counted[34:], 36)]
    store = prepare_tokens(
        [], [{}], lambda batch, first: iter(documents), vocab_size=9, cache_dir=tmp_path, label="x"
    )  # fmt: skip
    train, _ = prepare_rows(store, length=10, packing="cut", use="train", val_frac=0.0)
    rows = [train[row].tolist() for row in range(len(train))]
    assert rows == [[[0, 7], [8, 3]], [[11, 10]], [[21, 10]], [[31, 2], [34, 8]]]


def test_few_long_records_are_tokenised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.tasks.hf.store._BATCH_CHARS", 10)
    records = [{"text": "a" * count} for count in (4, 4, 4, 30, *[0] * 300, 1)]
    batches = list(_batches(records))
    assert [record for batch in batches for record in batch] == records
    assert [len(batch) for batch in batches] == [3, 1, 256, 45]


@pytest.mark.parametrize("model", MODELS)
def test_a_packed_document_is_seen_as_it_is_alone(task: Task, model: str) -> None:
    torch.manual_seed(0)
    network = load_model(ModelSettings(config={**MODELS[model], "vocab_size": 280})).eval()
    size = len(task.train_data)
    batch = task.train_data.__getitems__([0, size - 3, size - 2, size - 1])  # type: ignore[attr-defined]
    packed = network(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    pieces = [(row, piece) for row in range(4) for piece in documents(batch, row)]
    assert len(pieces) > 6
    for row, piece in pieces:
        alone = network(input_ids=batch["input_ids"][row : row + 1, piece]).logits
        torch.testing.assert_close(packed[row, piece], alone[0], rtol=1e-5, atol=1e-6)


def test_a_model_that_sees_earlier_documents_is_refused() -> None:
    network = load_model(ModelSettings(config={**MODELS["llama"], "vocab_size": 280}))
    check_documents_apart(network, length=32)
    blind = type("Blind", (torch.nn.Module,), {})()
    blind.network = network
    blind.forward = lambda position_ids, **inputs: network(**inputs)
    with pytest.raises(ConfigError, match=r"sees earlier documents.*packing off"):
        check_documents_apart(blind, length=32)


# Of transformers' own, where peft asks a model about it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_saved_model_is_trained_with_its_dropout_and_gradient_checkpointing(
    tmp_path: Path, rank: int
) -> None:
    fields = {**MODELS["llama"], "vocab_size": 280, "attention_dropout": 0.5}
    load_model(ModelSettings(config=fields)).save_pretrained(tmp_path)
    settings = ModelSettings(name=str(tmp_path), gradient_checkpointing=True, attention="eager")
    network = add_adapters(load_model(settings), LoraSettings(r=rank))
    assert all(module.training for module in network.modules())
    runs: list[int] = []
    layer = next(module for name, module in network.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    tokens = torch.arange(8)[None]
    one, other = (network(input_ids=tokens, use_cache=False).logits for _ in range(2))
    assert not torch.equal(one, other)
    one.sum().backward()
    assert len(runs) == 3  # once more in the backward pass


QWEN_LIKE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", ["marked", "qwen-like"])
def test_of_a_chat_the_answers_alone_count(folder: Path, tokenizer: Any, template: str) -> None:
    source = SourceSettings(path=str(chats(folder / "more.jsonl", count=3)))
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = own if template == "marked" else QWEN_LIKE
        encoded = list(Encoder(tokenizer, source, answers_only=True)(list(records(source)), first=0))
        every = list(Encoder(tokenizer, source, answers_only=False)(list(records(source)), first=0))
    finally:
        tokenizer.chat_template = own
    end, thoughts = ("<|end|>", "") if template == "marked" else ("<|end|>\n", "<think></think>")
    for number, document in enumerate(encoded):
        assert document.counted is not None
        said = tokenizer.decode(np.array(document.tokens)[document.counted])
        assert said == f"answer {number}{end}{thoughts}yes{end}"
        assert every[number].tokens == document.tokens
        assert every[number].counted is None


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "what is the time"},
        CALL,
        {"role": "tool", "content": "<tool_call>clock</tool_call><|end|>\n"},  # a quotation
        CALL,
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "noon"},
    ],
    "tools": json.dumps([{"type": "function", "function": {"name": "clock"}}]),
}
MARKED = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}<|end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", ["qwen-like", "marked"])
def test_of_a_chat_with_tools_the_calls_and_answers_count(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", QWEN_LIKE if template == "qwen-like" else MARKED)
    (document,) = Encoder(tokenizer, SourceSettings(path="x"), answers_only=True)([WITH_TOOLS], first=0)
    said = tokenizer.decode(np.array(document.tokens)[document.counted])
    call = "<tool_call>clock</tool_call><|end|>\n"
    thoughts = "<think></think>" if template == "qwen-like" else ""
    assert said == f"{call}{call}{thoughts}noon<|end|>\n"


def test_an_answer_that_stands_otherwise_in_the_midst_of_a_chat_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = QWEN_LIKE.replace("<|end|>", "{{ '<|last|>' if loop.last else '<|next|>' }}")
    monkeypatch.setattr(tokenizer, "chat_template", changed)
    with pytest.raises(DataError, match="an answer of the source x cannot be found"):
        list(Encoder(tokenizer, SourceSettings(path="x"), answers_only=True)([WITH_TOOLS], first=0))


def test_of_a_pair_the_completion_alone_counts(tokenizer: Any) -> None:
    source = SourceSettings(path="x")
    pairs = [{"prompt": "what ", "completion": "this"}, {"prompt": [{"role": "user", "content": "a"}],
             "completion": [{"role": "assistant", "content": "bc"}]}]  # fmt: skip
    for pair, counted in zip(pairs, ("this<|end|>", "bc<|end|>"), strict=True):
        (document,) = Encoder(tokenizer, source, answers_only=True)([pair], first=0)
        assert tokenizer.decode(np.array(document.tokens)[document.counted]) == counted


def test_targets_follow_their_inputs_and_end_with_the_document(task: Task, tokenizer: Any) -> None:
    batch = task.train_data.__getitems__(list(range(len(task.train_data))))  # type: ignore[attr-defined]
    seen = 0
    for row in range(len(batch["source"])):
        for piece in documents(batch, row):
            inputs, targets = batch["input_ids"][row, piece], batch["targets"][row, piece]
            counted = targets[:-1] != -100
            assert torch.equal(targets[:-1][counted], inputs[1:][counted])
            seen += int(counted.sum())
    assert seen > 1000


def test_the_order_is_the_same_at_any_world_size_and_after_a_resume(task: Task) -> None:
    def steps(world_size: int, count: int, position: int = 0) -> list[torch.Tensor]:
        loaders = [
            Loader(task.train_data, global_batch=8, micro_batch=2, rank=rank, world_size=world_size, seed=3)
            for rank in range(world_size)
        ]
        for loader in loaders:
            loader.load_state_dict({**loader.state_dict(), "position": position})
        return [
            torch.cat([batch["input_ids"] for loader in loaders for batch in loader.next()])
            for _ in range(count)
        ]

    whole = steps(1, 12)
    for step, rows in enumerate(steps(2, 12)):
        assert torch.equal(rows, whole[step])
    for step, rows in enumerate(steps(4, 4, position=8 * 8), start=8):
        assert torch.equal(rows, whole[step])


def test_a_mixture_shows_every_row_at_the_shares_that_were_asked_for() -> None:
    assert _counts([(7, 0.0), (3, 0.0)]) == [7, 3]
    assert _counts([(70, 1.0), (30, 1.0)]) == [70, 70]
    assert _counts([(10, 0.9), (10, 0.1)]) == [90, 10]
    assert _counts([(3, 3.0), (1, 1.0)]) == [3, 1]


def test_weights_are_shares_of_the_samples(folder: Path, config: TrainConfig) -> None:
    sources = [
        {**source, "weight": weight}
        for source, weight in zip(config.task_args["sources"], (3, 1), strict=True)
    ]
    mixed = build_task(hf_config(folder, sources=sources)).train_data
    batch = mixed.__getitems__(list(range(len(mixed))))  # type: ignore[attr-defined]
    counts = torch.bincount(batch["source"]).tolist()
    assert counts[0] == pytest.approx(3 * counts[1], abs=3)
    rows = {tuple(row) for row in batch["input_ids"].tolist()}
    plain = build_task(config).train_data
    assert rows == {tuple(plain[index]["input_ids"].tolist()) for index in range(len(plain))}


def test_each_source_has_a_loss_of_its_own(task: Task) -> None:
    batch = task.val_data.__getitems__(list(range(len(task.val_data))))  # type: ignore[attr-defined]
    with torch.no_grad():
        loss = task.loss(task.model, batch)
    assert task.parts == ("text", "chat")
    assert loss.by_part is not None
    total, count = loss.by_part.sum(0).tolist()
    assert count == loss.count == (batch["targets"] != -100).sum()
    assert total == pytest.approx(float(loss.total), rel=1e-5)
    assert (loss.by_part[:, 1] > 0).all()


def test_data_is_prepared_once_and_goes_to_workers_by_name(
    config: TrainConfig, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.tasks.hf.store._encoded", None)  # a second preparation would call it
    again = build_task(config)
    assert again.train_data.fingerprint() == task.train_data.fingerprint()  # type: ignore[attr-defined]
    sent = pickle.dumps(again.val_data)
    assert torch.equal(pickle.loads(sent)[0]["targets"], task.val_data[0]["targets"])


def test_parquet_and_saved_datasets_give_the_records_of_jsonl(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="of the extra hf")
    lines = list(records(SourceSettings(path=str(chats(tmp_path / "a.jsonl", count=5)))))
    data = datasets.Dataset.from_list(lines)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    for path in ("a.parquet", "saved"):
        assert list(records(SourceSettings(path=str(tmp_path / path)))) == lines
    assert list(records(SourceSettings(path=str(tmp_path / "saved"), limit=2))) == lines[:2]


def test_of_saved_datasets_the_split_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="of the extra hf")
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    sources = {name: SourceSettings(path=str(tmp_path / "saved"), split=name) for name in (*parts, "dev")}
    for name in parts:
        assert list(records(sources[name])) == [{"text": name}]
    assert identity(sources["train"]) != identity(sources["test"])
    for asked in (identity, lambda source: list(records(source))):
        with pytest.raises(DataError, match=r"no split 'dev'.*test, train"):
            asked(sources["dev"])


def test_a_folder_gives_its_texts_and_tables_and_a_file_that_is_neither_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    chats(folder / "b.jsonl", count=2)
    (folder / "c.png").write_bytes(b"\x89PNG\0\0")
    (folder / "d.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd without a zero")
    read = list(records(SourceSettings(path=str(folder))))
    assert [sorted(record) for record in read] == [["text"], ["messages"], ["messages"]]
    (warning,) = caplog.messages
    assert re.search(r"2 files.*c\.png, .*d\.jsonl\.zst", warning)
    for name in ("c.png", "d.jsonl.zst"):
        with pytest.raises(DataError, match=f"nothing to read in .*{name}"):
            list(records(SourceSettings(path=str(folder / name))))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"txt": "a"}, r"record 7 of the source x: it has the columns \['txt'\]"),
        ({"text": 3}, "text is a int"),
        ({"prompt": "a"}, "no completion beside prompt"),
        ({"messages": [{"content": "no role"}]}, "a message has no role"),
    ],
)
def test_a_record_that_is_no_document_is_named(tokenizer: Any, record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(Encoder(tokenizer, SourceSettings(path="x"), answers_only=True)([record], first=7))


# Of transformers' own, where peft asks a model about it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model_settings": {"revision": "x"}}, "either loaded by its name or made from a config"),
        ({"model_settings": {"config": {"model_type": "lama"}}}, r"cannot be made.*lama"),
        (
            {"model_settings": {"name": "/nowhere/at/all"}, "tokenizer": {}},
            "tokenizer '/nowhere/at/all' cannot be loaded",
        ),
        (
            {"model_settings": {"config": MODELS["llama"], "attention": "flash_attention_2"}},
            r"packing is whole.*flash_attention_2.*packing off",
        ),
        (
            {
                "model_settings": {"config": MODELS["llama"], "attention": "flash_attention_2"},
                "packing": "off",
            },
            r"flash_attention_2 cannot be made.*[Ii]nstall flash-attn",
        ),
        ({"packing": "tight"}, r"task_args\.packing.*tight"),
        ({"lora": {"rank": 8}}, r"unknown key 'lora\.rank' in task_args"),
        ({"lora": {"r": 4, "targets": ["nothing"]}}, "adapters cannot be added"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_task(hf_config(folder, **more))
